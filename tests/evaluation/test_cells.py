"""Cells: measured once and kept."""

import csv
from functools import partial

import pytest
import torch
from sweeps import sweep, trainer
from tiny import some_ddpm

from callbacks import FrechetDistance
from ddim_pl.data.base import TensorImages
from ddim_pl.data.digits import DigitsDataModule, digits_arrays
from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.data.teacher_pairs import TeacherPairsDataModule
from ddim_pl.evaluation.cells import identity_of
from ddim_pl.images import write_png
from ddim_pl.metrics.digits import DigitsFeatures
from ddim_pl.metrics.quality import SampleQuality
from ddim_pl.metrics.statistics import FeatureStatistics
from ddim_pl.samplers import DDIM
from ddim_pl.training.fingerprint import digest_of


def test_a_cell_has_the_distance_that_the_callback_measures(tmp_path):
    model = some_ddpm(timesteps="quadratic", num_steps=3)
    callback = FrechetDistance(DigitsFeatures, num_samples=40, batch_size=40)
    t = trainer(tmp_path, callback)
    t.test(model, DigitsDataModule(), verbose=False)
    rows = sweep(
        tmp_path / "sweep", model, timesteps=None, samplers=None, num_steps=[3], num_samples=40
    )
    expected = float(t.callback_metrics["test/digits_fd"])
    assert float(rows[0]["digits_fd"]) == pytest.approx(expected, rel=1e-4)


def test_settings_come_from_the_callback_where_none_are_given(tmp_path):
    callback = FrechetDistance(
        DigitsFeatures, num_samples=37, batch_size=10, metrics=("fd", "precision_recall")
    )
    trainer(tmp_path, callback).sweep(
        some_ddpm(), DigitsDataModule(), num_steps=[2], output=str(tmp_path)
    )
    assert "37 images" in (tmp_path / "sweep.md").read_text()
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert {"digits_fd", "digits_precision", "digits_recall"} <= set(rows[0])


@pytest.mark.parametrize("other", ["images", "extractor", "precision", "metrics", "noise_source"])
def test_a_cell_of_other_circumstances_is_measured_anew(tmp_path, monkeypatch, other):
    class OtherDigits(DigitsDataModule):
        pixel = 0

        def load(self, train):
            images, labels = digits_arrays()
            images[0, 0, 0, 0] += self.pixel
            return TensorImages(images, labels, 10)

    class OtherFeatures(DigitsFeatures):
        def __init__(self, change=0.0):
            super().__init__()
            self.classifier.head.bias.data += change

    def run(data, features, precision, metrics=("fd",), source="generators"):
        calls.clear()
        model.noise_source = source
        trainer(tmp_path, precision=precision).sweep(
            model,
            data,
            timesteps=["linear"],
            num_steps=[1],
            features=features,
            num_samples=40,
            metrics=metrics,
            output=str(tmp_path / "out"),
        )
        return len(calls)

    model, calls, original = some_ddpm(), [], SampleQuality.compute
    monkeypatch.setattr(SampleQuality, "compute", lambda s: calls.append(1) or original(s))
    first = (OtherDigits(), OtherFeatures, "32-true")
    assert run(*first) == 1
    assert run(*first) == 0
    changed = OtherDigits()
    changed.pixel = 1
    others = {
        "images": (changed, *first[1:]),
        "extractor": (first[0], partial(OtherFeatures, 1.0), first[2]),
        "precision": (*first[:2], "bf16-mixed"),
        "metrics": (*first, ("fd", "kid")),
        "noise_source": (*first, ("fd",), "philox"),
    }
    assert run(*others[other]) == 1


def test_a_damaged_cell_is_measured_anew(tmp_path):
    model = some_ddpm()
    first = sweep(tmp_path, model, timesteps=["linear"], num_steps=[2], samplers=[DDIM()])
    (file,) = (tmp_path / "cells").glob("*.json")
    file.write_text(file.read_text()[:20])
    with pytest.warns(UserWarning, match="is damaged"):
        again = sweep(tmp_path, model, timesteps=["linear"], num_steps=[2], samplers=[DDIM()])
    assert first == again


def test_real_images_are_read_once(tmp_path):
    class Counting(DigitsFeatures):
        seen = 0

        def forward(self, images):
            type(self).seen += len(images)
            return super().forward(images)

    sweep(tmp_path, features=Counting)
    # Two black ones are tried first, and the features of eight are kept beside the sums.
    assert Counting.seen == 2 + 1797 + 8 + 6 * 40


