"""Which checkpoint is `last`, and one process in a run's folder."""

import csv
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config, write_config

from ddim_pl.cli import main
from ddim_pl.locks import alone_in
from ddim_pl.runs import claim_version, newest_checkpoint, read_checkpoint

ROOT = Path(__file__).parents[1]


def checkpoint_in(run, name="last.ckpt", age=0):
    file = run / "checkpoints" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (1000 + age, 1000 + age))
    return file


@pytest.mark.parametrize("name", ["exp", "a/b", "x[a]", "[a]/b*"])
def test_last_is_found_under_any_name(tmp_path, name):
    file = checkpoint_in(tmp_path / name / "version_0")
    assert newest_checkpoint(tmp_path) == file
    assert newest_checkpoint(tmp_path, name) == file


def test_last_is_a_whole_checkpoint_where_last_is_not_yet_written(tmp_path):
    run = tmp_path / "exp" / "version_0"
    file = checkpoint_in(run, "epoch=0-step=6.ckpt", age=1)
    checkpoint_in(run, "epoch=0-step=3.ckpt")
    checkpoint_in(run, "student-0002-steps.ckpt", age=2)
    checkpoint_in(run, "last.ckpt.part", age=3)
    assert newest_checkpoint(tmp_path) == file
    assert newest_checkpoint(tmp_path) != checkpoint_in(run)
    assert newest_checkpoint(tmp_path).name == "last.ckpt"


def test_last_does_not_skip_a_newer_run_without_a_checkpoint(tmp_path):
    file = checkpoint_in(tmp_path / "exp" / "version_0")
    begun = tmp_path / "exp" / "version_1"
    begun.mkdir()
    assert newest_checkpoint(tmp_path) == file  # a folder of results alone
    (begun / "config.yaml").touch()
    with pytest.raises(ValueError, match=r"version_1, which has no checkpoint yet.*version_0"):
        newest_checkpoint(tmp_path)


