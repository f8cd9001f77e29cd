import torch

from ddim_pl.data.digits import digits_arrays
from ddim_pl.metrics.digits import WEIGHTS, DigitsFeatures


def test_the_covariance_of_all_digits_is_well_conditioned() -> None:
    features = DigitsFeatures()(digits_arrays()[0])
    assert features.shape[1] == 32
    assert torch.linalg.cond(torch.cov(features.double().T)) < 1e4


def test_the_shipped_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size < 100_000
