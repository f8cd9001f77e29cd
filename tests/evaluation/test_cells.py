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
