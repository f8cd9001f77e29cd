"""Densities of Gamma diffusion's steps against scipy and draws; divergences against both."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact import PAIRS
from scipy import special, stats
from torch import Tensor

from ddim_pl.noise import GammaNoise
from ddim_pl.noise.gamma import standardised_beta, standardised_gamma
from ddim_pl.noise.gamma_divergences import (
    beta_rule,
    first_log_density,
    gamma_rule,
    prior_divergence,
    report_divergence,
    report_log_density,
    thinning_divergence,
    thinning_log_density,
)
from ddim_pl.noise.gamma_steps import report_step, thinning_shapes, thinning_step
from ddim_pl.prediction import Prediction
from ddim_pl.schedules import LinearSchedule
from ddim_pl.transitions import ddim_noise_scale, posterior, q_sample

SCHEDULE = LinearSchedule()
IMAGE = 0.3
# From 60 to 59 the fresh shape is 0.13, and two draws of a hundred are a rounding from its pole.
no_pole = pytest.mark.parametrize(("t", "s"), PAIRS[:-1])
every_pair = pytest.mark.parametrize(("t", "s"), PAIRS)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def draws(count: int, noise: GammaNoise, t: float) -> Prediction:
    """The true x, and one and the same noise for all."""
    x = torch.full((count, 1), IMAGE, dtype=torch.float64)
    return Prediction(x, torch.full_like(x, 0.7))


# Rules


@pytest.mark.parametrize("shape", [0.3, 1.0, 5.0, 1e3, 1e14])
def test_the_gamma_rule_has_the_mean_the_log_mean_and_the_entropy(shape: float) -> None:
    d, weight, log_density = (each[0] for each in gamma_rule(number(shape)))
    assert float((weight * d.exp()).sum()) == pytest.approx(1, abs=1e-6)
    wanted = special.digamma(shape) - math.log(shape)
    assert float((weight * d).sum()) == pytest.approx(wanted, abs=1e-6, rel=1e-9)
    entropy = -float((weight * (log_density - d)).sum()) + math.log(shape)
    wanted = float(stats.gamma(shape).entropy()) if shape < 1e6 else None
    wanted = wanted or math.log(2 * math.pi * math.e * shape) / 2
    assert entropy == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(("a", "b"), [(0.3, 40.0), (1.0, 1.0), (5.0, 2.0), (1e3, 10.0), (3, 1e6)])
def test_the_beta_rule_has_the_mean_the_logit_and_the_entropy(a: float, b: float) -> None:
    d, weight, log_density = (each[0] for each in beta_rule(number(a), number(b)))
    logit = d + math.log(a / b)
    share = torch.sigmoid(logit)
    assert float((weight * share).sum()) == pytest.approx(a / (a + b), rel=1e-6)
    wanted = special.digamma(a) - special.digamma(b)
    assert float((weight * logit).sum()) == pytest.approx(wanted, abs=1e-6)
    slope = torch.nn.functional.logsigmoid(logit) + torch.nn.functional.logsigmoid(-logit)
    entropy = -float((weight * (log_density - slope)).sum())
    assert entropy == pytest.approx(float(stats.beta(a, b).entropy()), abs=1e-5)


# Densities


@no_pole
@pytest.mark.parametrize("scale", ["ddim", 0.4])
def test_the_reports_density_is_that_of_its_draws(t: float, s: float, scale: str | float) -> None:
    """[Report], eq. 19 with its misprints corrected, of scipy's Gamma law and its density."""
    noise, high, low = GammaNoise(0.1), SCHEDULE(t), SCHEDULE(s)
    prediction = draws(20_000, noise, t)
    c = ddim_noise_scale(high, low, 1.0) if scale == "ddim" else number(float(scale))
    k = float(thinning_shapes(noise, high, low)[1])
    fresh = standardised_gamma((20_000, 1), number(k), torch.Generator().manual_seed(2), c)
    z_s = report_step(prediction, fresh, c, high, low)
    z_t = q_sample(*prediction, high)
    factor = (low.alpha - c * high.alpha) / (high.alpha * (1 + low.alpha))
    offset = factor * z_t + (low.alpha**2 + c * high.alpha) / (1 + low.alpha) * IMAGE
    theta = c * high.alpha * noise.theta_0
    law = stats.gamma(k, loc=float((offset - k * theta)[0]), scale=float(theta))
    assert stats.kstest(z_s[:, 0].numpy(), law.cdf).pvalue > 0.001
    found = report_log_density(z_s, prediction, c, noise, high, low)
    np.testing.assert_allclose(found, law.logpdf(z_s), rtol=1e-6, atol=1e-6)
    outside = report_log_density(z_s * 0 + law.support()[0] - 1, prediction, c, noise, high, low)
    assert (outside == -math.inf).all()


