"""Steps of Gamma diffusion: what each keeps of the Gamma marginal, and their Gaussian limits.

Where the true x stands for the network, the standardised noise of a state is known, and its law
can be judged. Draws are 100,000 with fixed seeds; Kolmogorov and Smirnov's test rejects at 1 %.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from exact import ExactGaussian
from scipy import stats
from torch import Tensor

from ddim_pl import timesteps
from ddim_pl.denoiser import Denoiser
from ddim_pl.inversion import encode
from ddim_pl.noise import GammaNoise, latents
from ddim_pl.noise.gamma import standardised_beta
from ddim_pl.noise.gamma_quantiles import normal_score
from ddim_pl.noise.gamma_steps import report_step, thinning_shapes, thinning_step
from ddim_pl.prediction import Prediction, eps_from_x
from ddim_pl.rng import image_generators, randn
from ddim_pl.samplers import (
    DDIM,
    GammaExact,
    GammaMoment,
    GammaQuantile,
    GammaReport,
    Sampler,
)
from ddim_pl.samplers.gamma import GammaSampler, default_sampler
from ddim_pl.scales import Scales, expand_like
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule
from ddim_pl.transitions import (
    ddim_noise_scale,
    ddim_step,
    q_sample,
    transition_variance,
    two_step_target,
)

KINDS = [GammaMoment, GammaReport, GammaExact, GammaQuantile]
STOCHASTIC = [GammaMoment, GammaReport, GammaExact]
SCHEDULE = LinearSchedule()
# From and to; with theta_0 = 0.1 the shapes at the end are from 1.2 to 1e6.
PAIRS = [
    (1000.0, 999.0),
    (1000.0, 500.0),
    (1000.0, 30.0),
    (900.0, 700.5),
    (801.0, 633.0),
    (500.0, 499.0),
    (400.0, 100.0),
    (300.0, 31.5),
    (120.0, 60.0),
    (60.0, 59.0),
]
every_pair = pytest.mark.parametrize(("t", "s"), PAIRS)
every_theta = pytest.mark.parametrize("theta_0", [0.001, 0.1])
IMAGE = 0.3


def draws(count: int, noise: GammaNoise, level: Scales, seed: int = 0) -> Prediction:
    """The true x, and noise of the Gamma law."""
    x = torch.full((count, 1), IMAGE, dtype=torch.float64)
    return Prediction(x, noise.draw(x.shape, level, torch.Generator().manual_seed(seed), x))


def after(
    sampler: GammaSampler, t: float, s: float, count: int = 100_000, seed: int = 0
) -> Tensor:
    """Standardised noise at `s` after one step from the Gamma marginal at `t`, `(count,)`."""
    high, low = SCHEDULE(t), SCHEDULE(s)
    prediction = draws(count, sampler.noise, high, seed)
    z = sampler.step(prediction, high, low, torch.Generator().manual_seed(seed + 1))
    return ((z - low.alpha * IMAGE) / low.sigma)[:, 0]


def p_value(eps: Tensor, noise: GammaNoise, s: float) -> float:
    """Of the hypothesis that the noise has the Gamma law: its normal scores are normal."""
    shape = noise.concentration(SCHEDULE(s))
    return float(stats.kstest(normal_score(eps, shape).numpy(), "norm").pvalue)


# The marginals


@pytest.mark.parametrize("kind", [GammaExact, GammaQuantile])
@every_theta
@every_pair
def test_exact_and_quantile_steps_keep_the_marginal(
    kind: type[GammaSampler], theta_0: float, t: float, s: float
) -> None:
    sampler = kind(theta_0)
    assert p_value(after(sampler, t, s, seed=4), sampler.noise, s) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", [GammaExact, GammaQuantile])
@every_theta
def test_a_million_draws_tell_no_difference(kind: type[GammaSampler], theta_0: float) -> None:
    sampler = kind(theta_0)
    for t, s in PAIRS[2:8:5]:
        assert p_value(after(sampler, t, s, 1_000_000, seed=9), sampler.noise, s) > 0.01


@every_theta
def test_exact_and_quantile_chains_keep_the_marginal(theta_0: float) -> None:
    """Twenty steps, the last one to a level of shape 1 at theta_0 = 0.1."""
    levels = torch.linspace(1000, 30, 21, dtype=torch.float64)
    noise = GammaNoise(theta_0)
    for kind in (GammaExact, GammaQuantile):
        x, eps = draws(100_000, noise, SCHEDULE(1000.0))
        known = Known(SCHEDULE, x)
        start = q_sample(x, eps, SCHEDULE(1000.0))
        generator = torch.Generator().manual_seed(1)
        z = kind(theta_0)(known, start, levels, generator=generator)
        eps = eps_from_x(SCHEDULE(30.0), z, x)[:, 0]
        assert p_value(eps, noise, 30.0) > 0.01


@every_theta
@every_pair
def test_moment_keeps_mean_and_variance(theta_0: float, t: float, s: float) -> None:
    """Within 5 standard errors, those of kurtosis 3 + 6 / K."""
    sampler = GammaMoment(theta_0)
    eps = after(sampler, t, s)
    kurtosis = 3 + 6 / float(sampler.noise.concentration(SCHEDULE(s)))
    assert abs(eps.mean()) < 5 / math.sqrt(len(eps))
    assert abs(eps.var() - 1) < 5 * math.sqrt((kurtosis - 1) / len(eps))


def test_moment_does_not_keep_the_shape() -> None:
    """A sum of Gamma variables of two scales: told with certainty where the skewness is large."""
    sampler = GammaMoment(0.1)
    assert p_value(after(sampler, 120.0, 60.0), sampler.noise, 60.0) < 1e-10


@every_theta
@every_pair
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_reports_step_keeps_the_mean_and_not_the_variance(
    theta_0: float, t: float, s: float, eta: float
) -> None:
    """The variance is `C^2 sigma_t^2 + c^2 var_ts`, within 6 standard errors of a skewed law."""
    sampler, high, low = GammaReport(theta_0, eta), SCHEDULE(t), SCHEDULE(s)
    c, fresh = ddim_noise_scale(high, low, eta), transition_variance(high, low)
    factor = (low.alpha - c * high.alpha) / (high.alpha * (1 + low.alpha))
    expected = (factor**2 * high.sigma**2 + c**2 * fresh) / low.sigma**2
    eps = after(sampler, t, s)
    assert abs(eps.mean()) < 5 * (expected / len(eps)).sqrt()
    kurtosis = (
        3
        + 6 / float(sampler.noise.concentration(high))
        + 6 / float(thinning_shapes(sampler.noise, high, low)[1])
    )
    assert abs(eps.var() / expected - 1) < 6 * math.sqrt((kurtosis - 1) / len(eps))


def test_the_drift_of_the_reports_variance() -> None:
    """As in the table of docs/gamma.md, from this formula; it does not depend on theta_0."""

    def ratio(t: float, s: float, eta: float) -> float:
        """Variance after a step, over what it should be."""
        eps = Prediction(torch.zeros(2).double(), torch.tensor([1.0, 0.0]).double())
        fresh = torch.tensor([0.0, 1.0]).double()
        terms = report_step(eps, fresh, SCHEDULE(t), SCHEDULE(s), eta=eta) / SCHEDULE(s).sigma
        return float(terms.square().sum())

    assert ratio(60.0, 59.0, 0.0) == pytest.approx(0.265, abs=0.005)
    assert ratio(500.0, 499.0, 0.0) == pytest.approx(0.618, abs=0.005)
    assert ratio(500.0, 499.0, 1.0) == pytest.approx(0.499, abs=0.002)
    assert ratio(1000.0, 500.0, 1.0) > 1000


@every_theta
def test_states_lie_above_the_edge_of_the_support(theta_0: float) -> None:
    for kind in (GammaExact, GammaQuantile):
        for t, s in ((1000.0, 30.0), (300.0, 1.0), (5.0, 1.0)):
            edge = -GammaNoise(theta_0).concentration(SCHEDULE(s)).sqrt()
            assert (after(kind(theta_0), t, s, 10_000) >= edge * (1 + 1e-12)).all()


# The limits of theta_0 -> 0


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


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_stochastic_steps_tend_to_gaussian_laws(kind: type[GammaSampler]) -> None:
    """With theta_0 = 1e-6 the shapes are above 1e10: normal to what 100,000 draws can tell."""
    eps = after(kind(1e-6), 400.0, 100.0, seed=4)
    assert stats.kstest((eps / eps.std()).numpy(), "norm").pvalue > 0.01


def test_the_moment_step_is_ddim_with_gamma_noise() -> None:
    high, low = SCHEDULE(400.0), SCHEDULE(100.0)
    sampler = GammaMoment(0.1, eta=0.5)
    prediction = draws(10, sampler.noise, high)
    z = sampler.step(prediction, high, low, torch.Generator().manual_seed(3))
    noise = sampler.noise.draw((10, 1), low, torch.Generator().manual_seed(3), prediction.x)
    assert torch.equal(z, ddim_step(prediction, high, low, eta=0.5, noise=noise))


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
    found = report_step(Prediction(x, eps), fresh, high, low, eta=eta)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


# Encoding


@dataclass(frozen=True)
class Known(Denoiser):
    """The true image in the place of a network."""

    schedule: NoiseSchedule
    x: Tensor

    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        return Prediction(self.x, eps_from_x(self.schedule(t), z, self.x))


@dataclass(frozen=True)
class ExactPair(Denoiser):
    """The posterior mean of images that are -0.8 or 0.5 in each entry, under Gamma noise."""

    schedule: NoiseSchedule
    noise: GammaNoise

    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        level, wide = self.schedule(t), z.double()
        values = torch.tensor([-0.8, 0.5], dtype=torch.float64)
        logits = torch.stack(
            [self.noise.log_density(eps_from_x(level, wide, v), level) for v in values]
        )
        # A state below both supports is nobody's: halfway between them.
        x = (logits.clamp(min=-1e300).softmax(0) * values.reshape(2, *(1,) * z.ndim)).sum(0).to(z)
        return Prediction(x, eps_from_x(level, z, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_theta
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_encoding_then_drawing_is_the_identity(
    num_steps: int, theta_0: float, dtype: torch.dtype
) -> None:
    """With the true x in any number of steps, to rounding: 1e-3 is far more than float32 needs."""
    sampler, start = GammaQuantile(theta_0), 50.0
    prediction = draws(1000, sampler.noise, SCHEDULE(start))
    z = q_sample(*prediction, SCHEDULE(start)).to(dtype)
    known = Known(SCHEDULE, prediction.x.to(dtype))
    levels = torch.linspace(1000, start, num_steps + 1, dtype=torch.float64)
    encoded = sampler(known, z, levels.flip(0))
    back = sampler(known, encoded, levels)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-8)
    eps = eps_from_x(SCHEDULE(1000.0), encoded.double(), prediction.x)[:, 0]
    assert p_value(eps, sampler.noise, 1000.0) > 0.01


@every_theta
def test_encoding_tends_to_the_identity_with_a_posterior_mean(theta_0: float) -> None:
    """First order in the steps, like DDIM's, between levels 100 and 1000."""
    sampler = GammaQuantile(theta_0)
    denoiser = ExactPair(SCHEDULE, sampler.noise)
    low = SCHEDULE(100.0)
    x = torch.tensor([-0.8, 0.5], dtype=torch.float64).repeat(100)[:, None]
    z = q_sample(x, sampler.noise.draw(x.shape, low, torch.Generator().manual_seed(0), x), low)
    errors = []
    for num_steps in (100, 200, 400):
        levels = torch.linspace(1000, 100, num_steps + 1, dtype=torch.float64)
        back = sampler(denoiser, sampler(denoiser, z, levels.flip(0)), levels)
        errors.append(float((back - z).square().mean().sqrt()))
    assert errors[-1] < 0.02
    assert all(1.6 < a / b < 2.5 for a, b in pairwise(errors)), errors


