import pytest
import torch

from ddim_pl.data.digits import digits_arrays
from ddim_pl.metrics.digits import WEIGHTS, DigitsFeatures


@pytest.fixture(scope="module")
def extractor() -> DigitsFeatures:
    return DigitsFeatures()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return digits_arrays()[0]


def test_features_are_float32_and_of_full_rank(
    extractor: DigitsFeatures, images: torch.Tensor
) -> None:
    features = extractor(images)
    assert features.shape == (len(images), extractor.num_features)
    assert features.dtype == torch.float32
    covariance = torch.cov(features.double().T)
    assert torch.linalg.cond(covariance) < 1e4


def test_features_do_not_depend_on_the_batch_they_come_in(
    extractor: DigitsFeatures, images: torch.Tensor
) -> None:
    whole = extractor(images[:64])
    parts = torch.cat([extractor(part) for part in images[:64].split(7)])
    # Float32 sums in another order.
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_it_stays_frozen_in_evaluation_mode_and_out_of_autocast(images: torch.Tensor) -> None:
    extractor = DigitsFeatures()
    parent = torch.nn.Sequential(extractor).train()
    assert parent.training
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    expected = extractor(images[:8])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(extractor(images[:8]), expected, rtol=0, atol=0)


def test_logits_are_the_head_of_the_features(
    extractor: DigitsFeatures, images: torch.Tensor
) -> None:
    features = extractor(images[:8])
    torch.testing.assert_close(extractor.logits(images[:8]), extractor.classifier.head(features))


def test_other_types_and_shapes_are_refused(
    extractor: DigitsFeatures, images: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=r"must be torch\.uint8, .*got torch\.float32"):
        extractor(images[:2].float())
    for shape in ((2, 3, 8, 8), (2, 1, 8, 9), (1, 8, 8)):
        with pytest.raises(ValueError, match=r"must have shape \(B, 1, 8, 8\), got"):
            extractor(torch.zeros(shape, dtype=torch.uint8))


def test_the_shipped_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size < 100_000
