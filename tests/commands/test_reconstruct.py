"""`main.py reconstruct`."""

from dataclasses import replace

import pytest
import torch
from command_runs import close, table, trainer, with_classes
from tiny import some_ddpm

from ddim_pl.data.digits import DigitsDataModule, digits_arrays
from ddim_pl.images import from_uint8, read_png, write_png
from ddim_pl.inversion import reconstruct as reconstruction
from ddim_pl.samplers import DDIM, Heun
from ddim_pl.schedules import LinearSchedule
from ddim_pl.timesteps import make_levels


@pytest.mark.parametrize("sampler", [DDIM(), Heun(), DDIM(clip=True)])
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
    sampler = replace(sampler, clip=None)  # encoding never clips
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


@pytest.mark.filterwarnings("ignore:.*distinct levels")
def test_numbers_of_steps_that_round_to_one_count_have_a_row_each(tmp_path):
    model = some_ddpm(timesteps="quadratic")
    trainer(tmp_path).reconstruct(
        model, DigitsDataModule(), num_images=1, timesteps="quadratic", num_steps=[5, 29, 30]
    )
    folder = tmp_path / "reconstruct"
    assert [row["steps"] for row in table(folder / "reconstruct.csv")] == ["5", "29", "29"]
    assert read_png(folder / "grid.png").shape[1] == 4 * 50
