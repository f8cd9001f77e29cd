"""DDIM on laws whose every marginal and whose flow are known."""

import math

import pytest
import torch
from exact import ExactGaussian, ExactMixture, propagate
from torch import Tensor

from ddim_pl import timesteps
from ddim_pl.denoiser import Denoiser
from ddim_pl.noise import latents
from ddim_pl.rng import NoiseSource, image_generators, image_noise, randn
from ddim_pl.samplers import DDIM, Ancestral, Sampler
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule

every_schedule = pytest.mark.parametrize(
    "schedule", [LinearSchedule(), CosineLogSNRSchedule()], ids=["linear", "cosine"]
)
every_sampler = pytest.mark.parametrize(
    "sampler", [DDIM(0.0), DDIM(0.3), DDIM(1.0), Ancestral("small"), Ancestral("large")], ids=str
)
EDGES = [DDIM(0.0), DDIM(1.0), Ancestral("small"), Ancestral("large")]


def start_points(count: int = 9) -> Tensor:
    return torch.linspace(-2, 2, count, dtype=torch.float64)[:, None]


# Laws


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_a_known_image_keeps_its_marginal_at_every_level(
    schedule: NoiseSchedule, eta: float, num_steps: int
) -> None:
    """Data without spread: the estimate of x is exact, and so is the law after every step."""
    denoiser = ExactGaussian(schedule, mean=0.3, std=0.0)
    zero = torch.zeros(1, dtype=torch.float64)
    levels = timesteps.linear(1000, num_steps)
    mean, std = denoiser.marginal(levels[0], zero)
    variance = zero + std**2
    for pair in levels.unfold(0, 2, 1):
        mean, variance = propagate(DDIM(eta), denoiser, pair, zero + mean, variance)
        want_mean, want_std = denoiser.marginal(pair[1], zero)
        if pair[1] == 0:  # images, also where the schedule has noise left
            want_mean, want_std = zero + 0.3, zero
        # The step's coefficients are measured from differences of float64 states of order 1.
        torch.testing.assert_close(mean, zero + want_mean, rtol=0, atol=1e-11)
        torch.testing.assert_close(variance, zero + want_std**2, rtol=0, atol=1e-11)


@every_sampler
@every_schedule
def test_the_law_tends_to_that_of_the_data_at_first_order(
    schedule: NoiseSchedule, sampler: Sampler
) -> None:
    """Propagated exactly; the mean holds for any number of steps, the spread in the limit."""
    std = torch.tensor([0.2, 0.5, 1.5], dtype=torch.float64)
    denoiser = ExactGaussian(schedule, torch.tensor([-0.4, 0.3, 0.0]).double(), std)
    mean, spread = denoiser.marginal(1000, std)
    errors = []
    for num_steps in (100, 200):
        levels = timesteps.linear(1000, num_steps)
        end_mean, variance = propagate(sampler, denoiser, levels, mean, spread**2)
        torch.testing.assert_close(end_mean, denoiser.marginal(0, std)[0], rtol=0, atol=1e-9)
        errors.append((variance.sqrt() - std).abs())
    assert (errors[1] < 0.05).all()
    order = (errors[0][1] / errors[1][1]).log2()
    assert abs(order - 1) < 0.2


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_sampled_images_have_the_propagated_law(eta: float) -> None:
    """Monte Carlo, seed 0, 20,000 images; 4 standard errors of the mean and of the variance."""
    denoiser = ExactGaussian(LinearSchedule(), 0.3, 0.5)
    levels, count = timesteps.quadratic(1000, 10), 20_000
    generator = torch.Generator().manual_seed(0)
    z = randn((count, 1), generator, torch.empty(0, dtype=torch.float64))
    images = DDIM(eta)(denoiser, z, levels, generator=generator)
    zero = torch.zeros(1, dtype=torch.float64)
    mean, variance = propagate(DDIM(eta), denoiser, levels, zero, zero + 1)
    assert abs(images.mean() - mean) < 4 * (variance / count).sqrt()
    assert abs(images.var() / variance - 1) < 4 * math.sqrt(2 / count)


