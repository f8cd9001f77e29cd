"""What all commands share: arguments, checkpoints, several processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import arrays_of, table, trainer, with_classes
from tiny import some_ddpm

from ddim_pl.cli import main
from ddim_pl.commands import COMMANDS
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.images import write_png
from ddim_pl.metrics.digits import DigitsFeatures
from ddim_pl.samplers import DDIM, Ancestral

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("sample", {"num_images": 0}, "num_images must be at least 1, got 0"),
        ("sample", {"first": -1}, "first must be at least 0"),
        ("sample", {"seed": -1}, "seed must be at least 0"),
        ("sample", {"label": 3}, "label must be left out for a model without classes"),
        ("interpolate", {"num_points": 1}, "num_points must be at least 2"),
        ("interpolate", {"images": ["a.png"]}, "images must be an even number"),
        ("interpolate", {"images": ["a.png", "b.png"]}, "a.png cannot be read"),
        ("interpolate", {"from_data": True}, "data must be a data module"),
        ("reconstruct", {}, "data must be a data module"),
        ("reconstruct", {"images": ["nowhere.png"]}, "nowhere.png cannot be read"),
        ("reconstruct", {"num_steps": [2000]}, "num_steps must lie in"),
        ("reconstruct", {"timesteps": "cubic"}, "timesteps must be one of"),
        ("levels", {"num_steps": [0]}, "num_steps of adaptive levels must lie in"),
        ("levels", {"output": "levels.txt"}, "must end in .json"),
    ],
)
def test_wrong_arguments_are_errors_before_anything_is_written(
    tmp_path, monkeypatch, command, arguments, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        getattr(trainer(tmp_path), command)(some_ddpm(), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_class_that_the_model_lacks_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"label must lie in \[0, 9\], got 10"):
        trainer(tmp_path).sample(with_classes(), label=10)
    write_png(torch.zeros(1, 8, 8, dtype=torch.uint8), tmp_path / "x.png")
    with pytest.raises(ValueError, match="label must be given with images"):
        trainer(tmp_path).reconstruct(with_classes(), images=[str(tmp_path / "x.png")])


@pytest.mark.parametrize("command", ["interpolate", "reconstruct"])
@pytest.mark.parametrize("sampler", [DDIM(0.5), Ancestral()])
def test_a_stochastic_sampler_cannot_encode(tmp_path, command, sampler):
    with pytest.raises(ValueError, match="cannot encode: use a deterministic sampler"):
        getattr(trainer(tmp_path), command)(some_ddpm(sampler=sampler), DigitsDataModule())


def test_every_verb_works_from_the_checkpoint_alone_and_keeps_to_its_run(checkpoint, tmp_path):
    run = checkpoint.parents[1]
    before = {f.name for f in run.iterdir()}
    main(["sample", "--ckpt_path", str(checkpoint), "--num_images", "3"])
    main(["interpolate", "--ckpt_path", str(checkpoint), "--num_pairs", "2"])
    main(["reconstruct", "--ckpt_path", str(checkpoint), "--num_steps", "[2,3]"])
    main(["levels", "--ckpt_path", str(checkpoint), "--num_steps", "[2]", "--num_images", "4"])
    config = tmp_path / "sweep.yaml"
    config.write_text(
        "samplers:\n- class_path: ddim_pl.samplers.DDIM\n  init_args: {eta: 1.0}\n- Heun\n"
        "timesteps: [linear]\nnum_steps: [2]\nname: mine\n"
    )
    main(["sweep", "--config", str(config), "--ckpt_path", str(checkpoint)])
    after = {"sample", "interpolate", "reconstruct", "levels.json", "mine"}
    assert {f.name for f in run.iterdir()} == before | after
    assert [f.name for f in run.parent.iterdir()] == ["version_0"]
    rows = table(run / "mine" / "sweep.csv")
    assert [row["sampler"] for row in rows] == ["DDIM(eta=1.0)", "Heun()"]
    assert "41 images" in (run / "mine" / "sweep.md").read_text()  # as the run's callback


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_a_checkpoint_is_an_error(command):
    with pytest.raises(SystemExit, match=f"error: {command} needs --ckpt_path"):
        main([command])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.sampler", "Foo"],
            "sampler cannot be Foo: known are Ancestral, Consistency, DDIM, DEQ, DPMSolverPP",
        ),
        (["--model.timesteps", "foo"], "timesteps must be one of"),
        (["--model.sampler", "Heun", "--model.sampler.eta", "1"], "eta is no argument of Heun"),
        (["--model.sampler.eta", "2"], "eta must lie in"),
        (["--num_imagez", "3"], "num_imagez"),
        (["--output", "README.md"], "output must be a folder, got 'README.md'"),
    ],
)
def test_wrong_options_are_one_line(checkpoint, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(["sample", "--ckpt_path", str(checkpoint), *arguments])
    text = error.value.code if isinstance(error.value.code, str) else capsys.readouterr().err
    (line,) = [line for line in text.splitlines() if line.startswith("error")]
    assert message in line


@pytest.mark.slow
def test_two_processes_give_what_one_gives(checkpoint, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    split = ["--model.sampler", "DEQ", "--model.sampler.split_levels", "true"]
    commands = {
        "split": [*split, "--model.num_steps", "6", "--num_images", "5", "--npz", "true"],
        "sample": ["--num_images", "5", "--npz", "true"],
        "reconstruct": ["--num_images", "5", "--num_steps", "[2,3]"],
        "sweep": [
            *("--timesteps", "[linear,adaptive]", "--num_steps", "[2]"),
            *("--metrics", "[fd,precision_recall]", "--num_shown", "3"),
        ],
    }
    common = ["--ckpt_path", str(checkpoint)]
    for command, arguments in commands.items():
        name, command = command, {"split": "sample"}.get(command, command)
        main([command, *common, "--output", str(tmp_path / name / "1"), *arguments])
        done = subprocess.run(
            [
                *(sys.executable, ROOT / "main.py", command, *common, "--trainer.devices", "2"),
                *("--output", tmp_path / name / "2", *arguments),
            ],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    for name in ("sample", "split"):
        one, two = (arrays_of(tmp_path / name / n / "samples.npz") for n in "12")
        assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
        assert (one["arr_1"] == two["arr_1"]).all()
        assert len(list((tmp_path / name / "2" / "images").glob("*.png"))) == 5
    for command, key in (("reconstruct", "error"), ("sweep", "digits_fd")):
        one, two = (table(tmp_path / command / n / f"{command}.csv") for n in "12")
        for a, b in zip(one, two, strict=True):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-3)


@pytest.mark.parametrize("command", ["sweep", "reconstruct"])
def test_a_single_value_for_a_list_is_told_how_to_be_one(checkpoint, command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--ckpt_path", str(checkpoint), "--num_steps", "5"])
    text = capsys.readouterr().err
    assert "num_steps must be a list of integers" in text
    assert "got 5: write it as '[5]'" in text


def test_a_moved_checkpoint_has_one_folder_of_its_own(checkpoint, tmp_path, capsys):
    """Not a new run each time, in which a stopped sweep would begin again."""
    runs = {f.name for f in checkpoint.parents[2].iterdir()}
    moved = tmp_path / "moved.ckpt"
    shutil.copy(checkpoint, moved)
    sweep = ["sweep", "--ckpt_path", str(moved), "--timesteps", "[linear]", "--num_steps"]
    main([*sweep, "[2]"])
    (cell,) = (tmp_path / "moved-run" / "sweep" / "cells").glob("*.json")
    written = cell.stat().st_mtime_ns
    main([*sweep, "[2,3]"])
    assert len(table(tmp_path / "moved-run" / "sweep" / "sweep.csv")) == 2
    assert cell.stat().st_mtime_ns == written
    assert {f.name for f in checkpoint.parents[2].iterdir()} == runs
    assert {f.name for f in tmp_path.iterdir()} == {"moved.ckpt", "moved-run"}


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("sweep", {"timesteps": ["linear"], "num_steps": [2], "num_samples": 8}),
        ("reconstruct", {"num_steps": [2]}),
        ("interpolate", {"from_data": True, "num_pairs": 1, "num_points": 3}),
        ("invert", {"num_images": 2, "num_steps": 2, "num_updates": 1}),
        ("inpaint", {"num_images": 2, "num_fills": 1, "jump_length": 1, "num_resamples": 1}),
        ("forward", {"num_images": 2, "num_steps": 3, "num_points": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*singular covariance")
def test_real_images_may_come_from_a_folder(tmp_path, command, arguments):
    """They are decoded in threads, which are not in the inference mode of the command."""
    for number in range(8):
        (tmp_path / "images").mkdir(exist_ok=True)
        pixels = torch.full((1, 8, 8), 30 * number, dtype=torch.uint8)
        write_png(pixels, tmp_path / "images" / f"{number}.png")
    if command == "sweep":
        arguments = {**arguments, "features": DigitsFeatures, "num_shown": 2}
    data = ImageFolderDataModule(str(tmp_path / "images"), 8, channels=1)
    made = tmp_path / "made"
    getattr(trainer(tmp_path), command)(some_ddpm(), data, output=str(made), **arguments)
    assert list(made.rglob("*.png"))
