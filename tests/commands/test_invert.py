"""`main.py invert`: what it writes, from which latents it begins, and that devices share it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_unet, write_config
from torch import Tensor

from ddim_pl.cli import main
from ddim_pl.commands.sources import unclipped
from ddim_pl.images import read_png
from ddim_pl.inversion import encode
from ddim_pl.noise import latents
from ddim_pl.samplers import DDIM
from ddim_pl.timesteps import linear
from ddim_pl.training import DDPM

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of a tiny model with classes, hardly trained."""
    folder = tmp_path_factory.mktemp("invert")
    config = tiny_config(folder, max_epochs=1)
    network = tiny_unet(num_classes=10, dropout=0.0).init_args
    config["model"]["init_args"]["network"]["init_args"] = network
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][-1:]
    config["trainer"]["limit_val_batches"] = 0
    main(["fit", "--config", write_config(config, folder / "config.yaml")])
    return folder / "tiny" / "version_0" / "checkpoints" / "last.ckpt"


def run(checkpoint: Path, output: Path, *arguments: object) -> Tensor:
    """Invert four images through five steps; return the latents."""
    options = ["--num_images", 4, "--num_steps", 5, "--num_updates", 3, "--lr", 0.01, *arguments]
    main(["invert", "--ckpt_path", str(checkpoint), "--output", str(output), *map(str, options)])
    return load_file(output / "latents.safetensors")["latents"]


def rows(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / "curves.csv").read_text().splitlines()))


def test_it_writes_latents_pictures_curves_and_a_summary(checkpoint, tmp_path, capsys):
    z = run(checkpoint, tmp_path, "--start", "noise")
    assert z.shape == (4, 1, 8, 8)
    assert sorted(path.name.partition(".tfevents")[0] for path in tmp_path.iterdir()) == [
        "curves.csv",
        "curves.png",
        "events.out",
        "grid.png",
        "invert.md",
        "latents.safetensors",
    ]
    assert [row["update"] for row in rows(tmp_path)] == ["0", "1", "2", "3"]
    best = [float(row["best loss"]) for row in rows(tmp_path)]
    assert best == sorted(best, reverse=True)
    assert best[-1] < best[0]
    assert read_png(tmp_path / "grid.png").shape[0] == 3
    text = (tmp_path / "invert.md").read_text()
    assert "4 images inverted: 5 linear steps from noise" in text
    assert "3 updates" in text
    assert str(tmp_path) in capsys.readouterr().out


def test_a_second_call_replaces_the_runs_own_results_and_refuses_the_users(
    checkpoint, tmp_path, capsys
):
    own = checkpoint.parent.parent / "invert"
    few = ["--num_images", "1", "--num_steps", "5", "--num_updates", "1"]
    for _ in range(2):
        main(["invert", "--ckpt_path", str(checkpoint), *few])
    assert "files of an earlier call" in capsys.readouterr().out
    assert len(list(own.glob("events.out.tfevents.*"))) == 1
    with pytest.raises(SystemExit, match="output must be a folder without results"):
        run(checkpoint, own)
    assert load_file(own / "latents.safetensors")["latents"].shape[0] == 1


def test_the_best_latents_draw_the_loss_that_is_told(checkpoint, tmp_path):
    z = run(checkpoint, tmp_path, "--method", "Sequential")
    model = DDPM.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    data = _digits()
    drawn = DDIM()(unclipped(model, data[1]), z, linear(1000, 5))
    loss = (drawn - data[0]).square().flatten(1).sum(1).mean()
    told = float(rows(tmp_path)[-1]["best loss"])
    assert told == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("method", ["Sequential", "InverseJacobian"])
def test_other_gradients_are_methods_of_the_command(method, checkpoint, tmp_path):
    run(checkpoint, tmp_path, "--method", method)
    best = [float(row["best loss"]) for row in rows(tmp_path)]
    assert best[-1] < 0.999 * best[0]
    assert f"{method}(" in (tmp_path / "invert.md").read_text()


def test_a_loss_that_is_reached_ends_the_updates(checkpoint, tmp_path):
    run(checkpoint, tmp_path, "--num_updates", 50, "--stop_below", 1e4)
    assert len(rows(tmp_path)) == 1


def test_the_curve_ends_with_the_best_losses_of_batches_that_ended_apart(checkpoint, tmp_path):
    """Images one by one; the limit lies between their first losses, so that some end at once."""
    model = DDPM.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    x, label = _digits()
    levels, denoiser = linear(1000, 5), unclipped(model, label)

    def losses(z):
        return (DDIM()(denoiser, z, levels) - x).square().flatten(1).sum(1)

    limit = float(losses(encode(denoiser, x, levels)).median()) * 1.001
    more = ["--batch_size", 1, "--num_updates", 6, "--method", "Sequential"]
    z = run(checkpoint, tmp_path, "--stop_below", limit, *more)
    last = float(rows(tmp_path)[-1]["best loss"])
    assert last == pytest.approx(float(losses(z).mean()), rel=1e-4)
    assert 1 < len(rows(tmp_path)) <= 7