@every_schedule
@pytest.mark.parametrize("strategy", ["linear", "leading", "quadratic"])
def test_eta_one_has_the_law_of_ddpm(schedule: NoiseSchedule, strategy: str) -> None:
    """Until the step to level 0, to which DDPM adds no noise and a discrete schedule has none."""
    denoiser = ExactGaussian(schedule, 0.3, torch.tensor([0.2, 0.5], dtype=torch.float64))
    levels = timesteps.make_levels(strategy, LinearSchedule(), 20)[:-1]
    zero = torch.zeros(2, dtype=torch.float64)
    ddim, ddpm = (
        propagate(sampler, denoiser, levels, zero, zero + 1)
        for sampler in (DDIM(1.0), Ancestral())
    )
    torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-10)


def test_eta_one_gives_the_images_of_ddpm() -> None:
    """From the same generators, to float64 rounding: not the law only."""
    denoiser = ExactGaussian(LinearSchedule())
    levels = timesteps.linear(1000, 20)
    z, _ = latents(0, range(4), (3,))
    ddim, ddpm = (
        sampler(denoiser, z.double(), levels, generator=latents(0, range(4), (3,))[1])
        for sampler in (DDIM(1.0), Ancestral())
    )
    torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-10)


# The flow


def orders(denoiser: ExactGaussian | ExactMixture) -> Tensor:
    """Measured orders of DDIM's largest error against the exact flow, from S to 2 S steps."""
    z = start_points()
    exact = denoiser.flow(z, 1000, 0)
    errors = []
    for num_steps in (50, 100, 200, 400):
        images = DDIM()(denoiser, z, timesteps.linear(1000, num_steps))
        errors.append((images - exact).abs().max())
    return -torch.stack(errors).log2().diff()


@every_schedule
@pytest.mark.parametrize("law", [ExactGaussian, ExactMixture])
def test_ddim_approaches_the_flow_at_first_order(
    schedule: NoiseSchedule, law: type[ExactGaussian | ExactMixture]
) -> None:
    measured = orders(law(schedule))
    assert ((measured - 1).abs() < 0.2).all(), measured


@pytest.mark.parametrize("std", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [1, 10])
def test_a_single_image_is_reached_in_one_step(std: float, num_steps: int) -> None:
    """Without spread the flow is a straight line; with unit spread z hardly moves at S = 1."""
    denoiser = ExactGaussian(LinearSchedule(), 0.3, std)
    images = DDIM()(denoiser, start_points(), timesteps.linear(1000, num_steps))
    if std == 0:
        torch.testing.assert_close(images, torch.full_like(images, 0.3), rtol=0, atol=1e-10)
    else:
        assert (images.diff(dim=0) > 0).all()  # the flow never crosses itself


@every_schedule
def test_encoding_then_sampling_is_identity_in_the_limit(schedule: NoiseSchedule) -> None:
    """Levels rise from just above 0 to T and fall again; each way is of first order."""
    denoiser = ExactGaussian(schedule)
    images = start_points() / 2
    errors = []
    for num_steps in (100, 200, 400):
        levels = timesteps.linear(1000, num_steps)
        levels[-1] = 1e-3
        z = DDIM()(denoiser, images, levels.flip(0))
        back = DDIM()(denoiser, z, levels)
        errors.append((back - images).abs().max())
        # The latent is that of the exact flow, too.
        assert (z - denoiser.flow(images, 1e-3, 1000)).abs().max() < 10 / num_steps
    assert errors[-1] < 0.03
    measured = -torch.stack(errors).log2().diff()
    assert ((measured - 1).abs() < 0.2).all(), measured


