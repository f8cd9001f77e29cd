from urllib.error import URLError

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from inceptions import random_inception
from torch import nn

from callbacks import FrechetDistance
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.metrics.inception import InceptionFeatures
from ddim_pl.metrics.quality import SampleQuality


def test_no_network_is_an_error_that_names_the_file(monkeypatch):
    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", offline)
    with pytest.raises(
        ValueError, match=r"weights-inception-2015-12-05-6726825d.pth.*weights_path"
    ):
        InceptionFeatures()


def test_missing_weights_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="could not be read"):
        InceptionFeatures(str(tmp_path / "nowhere.pth"))


@pytest.mark.slow
def test_weights_load_from_a_file_and_the_number_is_called_fid(tmp_path):
    path = tmp_path / "weights.pth"
    theirs = random_inception("2048")
    torch.save(theirs.state_dict(), path)
    features = InceptionFeatures(str(path))
    grey = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    expected = theirs(grey.repeat(1, 3, 1, 1))
    # Batch norm is folded; rounding is relative to the largest feature.
    torch.testing.assert_close(features(grey), expected, rtol=0, atol=1e-6 * expected.max().item())
    assert expected.shape == (2, 2048)
    callback = FrechetDistance(lambda: features, num_samples=10)
    data = DigitsDataModule()
    data.setup("test")
    with pytest.warns(UserWarning, match="singular covariance"):
        callback.check(data, "test")
    assert callback.settings.quality.keys[0] == "fid"


@pytest.mark.slow
def test_folded_batch_norm_gives_the_features_of_torch_fidelity(tmp_path):
    theirs = random_inception("2048")
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = InceptionFeatures(str(tmp_path / "weights.pth"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in theirs.modules()) == 94
    generator = torch.Generator().manual_seed(1)
    # Of the size that the network has inside: no resizing, which rounds differently in float64.
    images = torch.randint(0, 256, (3, 3, 299, 299), dtype=torch.uint8, generator=generator)
    images[1] = images[1, :, :1, :1]  # one colour
    features, unfolded = ours(images), theirs(images)
    scale = unfolded.abs().max()
    assert unfolded.std(dim=0).mean() > 1e-2 * scale  # says something
    assert (features - unfolded).abs().max() < 1e-6 * scale
    # As near to the exact ones as the unfolded network is.
    theirs.double()._dtype = torch.float64
    exact = theirs(images)
    assert (features - exact).abs().max() < 2 * (unfolded - exact).abs().max()
    assert (features - exact).abs().max() < 1e-6 * scale


@pytest.mark.slow
def test_features_do_not_depend_on_autocast_or_on_moves(tmp_path):
    torch.save(random_inception("2048").state_dict(), tmp_path / "weights.pth")
    ours = InceptionFeatures(str(tmp_path / "weights.pth"))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = ours(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(images), expected)
    kernel = ours.network.Conv2d_2a_3x3.conv.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert ours.to("meta").network.Conv2d_2a_3x3.conv.weight.is_contiguous()


def test_an_unknown_resize_is_an_error_before_weights_are_read():
    with pytest.raises(ValueError, match=r"resize must be one of .*'clean'.* got 'bicubic'"):
        InceptionFeatures("nowhere.pth", resize="bicubic")


@pytest.mark.slow
def test_the_resize_of_another_tool_is_another_extractor_and_other_features(tmp_path):
    torch.save(random_inception("2048").state_dict(), tmp_path / "weights.pth")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = {}
    for resize in ("tensorflow", "pytorch", "clean"):
        extractor = InceptionFeatures(str(tmp_path / "weights.pth"), resize=resize)
        found[resize] = extractor(images)
        quality = SampleQuality(extractor, ["fd", "kid"])
        name = "fid" if resize == "tensorflow" else f"inception_{resize}_fd"
        assert quality.keys[0] == name
        assert extractor.preparation.startswith("b")
    scale = found["tensorflow"].std(dim=0).mean()
    for resize in ("pytorch", "clean"):
        assert (found[resize] - found["tensorflow"]).abs().mean() > 0.01 * scale
    # Of the network's own size nothing is resized, and that is all that "clean" changes.
    large = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    extractor = InceptionFeatures(str(tmp_path / "weights.pth"))
    clean = InceptionFeatures(str(tmp_path / "weights.pth"), resize="clean")
    torch.testing.assert_close(clean(large), extractor(large))
