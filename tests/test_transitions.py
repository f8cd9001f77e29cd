"""The pure steps: laws of Gaussians, exact in float64, at random real and integer levels."""

import pytest
import torch
from torch import Tensor

from ddim_pl.prediction import Prediction
from ddim_pl.scales import Scales, expand_like
from ddim_pl.schedules import (
    CosineLogSNRSchedule,
    ImprovedCosineSchedule,
    LinearSchedule,
    NoiseSchedule,
)
from ddim_pl.transitions import (
    ddim_noise_scale,
    ddim_step,
    forward_step,
    ode_step,
    posterior,
    q_sample,
    transition_variance,
)

every_schedule = pytest.mark.parametrize(
    "schedule",
    [LinearSchedule(), ImprovedCosineSchedule(), CosineLogSNRSchedule()],
    ids=["linear", "improved_cosine", "cosine_log_snr"],
)
integer_or_real = pytest.mark.parametrize("integer", [True, False], ids=["integer", "real"])


def level_pairs(schedule: NoiseSchedule, integer: bool, count: int = 500) -> tuple[Scales, Scales]:
    """Scales at random levels `t > s` (seed 0), some of them at the ends."""
    generator = torch.Generator().manual_seed(0)
    pairs = 1000 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    pairs[:4] = torch.tensor([[1000.0, 0.0], [1.0, 0.0], [1000.0, 999.0], [2.0, 1.0]])
    if integer:
        pairs = pairs.round()
    pairs = pairs.sort(dim=1, descending=True).values
    pairs = pairs[pairs[:, 0] > pairs[:, 1]]
    return schedule(pairs[:, 0]), schedule(pairs[:, 1])


def ddim_coefficients(t: Scales, s: Scales, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """A DDIM step as `a z + b x + c n`: what it makes of unit x, eps and noise."""
    one, zero = torch.ones_like(t.alpha), torch.zeros_like(t.alpha)
    noise = zero if eta else None
    of_x = ddim_step(Prediction(one, zero), t, s, eta=eta, noise=noise)
    of_eps = ddim_step(Prediction(zero, one), t, s, eta=eta, noise=noise)
    of_noise = ddim_step(Prediction(zero, zero), t, s, eta=eta, noise=one) if eta else zero
    a = of_eps / t.sigma
    return a, of_x - a * t.alpha, of_noise


def posterior_coefficients(t: Scales, s: Scales) -> tuple[Tensor, Tensor, Tensor]:
    one, zero = torch.ones_like(t.alpha), torch.zeros_like(t.alpha)
    a, std = posterior(one, zero, t, s)
    b, _ = posterior(zero, one, t, s)
    return a, b, std


@every_schedule
@integer_or_real
def test_ddim_eta_one_matches_ddpm_posterior(schedule: NoiseSchedule, integer: bool) -> None:
    t, s = level_pairs(schedule, integer)
    for ddim, ddpm in zip(ddim_coefficients(t, s, 1.0), posterior_coefficients(t, s), strict=True):
        torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-10)


@every_schedule
@integer_or_real
def test_the_posterior_is_bayes_rule(schedule: NoiseSchedule, integer: bool) -> None:
    """The precisions of `q(z_s | x)` and of `q(z_t | z_s)`, as a function of z_s, add up."""
    t, s = level_pairs(schedule, integer)
    inside = s.sigma > 0
    t, s = (Scales(level.alpha[inside], level.sigma[inside]) for level in (t, s))
    ratio = t.alpha / s.alpha
    forward = t.sigma**2 - ratio**2 * s.sigma**2
    precision = 1 / s.sigma**2 + ratio**2 / forward
    a, b, std = posterior_coefficients(t, s)
    torch.testing.assert_close(std, precision**-0.5, rtol=0, atol=1e-10)
    torch.testing.assert_close(a, ratio / forward / precision, rtol=0, atol=1e-10)
    torch.testing.assert_close(b, s.alpha / s.sigma**2 / precision, rtol=0, atol=1e-10)


@every_schedule
@integer_or_real
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_with_the_true_image_keeps_the_marginal(
    schedule: NoiseSchedule, integer: bool, eta: float
) -> None:
    """`N(alpha_t x, sigma_t^2)` goes to `N(alpha_s x, sigma_s^2)`, for any eta and levels."""
    t, s = level_pairs(schedule, integer)
    a, b, c = ddim_coefficients(t, s, eta)
    torch.testing.assert_close(a * t.alpha + b, s.alpha, rtol=0, atol=1e-12)
    torch.testing.assert_close(a**2 * t.sigma**2 + c**2, s.sigma**2, rtol=0, atol=1e-12)


