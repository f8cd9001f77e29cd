"""Distances between real images."""

import pytest
import torch
import yardstick
from torchmetrics.image.fid import FrechetInceptionDistance

from ddim_pl.data.digits import digits_arrays
from ddim_pl.metrics.digits import DigitsFeatures


def test_the_distance_is_that_of_torchmetrics():
    images, _ = digits_arrays()
    metric = FrechetInceptionDistance(feature=DigitsFeatures())
    metric.update(images[:900], real=True)
    metric.update(images[900:], real=False)
    first, second = (
        yardstick.features_of(DigitsFeatures(), part) for part in (images[:900], images[900:])
    )
    assert yardstick.distance(first, second) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_more_noise_is_further_away_and_stays_uint8():
    images, _ = digits_arrays()
    generator = torch.Generator().manual_seed(0)
    real = yardstick.features_of(DigitsFeatures(), images)
    rows = dict(
        yardstick.changed(
            images, real, lambda x: yardstick.features_of(DigitsFeatures(), x), generator
        )
    )
    values = list(rows.values())[:4]
    assert values == sorted(values)
    assert yardstick.noisy(images, 300, generator).unique().tolist()[::255] == [0, 255]


def test_a_folder_is_asked_for_where_it_is_needed(monkeypatch, capsys):
    for arguments in (["cifar10"], ["digits", "folder"]):
        monkeypatch.setattr("sys.argv", ["yardstick.py", *arguments])
        with pytest.raises(SystemExit):
            yardstick.main()
        assert "root must be given for cifar10" in capsys.readouterr().err
