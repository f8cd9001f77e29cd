"""What the shipped extractors have in common."""

import pytest
import torch
from photographs import smooth_images

from ddim_pl.data.digits import digits_arrays
from ddim_pl.metrics.cifar import CIFARFeatures
from ddim_pl.metrics.classifier import ClassifierFeatures
from ddim_pl.metrics.digits import DigitsFeatures


@pytest.fixture(scope="module", params=[DigitsFeatures, CIFARFeatures])
def extractor(request: pytest.FixtureRequest) -> ClassifierFeatures:
    return request.param()


@pytest.fixture(scope="module")
def images(extractor: ClassifierFeatures) -> torch.Tensor:
    return digits_arrays()[0] if extractor.name == "digits" else smooth_images(400)


def test_features_are_float32_and_of_full_rank(
    extractor: ClassifierFeatures, images: torch.Tensor
) -> None:
    features = extractor(images)
    assert features.shape == (len(images), extractor.num_features)
    assert features.dtype == torch.float32
    covariance = torch.cov(features.double().T)
    assert torch.linalg.matrix_rank(covariance) == extractor.num_features


def test_features_do_not_depend_on_the_batch_they_come_in(
    extractor: ClassifierFeatures, images: torch.Tensor
) -> None:
    whole = extractor(images[:64])
    parts = torch.cat([extractor(part) for part in images[:64].split(7)])
    # Float32 sums in another order.
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


def test_it_stays_frozen_in_evaluation_mode_and_out_of_autocast(
    extractor: ClassifierFeatures, images: torch.Tensor
) -> None:
    parent = torch.nn.Sequential(extractor).train()
    assert parent.training
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    expected = extractor(images[:8])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(extractor(images[:8]), expected, rtol=0, atol=0)


def test_logits_are_the_head_of_the_features(
    extractor: ClassifierFeatures, images: torch.Tensor
) -> None:
    features, logits = extractor.features_and_logits(images[:8])
    torch.testing.assert_close(features, extractor(images[:8]))
    torch.testing.assert_close(logits, extractor.classifier.head(features))
    torch.testing.assert_close(extractor.logits(images[:8]), logits)


def test_other_types_and_shapes_are_refused(
    extractor: ClassifierFeatures, images: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=r"must be torch\.uint8, .*got torch\.float32"):
        extractor(images[:2].float())
    channels, side, _ = extractor.image_shape
    wanted = rf"must have shape \(B, {channels}, {side}, {side}\), got"
    for shape in ((2, 4 - channels, side, side), (2, channels, side, side + 1), (1, side, side)):
        with pytest.raises(ValueError, match=wanted):
            extractor(torch.zeros(shape, dtype=torch.uint8))
