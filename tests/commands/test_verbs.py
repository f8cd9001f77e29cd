"""sample, interpolate, reconstruct and levels: from Python, by command, on two devices."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import some_ddpm, tiny_config, tiny_unet, write_config

from ddim_pl.cli import main
from ddim_pl.commands import COMMANDS, Trainer
from ddim_pl.data.digits import DigitsDataModule, digits_arrays
from ddim_pl.evaluation.worker import on_every_worker
from ddim_pl.images import from_uint8, grid, read_png, to_uint8, write_png
from ddim_pl.latents import reconstruct as reconstruction
from ddim_pl.latents import slerp
from ddim_pl.noise import latents
from ddim_pl.samplers import DDIM, Ancestral, Heun
from ddim_pl.schedules import LinearSchedule
from ddim_pl.timesteps import make_levels

ROOT = Path(__file__).parents[2]


def trainer(folder, **settings):
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **settings,
    )


def with_classes(**changes):
    return some_ddpm(network=tiny_unet(num_classes=10), **changes)


def table(file):
    return list(csv.DictReader(file.read_text().splitlines()))


def close(a, b):
    """Equal uint8 pictures, but for the rounding of a batch of another size."""
    return (a.int() - b.int()).abs().max() <= 1


# ---- sample -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [3, 250])
def test_sample_writes_the_images_of_the_model(tmp_path, batch_size):
    model = some_ddpm()
    trainer(tmp_path).sample(model, num_images=7, npz=True, batch_size=batch_size)
    folder = tmp_path / "sample"
    expected = to_uint8(model.sample(range(7)))
    assert sorted(f.name for f in folder.iterdir()) == [
        *(f"{i:06d}.png" for i in range(7)),
        "grid.png",
        "samples.npz",
    ]
    for index, image in enumerate(expected):
        assert close(read_png(folder / f"{index:06d}.png"), image)
    arrays = np.load(folder / "samples.npz", allow_pickle=False)
    assert list(arrays) == ["arr_0"]
    assert arrays["arr_0"].shape == (7, 8, 8, 1)
    assert close(torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2), expected)
    assert close(read_png(folder / "grid.png"), grid(expected)[:1])


def test_sample_goes_on_where_an_earlier_call_ended(tmp_path):
    model = some_ddpm()
    trainer(tmp_path).sample(model, num_images=3, output=str(tmp_path / "mine"))
    trainer(tmp_path).sample(model, num_images=2, first=3, output=str(tmp_path / "mine"))
    expected = to_uint8(model.sample(range(5)))
    for index in range(5):
        assert close(read_png(tmp_path / "mine" / f"{index:06d}.png"), expected[index])


def test_sample_of_a_class_and_a_seed(tmp_path):
    model = with_classes()
    trainer(tmp_path).sample(model, num_images=4, label=3, seed=9, npz=True, png=False)
    arrays = np.load(tmp_path / "sample" / "samples.npz")
    assert arrays["arr_1"].tolist() == [3] * 4
    expected = to_uint8(model.sample(range(4), label=torch.tensor([3] * 4), seed=9))
    assert close(torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2), expected)
    assert not (tmp_path / "sample" / "000000.png").exists()
    trainer(tmp_path).sample(model, num_images=12, npz=True)
    assert np.load(tmp_path / "sample" / "samples.npz")["arr_1"].tolist() == [*range(10), 0, 1]


def test_a_second_sample_leaves_none_of_the_first(tmp_path):
    model = some_ddpm()
    trainer(tmp_path).sample(model, num_images=5)
    trainer(tmp_path).sample(model, num_images=2)
    assert len(list((tmp_path / "sample").glob("0*.png"))) == 2


def test_sample_that_goes_on_in_the_run_keeps_what_is_there(tmp_path):
    model = some_ddpm()
    trainer(tmp_path).sample(model, num_images=3)
    trainer(tmp_path).sample(model, num_images=2, first=3)
    assert len(list((tmp_path / "sample").glob("0*.png"))) == 5


# ---- what all verbs share ----------------------------------------------------------------------


def test_work_is_not_in_the_trainers_precision_but_the_network_is(tmp_path):
    """An extractor in bfloat16 would measure another distance than `test` does."""
    seen = []

    def work(worker):
        seen.append(torch.is_autocast_enabled("cpu"))
        model.average.module.register_forward_pre_hook(
            lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
        )
        list(worker.sample_batches([0], 1, ""))

    model = some_ddpm(num_steps=1)
    on_every_worker(trainer(tmp_path, precision="bf16-mixed"), model, work)
    assert seen == [False, True]


def test_the_model_is_set_up_so_that_it_can_compile(tmp_path, monkeypatch):
    model, stages = some_ddpm(compile=True), []
    monkeypatch.setattr(model, "setup", stages.append)
    on_every_worker(trainer(tmp_path), model, lambda device: None)
    assert stages == ["predict"]


# ---- interpolate ------------------------------------------------------------------------------


def rows_of(picture, rows, columns, side=8):
    """The images of a grid, `(rows, columns, H, W)`, made small again."""
    factor = max(1, 512 // (columns * side))
    gap = max(2, factor // 4)
    size = side * factor
    return torch.stack(
        [
            torch.stack(
                [
                    picture[0, gap + r * (size + gap) :, gap + c * (size + gap) :][
                        :size:factor, :size:factor
                    ]
                    for c in range(columns)
                ]
            )
            for r in range(rows)
        ]
    )


def test_a_row_between_latents_is_that_of_slerp(tmp_path):
    model = some_ddpm()
    trainer(tmp_path).interpolate(model, num_pairs=2, num_points=5)
    shown = rows_of(read_png(tmp_path / "interpolate" / "grid.png"), 2, 5)
    z, _ = latents(model.seed, [1, 3], model.image_shape)
    for point in range(5):
        between = slerp(z[:1], z[1:], point / 4)
        expected = to_uint8(model.sampler(model.denoiser, between, model.levels))[0, 0]
        assert close(shown[1, point], expected)
    ends = to_uint8(model.sample([1, 3]))[:, 0]
    assert close(shown[1, [0, -1]], ends)


def test_rows_between_images_end_in_their_reconstructions(tmp_path):
    model = with_classes(num_steps=6)
    trainer(tmp_path).interpolate(
        model, DigitsDataModule(), from_data=True, num_pairs=3, num_points=4
    )
    shown = rows_of(read_png(tmp_path / "interpolate" / "grid.png"), 3, 4)
    images, labels = digits_arrays()
    for row in range(3):
        pair = torch.where(labels == row)[0][:2]
        denoiser = replace(model.conditioned(labels[pair]), clip=False)
        back = reconstruction(denoiser, from_uint8(images[pair]), model.levels)
        assert close(shown[row, [0, -1]], to_uint8(back)[:, 0])


def test_image_files_are_interpolated(tmp_path):
    images, _ = digits_arrays()
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for file, image in zip(files, images, strict=False):
        write_png(image, file)
    trainer(tmp_path).interpolate(with_classes(), images=list(map(str, files)), label=1)
    assert read_png(tmp_path / "interpolate" / "grid.png").shape[1] > 50


# ---- reconstruct ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [DDIM(), Heun()])
def test_the_error_table_is_that_of_the_images(tmp_path, sampler):
    model = with_classes(sampler=sampler)
    trainer(tmp_path).reconstruct(
        model, DigitsDataModule(), num_images=9, num_steps=[2, 5], batch_size=4
    )
    folder = tmp_path / "reconstruct"
    rows = table(folder / "reconstruct.csv")
    images, labels = digits_arrays()
    x = from_uint8(images[:9])
    denoiser = replace(model.conditioned(labels[:9]), clip=False)
    for row, steps in zip(rows, (2, 5), strict=True):
        levels = make_levels("trailing", model.schedule, steps)
        back = reconstruction(denoiser, x, levels, sampler=sampler)
        error = ((back - x).double() / 2).square().flatten(1).mean(1)
        assert int(row["steps"]) == steps
        assert float(row["error"]) == pytest.approx(float(error.mean()), rel=1e-3)
        assert float(row["standard error"]) == pytest.approx(float(error.std() / 3), rel=1e-3)
    assert "DDIM" in (folder / "reconstruct.md").read_text() or sampler == Heun()
    picture = read_png(folder / "grid.png")
    assert picture.shape[1] == 3 * 50  # a row of images, and one for each number of steps
    left = picture.shape[2] - 9 * 50
    first = picture[0, :48:6, left : left + 48 : 6]
    assert close(first, images[0, 0])


def test_files_are_reconstructed_at_the_models_size(tmp_path):
    write_png(torch.randint(0, 255, (3, 40, 30), dtype=torch.uint8), tmp_path / "x.png")
    trainer(tmp_path).reconstruct(some_ddpm(), images=[str(tmp_path / "x.png")], num_steps=[2])
    assert (tmp_path / "reconstruct" / "reconstruct.csv").exists()


def test_steps_by_default_end_at_the_schedule(tmp_path):
    model = some_ddpm(schedule=LinearSchedule(20), timesteps="trailing")
    trainer(tmp_path).reconstruct(model, DigitsDataModule(), num_images=1)
    rows = table(tmp_path / "reconstruct" / "reconstruct.csv")
    assert [row["steps"] for row in rows] == ["10", "20"]


# ---- levels -----------------------------------------------------------------------------------


def test_found_levels_can_be_given_as_timesteps(tmp_path, capsys):
    model = some_ddpm()
    trainer(tmp_path).levels(model, num_steps=[2, 4], num_images=8)
    file = tmp_path / "levels.json"
    found = json.loads(file.read_text())["levels"]
    assert sorted(found) == ["2", "4"]
    assert "4 steps" in capsys.readouterr().out
    again = some_ddpm(timesteps=str(file), num_steps=4)
    assert again.levels.tolist() == found["4"]
    assert again.sample(range(2)).isfinite().all()


def test_levels_do_not_depend_on_the_batches(tmp_path):
    model = with_classes()
    for size in (3, 64):
        output = str(tmp_path / f"{size}.json")
        trainer(tmp_path).levels(
            model, num_steps=[3], num_images=8, batch_size=size, output=output
        )
    assert json.loads((tmp_path / "3.json").read_text()) == json.loads(
        (tmp_path / "64.json").read_text()
    )


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
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
    tmp_path, monkeypatch, verb, arguments, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        getattr(trainer(tmp_path), verb)(some_ddpm(), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_class_that_the_model_lacks_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"label must lie in \[0, 9\], got 10"):
        trainer(tmp_path).sample(with_classes(), label=10)
    write_png(torch.zeros(1, 8, 8, dtype=torch.uint8), tmp_path / "x.png")
    with pytest.raises(ValueError, match="label must be given with images"):
        trainer(tmp_path).reconstruct(with_classes(), images=[str(tmp_path / "x.png")])


@pytest.mark.parametrize("verb", ["interpolate", "reconstruct"])
@pytest.mark.parametrize("sampler", [DDIM(0.5), Ancestral()])
def test_a_stochastic_sampler_cannot_encode(tmp_path, verb, sampler):
    with pytest.raises(ValueError, match="cannot encode: use a deterministic sampler"):
        getattr(trainer(tmp_path), verb)(some_ddpm(sampler=sampler), DigitsDataModule())


# ---- the command line -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(folder, max_epochs=1)
    config["model"]["init_args"]["network"]["init_args"]["num_classes"] = 10
    main(["fit", "--config", write_config(config, folder / "config.yaml")])
    return folder / "tiny" / "version_0" / "checkpoints" / "last.ckpt"


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


def test_sample_draws_with_the_checkpoints_weights(checkpoint, tmp_path):
    from ddim_pl.training import DDPM

    out = tmp_path / "out"
    main(
        [
            *("sample", "--ckpt_path", str(checkpoint), "--num_images", "3", "--png", "false"),
            *("--npz", "true", "--output", str(out), "--model.sampler", "Heun"),
            *("--model.num_steps", "3"),
        ]
    )
    model = DDPM.load_from_checkpoint(checkpoint, weights_only=True)
    levels = make_levels(model.timesteps, model.schedule, 3)
    expected = to_uint8(model.sample(range(3), sampler=Heun(), levels=levels))
    arrays = np.load(out / "samples.npz")["arr_0"]
    assert close(torch.from_numpy(arrays).permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_verb_without_a_checkpoint_is_an_error(verb):
    with pytest.raises(SystemExit, match=f"error: {verb} needs --ckpt_path"):
        main([verb])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.sampler", "Foo"],
            "sampler cannot be Foo: known are Ancestral, DDIM, DEQ, DPMSolverPP",
        ),
        (["--model.timesteps", "foo"], "timesteps must be one of"),
        (["--model.sampler", "Heun", "--model.sampler.eta", "1"], "no argument 'eta'"),
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
    commands = {
        "sample": ["--num_images", "5", "--npz", "true"],
        "reconstruct": ["--num_images", "5", "--num_steps", "[2,3]"],
        "sweep": [
            *("--timesteps", "[linear,adaptive]", "--num_steps", "[2]"),
            *("--metrics", "[fd,precision_recall]", "--num_shown", "3"),
        ],
    }
    common = ["--ckpt_path", str(checkpoint)]
    for verb, arguments in commands.items():
        main([verb, *common, "--output", str(tmp_path / verb / "1"), *arguments])
        done = subprocess.run(
            [
                *(sys.executable, ROOT / "main.py", verb, *common, "--trainer.devices", "2"),
                *("--output", tmp_path / verb / "2", *arguments),
            ],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    one, two = (np.load(tmp_path / "sample" / n / "samples.npz") for n in "12")
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    assert (one["arr_1"] == two["arr_1"]).all()
    for verb, key in (("reconstruct", "error"), ("sweep", "digits_fd")):
        one, two = (table(tmp_path / verb / n / f"{verb}.csv") for n in "12")
        for a, b in zip(one, two, strict=True):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-3)


@pytest.mark.parametrize("verb", ["sweep", "reconstruct"])
def test_a_single_value_for_a_list_is_told_how_to_be_one(checkpoint, verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--ckpt_path", str(checkpoint), "--num_steps", "5"])
    assert "--num_steps takes a list, got 5: write it as '[5]'" in capsys.readouterr().err
