"""Scales of a level and their broadcast to a batch."""

import math

import pytest
import torch

from ddim_pl.scales import Scales, add_scaled, combine, expand_like, float64, to_device


def test_coefficients_multiply_a_batch() -> None:
    batch = torch.ones(2, 3, 4, 4)
    per_image = expand_like(torch.tensor([2.0, 3.0], dtype=torch.float64), batch)
    assert per_image.shape == (2, 1, 1, 1)
    assert per_image.dtype == batch.dtype
    assert (per_image * batch)[1].unique() == 3
    scaled = expand_like(torch.tensor(2.0, dtype=torch.float64), batch) * batch
    assert scaled.dtype == batch.dtype  # a float64 scalar does not promote


def test_the_snr_is_a_ratio_of_squares_and_infinite_without_noise() -> None:
    scales = Scales(torch.tensor([0.8, 1.0]).double(), torch.tensor([0.6, 0.0]).double())
    assert scales.snr.tolist() == pytest.approx([16 / 9, math.inf])
    assert scales.log_snr.tolist() == pytest.approx([math.log(16 / 9), math.inf])


def test_casts_keep_the_device_and_the_values() -> None:
    single = torch.tensor([0.1, 0.2])
    assert float64(single).dtype == torch.float64
    assert torch.equal(float64(single).float(), single)
    assert to_device(single.double(), single).dtype == torch.float64


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_with_coefficients_are_those_of_products(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    x, y = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=dtype)
    wide_a, wide_b = (each.reshape(*(shape or (1,)), 1, 1, 1) for each in (a, b))
    exact = wide_a * x.double() + wide_b * y.double()
    for found, wanted in [(combine(a, x, b, y), exact), (add_scaled(x, b, y), x + wide_b * y)]:
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted.to(dtype), rtol=3e-7, atol=3e-7)