@pytest.mark.parametrize("level", [30.0, 60.0, 120.0])
def test_the_first_density_is_the_posterior_of_a_flat_prior(level: float) -> None:
    """Images drawn evenly, those kept whose state is near 0: [Report]'s sign is refuted."""
    noise, t = GammaNoise(0.1), SCHEDULE(level)
    generator = torch.Generator().manual_seed(5)
    x = torch.rand((2_000_000, 1), generator=generator, dtype=torch.float64) * 6 - 3
    z = q_sample(x, noise.draw(x.shape, t, generator, x), t)
    kept = x[(z.abs() < 0.01 * t.sigma)]
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    density = first_log_density(grid, torch.zeros_like(grid), noise, t).exp()
    assert float(density.sum() * 1e-4) == pytest.approx(1, abs=2e-3)
    below = (density.cumsum(0) * 1e-4).numpy()

    def p_value(values: Tensor) -> float:
        law = lambda v: np.interp(v, grid.numpy(), below)  # noqa: E731
        return float(stats.kstest(values.numpy(), law).pvalue)

    assert p_value(kept) > 0.001
    assert p_value(-kept) < 1e-6


@no_pole
@pytest.mark.parametrize("theta_0", [0.001, 0.1])
def test_the_posteriors_density_is_scipys_beta(t: float, s: float, theta_0: float) -> None:
    noise, high, low = GammaNoise(theta_0), SCHEDULE(t), SCHEDULE(s)
    prediction = draws(100, noise, t)
    shapes = thinning_shapes(noise, high, low)
    beta = standardised_beta((100, 1), *shapes, torch.Generator().manual_seed(2), prediction.x)
    z_s = thinning_step(prediction, beta, noise, high, low)
    k_t = float(sum(shapes))
    scale = low.alpha * theta_0 * (k_t + math.sqrt(k_t) * 0.7)
    start = low.alpha * (IMAGE - theta_0 * shapes[0])
    law = stats.beta(*(float(k) for k in shapes), loc=float(start), scale=float(scale))
    found = thinning_log_density(z_s, prediction, noise, high, low)
    # scipy takes differences of log Gamma(K), with K up to 2e10 here.
    np.testing.assert_allclose(found, law.logpdf(z_s), rtol=1e-5, atol=3e-4)


# Divergences


