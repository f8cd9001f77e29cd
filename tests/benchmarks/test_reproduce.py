"""Stages run after those they need, once, and go on after a kill; the page stays the same."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import reproduce
import yaml
from claim_stages import Maker, Stage
from measuring import ROOT
from reproduce import Runner, alone, publish, seconds_of
from studies import cifar10

from benchmarks.stages_here import Here, RunnerHere
from benchmarks.tiny_study import TINY
from ddim_pl.cli import main

APPEND = (
    "import sys, pathlib; file = pathlib.Path(sys.argv[1]); file.parent.mkdir(exist_ok=True);"
    "open(file, 'a').write(sys.argv[2])"
)


def writes(out, name, text, needs=(), goes_on=False, code=APPEND):
    """A stage that appends a text to a file, and finds what is there."""
    folder = out / "stages" / name
    command = ("-c", code, str(folder / "file"), text)
    read = (folder / "file").read_text
    return Stage(name, (command,), read, tuple(needs), folder, goes_on)


def run(out, stages, jobs=1, deadline=float("inf")):
    """What is found, what failed, and the order in which stages ended."""
    order, last = [], ({}, [])

    def after(done, failed):
        nonlocal last
        last = dict(done), list(failed)
        order.extend(name for name in [*done, *failed] if name not in order)

    Runner(out, jobs).run(stages, deadline, after)
    return {name: each["found"] for name, each in last[0].items()}, last[1], order


def test_stages_run_after_those_they_need_and_once(tmp_path):
    stages = [writes(tmp_path, "b", "b", ["a"]), writes(tmp_path, "a", "a")]
    found, failed, order = run(tmp_path, stages)
    assert (found, failed, order) == ({"a": "a", "b": "b"}, [], ["a", "b"])
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert run(tmp_path, stages) == ({}, [], [])  # nothing was called, nothing ended
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert {n: r["found"] for n, r in Runner(tmp_path, 1).results(stages).items()} == found


def test_two_stages_run_at_a_time(tmp_path):
    """Each waits for what the other writes, and would not end alone."""
    wait = (
        "import sys, time, pathlib\n"
        "pathlib.Path(sys.argv[1]).parent.mkdir(exist_ok=True)\n"
        "pathlib.Path(sys.argv[1]).write_text('here')\n"
        "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.01)"
    )
    pair = [tmp_path / "stages" / name / "file" for name in ("a", "b")]
    stages = [
        writes(tmp_path, name, str(other), code=wait)
        for name, other in zip("ab", reversed(pair), strict=True)
    ]
    assert run(tmp_path, stages, jobs=2)[0] == {"a": "here", "b": "here"}


@pytest.mark.parametrize(("goes_on", "left"), [(True, "partwhole"), (False, "whole")])
def test_a_killed_stage_begins_anew_or_goes_on(tmp_path, goes_on, left):
    """A sweep finds its cells again; what cannot use them does not."""
    kill = f"{APPEND}; import os; os.kill(os.getpid(), 9)"
    other = writes(tmp_path, "other", "fine")
    killed = writes(tmp_path, "a", "part", goes_on=goes_on, code=kill)
    after = writes(tmp_path, "b", "b", ["a"])
    found, failed, _ = run(tmp_path, [killed, after, other])
    assert found == {"other": "fine"}  # the others go on, those after it do not begin
    assert failed == ["a"]
    again = writes(tmp_path, "a", "whole", goes_on=goes_on)
    found, failed, order = run(tmp_path, [again, after, other])
    assert found["a"] == left
    assert (failed, order) == ([], ["other", "a", "b"])


def test_a_fit_goes_on_from_its_last_checkpoint(tmp_path):
    run = tmp_path / "version_0"
    last = run / "checkpoints" / "last.ckpt"
    stage = Stage("a", (("main.py", "fit"),), dict, (), run, goes_on=True, run=run)
    begin = (("main.py", "fit", "--trainer.logger.init_args.version=0"),)
    assert stage.prepare() == begin
    run.mkdir()
    (run / "config.yaml").touch()  # of a fit that was killed before its first checkpoint
    assert stage.prepare() == begin
    assert not run.exists()
    last.parent.mkdir(parents=True)
    last.touch()
    assert stage.prepare() == (("main.py", "fit", f"--ckpt_path={last}"),)
    assert last.exists()


def test_no_stage_begins_after_the_budget(tmp_path):
    stages = [writes(tmp_path, "a", "a")]
    assert run(tmp_path, stages, deadline=time.monotonic()) == ({}, [], [])
    assert not (tmp_path / "stages").exists()
    assert run(tmp_path, stages)[0] == {"a": "a"}


SAVES = """
import signal, sys, time, pathlib
last = pathlib.Path(sys.argv[1], "checkpoints", "last.ckpt")
def save(*_):
    last.touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
