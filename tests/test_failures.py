"""What a run needs dies or is full: it ends with one line, without a hang or a broken file."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from processes import config_of, start, wait_for
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem
from tiny import tiny_config, write_config
from torch.utils.data import get_worker_info

from ddim_pl.cli import main
from ddim_pl.data.base import TensorImages
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.files import check_writable

WITHIN = 60
"""Seconds in which all processes of a run must have ended."""


class _Images(TensorImages):
    def images(self, indices):
        if get_worker_info() is not None and self.fails:
            if self.fails == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("face.jpg cannot be read (it is cut off): replace or remove it")
        return super().images(indices)


class Failing(DigitsDataModule):
    """Its training images fail in the process that loads them."""

    def __init__(self, how: str, **kwargs) -> None:
        super().__init__(**kwargs)
        self.how = how

    def load(self, train):
        found = super().load(train)
        every = torch.arange(len(found))
        images = _Images(found.images(every), found.labels(every), found.num_classes)
        images.fails = self.how if train else None
        return images


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("dies", "a process that loads data has died (DataLoader worker"),
        ("raises", "face.jpg cannot be read (it is cut off): replace or remove it"),
    ],
)
def test_a_process_that_loads_data_fails(tmp_path, how, message):
    config = tiny_config(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[])
    config["data"] = {
        "class_path": "test_failures.Failing",
        "init_args": {"how": how, "batch_size": 8, "num_workers": 1},
    }
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", write_config(config, tmp_path / "config.yaml")])
    assert stop.value.code.startswith(f"error: {message}")
    assert "\n" not in stop.value.code


def _child(process) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ours = [pid for pid in children if b"main.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    (pid,) = ours
    return int(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["first", "second"])
def test_when_a_rank_is_killed_the_other_ends_and_the_run_goes_on_from_its_checkpoint(
    tmp_path, dies
):
    config = config_of(tmp_path)
    process = start(tmp_path, "fit", "--config", config, "--trainer.devices", 2)
    last = tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    wait_for(last.exists, process)
    other = _child(process)
    os.kill(process.pid if dies == "first" else other, signal.SIGKILL)
    end = time.monotonic() + WITHIN
    while process.poll() is None or _runs(other):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert process.returncode != 0
    error = process.communicate()[1]
    assert "Traceback" not in error
    told = "another process of this run has ended", "the process that started this one has died"
    assert any(text in error for text in told) or "terminated with code -9" in error
    saved = torch.load(last, weights_only=True)["global_step"]
    again = ["--ckpt_path", last, "--trainer.max_steps", saved + 3, "--trainer.devices", 2]
    resumed = start(tmp_path, "fit", "--config", config, *again)
    error = resumed.communicate(timeout=240)[1]
    assert resumed.returncode == 0, error
    assert torch.load(last, weights_only=True)["global_step"] == saved + 3


def test_a_disk_that_is_full_in_a_thread_of_tensorboard_is_one_line(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path, max_epochs=1, limit_val_batches=0)
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][-1:]
    path = write_config(config, tmp_path / "config.yaml")
    main(["fit", "--config", path])
    last = tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt"

    def full(self, filename, *arguments):
        raise OSError(28, "No space left on device", filename)

    monkeypatch.setattr(LocalFileSystem, "_write", full)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["test", "--config", path, "--ckpt_path", str(last)])
    assert str(stop.value.code).startswith(f"error: {tmp_path}/tiny/version_0/events.out")
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    def denied(**place):
        raise PermissionError(13, "Permission denied", str(place["dir"]))

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    message = (
        r"output must be in a folder that can be written to, got .*/new \(permission denied\)"
    )
    with pytest.raises(ValueError, match=message):
        check_writable("output", tmp_path / "new")
