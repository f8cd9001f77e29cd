import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import some_ddpm, tiny_config, tiny_ddpm, tiny_unet, write_config

from callbacks import Students
from callbacks.students import _add_row
from ddim_pl.cli import main
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.images import grid, read_png, to_uint8
from ddim_pl.schedules import CosineLogSNRSchedule
from ddim_pl.training import DDPM, ProgressiveDistillation

ROOT = Path(__file__).parents[2]
STEPS = (4, 2, 1)


def ladder_config(folder):
    """A teacher of 8 steps beside a config of three rounds, five updates each."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher = some_ddpm(
        network=tiny_unet(dropout=0.0),
        schedule=CosineLogSNRSchedule(),
        prediction="v",
        loss_weight="snr_plus_one",
        time_input="log_snr",
    )
    t = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    t.strategy.connect(teacher)
    t.save_checkpoint(folder / "teacher.ckpt")
    config = tiny_config(folder, max_epochs=-1, limit_val_batches=0)
    config["model"] = {
        "class_path": "ddim_pl.training.ProgressiveDistillation",
        "init_args": {
            "teacher": str(folder / "teacher.ckpt"),
            "rounds": [[steps, 5] for steps in STEPS],
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
            "ema_decay": 0.5,
        },
    }
    callbacks = config["trainer"]["callbacks"]
    callbacks[0]["init_args"]["every_n_validations"] = 0
    callbacks[1] = {"class_path": "callbacks.Students", "init_args": {"num_images": 4}}
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished ladder: its config and its folder."""
    folder = tmp_path_factory.mktemp("ladder")
    config = ladder_config(folder)
    main(["fit", "--config", write_config(config, folder / "config.yaml")])
    return config, folder / "tiny" / "version_0"


def student(version, steps):
    return version / "checkpoints" / f"student-{steps:04d}-steps.ckpt"


def rows(version):
    return list(csv.DictReader((version / "students" / "students.csv").read_text().splitlines()))


def test_each_round_leaves_a_checkpoint_a_picture_and_a_line(run):
    _, version = run
    assert sorted(f.name for f in (version / "students").iterdir()) == [
        "student-0001-steps.png",
        "student-0002-steps.png",
        "student-0004-steps.png",
        "students.csv",
        "students.png",
    ]
    tags = EventAccumulator(str(version)).Reload().Tags()["images"]
    assert tags == ["students/samples", "students/plot"]
    assert sorted(f.name for f in (version / "checkpoints").glob("student*")) == [
        f"student-{steps:04d}-steps.ckpt" for steps in sorted(STEPS)
    ]
    assert [(row["steps"], row["updates"]) for row in rows(version)] == [
        ("4", "5"),
        ("2", "5"),
        ("1", "5"),
    ]
    assert all(float(row["digits_fd"]) > 0 for row in rows(version))
    assert not list(version.rglob("*.part"))


@pytest.mark.parametrize("steps", STEPS)
def test_a_student_is_a_plain_model_that_knows_its_steps(run, steps):
    _, version = run
    state = torch.load(student(version, steps), weights_only=True)
    assert not any(name.startswith("teacher") for name in state["state_dict"])
    model = DDPM.load_from_checkpoint(
        student(version, steps), map_location="cpu", weights_only=True
    )
    assert type(model) is DDPM
    assert model.prediction == "v"
    assert len(model.levels) == steps + 1
    drawn = grid(to_uint8(model.sample(range(4))))
    shown = read_png(version / "students" / f"student-{steps:04d}-steps.png")
    assert torch.equal(torch.as_tensor(shown), drawn)


def test_a_student_is_the_averaged_network_at_the_end_of_its_round(run):
    _, version = run
    for round_end, steps in ((5, 4), (10, 2), (15, 1)):
        (file,) = (version / "checkpoints").glob(f"*step={round_end}.ckpt")
        module = ProgressiveDistillation.load_from_checkpoint(
            file, map_location="cpu", weights_only=True
        )
        assert module.student_steps == steps
        saved = torch.load(student(version, steps), weights_only=True)["state_dict"]
        for name, value in module.average.module.state_dict().items():
            assert torch.equal(saved[f"average.module.{name}"], value), name
            assert torch.equal(saved[f"network.{name}"], value), name
        model = DDPM.load_from_checkpoint(
            student(version, steps), map_location="cpu", weights_only=True
        )
        torch.testing.assert_close(model.sample([5]), module.sample([5]), rtol=0, atol=0)


def test_the_command_line_takes_a_student_like_any_checkpoint(run, tmp_path, capsys):
    _, version = run
    path = str(student(version, 2))
    out = tmp_path / "images"
    main(["sample", "--ckpt_path", path, "--num_images", "4", "--output", str(out)])
    drawn = torch.stack(
        [torch.as_tensor(read_png(out / "images" / f"{i:06d}.png")) for i in range(4)]
    )
    shown = read_png(version / "students" / "student-0002-steps.png")
    assert torch.equal(grid(drawn), torch.as_tensor(shown))
    capsys.readouterr()
    main(["test", "--ckpt_path", path])
    results = json.loads((version / "test-results.json").read_text())
    assert results["network evaluations"] == 2
    measured = float(rows(version)[1]["digits_fd"])
    assert results["test/digits_fd"] == pytest.approx(measured, rel=1e-5)


