"""`main.py forward`."""

import pytest
import torch
from command_runs import table, trainer, with_classes
from tiny import some_ddpm

from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.images import read_png, write_png
from ddim_pl.noise import GammaNoise


def test_it_writes_a_table_and_a_row_for_each_image_and_eta(tmp_path):
    arguments = {
        "num_images": 9,
        "num_shown": 2,
        "num_steps": 20,
        "num_points": 5,
        "etas": [0.0, 1.0],
    }
    trainer(tmp_path).forward(some_ddpm(), DigitsDataModule(), **arguments)
    folder = tmp_path / "forward"
    rows = table(folder / "forward.csv")
    assert [float(row["level"]) for row in rows] == 2 * [50.0, 350.0, 700.0, 1000.0]
    for row in rows:
        assert abs(float(row["mean"])) < 0.2  # of 576 draws
        assert float(row["deviation"]) == pytest.approx(1, abs=0.15)
    assert all(float(row["correlation"]) == pytest.approx(1) for row in rows[:4])
    # That of DDPM's chain: the ratio of the levels' alpha / sigma.
    clean, noisy = (some_ddpm().schedule(float(rows[k]["level"])) for k in (4, 5))
    expected = (noisy.alpha / noisy.sigma) / (clean.alpha / clean.sigma)
    assert float(rows[5]["correlation"]) == pytest.approx(float(expected), abs=0.12)
    assert read_png(folder / "grid.png").shape[1] == 4 * 50
    assert "9 images on DDIM's forward paths of 20 steps" in (folder / "forward.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"etas": [2.0]}, r"etas must be one or more numbers in \[0, 1\], got \[2.0\]"),
        ({"etas": []}, "etas must be one or more"),
        ({"num_points": 1}, "num_points must be at least 2"),
        ({"num_steps": 2000}, "num_steps must lie in"),
    ],
)
def test_wrong_arguments_are_errors_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).forward(some_ddpm(), DigitsDataModule(), **arguments)
    assert not (tmp_path / "forward").exists()


def test_gamma_noise_has_other_paths(tmp_path):
    with pytest.raises(ValueError, match="noise must be Gaussian for forward, got GammaNoise"):
        trainer(tmp_path).forward(some_ddpm(noise=GammaNoise(0.1), sampler=None))


def test_files_need_no_class(tmp_path):
    write_png(torch.randint(0, 255, (1, 8, 8), dtype=torch.uint8), tmp_path / "x.png")
    files = [str(tmp_path / "x.png")]
    trainer(tmp_path).forward(with_classes(), images=files, num_steps=4, etas=[0.5])
    assert read_png(tmp_path / "forward" / "grid.png").shape[1] == 50