@pytest.mark.slow
def test_figure_1s_script_goes_on_where_it_stopped_and_refuses_what_is_wrong(checkpoint, tmp_path):
    def script(*arguments):
        command = [sys.executable, "benchmarks/figure1.py", "--output", tmp_path / "figure"]
        given = [*command, "--digits", checkpoint, "--device", "cpu", *arguments]
        paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        more = {"cwd": ROOT, "env": os.environ | paths, "capture_output": True, "text": True}
        return subprocess.run([str(each) for each in given], check=False, **more)

    for count in (1, 2):
        ended = script("--images", count, "--updates", 2, "--starts", "noise", "encoding")
        assert ended.returncode == 0, ended.stderr
    table = (tmp_path / "figure.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:6]] for line in table if line]
    kinds = [[start, method] for start in ("noise", "encoding") for method in ("DDIM", "DEQ-DDIM")]
    assert cells == [["digits", "10", *kind, "2"] for kind in kinds]
    assert len(json.loads((tmp_path / "figure.json").read_text())) == 8
    for wrong in (["--images", 0], ["--images", 10**6], ["--church", "none.ckpt"]):
        ended = script(*wrong)
        assert ended.returncode
        assert wrong[0][2:] in ended.stderr.splitlines()[-1]
        assert "Traceback" not in ended.stderr


def test_descent_begins_at_the_encoding_or_at_noise_or_at_given_latents(checkpoint, tmp_path):
    model = DDPM.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    x, label = _digits()
    levels = linear(1000, 5)
    encoded = encode(unclipped(model, label), x, levels)
    noise, _ = latents(11, range(4), (1, 8, 8))
    for name, first in {"encoding": encoded, "noise": noise}.items():
        common = ("--start", name, "--seed", 11, "--max_seconds", 0)
        found = run(checkpoint, tmp_path / name, *common)
        torch.testing.assert_close(found, first, rtol=1e-4, atol=1e-4)
        assert len(rows(tmp_path / name)) == 1
    file = tmp_path / "noise" / "latents.safetensors"
    on = run(checkpoint, tmp_path / "on", "--start", file, "--max_seconds", 0)
    torch.testing.assert_close(on, noise)


def _digits() -> tuple[Tensor, Tensor]:
    from ddim_pl.data.digits import DigitsDataModule
    from ddim_pl.images import from_uint8

    data = DigitsDataModule()
    data.setup("test")
    first = torch.arange(4)
    return from_uint8(data.val_set.images(first)), data.val_set.labels(first)


def test_batches_do_not_change_the_latents(checkpoint, tmp_path):
    whole = run(checkpoint, tmp_path / "whole", "--start", "noise")
    parts = run(checkpoint, tmp_path / "parts", "--start", "noise", "--batch_size", 3)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)
    losses = [float(rows(tmp_path / name)[-1]["best loss"]) for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_two_processes_share_the_images(checkpoint, tmp_path):
    whole = run(checkpoint, tmp_path / "whole", "--start", "noise")
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "main.py", "invert", "--ckpt_path", checkpoint),
            *("--output", tmp_path / "two", "--num_images", "4", "--num_steps", "5"),
            *("--num_updates", "3", "--lr", "0.01", "--start", "noise"),
            *("--trainer.devices", "2", "--trainer.accelerator", "cpu"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    two = load_file(tmp_path / "two" / "latents.safetensors")["latents"]
    torch.testing.assert_close(two, whole, rtol=1e-3, atol=1e-3)
    losses = [float(rows(tmp_path / name)[-1]["best loss"]) for name in ("whole", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.noise", "GammaNoise", "--model.sampler", "GammaQuantile"],
            "noise must be Gaussian for invert, got GammaNoise",
        ),
        (["--start", "middle"], "start must be 'encoding', 'noise' or a latents.safetensors file"),
        (["--start", "EMPTY"], "holds no latents"),
        (["--start", "OTHER"], "holds latents of shape (3, 4, 4), the model has (1, 8, 8)"),
        (["--start", "FEW"], "start must hold a latent for each of 4 images"),
        (["--lr", "0"], "lr must be positive and at most 1000, got 0"),
        (["--num_updates", "0"], "num_updates must be at least 1, got 0"),
        (["--num_steps", "1001"], "num_steps must lie in [1, 1000]"),
        (
            ["--method", "Sideways"],
            "method cannot be Sideways: known are Implicit, InverseJacobian, Sequential",
        ),
        (["--label", "10", "--images", "[x.png]"], "label must lie in [0, 9], got 10"),
    ],
)
def test_wrong_input_is_one_line_of_error(checkpoint, tmp_path, capsys, arguments, message):
    files = {
        "EMPTY": {"other": torch.zeros(1)},
        "OTHER": {"latents": torch.zeros(4, 3, 4, 4)},
        "FEW": {"latents": torch.zeros(2, 1, 8, 8)},
    }
    for i, argument in enumerate(arguments):
        if argument in files:
            save_file(files[argument], tmp_path / argument)
            arguments = [*arguments[:i], str(tmp_path / argument), *arguments[i + 1 :]]
    with pytest.raises(SystemExit) as stopped:
        run(checkpoint, tmp_path / "out", *arguments)
    line = str(stopped.value.code) + capsys.readouterr().err
    assert message in line, line