def test_encoding_may_start_from_clean_data(gaussian: ExactGaussian) -> None:
    z, _ = latents(0, range(3), (3, 4, 4))
    levels = timesteps.linear(1000, 10)
    for state in DDIM().trajectory(gaussian, z, levels.flip(0)):
        assert state.z.isfinite().all()
    assert state.t == 1000


# Levels


@pytest.mark.parametrize(
    "sampler", [DDIM(1e-3), DDIM(1.0), Ancestral("small"), Ancestral("large")], ids=str
)
def test_a_stochastic_sampler_refuses_rising_levels(
    sampler: Sampler, gaussian: ExactGaussian
) -> None:
    z, generators = latents(0, range(2), (3, 4, 4))
    with pytest.raises(ValueError, match=r"levels must decrease strictly.*deterministic"):
        sampler(gaussian, z, torch.tensor([0.0, 500.0, 1000.0]), generator=generators)


@pytest.mark.parametrize("sampler", EDGES, ids=str)
@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([500.0, 500.0], "decrease strictly"),
        ([1000.0, 400.0, 600.0, 0.0], "decrease strictly"),
        ([1000.0, math.nan], "decrease strictly"),
        ([1000.0], "at least 2"),
        ([], "at least 2"),
        ([[1000.0, 0.0]], "at least 2"),
        ([1001.0, 0.0], r"lie in \[0, 1000\]"),
        ([1000.0, -1.0], r"lie in \[0, 1000\]"),
    ],
)
def test_levels_that_do_not_fall_within_the_schedule_are_refused(
    sampler: Sampler, gaussian: ExactGaussian, levels: list[float], message: str
) -> None:
    z, generators = latents(0, range(2), (3, 4, 4))
    with pytest.raises(ValueError, match=message):
        sampler(gaussian, z, torch.tensor(levels), generator=generators)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_outside_the_unit_interval_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        DDIM(eta)


# Images


@pytest.mark.parametrize("source", ["generators", "philox"])
@pytest.mark.parametrize("sampler", EDGES, ids=str)
def test_same_seed_same_images_for_any_batch_split(
    sampler: Sampler, source: NoiseSource, gaussian: ExactGaussian
) -> None:
    """Bit for bit: the denoiser is elementwise, and each image has its own generator."""
    levels = timesteps.leading(1000, 10)
    runs = []
    for size in (1, 7, 64):
        parts = []
        for first in range(0, 64, size):
            some = range(first, min(first + size, 64))
            z, generators = latents(3, some, (3, 4, 4), noise_source=source)
            parts.append(sampler(gaussian, z, levels, generator=generators))
        runs.append(torch.cat(parts))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    assert len(runs[0].flatten(1).unique(dim=0)) == 64


@pytest.mark.parametrize("sampler", EDGES, ids=str)
def test_different_seeds_share_no_image(sampler: Sampler, gaussian: ExactGaussian) -> None:
    levels = timesteps.leading(1000, 5)
    images = []
    for seed in range(5):
        z, generators = latents(seed, range(20), (3, 4, 4))
        images.append(sampler(gaussian, z, levels, generator=generators))
    assert len(torch.cat(images).flatten(1).unique(dim=0)) == 100


@pytest.mark.parametrize("source", ["generators", "philox"])
@pytest.mark.parametrize("sampler", [DDIM(0.5), DDIM(1.0), Ancestral()], ids=str)
def test_the_noise_is_that_of_the_generators_not_of_the_latents(
    sampler: Sampler, source: NoiseSource, gaussian: ExactGaussian
) -> None:
    levels = timesteps.leading(1000, 5)
    z, generators = latents(0, range(2), (3, 4, 4), noise_source=source)
    one = sampler(gaussian, z, levels, generator=generators)
    other = sampler(gaussian, z, levels, generator=image_noise(source, 1, range(2)))
    assert (one != other).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_have_the_dtype_of_the_latents(
    eta: float, dtype: torch.dtype, gaussian: ExactGaussian
) -> None:
    z, generators = latents(0, range(2), (3, 4, 4))
    images = DDIM(eta)(gaussian, z.to(dtype), timesteps.leading(1000, 5), generator=generators)
    assert images.dtype == dtype
    assert images.shape == z.shape