def test_a_students_config_is_that_of_a_plain_model(run):
    _, version = run
    checkpoint = torch.load(student(version, 4), weights_only=True)
    config = yaml.safe_load(checkpoint["ddim_pl_config"])
    assert config["model"]["class_path"] == "ddim_pl.training.ddpm.DDPM"
    assert config["model"]["init_args"]["num_steps"] == 4
    names = [each["class_path"] for each in config["trainer"]["callbacks"]]
    assert "callbacks.FrechetDistance" in names
    assert not any(name.endswith("Students") for name in names)


@pytest.mark.parametrize("stop", [5, 15])
def test_a_run_stopped_before_a_round_was_closed_writes_the_same_files(run, tmp_path, stop):
    config, version = run
    config = yaml.safe_load(yaml.safe_dump(config))
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    (file,) = (version / "checkpoints").glob(f"*step={stop}.ckpt")
    path = write_config(config, tmp_path / "config.yaml")
    # What an earlier crash has left must not be in the way.
    again = tmp_path / "tiny" / "version_0"
    stale = student(again, STEPS[stop // 5 - 1])
    stale = stale.with_name(stale.name + ".part")
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"half a file")
    main(["fit", "--config", path, "--ckpt_path", str(file), "--trainer.logger.version", "0"])
    for steps in STEPS[stop // 5 - 1 :]:
        name = f"students/student-{steps:04d}-steps.png"
        assert (again / name).read_bytes() == (version / name).read_bytes()
        expected, got = (
            torch.load(student(v, steps), weights_only=True) for v in (version, again)
        )
        assert expected["global_step"] == got["global_step"]
        assert expected["hyper_parameters"] == got["hyper_parameters"]
        for key, value in expected["state_dict"].items():
            assert torch.equal(value, got["state_dict"][key]), key
    assert rows(again) == rows(version)[stop // 5 - 1 :]
    assert not list(again.rglob("*.part"))


def test_a_line_written_twice_stands_once(tmp_path):
    path = tmp_path / "students" / "students.csv"
    for steps, value in ((4, 1.0), (2, 2.0), (4, 3.0)):
        _add_row(path, {"steps": steps, "updates": 5, "digits_fd": value})
    assert path.read_text() == "steps,updates,digits_fd\n4,5,3.0\n2,5,2.0\n"


def test_students_without_a_measurement_are_written_all_the_same(run, tmp_path):
    config, _ = run
    module = ProgressiveDistillation(
        teacher=config["model"]["init_args"]["teacher"], rounds=[(2, 1), (1, 1)]
    )
    t = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        max_epochs=-1,
        default_root_dir=tmp_path,
        callbacks=[Students(num_images=2)],
    )
    t.fit(module, DigitsDataModule(batch_size=4))
    text = (tmp_path / "students" / "students.csv").read_text()
    assert text == "steps,updates\n2,1\n1,1\n"
    assert student(tmp_path, 1).exists()


def test_students_of_another_method_are_refused(tmp_path):
    t = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        max_steps=1,
        callbacks=[Students()],
    )
    with pytest.raises(
        ValueError, match="Students must be ProgressiveDistillation or TRACT, got DDPM"
    ):
        t.fit(tiny_ddpm(), DigitsDataModule(batch_size=4))


def test_a_grid_of_no_images_is_refused():
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        Students(num_images=0)


def two_processes(folder, *arguments):
    """A fit of two processes that was started in `folder`."""
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", "fit", *map(str, arguments), "--trainer.devices", "2"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_end_the_ladder_leave_the_students_and_resume(tmp_path):
    config = ladder_config(tmp_path)
    files = config["trainer"]["callbacks"][-1]["init_args"]
    files["every_n_train_steps"] = 1
    two_processes(tmp_path, "--config", write_config(config, tmp_path / "config.yaml"))
    version = tmp_path / "tiny" / "version_0"
    assert [f.name for f in version.parent.iterdir()] == ["version_0"]
    assert [row["steps"] for row in rows(version)] == ["4", "2", "1"]
    for steps in STEPS:
        model = DDPM.load_from_checkpoint(
            student(version, steps), map_location="cpu", weights_only=True
        )
        assert len(model.levels) == steps + 1
        drawn = grid(to_uint8(model.sample(range(4))))
        shown = read_png(version / "students" / f"student-{steps:04d}-steps.png")
        assert torch.equal(torch.as_tensor(shown), drawn)
    last = torch.load(version / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 15
    assert last["state_dict"]["_extra_state"] == {"round": 2}

    # Stopped inside the second round, it ends in the same weights.
    (inside,) = version.glob("checkpoints/*step=7.ckpt")
    inside = inside.rename(tmp_path / "inside.ckpt")
    (version / "checkpoints" / "last.ckpt").unlink()
    two_processes(tmp_path, "--ckpt_path", inside, "--trainer.logger.init_args.name", "resumed")
    again = tmp_path / "runs" / "resumed" / "version_0" / "checkpoints" / "last.ckpt"
    resumed = torch.load(again, weights_only=True)["state_dict"]
    for name, value in last["state_dict"].items():
        if name != "_extra_state":
            assert torch.equal(resumed[name], value), name
