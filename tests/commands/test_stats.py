"""Statistics of images, written to be measured against."""

import json

import numpy as np
import pytest
import torch

from ddim_pl.cli import main
from ddim_pl.commands.measure import measure
from ddim_pl.commands.stats import stats
from ddim_pl.data.digits import DigitsDataModule, digits_arrays
from ddim_pl.evaluation.measure import weights_of
from ddim_pl.images import read_png, write_png
from ddim_pl.metrics.digits import DigitsFeatures
from ddim_pl.metrics.statistics import read_statistics

COUNT = 60


@pytest.fixture
def folder(tmp_path):
    for index, image in enumerate(digits_arrays()[0][:COUNT]):
        write_png(image, tmp_path / "images" / f"{index:03d}.png")
    return tmp_path


def test_statistics_are_those_of_the_features_and_say_of_which(folder):
    file = folder / "new" / "digits.npz"
    stats(str(file), images=str(folder / "images"), features=DigitsFeatures, device="cpu")
    x = DigitsFeatures()(digits_arrays()[0][:COUNT]).double()
    with np.load(file, allow_pickle=False) as arrays:
        np.testing.assert_allclose(arrays["mu"], x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(arrays["sigma"], x.T.cov(), rtol=1e-4, atol=1e-6)
        assert {"mu", "sigma", "num_images", "extractor", "weights", "images"} < set(arrays)
    found = read_statistics(file)
    assert (found.num_images, found.extractor, found.resize) == (COUNT, "digits", "none")
    assert (found.weights, found.images) == (weights_of(DigitsFeatures()), "as they are")


def test_a_round_trip_is_the_distance_of_the_images(folder, capsys):
    stats(str(folder / "a.npz"), images=str(folder / "images"), features=DigitsFeatures)
    stats(str(folder / "b.npz"), data=DigitsDataModule(), features=DigitsFeatures)
    assert read_statistics(folder / "b.npz").num_images == 1797
    capsys.readouterr()
    real = digits_arrays()[0]
    np.savez(folder / "real.npz", real.permute(0, 2, 3, 1).numpy())
    found = []
    for a, b in (("images", "real.npz"), ("a.npz", "b.npz"), ("images", "b.npz")):
        measure(str(folder / a), str(folder / b), features=DigitsFeatures)
        found.append(json.loads(capsys.readouterr().out))
    values = [each["digits_fd"] for each in found]
    assert values[1:] == pytest.approx(values[:1] * 2, rel=1e-6)
    assert found[1]["b"]["statistics"]["extractor"] == "digits"
    measure(str(folder / "a.npz"), str(folder / "a.npz"), features=DigitsFeatures)
    assert abs(json.loads(capsys.readouterr().out)["digits_fd"]) < 1e-4


def test_other_weights_or_another_extractor_are_refused(folder):
    class Changed(DigitsFeatures):
        def __init__(self):
            super().__init__()
            self.classifier.trunk[0].bias[0] += 1

    class Other(DigitsFeatures):
        name = "other"

    stats(str(folder / "a.npz"), images=str(folder / "images"), features=DigitsFeatures)
    with pytest.raises(ValueError, match=r"weights \w+ of 'digits', got .*a.npz"):
        measure(str(folder / "images"), str(folder / "a.npz"), features=Changed)
    with pytest.raises(ValueError, match=r"extractor 'other' with 32 .*a.npz of 32 features of d"):
        measure(str(folder / "images"), str(folder / "a.npz"), features=Other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "x.txt"}, "output must end in .npz"),
        ({"images": None}, "images or data must be given, one of the two"),
        ({"data": DigitsDataModule()}, "images or data must be given, one of the two"),
        ({"images": "nowhere"}, "images must be a folder of images, or an NPZ"),
        ({"images": "given.npz"}, "images must be images, got statistics in given.npz"),
        ({"output": "given.npz"}, "output must be a new file, got 'given.npz', which exists"),
        ({"device": "nowhere"}, "device must be one that works"),
    ],
)
def test_wrong_arguments_are_errors_before_anything_is_written(
    folder, monkeypatch, arguments, message
):
    monkeypatch.chdir(folder)
    np.savez("given.npz", mu=np.zeros(3), sigma=np.eye(3))
    settings = {"output": "x.npz", "images": "images", "features": DigitsFeatures, **arguments}
    with pytest.raises(ValueError, match=message):
        stats(**settings)
    assert sorted(path.name for path in folder.iterdir()) == ["given.npz", "images"]


def test_the_command_line_takes_a_folder_or_a_data_module(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    common = ["--features", "DigitsFeatures", "--device", "cpu"]
    main(["stats", "a.npz", "--images", "images", *common])
    assert "a.npz: 32 features digits of 60 images" in capsys.readouterr().out
    module = ["--data", "ImageFolderDataModule", "--data.root", "images"]
    module += ["--data.image_size", "8", "--data.channels", "1"]
    main(["stats", "b.npz", *module, *common])
    a, b = read_statistics(folder / "a.npz"), read_statistics(folder / "b.npz")
    torch.testing.assert_close(a.covariance, b.covariance)
    assert b.images.startswith("Squaring(")


def test_colours_that_an_extractor_does_not_see_are_said_and_recorded(folder):
    for path in sorted((folder / "images").iterdir()):
        write_png(read_png(path).expand(3, -1, -1), path)
    file = folder / "gray.npz"
    with pytest.warns(UserWarning, match="have three channels and are converted to gray"):
        stats(str(file), images=str(folder / "images"), features=DigitsFeatures, device="cpu")
    assert read_statistics(file).images == "converted to gray"