@pytest.mark.parametrize("theta_0", [0.001, 0.1])
@pytest.mark.parametrize("share", [1e-3, 0.2, 1.0])
@pytest.mark.parametrize(("t", "s"), [(500.0, 250.0), (500.0, 499.0), (120.0, 60.0)])
def test_the_divergence_of_a_step_is_that_of_draws(
    t: float, s: float, share: float, theta_0: float
) -> None:
    """The mean of `log q - log p` over draws from q, within 5 standard errors."""
    noise, high, low = GammaNoise(theta_0), SCHEDULE(t), SCHEDULE(s)
    count = 100_000
    shapes = thinning_shapes(noise, high, low)
    for error in (-0.3, -0.02, 0.02, 0.3):
        true = draws(count, noise, t)
        wrong = Prediction(true.x + error, true.eps - high.alpha / high.sigma * error)
        beta = standardised_beta((count, 1), *shapes, torch.Generator().manual_seed(3), true.x)
        z_s = thinning_step(true, beta, noise, high, low)
        mean, std = posterior(q_sample(*true, high), wrong.x, high, low)
        log_q = thinning_log_density(z_s, true, noise, high, low)
        log_p = torch.logaddexp(
            math.log(share) + torch.distributions.Normal(mean, std).log_prob(z_s),
            (math.log1p(-share) if share < 1 else -math.inf)
            + thinning_log_density(z_s, wrong, noise, high, low),
        )
        ratio = log_q - log_p
        found = thinning_divergence(
            true.eps[:1], true.x[:1] * 0 + error, noise, high, low, gaussian_share=share
        )
        # The last: of the rule, where the support of p_thin ends within that of q.
        bound = 5 * ratio.std() / math.sqrt(count) + 1e-9 + 2e-3 * found
        assert abs(ratio.mean() - found) < bound, (error, float(found), float(ratio.mean()))


@every_pair
def test_a_gaussian_step_has_ddpms_divergence_and_a_constant(t: float, s: float) -> None:
    noise, high, low = GammaNoise(0.1), SCHEDULE(t), SCHEDULE(s)
    error = torch.linspace(-1, 1, 9, dtype=torch.float64)
    found = thinning_divergence(
        torch.full_like(error, 0.7), error, noise, high, low, gaussian_share=1.0
    )
    wanted = (low.snr - high.snr) / 2 * error.square()
    torch.testing.assert_close(found - found[4], wanted, rtol=1e-6, atol=1e-9)
    assert found[4] > 0


@every_pair
@pytest.mark.parametrize("share", [1e-3, 0.5])
def test_the_divergence_tends_to_ddpms(t: float, s: float, share: float) -> None:
    """At first order in theta_0."""
    high, low = SCHEDULE(t), SCHEDULE(s)
    eps = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    error = torch.tensor([-0.4, -0.01, 0.01, 0.4], dtype=torch.float64) * high.sigma / high.alpha
    eps, error = torch.broadcast_tensors(eps, error.clamp(-1, 1))
    limit = (low.snr - high.snr) / 2 * error.square()
    gaps = [
        float(
            (
                thinning_divergence(eps, error, GammaNoise(v), high, low, gaussian_share=share)
                - limit
            )
            .abs()
            .max()
            / limit.max()
        )
        for v in (1e-3, 1e-4, 1e-5)
    ]
    assert gaps[-1] < 1e-2
    assert all(a > 5 * b or b < 1e-4 for a, b in pairwise(gaps)), gaps  # the last is rounding


def test_without_a_gaussian_share_an_estimate_above_the_image_costs_infinity() -> None:
    """The answer to the question of [Report]: eq. 20 is no weighted loss, see docs/gamma.md."""
    for theta_0 in (0.001, 0.1):
        noise = GammaNoise(theta_0)
        for t, s in PAIRS:
            high, low = SCHEDULE(t), SCHEDULE(s)
            error = torch.tensor([-0.1, 0.0, 1e-9, 0.1], dtype=torch.float64)
            found = thinning_divergence(
                torch.zeros_like(error), error, noise, high, low, gaussian_share=0.0
            )
            assert found[0] > 0
            assert abs(found[1]) < 1e-12
            assert (found[2:] == math.inf).all()
            c = ddim_noise_scale(high, low, 1.0)
            assert (report_divergence(error, c, noise, high, low)[2:] == math.inf).all()