def test_a_folder_of_diffusers_is_to_be_imported(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is a folder: give a file or 'last'"):
        read_checkpoint(tmp_path)
    (tmp_path / "model_index.json").touch()
    wanted = rf"which is a folder of diffusers: .* main.py import {tmp_path} --output FILE"
    with pytest.raises(FileNotFoundError, match=wanted):
        read_checkpoint(tmp_path)


FAILING = """
from lightning import Callback


class Fails(Callback):
    def __init__(self, where: str, leaves: bool = False):
        self.where, self.leaves = where, leaves

    def fail(self, trainer, where):
        if where == self.where:
            if self.leaves:
                (Path(trainer.log_dir) / "mine.txt").touch()
            raise ValueError("it fails")

    def setup(self, trainer, pl_module, stage):
        self.fail(trainer, "setup")

    def on_sanity_check_start(self, trainer, pl_module):
        self.fail(trainer, "check")

    def on_train_batch_start(self, trainer, *arguments):
        self.fail(trainer, "batch")
"""


@pytest.fixture
def failing_fit(tmp_path, monkeypatch):
    """A fit that fails in a place, or does not; its runs are in `runs/tiny`."""
    (tmp_path / "failing.py").write_text("from pathlib import Path\n" + FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    loggers = ["TensorBoardLogger", "CSVLogger"]

    def fit(*more, where="", leaves=False, name="tiny"):
        config = tiny_config(Path("runs"), max_steps=1, num_sanity_val_steps=1)
        settings = config["trainer"]["logger"]["init_args"] | {"name": name}
        config["trainer"]["logger"] = [{"class_path": n, "init_args": settings} for n in loggers]
        fails = {"class_path": "failing.Fails", "init_args": {"where": where, "leaves": leaves}}
        saves = config["trainer"]["callbacks"][-1]
        config["trainer"]["callbacks"] = [fails, saves]
        given = ["fit", "--config", write_config(config, tmp_path / "config.yaml"), *more]
        if not where:
            main(given)
            return
        with pytest.raises(SystemExit) as stop:
            main(given)
        assert "it fails" in str(stop.value.code)

    return fit


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:The dirpath has changed")
def test_a_fit_that_fails_before_it_trains_leaves_no_run(failing_fit, tmp_path):
    runs = tmp_path / "runs"
    failing_fit(where="setup")
    assert not runs.exists()
    runs.mkdir()
    failing_fit(where="check")
    assert [*runs.iterdir()] == []  # a folder of the user
    failing_fit()
    last = runs / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    before = sorted(runs.rglob("*"))
    failing_fit(where="setup")
    assert sorted(runs.rglob("*")) == before
    failing_fit("--ckpt_path", str(last), where="setup")
    assert {*before} <= {*runs.rglob("*")}
    failing_fit("--ckpt_path", str(last), name="other", where="setup")
    assert [each.name for each in runs.iterdir()] == ["tiny"]


@pytest.mark.parametrize(("where", "leaves"), [("batch", False), ("setup", True)])
def test_a_fit_that_has_trained_or_left_a_file_keeps_its_run(failing_fit, where, leaves):
    failing_fit(where=where, leaves=leaves)
    run = Path("runs/tiny/version_0")
    assert next(run.glob("events.out.tfevents.*")).is_file()
    assert (run / "mine.txt").exists() == leaves


def test_processes_that_claim_a_version_get_one_each(tmp_path):
    (tmp_path / "version_3").mkdir()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        numbers = pool.map(claim_version, [tmp_path] * 40)
    assert sorted(numbers) == list(range(4, 44))


@pytest.fixture
def config(tmp_path):
    """A fit of 5 updates with two loggers."""
    settings = tiny_config(tmp_path / "runs", max_steps=5)
    first = settings["trainer"]["logger"]
    second = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": dict(first["init_args"]),
    }
    settings["trainer"]["logger"] = [first, second]
    settings["trainer"]["callbacks"] = settings["trainer"]["callbacks"][-1:]
    return write_config(settings, tmp_path / "config.yaml")


def test_two_loggers_and_a_resumed_run_and_its_test_share_one_folder(config, tmp_path):
    main(["fit", "--config", config])
    run = tmp_path / "runs/tiny/version_0"
    main(["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", "10"])
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows if row["train/loss"]] == ["4", "9"]
    main(["test", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")])
    more = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert len(more) == len(rows) + 1
    assert more[-1]["test/loss"]
    assert (run / "test-results.json").is_file()
    assert [each.name for each in run.parent.iterdir()] == ["version_0"]


def test_a_second_resume_of_a_run_is_refused(config, tmp_path, capsys):
    main(["fit", "--config", config])
    run = tmp_path / "runs/tiny/version_0"
    resume = ["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", "10"]
    before = sorted(run.rglob("*"))
    with alone_in(run, ".fit-lock"), pytest.raises(SystemExit, match="no other process works"):
        main(resume)
    assert sorted(run.rglob("*")) == before
    main(resume)
    assert not (run / ".fit-lock").exists()


def test_a_version_that_exists_is_not_begun_again(config, tmp_path):
    main(["fit", "--config", config])
    single = tiny_config(tmp_path / "runs", max_steps=5)
    single["trainer"]["logger"]["init_args"]["version"] = 0
    path = write_config(single, tmp_path / "again.yaml")
    with pytest.raises(SystemExit, match=r"error: trainer.logger.version must be that of a new"):
        main(["fit", "--config", path])


def test_a_fast_development_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_config(tiny_config(tmp_path / "runs"), tmp_path / "config.yaml")
    main(["fit", "--config", path, "--trainer.fast_dev_run", "true"])
    assert [each.name for each in tmp_path.iterdir()] == ["config.yaml"]


def test_predict_and_sample_of_a_moved_checkpoint_write_into_one_folder(config, tmp_path):
    main(["fit", "--config", config])
    moved = tmp_path / "moved" / "some.ckpt"
    moved.parent.mkdir()
    (tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt").rename(moved)
    main(["sample", "--ckpt_path", str(moved), "--num_images", "2"])
    more = ["--trainer.callbacks+=callbacks.ImageWriter", "--data.num_predict", "2"]
    main(["predict", "--ckpt_path", str(moved), *more])
    main(["test", "--ckpt_path", str(moved)])
    written = {each.name for each in (moved.parent / "some-run").iterdir()}
    assert written >= {"sample", "predict", "test-results.json"}
    assert [each.name for each in (tmp_path / "runs/tiny").iterdir()] == ["version_0"]


@pytest.mark.slow
def test_two_fits_at_once_get_a_folder_each(config, tmp_path):
    command = [sys.executable, str(ROOT / "main.py"), "fit", "--config", config]
    both = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[1] and process.returncode for process in both] == [0, 0]
    runs = sorted((tmp_path / "runs/tiny").iterdir())
    assert [run.name for run in runs] == ["version_0", "version_1"]
    for run in runs:
        assert (run / "checkpoints" / "last.ckpt").is_file()
        assert len(list(run.glob("events.*"))) == 1
