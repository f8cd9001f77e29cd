"""`main.py inpaint`."""

import pytest
import torch
from command_runs import trainer, with_classes
from tiny import some_ddpm

from ddim_pl.commands.sources import known_parts
from ddim_pl.data.digits import DigitsDataModule, digits_arrays
from ddim_pl.images import from_uint8, read_png, to_uint8, write_png
from ddim_pl.noise import GammaNoise
from ddim_pl.samplers import RePaint

FEW = {"num_images": 3, "num_fills": 2, "jump_length": 2, "num_resamples": 2, "batch_size": 4}


def test_the_known_part_stays_and_the_rest_is_repaints(tmp_path):
    model = with_classes()
    trainer(tmp_path).inpaint(model, DigitsDataModule(), **FEW)
    images, labels = digits_arrays()
    known = known_parts(8, 8)["half"]
    folder = tmp_path / "inpaint"
    for number in range(2):
        indices = range(3 * number, 3 * number + 3)
        z, generators = model.latents(indices, model.levels[0])
        x = from_uint8(images[:3])
        expected = RePaint(1.0, 2, 2)(
            model.conditioned(labels[:3]),
            z,
            model.levels,
            image=x,
            mask=known,
            generator=generators,
        )
        for index in range(3):
            found = read_png(folder / "images" / f"{index:06d}-{number}.png")
            assert torch.equal(found[:, known], images[index][:, known])
            assert (found.int() - to_uint8(expected)[index].int()).abs().max() <= 1
    assert read_png(folder / "grid.png").shape[1] == 4 * 50


def test_a_mask_is_a_file_white_where_known(tmp_path):
    image = torch.randint(0, 255, (1, 8, 8), dtype=torch.uint8)
    write_png(image, tmp_path / "x.png")
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, 2:5] = 255
    write_png(mask, tmp_path / "mask.png")
    files = {"images": [str(tmp_path / "x.png")], "mask": str(tmp_path / "mask.png")}
    trainer(tmp_path).inpaint(some_ddpm(), **{**FEW, **files, "num_fills": 1})
    found = read_png(tmp_path / "inpaint" / "images" / "000000-0.png")
    assert torch.equal(found[mask == 255], image[mask == 255])
    assert not torch.equal(found, image)


def test_named_masks_know_what_they_say():
    parts = known_parts(8, 12)
    shares = {name: float(mask.float().mean()) for name, mask in parts.items()}
    wanted = {"half": 1 / 2, "expand": 1 / 4, "centre": 3 / 4, "lines": 1 / 2, "pixels": 1 / 4}
    assert shares == wanted
    assert parts["half"][:, :6].all()
    assert not parts["centre"][4, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": "nowhere.png"}, r"mask must be one of \['centre', .*\] or an image file, got"),
        ({"mask": "WHITE"}, "mask must have a black part"),
        ({"jump_length": 5}, "jump_length must be less than the number of steps, 5"),
        ({"num_fills": 0}, "num_fills must be at least 1"),
        ({"eta": 2.0}, "eta must lie in"),
        ({"label": 1}, "label must be left out without images, got 1"),
    ],
)
def test_wrong_arguments_are_errors_before_anything_is_written(tmp_path, arguments, message):
    write_png(torch.full((1, 8, 8), 255, dtype=torch.uint8), tmp_path / "white.png")
    if arguments.get("mask") == "WHITE":
        arguments = {"mask": str(tmp_path / "white.png")}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).inpaint(some_ddpm(), DigitsDataModule(), **{**FEW, **arguments})
    assert not (tmp_path / "inpaint").exists()


def test_gamma_noise_cannot_be_repainted(tmp_path):
    with pytest.raises(ValueError, match="noise must be Gaussian for inpaint, got GammaNoise"):
        trainer(tmp_path).inpaint(some_ddpm(noise=GammaNoise(0.1), sampler=None), **FEW)