last.parent.mkdir(parents=True, exist_ok=True)
last.with_name("begun").touch()
time.sleep(0 if f"--ckpt_path={last}" in sys.argv else 60)
"""


def test_a_fit_is_stopped_at_the_deadline_and_gone_on_with(tmp_path):
    folder = tmp_path / "runs" / "fit"
    command = ("-c", SAVES, str(folder))
    fit = Stage("fit", (command,), dict, (), folder, goes_on=True, run=folder)
    other = writes(tmp_path, "after", "a", ["fit"])
    runner, ended = Runner(tmp_path, 1), []
    thread = threading.Thread(
        target=runner.run,
        args=(
            [fit, other],
            time.monotonic() + 3,
            lambda done, failed: ended.append((dict(done), failed)),
        ),
    )
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert ended == [({}, [])]  # the page is written; neither done nor failed
    assert (folder / "checkpoints" / "last.ckpt").exists()
    found, failed, order = run(tmp_path, [fit, other])
    assert (found, failed, order) == ({"fit": {}, "after": "a"}, [], ["fit", "after"])


def test_the_study_of_cifar10_is_of_a_folder(tmp_path, capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(reproduce, "reproduce", lambda *given: kept.append(given) or 0)
    monkeypatch.chdir(tmp_path)
    given = ["cifar10", "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert reproduce.main([*given, "--images", "128000"]) == 0
    study, seeds, *_, claims = kept[0]
    assert claims == [*range(1, 11)]
    assert (study.name, seeds) == ("cifar10", [0])
    assert "--trainer.max_epochs=2" in study.fits["teacher"].options
    assert f"--data.root={tmp_path}" in study.fits["ladder"].options
    for wrong, message in (
        (["cifar10"], "--root must be the folder"),
        (["cifar10", "--root", "nowhere"], "got nowhere"),
        ([*given, "--images", "9"], "at least 64000"),
        (["digits", "--root", str(tmp_path)], "--root must be left out for digits"),
    ):
        with pytest.raises(SystemExit):
            reproduce.main(wrong)
        assert message in capsys.readouterr().err


def test_every_fit_on_cifar10_can_be_made(tmp_path, capsys):
    for number in range(10):
        (tmp_path / "images" / str(number)).mkdir(parents=True)
    study = cifar10(str(tmp_path / "images"), 1_000_000)
    for name, fit in study.fits.items():
        (command,) = Maker(study, 0, tmp_path).fit(name, fit).commands
        with pytest.raises(SystemExit) as stop:
            main([*command[1:], "--print_config"])
        captured = capsys.readouterr()
        assert not stop.value.code, (name, captured.err)
        shown = yaml.safe_load(captured.out)
        data = shown["data"]["init_args"]
        data = data["images"]["init_args"] if fit.pairs else data
        assert data["root"] == str(tmp_path / "images"), name
        noise = shown["model"]["init_args"].get("noise") or {}
        assert (noise.get("init_args") or {}).get("theta_0") == (
            float(name.removeprefix("gamma-")) if name.startswith("gamma-0") else None
        )


def test_results_of_other_commands_are_refused(tmp_path):
    run(tmp_path, [writes(tmp_path, "a", "a")])
    with pytest.raises(ValueError, match=r"a\.json of other commands: give another folder"):
        run(tmp_path, [writes(tmp_path, "a", "another")])


@pytest.mark.parametrize(("text", "seconds"), [("45s", 45), ("90m", 5400), ("1.5h", 5400)])
def test_a_budget_is_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["3", "h", "3 h", "-1h", "3d"])
def test_a_budget_without_a_unit_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="budget must be a number with s, m or h"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seeds", "1", "1"], "distinct"), (["--jobs", "0"], "at least 1"), (["mnist"], "digits")],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        reproduce.main(arguments)
    assert message in capsys.readouterr().err


SLEEPS = """
import os, sys
from pathlib import Path
import reproduce
from claim_stages import Stage
folder = Path(sys.argv[1])
code = (
    "import os, sys, time; os.makedirs(os.path.dirname(sys.argv[1]));"
    "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
)
stage = Stage("a", (("-c", code, str(folder / "stages" / "pid")),), dict, (), folder / "stages")
def wait(study, seeds, runner, budget, claims):
    runner.run([stage], float("inf"), print)