@every_schedule
def test_large_variance_adds_what_the_forward_step_added(schedule: NoiseSchedule) -> None:
    """And keeps the mean: the marginal becomes too wide by the difference of the variances."""
    t, s = level_pairs(schedule, integer=True)
    one = torch.ones_like(t.alpha)
    (mean, small), (other, large) = (
        posterior(one, one, t, s, variance=variance) for variance in ("small", "large")
    )
    assert torch.equal(mean, other)
    torch.testing.assert_close(large**2, 1 - (t.alpha / s.alpha) ** 2, rtol=0, atol=1e-12)
    torch.testing.assert_close(small, large * s.sigma / t.sigma, rtol=0, atol=1e-12)
    assert (large >= small).all()


def test_large_variance_of_one_level_is_its_beta() -> None:
    schedule = LinearSchedule()
    k = torch.arange(1, 1001)
    variance = transition_variance(schedule(k), schedule(k - 1))
    torch.testing.assert_close(variance, schedule.betas(), rtol=1e-11, atol=0)


@every_schedule
def test_transition_variance_is_never_negative(schedule: NoiseSchedule) -> None:
    """Not even between neighbouring float64 levels, where its root would be no number (seed 0)."""
    generator = torch.Generator().manual_seed(0)
    t = 1000 * torch.rand(20_000, generator=generator, dtype=torch.float64)
    s = torch.nextafter(t, torch.zeros_like(t))
    assert (transition_variance(schedule(t), schedule(s)) >= 0).all()
    assert ddim_noise_scale(schedule(t), schedule(s), 1.0).isfinite().all()


@every_schedule
@integer_or_real
def test_the_deterministic_step_is_euler_in_the_ratio_of_noise_to_signal(
    schedule: NoiseSchedule, integer: bool
) -> None:
    """`y_s = y_t + (r_s - r_t) eps` with `y = z / alpha` and `r = sigma / alpha`."""
    t, s = level_pairs(schedule, integer)
    generator = torch.Generator().manual_seed(1)
    x, eps = torch.randn(2, len(t.alpha), generator=generator, dtype=torch.float64)
    y = q_sample(x, eps, t) / t.alpha + (s.sigma / s.alpha - t.sigma / t.alpha) * eps
    # y is up to 1e5 where alpha_T is 5e-5.
    stepped = ddim_step(Prediction(x, eps), t, s)
    torch.testing.assert_close(stepped, s.alpha * y, rtol=0, atol=1e-10)


@every_schedule
def test_a_deterministic_step_lands_on_the_line_of_its_estimates(schedule: NoiseSchedule) -> None:
    """Up or down: with the same estimates, going there and back is the identity."""
    t, s = level_pairs(schedule, integer=False)
    x, eps = torch.randn(2, len(t.alpha), 3, generator=torch.Generator().manual_seed(2)).double()
    prediction = Prediction(x, eps)
    assert torch.equal(ddim_step(prediction, t, s), q_sample(x, eps, s))
    assert torch.equal(ddim_step(prediction, s, t), q_sample(x, eps, t))


def test_the_noise_scale_is_that_of_the_paper() -> None:
    """[DDIM], eq. 16, in their letters; none at eta 0 nor in the step to clean data."""
    schedule = LinearSchedule()
    t, s = level_pairs(schedule, integer=True)
    abar_t, abar_s = t.alpha**2, s.alpha**2
    want = 0.3 * ((1 - abar_s) / (1 - abar_t)).sqrt() * (1 - abar_t / abar_s).sqrt()
    torch.testing.assert_close(ddim_noise_scale(t, s, 0.3), want, rtol=0, atol=1e-11)
    assert (ddim_noise_scale(t, s, 0.0) == 0).all()
    assert (ddim_noise_scale(t, schedule(torch.zeros_like(t.alpha)), 1.0) == 0).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_levels_per_image_act_on_each_image(eta: float) -> None:
    schedule = LinearSchedule()
    t, s = level_pairs(schedule, integer=False, count=6)
    generator = torch.Generator().manual_seed(3)
    x, eps, noise = torch.randn(3, len(t.alpha), 3, 4, 4, generator=generator)
    together = ddim_step(Prediction(x, eps), t, s, eta=eta, noise=noise)
    mean, std = posterior(eps, x, t, s)
    assert std.shape == t.alpha.shape
    assert together.dtype == mean.dtype == x.dtype
    for i in range(len(x)):
        one = [Scales(level.alpha[i], level.sigma[i]) for level in (t, s)]
        alone = ddim_step(
            Prediction(x[i : i + 1], eps[i : i + 1]), *one, eta=eta, noise=noise[i : i + 1]
        )
        torch.testing.assert_close(together[i : i + 1], alone)
        torch.testing.assert_close(
            mean[i : i + 1], posterior(eps[i : i + 1], x[i : i + 1], *one)[0]
        )