@pytest.mark.parametrize(("t", "s"), [(500.0, 250.0), (120.0, 60.0), (300.0, 200.0)])
def test_small_errors_below_cost_a_weighted_square(t: float, s: float) -> None:
    """By the Fisher information, which is finite for shapes above 2."""
    noise, high, low = GammaNoise(0.1), SCHEDULE(t), SCHEDULE(s)
    a, b = (float(k) for k in thinning_shapes(noise, high, low))
    eps, error = number(0.7), number(-1e-4)
    g = a + b + math.sqrt(a + b) * 0.7
    rho = 1e-4 / (noise.theta_0 * g)
    found = thinning_divergence(eps[None], error[None], noise, high, low, gaussian_share=0.0)
    wanted = rho**2 / 2 * b * (a + b - 1) / (a - 2)
    assert float(found) == pytest.approx(wanted, rel=2e-2)
    c = ddim_noise_scale(high, low, 1.0)
    delta = (low.alpha**2 + c * high.alpha) / (1 + low.alpha) * 1e-4
    delta = float(delta / (c * high.alpha * noise.theta_0))
    found = report_divergence(error[None], c, noise, high, low)
    assert float(found) == pytest.approx(delta**2 / 2 / (b - 2), rel=2e-2)


@pytest.mark.parametrize("error", [-0.5, -0.05])
def test_the_reports_divergence_is_that_of_draws(error: float) -> None:
    noise, high, low = GammaNoise(0.1), SCHEDULE(120.0), SCHEDULE(60.0)
    c = number(0.6)
    true = draws(200_000, noise, 120.0)
    wrong = Prediction(true.x + error, true.eps - high.alpha / high.sigma * error)
    fresh = thinning_shapes(noise, high, low)[1]
    g = standardised_gamma((200_000, 1), fresh, torch.Generator().manual_seed(0), true.x)
    z_s = report_step(true, g, c, high, low)
    ratio = report_log_density(z_s, true, c, noise, high, low) - report_log_density(
        z_s, wrong, c, noise, high, low
    )
    found = report_divergence(number(error)[None], c, noise, high, low)
    assert abs(ratio.mean() - found) < 5 * ratio.std() / math.sqrt(len(ratio))


@pytest.mark.parametrize("theta_0", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("share", [1e-3, 1.0])
def test_the_priors_divergence_is_that_of_draws_and_has_its_limit(
    theta_0: float, share: float
) -> None:
    noise, t = GammaNoise(theta_0), SCHEDULE(600.0)
    x = torch.full((200_000, 1), 0.8, dtype=torch.float64)
    eps = noise.draw(x.shape, t, torch.Generator().manual_seed(0), x)
    z = q_sample(x, eps, t)
    log_p = torch.logaddexp(
        math.log(share) + torch.distributions.Normal(0, 1).log_prob(z),
        (math.log1p(-share) if share < 1 else -math.inf) + noise.log_density(z, t),
    )
    ratio = noise.log_density(eps, t) - t.sigma.log() - log_p
    found = prior_divergence(x[:1], noise, t, gaussian_share=share)
    assert abs(ratio.mean() - found) < 5 * ratio.std() / math.sqrt(len(x))
    limit = (x[0] ** 2 * t.alpha**2 - t.alpha**2 - 2 * t.sigma.log()) / 2
    found = prior_divergence(x[:1], GammaNoise(1e-6), t, gaussian_share=share)
    assert float(found) == pytest.approx(float(limit), rel=1e-4)


def test_images_of_a_batch_may_have_different_levels() -> None:
    noise = GammaNoise(0.05)
    t, s = number(500.0), number(400.0)
    high = SCHEDULE(torch.stack([t, t / 2]))
    low = SCHEDULE(torch.stack([s, s / 2]))
    eps = torch.tensor([[0.3, -1.0], [0.3, -1.0]], dtype=torch.float64)
    error = torch.full_like(eps, 0.1)
    both = thinning_divergence(eps, error, noise, high, low, gaussian_share=1e-3)
    for i, (a, b) in enumerate(((t, s), (t / 2, s / 2))):
        one = thinning_divergence(
            eps[i : i + 1], error[i : i + 1], noise, SCHEDULE(a), SCHEDULE(b), gaussian_share=1e-3
        )
        torch.testing.assert_close(both[i : i + 1], one, rtol=1e-10, atol=1e-12)
