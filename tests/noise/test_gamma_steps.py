"""Steps of Gamma diffusion: their formulas, their Gaussian limits, the target of distillation."""

import math
from itertools import pairwise

import pytest
import torch
from exact import PAIRS
from torch import Tensor

from ddim_pl.noise import GammaNoise
from ddim_pl.noise.gamma import standardised_beta
from ddim_pl.noise.gamma_steps import report_step, thinning_shapes, thinning_step
from ddim_pl.prediction import Prediction, eps_from_x
from ddim_pl.rng import randn
from ddim_pl.scales import Scales, expand_like
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule
from ddim_pl.transitions import (
    ddim_noise_scale,
    ddim_step,
    q_sample,
    transition_variance,
    two_step_target,
)

SCHEDULE = LinearSchedule()
every_pair = pytest.mark.parametrize(("t", "s"), PAIRS)
IMAGE = 0.3


def draws(count: int, noise: GammaNoise, scales: Scales, seed: int = 0) -> Prediction:
    """The true x, and noise of the Gamma law."""
    x = torch.full((count, 1), IMAGE, dtype=torch.float64)
    return Prediction(x, noise.draw(x.shape, scales, torch.Generator().manual_seed(seed), x))


def rates(errors: list[float]) -> list[float]:
    """Orders in theta_0, which falls by ten from one error to the next."""
    return [math.log10(a / b) for a, b in pairwise(errors)]


@every_pair
def test_the_quantile_step_tends_to_ddim(t: float, s: float) -> None:
    high, low = SCHEDULE(t), SCHEDULE(s)
    prediction = Prediction(torch.full((9,), IMAGE).double(), torch.linspace(-2, 2, 9).double())
    limit = ddim_step(prediction, high, low)
    errors = [
        float((GammaNoise(theta).step(prediction, high, low) - limit).abs().max())
        for theta in (1e-3, 1e-4, 1e-5)
    ]
    assert errors[-1] < 1e-4
    assert all(abs(rate - 1) < 0.15 for rate in rates(errors))


@every_pair
def test_the_exact_step_tends_to_ddpms_posterior(t: float, s: float) -> None:
    """DDIM with eta = 1: the standardised Beta draw is its noise."""
    high, low = SCHEDULE(t), SCHEDULE(s)
    prediction = Prediction(torch.full((9,), IMAGE).double(), torch.linspace(-2, 2, 9).double())
    beta = torch.linspace(1, -3, 9).double()
    limit = ddim_step(prediction, high, low, eta=1.0, noise=beta)
    errors = [
        float((thinning_step(prediction, beta, GammaNoise(theta), high, low) - limit).abs().max())
        for theta in (1e-3, 1e-4, 1e-5)
    ]
    assert errors[-1] < 1e-4
    assert all(abs(rate - 1) < 0.15 for rate in rates(errors))


def test_the_reports_step_is_its_equation_18() -> None:
    """`C z_t + D x + c (g - E g)`, written with the state."""
    high, low, eta = SCHEDULE(400.0), SCHEDULE(100.0), 0.7
    x, eps = draws(10, GammaNoise(), high)
    fresh = randn(x.shape, torch.Generator().manual_seed(0), x)
    c = ddim_noise_scale(high, low, eta)
    big_c = (low.alpha - c * high.alpha) / (high.alpha * (1 + low.alpha))
    big_d = (low.alpha**2 + c * high.alpha) / (1 + low.alpha)
    g = transition_variance(high, low).sqrt() * fresh
    expected = big_c * q_sample(x, eps, high) + big_d * x + c * g
    found = report_step(Prediction(x, eps), fresh, c, high, low)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_the_drift_of_the_reports_variance() -> None:
    """As in the table of docs/gamma.md, from this formula; it does not depend on theta_0."""

    def ratio(t: float, s: float, eta: float) -> float:
        """Variance after a step, over what it should be."""
        eps = Prediction(torch.zeros(2).double(), torch.tensor([1.0, 0.0]).double())
        fresh = torch.tensor([0.0, 1.0]).double()
        high, low = SCHEDULE(t), SCHEDULE(s)
        c = ddim_noise_scale(high, low, eta)
        terms = report_step(eps, fresh, c, high, low) / low.sigma
        return float(terms.square().sum())

    assert ratio(60.0, 59.0, 0.0) == pytest.approx(0.265, abs=0.005)
    assert ratio(500.0, 499.0, 0.0) == pytest.approx(0.618, abs=0.005)
    assert ratio(500.0, 499.0, 1.0) == pytest.approx(0.499, abs=0.002)
    assert ratio(1000.0, 500.0, 1.0) > 1000


