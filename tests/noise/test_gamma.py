"""Gamma noise: its shapes, its random numbers and its transport between levels."""

import math

import pytest
import torch
from scipy import stats

from ddim_pl.noise import GammaNoise, latents
from ddim_pl.noise.gamma import standardised_beta, standardised_gamma
from ddim_pl.noise.gamma_quantiles import normal_score
from ddim_pl.rng import image_generators
from ddim_pl.scales import Scales
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule

SHAPE = (3, 4, 4)
EMPTY64 = torch.empty(0, dtype=torch.float64)


def scales_of(shape: float, theta_0: float = 0.001) -> Scales:
    """Scales at which Gamma noise has this shape K: `sigma / alpha = theta_0 sqrt(K)`."""
    ratio = torch.tensor(theta_0 * math.sqrt(shape), dtype=torch.float64)
    alpha = 1 / (1 + ratio**2).sqrt()
    return Scales(alpha, ratio * alpha)


def test_shapes_are_the_sums_of_the_papers() -> None:
    """`k_t = beta_t / (abar_t theta_0^2)`, [Gamma], with the slip of [Report] corrected."""
    schedule, noise = LinearSchedule(), GammaNoise(0.01)
    betas = schedule.betas()
    k = betas / ((1 - betas).cumprod(0) * 0.01**2)
    found = noise.concentration(schedule(torch.arange(1, 1001)))
    torch.testing.assert_close(found, k.cumsum(0), rtol=1e-10, atol=0)
    assert noise.concentration(schedule(0.0)) == 0
    assert (
        noise.concentration(Scales(torch.tensor(0.0).double(), torch.tensor(1.0).double())) == 1e20
    )


@pytest.mark.parametrize("shape", [1e-2, 0.1, 1.0, 30.0, 1e3, 1e5, 1e8, 1e12, 5e14])
def test_gamma_draws_have_their_law(shape: float) -> None:
    """100,000 draws, seed 0. The third moment tells a Gamma variable from a normal one.

    Normal scores of the draws are standard normal: Kolmogorov and Smirnov at 1 %; where K is so
    small that most draws are 0 to all digits, only the moments, with 5 of their standard errors.
    """
    n = 100_000
    generator = torch.Generator().manual_seed(0)
    eps = GammaNoise().draw((n,), scales_of(shape), generator, EMPTY64)
    assert eps.isfinite().all()
    assert abs(eps.mean()) < 5 / math.sqrt(n)
    kurtosis = 3 + 6 / shape
    assert abs(eps.var() - 1) < 5 * math.sqrt((kurtosis - 1) / n)
    if shape < 1:
        return
    skewness = 2 / math.sqrt(shape)
    spread = 15 + 200 / shape + 500 / shape**2  # bounds the variance of eps^3
    assert abs(eps.pow(3).mean() - skewness) < 5 * math.sqrt(spread / n)
    scores = normal_score(eps, torch.tensor(shape))
    assert stats.kstest(scores.numpy(), "norm").pvalue > 0.01


def test_the_largest_shapes_are_drawn_and_centred_without_steps() -> None:
    """K theta is 1e9 deviations from 0 at K = 1e18; float32 would leave a few hundred values."""
    for shape in (1e12, 1e15, 1e18):
        eps = standardised_gamma(
            (10_000,), torch.tensor(shape).double(), torch.Generator().manual_seed(0), EMPTY64
        )
        assert len(eps.unique()) > 9_900
        assert abs(eps.var() - 1) < 5 * math.sqrt(2 / 10_000)


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.5), (2.0, 5.0), (1e5, 3e5), (1e12, 1e9)])
def test_standardised_beta_draws_have_their_law(a: float, b: float) -> None:
    """100,000 draws, seed 1; Kolmogorov and Smirnov at 1 %. Of large shapes the law is normal."""
    generator = torch.Generator().manual_seed(1)
    shapes = torch.tensor(a).double(), torch.tensor(b).double()
    beta = standardised_beta((100_000,), *shapes, generator, EMPTY64)
    if a + b > 1e4:
        assert stats.kstest(beta.numpy(), "norm").pvalue > 0.01
        return
    mean, std = stats.beta.stats(a, b)[0], stats.beta.std(a, b)
    assert stats.kstest(mean + std * beta.numpy(), stats.beta(a, b).cdf).pvalue > 0.01