# The trajectory


@pytest.mark.parametrize("sampler", EDGES, ids=str)
def test_a_trajectory_yields_each_state_and_ends_where_the_call_does(
    sampler: Sampler, gaussian: ExactGaussian
) -> None:
    levels = timesteps.quadratic(1000, 10)
    z, generators = latents(0, range(2), (3, 4, 4))
    states = list(sampler.trajectory(gaussian, z, levels, generator=generators))
    assert len(states) == 10
    assert [state.t.item() for state in states] == levels[1:].tolist()
    assert all(state.t.dtype == torch.float64 and state.t.ndim == 0 for state in states)
    # The estimate belongs to the state that the step was made from.
    before = [z, *(state.z for state in states)]
    for t, start, state in zip(levels, before, states, strict=False):
        torch.testing.assert_close(state.x, gaussian(start, t).x, rtol=0, atol=0)
    z, generators = latents(0, range(2), (3, 4, 4))
    assert torch.equal(sampler(gaussian, z, levels, generator=generators), states[-1].z)


@pytest.mark.parametrize("sampler", EDGES, ids=str)
def test_gradients_flow_along_a_trajectory_but_not_through_a_call(
    sampler: Sampler, gaussian: ExactGaussian
) -> None:
    levels = timesteps.leading(1000, 5)
    z, generators = latents(0, range(2), (3, 4, 4))
    z = z.double().requires_grad_()
    assert not sampler(gaussian, z, levels, generator=generators).requires_grad
    assert torch.is_grad_enabled()
    *_, last = sampler.trajectory(gaussian, z, levels, generator=generators)
    (gradient,) = torch.autograd.grad(last.z.sum(), z)
    # The map is affine: its slope is that of two states.
    ends = []
    for start in (torch.zeros_like(z), torch.ones_like(z)):
        ends.append(sampler(gaussian, start, levels, generator=image_generators(1, range(2))))
    torch.testing.assert_close(gradient, ends[1] - ends[0], rtol=0, atol=1e-10)
    with torch.no_grad():
        *_, last = sampler.trajectory(gaussian, z, levels, generator=generators)
    assert not last.z.requires_grad


def test_a_trajectory_does_one_network_call_a_step(gaussian: ExactGaussian) -> None:
    """And no more than were asked for: it may be left at any state."""
    calls = []

    class Counted(Denoiser):
        schedule = gaussian.schedule

        def __call__(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            calls.append(t.item())
            return gaussian(z, t)

    denoiser: Denoiser = Counted()
    z, _ = latents(0, range(2), (3, 4, 4))
    levels = timesteps.linear(1000, 5)
    states = DDIM().trajectory(denoiser, z, levels)
    next(states)
    next(states)
    assert calls == [1000, 800]


@pytest.mark.parametrize("sampler", [DDIM(), Ancestral()], ids=str)
def test_progress_is_shown_only_when_asked_for(
    sampler: Sampler, gaussian: ExactGaussian, capsys: pytest.CaptureFixture[str]
) -> None:
    z, generators = latents(0, range(2), (3, 4, 4))
    levels = timesteps.leading(1000, 5)
    quiet = sampler(gaussian, z, levels, generator=generators)
    assert capsys.readouterr() == ("", "")
    z, generators = latents(0, range(2), (3, 4, 4))
    shown = sampler(gaussian, z, levels, generator=generators, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert type(sampler).__name__ in err
    assert "0/5" in err
    assert torch.equal(quiet, shown)


def test_levels_may_be_given_in_any_dtype(gaussian: ExactGaussian) -> None:
    z, _ = latents(0, range(2), (3, 4, 4))
    integers = torch.tensor([1000, 500, 0])
    images = DDIM()(gaussian, z, integers)
    assert torch.equal(images, DDIM()(gaussian, z, integers.double()))
