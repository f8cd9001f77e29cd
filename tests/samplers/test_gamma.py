"""Samplers of Gamma diffusion: what each keeps of the Gamma marginal; their steps are in noise/.

With the true x in place of the network, the standardised noise of a state is known, and its law is
tested: 100,000 samples with fixed seeds, by Kolmogorov and Smirnov's test at 1 %.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from exact import PAIRS, ExactGaussian
from scipy import stats
from torch import Tensor

from ddim_pl import timesteps
from ddim_pl.denoiser import Denoiser
from ddim_pl.inversion import encode
from ddim_pl.noise import GammaNoise, latents
from ddim_pl.noise.gamma_quantiles import normal_score
from ddim_pl.noise.gamma_steps import report_step, thinning_shapes
from ddim_pl.prediction import Prediction, eps_from_x
from ddim_pl.rng import image_generators
from ddim_pl.samplers import DDIM, GammaExact, GammaMoment, GammaQuantile, GammaReport, Sampler
from ddim_pl.samplers.gamma import GammaSampler, default_sampler
from ddim_pl.scales import Scales
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule
from ddim_pl.transitions import ddim_noise_scale, ddim_step, q_sample, transition_variance

KINDS = [GammaMoment, GammaReport, GammaExact, GammaQuantile]
STOCHASTIC = [GammaMoment, GammaReport, GammaExact]
SCHEDULE = LinearSchedule()
every_pair = pytest.mark.parametrize(("t", "s"), PAIRS)
every_theta = pytest.mark.parametrize("theta_0", [0.001, 0.1])
IMAGE = 0.3


def draws(count: int, noise: GammaNoise, scales: Scales, seed: int = 0) -> Prediction:
    """The true x, and noise of the Gamma law."""
    x = torch.full((count, 1), IMAGE, dtype=torch.float64)
    return Prediction(x, noise.draw(x.shape, scales, torch.Generator().manual_seed(seed), x))


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


# The report's step with any sigma_t, and with doubling shapes


def spread(sampler: GammaSampler, levels: Tensor) -> Tensor:
    """Standardised noise after all levels, from the Gamma law at the first."""
    first, last = SCHEDULE(levels[0]), SCHEDULE(levels[-1])
    x, eps = draws(100_000, sampler.noise, first, 4)
    generator = torch.Generator().manual_seed(5)
    z = sampler(Known(SCHEDULE, x), q_sample(x, eps, first), levels, generator=generator)
    return eps_from_x(last, z, x)[:, 0]


def test_with_doubling_shapes_only_all_fresh_noise_keeps_the_law() -> None:
    """`sigma_t = alpha_s / alpha_t` makes C zero; any other sigma misses, see docs/gamma.md."""
    levels = timesteps.doubling(SCHEDULE)[:21]  # to level 17, whose shape is 0.4 at theta_0 = 0.1
    alpha = SCHEDULE(levels).alpha
    fresh = tuple((alpha[1:] / alpha[:-1]).tolist())
    noise = GammaNoise(0.1)
    exact = GammaReport(0.1, sigma=fresh)
    assert p_value(spread(exact, levels), noise, float(levels[-1])) > 0.01
    for sigma in (0.0, 0.5, 0.9):
        other = spread(GammaReport(0.1, sigma=sigma), levels)
        assert p_value(other, noise, float(levels[-1])) < 1e-10
    for t, s in ((1000.0, 500.0), (120.0, 60.0), (60.0, 59.0)):  # without the doubling
        ratio = float(SCHEDULE(s).alpha / SCHEDULE(t).alpha)
        assert p_value(after(GammaReport(0.1, sigma=ratio), t, s), noise, s) < 1e-10


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
def test_the_variance_with_doubling_shapes(kappa: float) -> None:
    """`2 (1 - kappa)^2 / (1 + alpha_s)^2 + kappa^2`, `kappa = sigma alpha_t / alpha_s`."""
    levels = timesteps.doubling(SCHEDULE)
    for t, s in ((levels[0], levels[1]), (levels[9], levels[10]), (levels[15], levels[16])):
        high, low = SCHEDULE(t), SCHEDULE(s)
        sampler = GammaReport(0.01, sigma=float(kappa * low.alpha / high.alpha))
        wanted = 2 * (1 - kappa) ** 2 / (1 + low.alpha) ** 2 + kappa**2
        assert after(sampler, float(t), float(s)).var() == pytest.approx(float(wanted), rel=0.03)


@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.5])
def test_in_the_reports_sense_the_step_is_exact_with_doubling_shapes(sigma: float) -> None:
    """One Z for the noise of all levels, as in its annex: the step gives `alpha_s theta_0 Z`."""
    levels = timesteps.doubling(SCHEDULE)
    for t, s in ((levels[3], levels[4]), (levels[12], levels[13]), (levels[26], levels[27])):
        high, low = SCHEDULE(t), SCHEDULE(s)
        noise = GammaNoise(0.1)
        _, shape = thinning_shapes(noise, high, low)
        unit = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
        z = shape.sqrt() * unit
        # Its recursion has sqrt(abar) of the cleaner level as well: (1 + alpha_s), not 2.
        eps = high.alpha * noise.theta_0 * (1 + low.alpha) * z / high.sigma
        x = torch.full_like(unit, IMAGE)
        found = report_step(Prediction(x, eps), unit, torch.tensor(sigma).double(), high, low)
        wanted = low.alpha * (x + noise.theta_0 * z)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_sigma_may_be_a_constant_ddims_or_a_list() -> None:
    levels = timesteps.linear(1000, 6)
    scales = SCHEDULE(levels)
    ddims = [
        float(ddim_noise_scale(SCHEDULE(t), SCHEDULE(s), 1.0)) for t, s in pairwise(levels[:-1])
    ]
    assert scales.sigma[-1] == 0
    x, eps = draws(10, GammaNoise(0.1), SCHEDULE(1000.0))
    known, z = Known(SCHEDULE, x), q_sample(x, eps, SCHEDULE(1000.0))

    def run(sampler: GammaReport, to: int = 7) -> Tensor:
        return sampler(known, z, levels[:to], generator=torch.Generator().manual_seed(0))

    for to in (6, 7):  # to a level with noise, and to clean data
        same = run(GammaReport(0.1, sigma=tuple(ddims)), to)
        torch.testing.assert_close(same, run(GammaReport(0.1), to))
        constant = run(GammaReport(0.1, sigma=(0.2,) * 5), to)
        torch.testing.assert_close(constant, run(GammaReport(0.1, sigma=0.2), to))
    assert not torch.equal(
        run(GammaReport(0.1, sigma=0.2), 6), run(GammaReport(0.1, sigma=0.3), 6)
    )
    assert GammaReport(0.1, sigma=[0.1, 0.2]) == GammaReport(0.1, sigma=(0.1, 0.2))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 4, 6])
def test_a_list_of_sigmas_has_a_value_for_each_noisy_level(count: int) -> None:
    x, eps = draws(2, GammaNoise(0.1), SCHEDULE(1000.0))
    sampler = GammaReport(0.1, sigma=(0.1,) * count)
    with pytest.raises(ValueError, match=f"sigma must have 5 values.*got {count}"):
        sampler(
            Known(SCHEDULE, x),
            eps,
            timesteps.linear(1000, 6),
            generator=torch.Generator().manual_seed(0),
        )


@pytest.mark.parametrize("sigma", [-0.1, math.inf, math.nan, (0.1, -1.0)])
def test_a_sigma_is_a_finite_scale(sigma: float | tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sigma must be at least 0 and finite, got"):
        GammaReport(sigma=sigma)


def test_eta_and_sigma_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"sigma must be None with eta 1\.0, got 0\.1"):
        GammaReport(eta=1.0, sigma=0.1)


@every_theta
def test_states_lie_above_the_edge_of_the_support(theta_0: float) -> None:
    for kind in (GammaExact, GammaQuantile):
        for t, s in ((1000.0, 30.0), (300.0, 1.0), (5.0, 1.0)):
            edge = -GammaNoise(theta_0).concentration(SCHEDULE(s)).sqrt()
            assert (after(kind(theta_0), t, s, 10_000) >= edge * (1 + 1e-12)).all()


# The steps and their limits of theta_0 -> 0


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


# Encoding


@dataclass(frozen=True)
class Known(Denoiser):
    """The true image in place of a network."""

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
        scales, wide = self.schedule(t), z.double()
        values = torch.tensor([-0.8, 0.5], dtype=torch.float64)
        logits = torch.stack(
            [self.noise.log_density(eps_from_x(scales, wide, v), scales) for v in values]
        )
        # A state below both supports gets their mean.
        x = (logits.clamp(min=-1e300).softmax(0) * values.reshape(2, *(1,) * z.ndim)).sum(0).to(z)
        return Prediction(x, eps_from_x(scales, z, x))


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
    """To a rounding of float32: what is drawn is the same to the bit, see noise/test_gamma.py."""
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
    # States of `GammaReport` grow a thousandfold.
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
