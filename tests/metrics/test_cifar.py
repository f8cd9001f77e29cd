import pytest
import torch

from ddim_pl.metrics.cifar import WEIGHTS, CIFARClassifier, CIFARFeatures, folded


@pytest.fixture(scope="module")
def extractor() -> CIFARFeatures:
    return CIFARFeatures()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth random images, like photographs out of focus."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(400, 3, 6, 6, generator=generator)
    large = torch.nn.functional.interpolate(small, size=32, mode="bicubic", antialias=False)
    return (255 * large).clamp(0, 255).to(torch.uint8)


def test_features_are_float32_and_of_full_rank(
    extractor: CIFARFeatures, images: torch.Tensor
) -> None:
    features = extractor(images)
    assert features.shape == (len(images), extractor.num_features)
    assert features.dtype == torch.float32
    covariance = torch.cov(features.double().T)
    assert torch.linalg.matrix_rank(covariance) == extractor.num_features


def test_features_do_not_depend_on_the_batch_they_come_in(
    extractor: CIFARFeatures, images: torch.Tensor
) -> None:
    whole = extractor(images[:64])
    parts = torch.cat([extractor(part) for part in images[:64].split(7)])
    # Float32 sums in another order.
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


def test_it_stays_frozen_in_evaluation_mode_and_out_of_autocast(images: torch.Tensor) -> None:
    extractor = CIFARFeatures()
    parent = torch.nn.Sequential(extractor).train()
    assert parent.training
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    expected = extractor(images[:8])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(extractor(images[:8]), expected, rtol=0, atol=0)


def test_logits_are_the_head_of_the_features(
    extractor: CIFARFeatures, images: torch.Tensor
) -> None:
    features, logits = extractor.features_and_logits(images[:8])
    torch.testing.assert_close(features, extractor(images[:8]))
    torch.testing.assert_close(logits, extractor.classifier.head(features))
    torch.testing.assert_close(extractor.logits(images[:8]), logits)


def test_other_types_and_shapes_are_refused(
    extractor: CIFARFeatures, images: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=r"must be torch\.uint8, .*got torch\.float32"):
        extractor(images[:2].float())
    for shape in ((2, 1, 32, 32), (2, 3, 32, 31), (3, 32, 32)):
        with pytest.raises(ValueError, match=r"must have shape \(B, 3, 32, 32\), got"):
            extractor(torch.zeros(shape, dtype=torch.uint8))


def test_the_shipped_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size < 2_000_000


def test_a_folded_network_is_the_same_function() -> None:
    torch.manual_seed(0)
    network = CIFARClassifier(norm=True).double()
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    network(x)  # running statistics other than 0 and 1
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    plain = folded(network)
    assert network.training
    torch.testing.assert_close(plain(x), network.eval()(x))
    assert plain.state_dict().keys() == CIFARClassifier().state_dict().keys()
