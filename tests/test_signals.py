"""Signals end a command, with what it made saved; tried on processes of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from ladders import save
from processes import config_of, start, wait_for
from tiny import some_ddpm

from ddim_pl import signals

ROOT = Path(__file__).parents[1]
NAMES = ["SIGINT", "SIGTERM", "SIGHUP"]


@pytest.fixture
def not_ignored():
    """Signals as in a terminal; a test run in the background may be told to ignore them."""
    before = {each: signal.signal(each, signal.default_int_handler) for each in signals.HANDLED}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_signal_saves_the_last_update_says_so_and_gives_its_exit_status(
    tmp_path, name, not_ignored
):
    process = start(tmp_path, "fit", "--config", config_of(tmp_path))
    last = tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    wait_for(last.exists, process)
    before = torch.load(last, weights_only=True)["global_step"]
    process.send_signal(signal.Signals[name])
    process.send_signal(signal.Signals[name])  # at once: it is taken for the same
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + signal.Signals[name]
    after = torch.load(last, weights_only=True)["global_step"]
    assert after >= before
    assert f"update {after} is saved in" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_signal_ends_a_command_that_has_nothing_to_save(tmp_path, not_ignored):
    model = some_ddpm()
    path = tmp_path / "model.ckpt"
    save(model, path)
    checkpoint = torch.load(path, weights_only=True)
    config = yaml.safe_load(Path(config_of(tmp_path)).read_text())
    checkpoint["ddim_pl_config"] = yaml.safe_dump(config)
    torch.save(checkpoint, path)
    folder = tmp_path / "images"
    arguments = ["sample", "--ckpt_path", path, "--num_images", 100_000, "--output", folder]
    process = start(tmp_path, *arguments)
    wait_for((folder / "manifest.json").exists, process)
    process.terminate()
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 143
    assert "Traceback" not in error


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received() is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_raises_at_once_or_when_it_is_let(name, not_ignored):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop, signals.handled():
        os.kill(os.getpid(), number)
    assert stop.value.code == 128 + number
    made, sent = [], []

    def work():
        signals.defer(sent.append)
        os.kill(os.getpid(), number)
        made.append(signals.received())
        signals.undefer()
        made.append("more")

    with pytest.raises(signals.Interrupted) as stop, signals.handled():
        work()
    assert stop.value.code == 128 + number
    assert made == sent == [number]
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal, time\n"
        "from ddim_pl import signals\n"
        "with signals.handled():\n"
        "    signals.defer()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(2 * signals.SAME)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, capture_output=True)
    assert done.returncode == 143
    assert b"SIGTERM: stopping after this update" in done.stderr