@every_theta
def test_encoding_may_start_from_clean_data(theta_0: float, gaussian: ExactGaussian) -> None:
    x, _ = latents(0, range(3), (3, 4, 4))
    for schedule in (SCHEDULE, CosineLogSNRSchedule()):
        denoiser = ExactGaussian(schedule, gaussian.mean, gaussian.std)
        z = encode(denoiser, x / 2, timesteps.linear(1000, 20), sampler=GammaQuantile(theta_0))
        assert z.isfinite().all()


# The target of progressive distillation


def two_steps(
    noise: GammaNoise, schedule: NoiseSchedule, num_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Scales, Scales]:
    """States that a step begins at, guesses and ends of two halves of it, and its levels."""
    step = 1000 / num_steps
    t = step * torch.tensor([1, (num_steps + 1) // 2, num_steps], dtype=torch.float64)
    high, mid, low = schedule(t), schedule(t - step / 2), schedule((t - step).clamp(min=0))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((3, 200), generator=generator, dtype=torch.float64) * 2 - 1
    z = q_sample(x, noise.draw(x.shape, high, generator, x), high)
    # Errors of a network: of the size of the noise, but no larger than images.
    near = [
        x + 0.3 * expand_like(level.sigma, x) * randn(x.shape, generator, x)
        for level in (high, mid)
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


# Every shape, and bad input


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
@pytest.mark.parametrize("theta_0", [1e-6, 0.001, 0.1, 1.0])
def test_nothing_overflows_from_the_smallest_to_the_largest_shapes(
    theta_0: float, schedule: NoiseSchedule, kind: type[GammaSampler], gaussian: ExactGaussian
) -> None:
    """K from 1e-4, at level 1 and theta_0 = 1, to 5e20; with estimates beyond the support."""
    denoiser = ExactGaussian(schedule, gaussian.mean, gaussian.std)
    sampler = kind(theta_0)
    for levels in (timesteps.linear(1000, 20), torch.tensor([1000.0, 10, 2, 1, 0.5, 0])):
        z, generators = latents(
            0, range(4), (3, 4, 4), noise=sampler.noise, scales=schedule(1000.0)
        )
        for state in sampler.trajectory(denoiser, z, levels, generator=generators):
            assert state.z.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_below_the_support_is_taken_to_its_edge(kind: type[GammaSampler]) -> None:
    high, low = SCHEDULE(100.0), SCHEDULE(60.0)
    sampler = kind(0.1)
    x = torch.zeros(2, 3, dtype=torch.float64)
    edge = -sampler.noise.concentration(high).sqrt()
    z = [
        sampler.step(Prediction(x, x + eps), high, low, torch.Generator().manual_seed(0))
        for eps in (edge, 10 * edge)
    ]
    assert z[1].isfinite().all()
    if kind in (GammaExact, GammaQuantile):
        torch.testing.assert_close(z[1], z[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(
            z[0], x - low.sigma * sampler.noise.concentration(low).sqrt(), rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta_0", [0.001, 0.1])
def test_same_seed_same_images_for_any_batch_split(
    kind: type[GammaSampler], theta_0: float, gaussian: ExactGaussian
) -> None:
    """To a rounding of float32: what is drawn is the same to the bit, see test_noise.py."""
    sampler, levels = kind(theta_0), timesteps.linear(1000, 8)
    runs = []
    for size in (1, 7, 30):
        parts = []
        for first in range(0, 30, size):
            z, generators = latents(
                3,
                range(first, min(first + size, 30)),
                (3, 4, 4),
                noise=sampler.noise,
                scales=SCHEDULE(1000.0),
            )
            parts.append(sampler(gaussian, z, levels, generator=generators))
        runs.append(torch.cat(parts))
    # The report's states grow a thousandfold on the way.
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=1e-4, atol=1e-4)
    assert len(runs[0].flatten(1).unique(dim=0)) == 30


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_the_noise_is_that_of_the_generators(
    kind: type[GammaSampler], gaussian: ExactGaussian
) -> None:
    levels = timesteps.linear(1000, 8)[:-1]
    z, generators = latents(0, range(2), (3, 4, 4))
    one = kind()(gaussian, z, levels, generator=generators)
    other = kind()(gaussian, z, levels, generator=image_generators(1, range(2)))
    assert (one != other).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta_0", [0.0, -1.0, math.nan])
def test_theta_0_must_be_positive(kind: type[GammaSampler], theta_0: float) -> None:
    with pytest.raises(ValueError, match=r"theta_0 must be positive, got .*0\.001"):
        kind(theta_0)


@pytest.mark.parametrize("kind", [GammaMoment, GammaReport])
def test_eta_must_lie_in_the_unit_interval(kind: type[GammaMoment | GammaReport]) -> None:
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got 1\.5"):
        kind(eta=1.5)


@pytest.mark.parametrize("kind", [GammaExact, GammaQuantile])
def test_steps_without_a_free_noise_have_no_eta(kind: type[GammaSampler]) -> None:
    with pytest.raises(TypeError, match="eta"):
        kind(eta=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_quantile_sampler_encodes(
    kind: type[GammaSampler], gaussian: ExactGaussian
) -> None:
    sampler = kind()
    assert sampler.encodes == (kind is GammaQuantile)
    if not sampler.encodes:
        z, generators = latents(0, range(2), (3, 4, 4))
        with pytest.raises(ValueError, match=r"levels must decrease strictly.*deterministic"):
            sampler(gaussian, z, torch.tensor([0.0, 500.0]), generator=generators)


def test_each_law_has_its_deterministic_sampler() -> None:
    ddim: Sampler = default_sampler(DDIM().noise)
    assert ddim == DDIM()
    for kind in KINDS:
        assert default_sampler(kind(0.02).noise) == GammaQuantile(0.02)


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