def test_draws_of_no_noise_are_zero() -> None:
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert (GammaNoise().draw((4, 3), Scales(one, zero), None, EMPTY64) == 0).all()
    for a, b in ((zero, one), (one, zero), (zero, zero)):
        assert (standardised_beta((4, 3), a, b, torch.Generator(), EMPTY64) == 0).all()


def test_each_image_may_have_a_level_of_its_own() -> None:
    t = torch.tensor([1.0, 300.0, 1000.0])
    generators = image_generators(0, range(3))
    together = GammaNoise().draw((3, 2, 2), LinearSchedule()(t), generators, EMPTY64)
    for i in range(3):
        alone = GammaNoise().draw(
            (1, 2, 2), LinearSchedule()(t[i]), image_generators(0, [i]), EMPTY64
        )
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("theta_0", [1e-5, 0.001, 0.1])
@pytest.mark.parametrize("size", [1, 7])
def test_gamma_latents_are_the_same_for_any_batch_split(theta_0: float, size: int) -> None:
    law = {"noise": GammaNoise(theta_0), "scales": CosineLogSNRSchedule()(1000.0)}
    whole, _ = latents(5, range(64), SHAPE, **law)
    parts = [latents(5, range(i, min(i + size, 64)), SHAPE, **law)[0] for i in range(0, 64, size)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.dtype == torch.float32
    assert len(whole.flatten(1).unique(dim=0)) == 64


def test_gamma_draws_leave_the_global_generator_alone_and_go_on() -> None:
    before = torch.get_rng_state()
    noise, scales = GammaNoise(), LinearSchedule()(300.0)
    z, generators = latents(0, range(3), SHAPE, noise=noise, scales=scales)
    more = noise.draw(z.shape, scales, generators, z)
    assert not torch.equal(more, z)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_does_not_change_gamma_noise(dtype: torch.dtype) -> None:
    scales = LinearSchedule()(300.0)
    draws = [
        GammaNoise().draw((2, 5), scales, torch.Generator().manual_seed(0), like)
        for like in (torch.empty(0, dtype=dtype), EMPTY64)
    ]
    assert draws[0].dtype == dtype
    assert torch.equal(draws[0], draws[1].to(dtype))


def test_no_images_make_an_empty_gamma_batch() -> None:
    z, _ = latents(0, [], SHAPE, noise=GammaNoise(), scales=LinearSchedule()(1000.0))
    assert z.shape == (0, *SHAPE)


@pytest.mark.parametrize("theta_0", [0.0, -0.001, math.nan, math.inf])
def test_theta_0_must_be_positive(theta_0: float) -> None:
    with pytest.raises(ValueError, match=r"theta_0 must be positive, got .*the paper has 0.001"):
        GammaNoise(theta_0)


@pytest.mark.parametrize("theta_0", [0.001, 0.1])
def test_transport_is_its_own_inverse_and_keeps_clean_noise(theta_0: float) -> None:
    noise, schedule = GammaNoise(theta_0), LinearSchedule()
    t, s = schedule(800.0), schedule(60.0)
    eps = noise.draw((1000,), t, torch.Generator().manual_seed(0), EMPTY64)
    moved = noise.transport(eps, t, s)
    torch.testing.assert_close(noise.transport(moved, s, t), eps, rtol=0, atol=1e-9)
    clean = schedule(0.0)
    assert torch.equal(noise.transport(eps, t, clean), eps)
    assert torch.equal(noise.transport(eps, clean, t), eps)