def test_q_sample_mixes_image_and_noise() -> None:
    level = LinearSchedule()(torch.tensor([0.0, 500.0]))
    x, eps = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(4))
    z = q_sample(x, eps, level)
    assert torch.equal(z[0], x[0])
    want = expand_like(level.alpha, x) * x + expand_like(level.sigma, x) * eps
    torch.testing.assert_close(z, want)


def test_a_stochastic_step_without_noise_is_an_error() -> None:
    t, s = level_pairs(LinearSchedule(), integer=True)
    x = torch.zeros(len(t.alpha))
    with pytest.raises(AssertionError, match="noise"):
        ddim_step(Prediction(x, x), t, s, eta=0.5)


# Steps along another noise, and back up


@every_schedule
@integer_or_real
def test_a_step_along_another_noise_keeps_the_state(
    schedule: NoiseSchedule, integer: bool
) -> None:
    """`z_s = alpha_s / alpha_t z_t + (sigma_s - alpha_s sigma_t / alpha_t) eps`, up and down."""
    below, above = level_pairs(schedule, integer)[::-1]
    generator = torch.Generator().manual_seed(5)
    x, eps, other = torch.randn(3, len(above.alpha), generator=generator, dtype=torch.float64)
    for t, s in ((above, below), (below, above)):
        ratio = s.alpha / t.alpha
        want = ratio * q_sample(x, eps, t) + (s.sigma - ratio * t.sigma) * other
        stepped = ode_step(Prediction(x, eps), other, t, s)
        # The ratio is up to 1e4 in the cosine schedule.
        torch.testing.assert_close(stepped, want, rtol=1e-10, atol=1e-10)
        own = ode_step(Prediction(x, eps), eps, t, s)
        assert torch.equal(own, ddim_step(Prediction(x, eps), t, s))


@every_schedule
@integer_or_real
def test_a_forward_step_keeps_the_marginal(schedule: NoiseSchedule, integer: bool) -> None:
    """`N(alpha_s x, sigma_s^2)` goes to `N(alpha_t x, sigma_t^2)`."""
    t, s = level_pairs(schedule, integer)
    one, zero = torch.ones_like(t.alpha), torch.zeros_like(t.alpha)
    a, c = forward_step(one, zero, s, t), forward_step(zero, one, s, t)
    torch.testing.assert_close(a * s.alpha, t.alpha, rtol=0, atol=1e-12)
    torch.testing.assert_close(a**2 * s.sigma**2 + c**2, t.sigma**2, rtol=0, atol=1e-12)


@every_schedule
def test_a_forward_step_undoes_a_step_of_ddpm_in_law(schedule: NoiseSchedule) -> None:
    """Bayes' rule: both ways the two states have the same covariance, given x."""
    t, s = level_pairs(schedule, integer=False)
    one, zero = torch.ones_like(t.alpha), torch.zeros_like(t.alpha)
    up = forward_step(one, zero, s, t) * s.sigma**2
    down, _ = posterior(one, zero, t, s)
    torch.testing.assert_close(up, down * t.sigma**2, rtol=0, atol=1e-12)


def test_two_forward_steps_are_one() -> None:
    schedule = LinearSchedule()
    r, s, t = (schedule(level) for level in (100.0, 400.0, 900.0))
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    a, c = (forward_step(z, noise, r, t) for z, noise in ((one, zero), (zero, one)))
    first, second = forward_step(zero, one, r, s), forward_step(zero, one, s, t)
    ratio = forward_step(one, zero, s, t)
    torch.testing.assert_close(ratio * forward_step(one, zero, r, s), a)
    torch.testing.assert_close((ratio * first) ** 2 + second**2, c**2)