def test_images_that_are_resized_otherwise_are_other_images(tmp_path):
    """Even if the hundred that are looked at are equal, as here, where none is resized."""
    write_png(torch.zeros(1, 8, 8, dtype=torch.uint8), tmp_path / "0.png")

    def name(**arguments):
        data = ImageFolderDataModule(str(tmp_path), 8, **arguments)
        data.setup("fit")
        pairs = TeacherPairsDataModule(data, "unused", num_pairs=1)
        pairs.setup("fit")
        names = identity_of(data), identity_of(pairs)
        assert names[0].split()[2] == names[1].split()[2]
        return names[0]

    ways = [{}, {"resample": "box"}, {"crop_first": True}, {"resize": False}]
    assert len({name(**way) for way in ways}) == len(ways)


def test_digits_have_the_name_they_always_had():
    """Their pixels are the same, so their finished cells are found."""
    data = DigitsDataModule()
    data.setup("fit")
    digest = digest_of({"images": data.train_set.images(torch.arange(100) * 1797 // 100)})
    assert identity_of(data) == f"DigitsDataModule 1797 {digest}"


def test_several_seeds_give_mean_deviation_and_the_minimum_and_share_cells(tmp_path):
    model = some_ddpm()
    way = {"timesteps": ["linear"], "num_steps": [2], "samplers": [DDIM()]}
    way["metrics"] = ("fd", "precision_recall")
    single = [sweep(tmp_path / "one", model, seed=seed, **way)[0] for seed in (5, 6, 9)]
    (row,) = sweep(tmp_path / "all", model, seeds=[5, 6, 9], **way)
    for name in ("digits_fd", "digits_precision", "digits_recall"):
        values = torch.tensor([float(each[name]) for each in single], dtype=torch.float64)
        assert float(row[name]) == pytest.approx(float(values.mean()), rel=1e-9)
        assert float(row[f"{name} deviation"]) == pytest.approx(float(values.std()), rel=1e-9)
    least = min(float(each["digits_fd"]) for each in single)
    assert float(row["digits_fd minimum of 3"]) == least
    assert [name for name in row if "minimum" in name] == ["digits_fd minimum of 3"]
    text = (tmp_path / "all" / "sweep.md").read_text()
    assert "mean and sample deviation of 3 sampling seeds (5, 6, 9)" in text
    assert len(list((tmp_path / "all" / "cells").glob("*.json"))) == 3
    sweep(tmp_path / "all", model, seed=6, **way)  # measured already
    assert len(list((tmp_path / "all" / "cells").glob("*.json"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [1, 2], "seed": 3}, "seed must be left out with seeds"),
        ({"seeds": [1, 1]}, r"seeds must be different numbers .* got \[1, 1\]"),
        ({"seeds": [-1, 2]}, "seeds must be different numbers of at least 0"),
        ({"statistics": "nowhere.npz"}, "nowhere.npz cannot be read"),
    ],
)
def test_wrong_seeds_and_statistics_are_errors_before_anything_is_written(
    tmp_path, arguments, message
):
    with pytest.raises(ValueError, match=message):
        sweep(tmp_path / "out", some_ddpm(), **arguments)
    assert not (tmp_path / "out").exists()


def test_statistics_are_the_real_side_of_a_table_and_part_of_its_cells(tmp_path):
    features = DigitsFeatures()(digits_arrays()[0]).double()
    model, way = some_ddpm(), {"timesteps": ["linear"], "num_steps": [2], "samplers": [DDIM()]}
    (images,) = sweep(tmp_path / "out", model, **way)
    for shift in (0.0, 1.0):
        known = {"num_images": 1797, "extractor": "digits"}
        moments = features.mean(0) + shift, features.T.cov()
        FeatureStatistics(*moments, **known).write(tmp_path / "real.npz")
        (row,) = sweep(tmp_path / "out", model, statistics=str(tmp_path / "real.npz"), **way)
        same = float(row["digits_fd"]) == pytest.approx(float(images["digits_fd"]), rel=1e-5)
        assert same == (shift == 0)
    assert len(list((tmp_path / "out" / "cells").glob("*.json"))) == 3
    text = (tmp_path / "out" / "sweep.md").read_text()
    assert f"real side {tmp_path / 'real.npz'} of 1797 images" in text
