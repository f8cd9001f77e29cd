"""Schedules: exact at the integers, smooth between them, precise where there is little noise."""

import dataclasses
import inspect
import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, rescale_zero_terminal_snr

from ddim_pl import schedules
from ddim_pl.schedules import (
    CosineLogSNRSchedule,
    DiscreteSchedule,
    EDMSchedule,
    ImprovedCosineSchedule,
    LinearSchedule,
    NoiseSchedule,
    ScaledLinearSchedule,
    ZeroTerminalSNR,
)
from ddim_pl.timesteps import karras

KINDS = [
    kind
    for _, kind in inspect.getmembers(schedules, inspect.isclass)
    if issubclass(kind, NoiseSchedule) and not inspect.isabstract(kind)
]
DISCRETE = [kind for kind in KINDS if issubclass(kind, DiscreteSchedule)]
every_schedule = pytest.mark.parametrize("schedule", [kind() for kind in KINDS])
every_discrete_schedule = pytest.mark.parametrize("schedule", [kind() for kind in DISCRETE])


def random_levels(count: int, seed: int = 0) -> torch.Tensor:
    """Real levels in (0, 1000), half of them crowded towards 0."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    return 1000 * torch.cat([u[: count // 2], 10 ** (-9 * u[count // 2 :])])


def test_all_schedules_are_found() -> None:
    assert {LinearSchedule, ScaledLinearSchedule, ImprovedCosineSchedule} <= set(DISCRETE)
    assert CosineLogSNRSchedule in KINDS


@every_schedule
def test_a_schedule_is_a_frozen_dataclass(schedule: NoiseSchedule) -> None:
    assert dataclasses.is_dataclass(schedule)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.num_levels = 1


@every_schedule
def test_signal_and_noise_have_variance_one(schedule: NoiseSchedule) -> None:
    level = schedule(random_levels(2000))
    total = level.alpha**2 + level.sigma**2
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@every_schedule
def test_log_snr_falls_strictly_at_integers_and_between(schedule: NoiseSchedule) -> None:
    t = torch.arange(0, 1000.25, 0.25, dtype=torch.float64)
    assert (schedule(t).log_snr.diff() < 0).all()
    assert (schedule(random_levels(500).sort().values.unique()).log_snr.diff() < 0).all()


@every_schedule
def test_scales_are_continuous_across_integers(schedule: NoiseSchedule) -> None:
    """The log-SNR falls by less than 8 a level from level 1 on, so 1e-7 apart it moves < 1e-6."""
    k = torch.arange(1, 1000, dtype=torch.float64)
    below, at, above = (schedule(k + d).log_snr for d in (-1e-7, 0, 1e-7))
    torch.testing.assert_close(below, at, rtol=0, atol=1e-6)
    torch.testing.assert_close(above, at, rtol=0, atol=1e-6)


@every_schedule
def test_scales_are_float64_and_have_the_shape_of_the_levels(schedule: NoiseSchedule) -> None:
    t = random_levels(6).float()
    for levels in (3, 3.5, t[0], t, t.reshape(2, 3), t[:0]):
        level = schedule(levels)
        shape = torch.as_tensor(levels).shape
        assert level.alpha.shape == level.sigma.shape == level.log_snr.shape == shape
        assert level.alpha.dtype == level.sigma.dtype == torch.float64
    torch.testing.assert_close(schedule(t).sigma[3], schedule(t[3]).sigma, rtol=0, atol=0)


@every_schedule
@pytest.mark.parametrize("t", [-1e-9, 1000.001, math.nan, math.inf, [0.0, 1001.0]])
def test_levels_outside_the_schedule_are_refused(schedule: NoiseSchedule, t: float) -> None:
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1000\]"):
        schedule(torch.as_tensor(t))


@every_schedule
def test_a_step_to_level_0_ends_in_clean_data(schedule: NoiseSchedule) -> None:
    t = torch.tensor([0.0, 1e-9, 1.0, 1000.0]).double()
    found, own = schedule.step_end(t), schedule(t)
    assert found.alpha[0] == 1
    assert found.sigma[0] == 0
    for a, b in zip(found, own, strict=True):
        assert torch.equal(a[1:], b[1:])
    assert schedule.step_end(0).sigma == 0
    assert schedule.step_end(0.0).alpha.dtype == torch.float64


@every_schedule
def test_the_ends_are_data_and_noise(schedule: NoiseSchedule) -> None:
    """sqrt(abar_T): 0.0064 (linear), 0.068 (scaled linear), 5e-5 (both cosines)."""
    assert schedule(0).sigma < 5e-5
    assert schedule(1000).alpha < 0.07


@every_discrete_schedule
def test_level_0_of_a_discrete_schedule_is_exactly_clean(schedule: DiscreteSchedule) -> None:
    assert schedule(0).alpha == 1
    assert schedule(0).sigma == 0
    assert schedule(0).log_snr == math.inf


@every_discrete_schedule
def test_integer_levels_are_the_cumulative_product(schedule: DiscreteSchedule) -> None:
    """A product of 1000 factors in float64 has an error of about 1000 * 1e-16, at random 4e-15."""
    abar = (1 - schedule.betas()).cumprod(0)
    level = schedule(torch.arange(1, 1001))
    torch.testing.assert_close(level.alpha, abar.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(level.sigma**2, 1 - abar, rtol=0, atol=1e-14)


@every_discrete_schedule
def test_log_abar_is_linear_between_integers(schedule: DiscreteSchedule) -> None:
    t = random_levels(500)
    t = t[schedule(t.ceil()).alpha > 0]
    k, w = t.floor(), t.frac()
    mixed = (1 - w) * schedule(k).alpha.log() + w * schedule(k + 1).alpha.log()
    torch.testing.assert_close(schedule(t).alpha, mixed.exp(), rtol=1e-12, atol=0)


@every_discrete_schedule
def test_tiny_levels_keep_their_relative_precision(schedule: DiscreteSchedule) -> None:
    """`sigma_t^2 = t c - (t c)^2 / 2 + ...` with `c = -log(1 - beta_1)`, for t in [0, 1]."""
    c = -math.log1p(-schedule.betas()[0].item())
    for t in (1e-12, 1e-9, 1e-6, 1e-3, 0.5, 1.0):
        u = c * t
        sigma = math.sqrt(u - u**2 / 2 + u**3 / 6 - u**4 / 24 + u**5 / 120)
        torch.testing.assert_close(schedule(t).sigma.item(), sigma, rtol=1e-12, atol=0)


def test_sigma_of_the_first_level_is_the_root_of_the_first_variance() -> None:
    sigma = LinearSchedule()(1).sigma.item()
    torch.testing.assert_close(sigma, math.sqrt(1e-4), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_levels", [1, 10, 1000, 4000])
@pytest.mark.parametrize(
    ("schedule", "beta_schedule"),
    [
        (LinearSchedule, "linear"),
        (ScaledLinearSchedule, "scaled_linear"),
        (ImprovedCosineSchedule, "squaredcos_cap_v2"),
    ],
)
def test_variances_are_those_of_diffusers(
    schedule: type[DiscreteSchedule], beta_schedule: str, num_levels: int
) -> None:
    """Its tables are float32: two roundings of 6e-8 after the square, and those of linspace."""
    ours = schedule(num_levels=num_levels)
    ends = {k: getattr(ours, k) for k in ("beta_start", "beta_end") if hasattr(ours, k)}
    theirs = DDIMScheduler(num_levels, beta_schedule=beta_schedule, **ends)
    assert ours.betas().dtype == torch.float64
    torch.testing.assert_close(ours.betas(), theirs.betas.double(), rtol=1e-6, atol=0)
    # The complement of a product of 0.999s in float32 is good to about 1e-5 of itself.
    abar = ours(torch.arange(1, num_levels + 1)).alpha ** 2
    torch.testing.assert_close(abar, theirs.alphas_cumprod.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "schedule", [LinearSchedule(), ScaledLinearSchedule(num_levels=100), ImprovedCosineSchedule()]
)
def test_rescaled_variances_are_those_of_diffusers(schedule: DiscreteSchedule) -> None:
    """Its function computes in the dtype it is given; the first level keeps its noise."""
    ours, theirs = ZeroTerminalSNR(schedule), rescale_zero_terminal_snr(schedule.betas())
    assert ours.num_levels == schedule.num_levels
    torch.testing.assert_close(ours.betas(), theirs, rtol=0, atol=1e-12)
    assert ours.betas()[-1] == 1
    torch.testing.assert_close(ours(1).sigma, schedule(1).sigma, rtol=1e-12, atol=0)


def test_a_last_variance_of_1_leaves_no_signal() -> None:
    """At T exactly, and linearly less on the way from T - 1."""
    schedule = ZeroTerminalSNR()
    last = schedule(1000)
    assert last.alpha == 0
    assert last.sigma == 1
    assert last.log_snr == -math.inf
    t = torch.tensor([0.0, 0.25, 0.5, 0.999], dtype=torch.float64)
    expected = schedule(999).alpha * (1 - t)
    torch.testing.assert_close(schedule(999 + t).alpha, expected, rtol=1e-9, atol=0)
    assert torch.isfinite(schedule(torch.linspace(0, 1000, 4001)).sigma).all()


def test_cosine_log_snr_has_the_closed_form_of_the_paper() -> None:
    """`alpha = cos(a u + b)`, `sigma = sin(a u + b)`: the angle is uniform in the level."""
    schedule = CosineLogSNRSchedule()
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    t = random_levels(1000)
    level = schedule(t)
    angle = a * t / 1000 + b
    torch.testing.assert_close(level.alpha, angle.cos(), rtol=1e-11, atol=0)
    torch.testing.assert_close(level.sigma, angle.sin(), rtol=1e-11, atol=0)
    torch.testing.assert_close(level.log_snr, -2 * angle.tan().log(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("low", "high"), [(-20.0, 20.0), (-10.0, 15.0)])
def test_cosine_log_snr_ends_at_its_bounds(low: float, high: float) -> None:
    schedule = CosineLogSNRSchedule(log_snr_min=low, log_snr_max=high)
    for t, log_snr in ((0, high), (1000, low)):
        torch.testing.assert_close(schedule(t).log_snr.item(), log_snr, rtol=0, atol=1e-9)


def test_cosine_log_snr_depends_on_the_fraction_of_the_way_only() -> None:
    t = random_levels(100)
    coarse, fine = CosineLogSNRSchedule(num_levels=8)(t / 125), CosineLogSNRSchedule()(t)
    torch.testing.assert_close(coarse.log_snr, fine.log_snr, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "arguments", "named"),
    [
        (LinearSchedule, {"num_levels": 0}, "num_levels"),
        (ScaledLinearSchedule, {"num_levels": -1}, "num_levels"),
        (ImprovedCosineSchedule, {"num_levels": 0}, "num_levels"),
        (CosineLogSNRSchedule, {"num_levels": 0}, "num_levels"),
        (LinearSchedule, {"beta_start": 0.0}, "beta_start"),
        (LinearSchedule, {"beta_start": 0.03}, "beta_start"),
        (ScaledLinearSchedule, {"beta_end": 1.0}, "beta_end"),
        (ImprovedCosineSchedule, {"offset": -0.1}, "offset"),
        (ImprovedCosineSchedule, {"max_beta": 1.0}, "max_beta"),
        (ZeroTerminalSNR, {"schedule": LinearSchedule(1)}, "num_levels"),
        (CosineLogSNRSchedule, {"log_snr_min": 20.0}, "log_snr_min"),
        (EDMSchedule, {"num_levels": 1}, "num_levels"),
        (EDMSchedule, {"sigma_min": 0.0}, "sigma_min"),
        (EDMSchedule, {"sigma_max": math.inf}, "sigma_max"),
        (EDMSchedule, {"rho": 0.5}, "rho"),
    ],
)
def test_bad_arguments_are_named(
    kind: type[NoiseSchedule], arguments: dict[str, float], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        kind(**arguments)


@every_schedule
def test_level_at_is_the_inverse_of_the_log_snr(schedule: NoiseSchedule) -> None:
    t = random_levels(500)
    found = schedule.level_at(schedule(t).log_snr)
    assert found.shape == t.shape
    # Between clipped variances the log-SNR of the cosine schedule is nearly flat at T only.
    torch.testing.assert_close(found, t, rtol=1e-7, atol=1e-9)


@every_schedule
def test_level_at_a_log_snr_that_no_level_has_is_the_nearest_level(
    schedule: NoiseSchedule,
) -> None:
    assert schedule.level_at(-100.0) == 1000
    torch.testing.assert_close(schedule.level_at(1e4).item(), 0.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
def test_the_scales_of_a_single_level_are_kept_and_are_those_of_a_vector(schedule):
    levels = [0.0, 1.0, 17.25, 999.0, 1000.0]
    several = schedule(torch.tensor(levels, dtype=torch.float64))
    with torch.inference_mode():
        first = [schedule(torch.tensor(t)) for t in levels]
    for i, t in enumerate(levels):
        again = schedule(t)
        assert again.alpha is first[i].alpha
        assert not again.alpha.is_inference()
        assert (again.alpha, again.sigma) == (several.alpha[i], several.sigma[i])
    with pytest.raises(ValueError, match="t must lie in"):
        schedule(1000.5)
    assert schedule == type(schedule)()  # what it keeps is no part of what it is


@pytest.mark.parametrize("steps", [2, 18])
def test_edm_has_the_levels_of_the_paper(steps: int) -> None:
    """[EDM], eq. 5, over "karras"; below level 1 the noise falls linearly to none."""
    schedule = EDMSchedule()
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    wanted = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)]
    scales = schedule(karras(schedule, steps)[:-1])
    sigmas = (scales.sigma / scales.alpha).tolist()
    assert sigmas == pytest.approx(wanted, rel=1e-9)
    last = schedule(0.25)
    assert (last.sigma / last.alpha).item() == pytest.approx(0.0005, rel=1e-12)
    assert (schedule(0).alpha, schedule(0).sigma) == (1, 0)
