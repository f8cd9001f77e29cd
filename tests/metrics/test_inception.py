from urllib.error import URLError

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity

from callbacks import FrechetDistance
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.metrics.inception import InceptionFeatures


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
def test_weights_load_from_a_file_and_the_number_is_called_fid(monkeypatch, tmp_path):
    # The layers' own random weights stand in for the real ones, which tests cannot download.
    with monkeypatch.context() as patch:
        extractor = fidelity.FeatureExtractorInceptionV3
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(extractor, "load_state_dict", lambda *_, **__: None)
        random = InceptionFeatures()
    path = tmp_path / "weights.pth"
    torch.save(random.network.state_dict(), path)
    features = InceptionFeatures(str(path))
    grey = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        expected = random(grey.repeat(1, 3, 1, 1))
        torch.testing.assert_close(features(grey), expected)
    assert expected.shape == (2, 2048)
    callback = FrechetDistance(lambda: features, num_samples=10)
    data = DigitsDataModule()
    data.setup("test")
    with pytest.warns(UserWarning, match="singular covariance"):
        callback.check(data, "test")
    assert callback.settings.quality.keys[0] == "fid"