def test_thinning_shapes_are_those_of_the_levels() -> None:
    noise = GammaNoise(0.01)
    for t, s in PAIRS:
        high, low = noise.concentration(SCHEDULE(t)), noise.concentration(SCHEDULE(s))
        kept, removed = thinning_shapes(noise, SCHEDULE(t), SCHEDULE(s))
        torch.testing.assert_close(kept, low, rtol=1e-10, atol=0)
        torch.testing.assert_close(removed, high - low, rtol=1e-9, atol=0)


def test_the_thinned_noise_of_any_x_is_the_posterior() -> None:
    """`q(z_s | z_t)` by its moments: of a Beta share the mean is r and the variance known."""
    noise = GammaNoise(0.1)
    high, low = SCHEDULE(120.0), SCHEDULE(60.0)
    k_t, k_s = noise.concentration(high), noise.concentration(low)
    x = torch.zeros(200_000, 1, dtype=torch.float64)
    g = torch.tensor(1.7, dtype=torch.float64) * k_t  # a state's Gamma variable
    eps = ((g - k_t) / k_t.sqrt()).expand_as(x)
    shapes = thinning_shapes(noise, high, low)
    beta = standardised_beta(x.shape, *shapes, torch.Generator().manual_seed(0), x)
    eps_s = thinning_step(Prediction(x, eps), beta, noise, high, low) / low.sigma
    share = (k_s + k_s.sqrt() * eps_s) / g
    r = k_s / k_t
    assert abs(share.mean() - r) < 5 * (r * (1 - r) / (k_t + 1) / len(x)).sqrt()
    assert abs(share.var() * (k_t + 1) / (r * (1 - r)) - 1) < 0.02  # 5 standard errors
    assert ((share > 0) & (share < 1)).all()


def two_steps(
    noise: GammaNoise, schedule: NoiseSchedule, num_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Scales, Scales]:
    """Start states of a step, guesses, end states of its two halves, x, and its scales."""
    step = 1000 / num_steps
    t = step * torch.tensor([1, (num_steps + 1) // 2, num_steps], dtype=torch.float64)
    high, mid, low = schedule(t), schedule(t - step / 2), schedule((t - step).clamp(min=0))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((3, 200), generator=generator, dtype=torch.float64) * 2 - 1
    z = q_sample(x, noise.draw(x.shape, high, generator, x), high)
    # Errors of a network: of the size of the noise, but no larger than images.
    near = [
        x + 0.3 * expand_like(scales.sigma, x) * randn(x.shape, generator, x)
        for scales in (high, mid)
    ]
    z_mid = noise.step(Prediction(near[0], eps_from_x(high, z, near[0])), high, mid)
    z_s = noise.step(Prediction(near[1], eps_from_x(mid, z_mid, near[1])), mid, low)
    return z, two_step_target(*near, high, mid, low), z_s, x, high, low


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
@pytest.mark.parametrize("theta_0", [1e-4, 0.001, 0.1])
@pytest.mark.parametrize("num_steps", [1, 2, 8, 64, 1024])
def test_a_student_of_the_quantile_target_lands_where_two_steps_do(
    num_steps: int, theta_0: float, schedule: NoiseSchedule
) -> None:
    noise = GammaNoise(theta_0)
    z, guess, z_s, _, high, low = two_steps(noise, schedule, num_steps)
    wanted = noise.implied_x(guess, z, z_s, high, low)
    assert wanted.isfinite().all()
    landed = noise.step(Prediction(wanted, eps_from_x(high, z, wanted)), high, low)
    torch.testing.assert_close(landed, z_s, rtol=0, atol=1e-8)


def test_the_linear_target_is_only_a_limit() -> None:
    """What `two_step_target`, exact for Gaussian noise, would cost: an error of order theta_0.

    Largest errors of x in 8 steps of the linear schedule: above 1e-5 at theta_0 = 0.001, where the
    published noise is, and a hundred times that at 0.1.
    """
    errors = []
    for theta_0 in (0.1, 0.01, 0.001):
        noise = GammaNoise(theta_0)
        z, guess, z_s, _, high, low = two_steps(noise, SCHEDULE, 8)
        exact = noise.implied_x(guess, z, z_s, high, low)
        errors.append(float((guess - exact)[1:].abs().max()))  # below, a step ends in clean data
    assert 1e-3 < errors[0] < 1
    assert 1e-6 < errors[2] < 1e-2
    assert all(abs(rate - 1) < 0.3 for rate in rates(errors)), errors
