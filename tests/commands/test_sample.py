"""`main.py sample`."""

import contextlib

import pytest
import torch
from command_runs import arrays_of, close, trainer, with_classes
from tiny import some_ddpm

from ddim_pl.cli import main
from ddim_pl.cli_checks import check_module
from ddim_pl.images import grid, read_png, to_uint8
from ddim_pl.samplers import Heun
from ddim_pl.timesteps import make_levels


@pytest.mark.parametrize("batch_size", [3, 250])
def test_sample_writes_the_images_of_the_model(tmp_path, batch_size):
    model = some_ddpm()
    trainer(tmp_path).sample(model, num_images=7, npz=True, batch_size=batch_size)
    folder = tmp_path / "sample"
    expected = to_uint8(model.sample(range(7)))
    assert sorted(f.name for f in folder.iterdir()) == [
        "grid.png",
        "images",
        "manifest.json",
        "samples.npz",
    ]
    names = [f"{i:06d}.png" for i in range(7)]
    assert sorted(f.name for f in (folder / "images").iterdir()) == names
    for index, image in enumerate(expected):
        assert close(read_png(folder / "images" / f"{index:06d}.png"), image)
    arrays = arrays_of(folder / "samples.npz")
    assert list(arrays) == ["arr_0"]
    assert arrays["arr_0"].shape == (7, 8, 8, 1)
    assert close(torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2), expected)
    assert close(read_png(folder / "grid.png"), grid(expected)[:1])


@pytest.mark.parametrize(("label", "columns"), [(None, 10), (1, None)])
def test_the_grid_has_a_column_for_each_class(tmp_path, label, columns):
    model = with_classes()
    model.sampler, model.num_steps = Heun(), 2
    trainer(tmp_path).sample(model, num_images=7, label=label)
    labels = None if label is None else torch.full((7,), label)
    expected = grid(to_uint8(model.sample(range(7), label=labels)), columns=columns)
    assert close(read_png(tmp_path / "sample" / "grid.png"), expected[:1])


def test_sample_goes_on_where_an_earlier_call_ended(tmp_path):
    model = some_ddpm()
    trainer(tmp_path).sample(model, num_images=3, output=str(tmp_path / "mine"))
    trainer(tmp_path).sample(model, num_images=2, first=3, output=str(tmp_path / "mine"))
    expected = to_uint8(model.sample(range(5)))
    for index in range(5):
        assert close(read_png(tmp_path / "mine/images" / f"{index:06d}.png"), expected[index])


def test_sample_of_a_class_and_a_seed(tmp_path):
    model = with_classes()
    trainer(tmp_path).sample(model, num_images=4, label=3, seed=9, npz=True, png=False)
    arrays = arrays_of(tmp_path / "sample" / "samples.npz")
    assert arrays["arr_1"].tolist() == [3] * 4
    expected = to_uint8(model.sample(range(4), label=torch.tensor([3] * 4), seed=9))
    assert close(torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2), expected)
    assert not (tmp_path / "sample" / "images").exists()
    trainer(tmp_path).sample(model, num_images=12, npz=True)
    assert arrays_of(tmp_path / "sample" / "samples.npz")["arr_1"].tolist() == [*range(10), 0, 1]


def test_a_second_sample_leaves_none_of_the_first_and_says_so(tmp_path, capsys):
    model = some_ddpm()
    trainer(tmp_path).sample(model, num_images=5)
    assert "removed" not in capsys.readouterr().out
    trainer(tmp_path).sample(model, num_images=2)
    assert "7 files of an earlier call are removed" in capsys.readouterr().out
    assert len(list((tmp_path / "sample/images").glob("*.png"))) == 2


def test_sample_that_goes_on_in_the_run_keeps_what_is_there(tmp_path):
    model = some_ddpm()
    trainer(tmp_path).sample(model, num_images=3, npz=True)
    trainer(tmp_path).sample(model, num_images=2, first=3, npz=True)
    assert len(list((tmp_path / "sample/images").glob("*.png"))) == 5
    names = ["grid-from-000003.png", "grid.png", "manifest-from-000003.json", "manifest.json"]
    names += ["samples-from-000003.npz", "samples.npz"]
    found = [f.name for f in (tmp_path / "sample").iterdir() if f.is_file()]
    assert sorted(found) == names


@pytest.mark.parametrize(
    ("first", "second"),
    [({}, {}), ({"png": False, "npz": True}, {}), ({"num_images": 4}, {"first": 3})],
)
def test_sample_mixes_no_images_of_two_calls(tmp_path, first, second):
    model, common = some_ddpm(), {"num_images": 2, "output": str(tmp_path / "mine")}
    trainer(tmp_path).sample(model, **{**common, **first})
    before = sorted((tmp_path / "mine").rglob("*"))
    with pytest.raises(ValueError, match="output must be a folder without results of an earlier"):
        trainer(tmp_path).sample(model, **{**common, **second})
    assert sorted((tmp_path / "mine").rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "warns"),
    [({}, False), ({"num_steps": 10}, True), ({"sampler": Heun()}, True)],
)
def test_a_student_warns_of_steps_that_it_was_not_distilled_to(changes, warns):
    student = some_ddpm(**{"num_steps": 2, "distilled_steps": 2, **changes})
    with (
        pytest.warns(UserWarning, match="distilled") if warns else contextlib.nullcontext() as told
    ):
        check_module(student)
    if told is not None:
        assert "distilled to 2 steps of DDIM(eta=0.0), and knows no others" in str(told[0].message)


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
    arrays = arrays_of(out / "samples.npz")["arr_0"]
    assert close(torch.from_numpy(arrays).permute(0, 3, 1, 2), expected)