reproduce.reproduce = wait
sys.exit(reproduce.main(["--out", str(folder)]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_call_ends_its_processes_and_a_killed_one_leaves_them_the_lock(tmp_path, number):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    call = subprocess.Popen(
        [sys.executable, "-c", SLEEPS, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths}
    )
    pid = tmp_path / "stages" / "pid"
    while not (pid.exists() and pid.read_text()):
        assert call.poll() is None
        time.sleep(0.05)
    call.send_signal(number)
    assert call.wait() == (130 if number == signal.SIGTERM else -9)
    child = int(pid.read_text())
    if number == signal.SIGKILL:
        with pytest.raises(ValueError, match="no other call works"), alone(tmp_path):
            pass
        os.kill(child, signal.SIGKILL)
    while Path(f"/proc/{child}/stat").exists() and " Z " not in _stat(child):
        time.sleep(0.01)
    with alone(tmp_path):
        pass


def _stat(process):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text()
    return " Z "


def test_a_page_is_published_with_its_figures(tmp_path):
    (tmp_path / "out" / "figures").mkdir(parents=True)
    (tmp_path / "out" / "figures" / "a.png").write_bytes(b"new")
    (tmp_path / "out" / "claims.md").write_text("![A](figures/a.png)\n")
    (tmp_path / "docs" / "claims").mkdir(parents=True)
    (tmp_path / "docs" / "claims" / "old.png").touch()
    (tmp_path / "out").rename(tmp_path / "not yet")
    given = (tmp_path / "out", tmp_path / "docs", "claims")
    with pytest.raises(ValueError, match="publish must wait until a seed is complete"):
        publish(*given, page="claims", figures="figures")
    assert (tmp_path / "docs" / "claims" / "old.png").exists()
    (tmp_path / "not yet").rename(tmp_path / "out")
    publish(*given, page="claims", figures="figures")
    assert (tmp_path / "docs" / "claims.md").read_text() == "![A](claims/a.png)\n"
    assert [file.name for file in (tmp_path / "docs" / "claims").iterdir()] == ["a.png"]


@pytest.mark.slow
def test_all_claims_are_measured_and_a_second_call_gives_the_same_page(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reproduce, "ThreadPoolExecutor", Here)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr("ddim_pl.commands.sweep.SEARCH_IMAGES", 4)
    monkeypatch.setattr("claim_measures.LEAST_SECONDS", 0.0)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert reproduce.reproduce(TINY, [1], RunnerHere(tmp_path, 1), float("inf")) == 0
    page = (tmp_path / "claims.md").read_text()
    assert "not measured yet" not in page
    assert page.count("<details>") == 10
    figures = {file: file.read_bytes() for file in (tmp_path / "figures").iterdir()}
    assert len(figures) == 17
    times = (tmp_path / "times.csv").read_text()
    assert reproduce.reproduce(TINY, [1], Runner(tmp_path, 2), float("inf")) == 0
    assert (tmp_path / "claims.md").read_text() == page
    assert {file: file.read_bytes() for file in (tmp_path / "figures").iterdir()} == figures
    assert (tmp_path / "times.csv").read_text() == times
    lost = next((tmp_path / "results").glob("cost-1.json"))
    kept = json.loads(lost.read_text())
    lost.unlink()
    assert reproduce.reproduce(TINY, [1], Runner(tmp_path, 2), 0.0) == 0  # no time for it
    assert "| 10 | Cost | not measured yet |" in (tmp_path / "claims.md").read_text()
    lost.write_text(json.dumps(kept))
    assert reproduce.reproduce(TINY, [1], Runner(tmp_path, 2), 0.0) == 0
    assert (tmp_path / "claims.md").read_text() == page


def test_claims_choose_the_stages(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Runner, "run", lambda _, stages, *__: asked.extend(stages))
    assert reproduce.reproduce(TINY, [3], Runner(tmp_path, 1), 60.0, [7]) == 0
    names = {stage.name for stage in asked}
    assert names == {"teacher-3", "ladder-3", "luhman-3", "students-3"}
    assert "not measured yet" in (tmp_path / "claims.md").read_text()
    with pytest.raises(SystemExit):
        reproduce.main(["digits", "--claims", "11"])
