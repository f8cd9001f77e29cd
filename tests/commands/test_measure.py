"""Distances of two sides without a model."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from ddim_pl.cli import main
from ddim_pl.commands.measure import make_extractor, measure
from ddim_pl.data.digits import digits_arrays
from ddim_pl.evaluation.measure import weights_of
from ddim_pl.images import read_png, write_png
from ddim_pl.metrics.digits import WEIGHTS, DigitsFeatures
from ddim_pl.metrics.quality import NUMBERS, SampleQuality
from ddim_pl.metrics.statistics import FeatureStatistics

ROOT = Path(__file__).parents[2]
NUM_REAL, NUM_FAKE = 120, 90


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Digits, and noisier ones, as PNGs."""
    root = tmp_path_factory.mktemp("sides")
    images = digits_arrays()[0]
    noise = torch.randint(0, 90, (NUM_FAKE, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    fake = (images[500 : 500 + NUM_FAKE].int() + noise).clamp(max=255).to(torch.uint8)
    for name, some in (("real", images[:NUM_REAL]), ("fake", fake)):
        for index, image in enumerate(some):
            write_png(image, root / name / f"{index:03d}.png")
        np.savez(root / f"{name}.npz", some.permute(0, 2, 3, 1).numpy())
    return root


def measured(folder, a, b, capsys, **arguments):
    settings = {"features": DigitsFeatures, "device": "cpu", **arguments}
    measure(str(folder / a), str(folder / b), **settings)
    return json.loads(capsys.readouterr().out)


class Digits(FeatureExtractorBase):
    """The features of digits for torch-fidelity, which reads RGB."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        self.features = DigitsFeatures()

    @staticmethod
    def get_provided_features_list():
        return ("32",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "32"

    def forward(self, images):
        return (self.features(images[:, :1]),)


def test_the_distance_of_two_folders_is_torch_fidelitys(folders, capsys):
    torch_fidelity.register_feature_extractor("digits", Digits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch_fidelity.calculate_metrics(
            **{"input1": str(folders / "fake"), "input2": str(folders / "real")},
            **{"fid": True, "cuda": False, "verbose": False, "cache": False},
            **{"save_cpu_ram": True, "feature_extractor": "digits", "batch_size": 32},
        )
    found = measured(folders, "fake", "real", capsys)
    expected = theirs["frechet_inception_distance"]
    assert expected > 1
    assert found["digits_fd"] == pytest.approx(expected, rel=1e-6)


def test_folders_arrays_and_statistics_have_one_distance(folders, tmp_path, capsys):
    features = DigitsFeatures()
    for name in ("real", "fake"):
        images = torch.from_numpy(np.load(folders / f"{name}.npz")["arr_0"]).permute(0, 3, 1, 2)
        x = features(images).double().numpy()
        np.savez(folders / f"{name}-stats.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    expected = measured(folders, "fake", "real", capsys)["digits_fd"]
    for ending in (".npz", "-stats.npz"):
        for sides in ((f"fake{ending}", "real"), (f"fake{ending}", f"real{ending}")):
            found = measured(folders, *sides, capsys)["digits_fd"]
            assert found == pytest.approx(expected, rel=1e-6), sides


def test_all_metrics_are_those_of_the_images_and_what_they_are_of_is_told(
    folders, tmp_path, capsys
):
    file = tmp_path / "out" / "found.json"
    found = measured(
        folders, "fake", "real", capsys, metrics=list(NUMBERS), output=str(file), seed=3
    )
    quality = SampleQuality(DigitsFeatures(), list(NUMBERS), seed=3)
    for name in ("real", "fake"):
        images = torch.from_numpy(np.load(folders / f"{name}.npz")["arr_0"]).permute(0, 3, 1, 2)
        quality.update(images, real=name == "real")
    for key, value in quality.compute().items():
        assert found[key] == pytest.approx(float(value), rel=1e-4), key
    assert found["a"]["num_images"] == NUM_FAKE
    assert found["b"] == {
        "source": str(folders / "real"),
        "num_images": NUM_REAL,
        "size": [8, 8],
        "channels": 1,
    }
    assert found["extractor"] == "digits"
    assert found["weights"] == weights_of(DigitsFeatures())
    assert {"resize", "precision", "device", "torch", "ddim_pl"} <= set(found)
    assert json.loads(file.read_text()) == found


def test_of_a_reference_batch_the_distance_takes_the_statistics(folders, tmp_path, capsys):
    """As guided-diffusion, whose files hold the moments of far more images than they show."""
    images = np.load(folders / "real.npz")["arr_0"]
    x = DigitsFeatures()(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy()
    shifted = {"mu": x.mean(0) + 1, "sigma": np.cov(x, rowvar=False)}
    np.savez(folders / "batch.npz", arr_0=images, **shifted)
    np.savez(folders / "shifted.npz", **shifted)
    both = measured(folders, "fake", "batch.npz", capsys, metrics=["fd", "precision_recall"])
    alone = measured(folders, "fake", "shifted.npz", capsys)
    plain = measured(folders, "fake", "real", capsys, metrics=["precision_recall"])
    assert both["digits_fd"] == pytest.approx(alone["digits_fd"], rel=1e-9)
    assert both["digits_recall"] == plain["digits_recall"]


@pytest.mark.parametrize(
    ("a", "b", "arguments", "message"),
    [
        ("nowhere", "real", {}, "a must be a folder of images, or an NPZ"),
        ("fake", "nowhere", {}, "b must be a folder of images, or an NPZ"),
        ("fake", "wide.npz", {}, "'digits' with 32 features, got .*wide.npz of 7 features"),
        ("wide.npz", "real", {}, "'digits' with 32 features, got .*wide.npz of 7 features"),
        (
            "fake",
            "wide.npz",
            {"metrics": ["fd", "kid"]},
            "metrics must be fd alone where a side is",
        ),
        ("wide.npz", "real", {"metrics": ["fd", "inception_score"]}, "metrics must be fd alone"),
        ("fake", "real", {"metrics": ["inception_score"]}, "one that compares a and b"),
        ("fake", "real", {"metrics": ["fid"]}, "metrics must be one or more of fd"),
        ("fake", "rgb.npz", {}, "features must take uint8 images|images must have shape"),
        (
            "fake",
            "one.npz",
            {},
            "the number of images of b must be at least 2 for fd, got 1: give",
        ),
        (
            "one.npz",
            "real",
            {},
            "the number of images of a must be at least 2 for fd, got 1: give",
        ),
        ("fake", "real", {"device": "nowhere"}, "device must be one that works, got 'nowhere'"),
        ("fake", "real", {"output": "x.txt"}, "output must end in .json"),
        ("fake", "real", {"batch_size": 0}, "batch_size must be at least 1"),
        ("fake", "real", {"weights": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_what_cannot_be_measured_is_an_error(folders, a, b, arguments, message):
    np.savez(folders / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(folders / "rgb.npz", np.zeros((40, 8, 8, 3), np.uint8))
    np.savez(folders / "one.npz", np.zeros((1, 8, 8, 1), np.uint8))
    settings = {"features": DigitsFeatures, "device": "cpu", **arguments}
    with pytest.raises((ValueError, OSError), match=message):
        measure(str(folders / a), str(folders / b), **settings)


def test_a_single_subset_has_no_deviation(folders, capsys):
    found = measured(folders, "real", "real", capsys, metrics=["kid"])
    assert found["kid_subsets"] == {"count": 1, "size": NUM_REAL}
    assert "digits_kid" in found
    assert "digits_kid_std" not in found
    assert "kid_subsets" not in measured(folders, "real", "real", capsys)


def test_colours_that_an_extractor_does_not_see_are_said(folders, tmp_path, capsys):
    for path in sorted((folders / "fake").iterdir()):
        write_png(read_png(path).expand(3, -1, -1), tmp_path / path.name)
    with pytest.warns(UserWarning, match="have three channels and are converted to gray, since"):
        found = measured(tmp_path, ".", folders / "real", capsys)
    assert (found["a"]["channels"], found["a"]["converted"]) == (3, "to gray")
    assert found["b"]["channels"] == 1
    assert "converted" not in found["b"]
    plain = measured(folders, "fake", "real", capsys)
    assert plain["digits_fd"] == pytest.approx(found["digits_fd"], rel=1e-6)


def test_weights_are_given_under_either_name():
    assert make_extractor(DigitsFeatures, str(WEIGHTS)).name == "digits"
    message = r"could not be read from nowhere.*/checkpoints, or give its path as --weights, or an"
    with pytest.raises(ValueError, match=f"the Inception weights {message}"):
        make_extractor(None, "nowhere.pth")
    with pytest.raises(ValueError, match="weights must be left out for an extractor without"):
        make_extractor(lambda: DigitsFeatures(), "x")


def test_the_command_line(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(folders / "fake"), str(folders / "real"), "--features", "DigitsFeatures"]
    main(["measure", *arguments, "--metrics", "[fd,kid]", "--device", "cpu"])
    found = json.loads(capsys.readouterr().out)
    assert {"digits_fd", "digits_kid", "digits_kid_std"} <= set(found)
    assert found["kid_subsets"] == {"count": 100, "size": NUM_FAKE}
    main(["measure", *arguments, "--weights", str(WEIGHTS), "--device=cpu"])
    assert json.loads(capsys.readouterr().out)["digits_fd"] == found["digits_fd"]
    assert not list(tmp_path.iterdir())
    for wrong, message in (
        (
            ["--features", "DigitFeatures"],
            "features cannot be DigitFeatures: did you mean DigitsFeatures?",
        ),
        (["--metric", "fd"], "metric"),
        (["--metrics", "fd"], "metrics must be a list of texts, got fd: write it as '[fd]'"),
        (["--weights", "nowhere"], "nowhere"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["measure", *arguments, *wrong])
        said = capsys.readouterr().err
        text = stop.value.code if isinstance(stop.value.code, str) else said
        (line,) = [line for line in text.splitlines() if line.startswith("error")]
        assert message in line


def test_a_warning_is_one_line_and_said_once(folders, tmp_path):
    for index in range(20):
        write_png(torch.full((1, 8, 8), index, dtype=torch.uint8), tmp_path / f"{index}.png")
    arguments = ["measure", tmp_path, folders / "real", "--features", "DigitsFeatures"]
    command = [sys.executable, ROOT / "main.py", *arguments, "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    said = [line for line in done.stderr.splitlines() if "singular" in line]
    (line,) = said
    assert line.endswith(
        "warning: 20 samples give a singular covariance of 32 features: take the "
        "distance as a rough guide"
    )
    assert "rank_zero_warn" not in done.stderr


def test_statistics_of_another_extractor_are_found_before_a_download(folders, tmp_path):
    path, (mean, covariance) = tmp_path / "digits.npz", (torch.zeros(32), torch.eye(32))
    FeatureStatistics(mean.double(), covariance.double(), extractor="digits").write(path)
    message = r"got Inception-v3 .*digits\.npz of 32 features of digits: give --features"
    with pytest.raises(ValueError, match=message):
        measure(str(folders / "real"), str(path))
