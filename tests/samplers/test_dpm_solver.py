"""DPM-Solver++(2M) against the exact flow and against diffusers."""

import types
from typing import Any

import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from exact import ExactGaussian, ExactMixture
from orders import SPACINGS, Spacing, errors, even, log_snr, order, quadratic
from peers import KINDS, SCHEDULES, SmallNetwork, assert_same_images, in_every_case, start
from torch import Tensor

from ddim_pl import timesteps
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.noise import latents
from ddim_pl.prediction import PredictionType
from ddim_pl.samplers import DDIM, DPMSolverPP
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule

# Diffusers asks NumPy for an array of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

every_schedule = pytest.mark.parametrize(
    "schedule", [LinearSchedule(), CosineLogSNRSchedule()], ids=["linear", "cosine"]
)

# Order


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("start", "end"), [(950, 20), (20, 950)])
def test_the_solver_is_of_second_order(
    start: float, end: float, spacing: Spacing, mixture: ExactMixture
) -> None:
    assert abs(order(DPMSolverPP(), mixture, spacing, start, end) - 2) < 0.2


def test_the_solver_is_of_second_order_from_pure_noise(mixture: ExactMixture) -> None:
    assert abs(order(DPMSolverPP(), mixture, log_snr, 1000, 20) - 2) < 0.1


def test_down_to_level_0_the_order_depends_on_the_last_levels(mixture: ExactMixture) -> None:
    """x is smooth in the level but not in lambda, whose last even steps are all of one size."""
    assert abs(order(DPMSolverPP(), mixture, quadratic, 950, 0) - 2) < 0.2
    assert order(DPMSolverPP(), mixture, even, 950, 0) > 1.2


@pytest.mark.parametrize("spacing", [even, quadratic])
@pytest.mark.parametrize("num_steps", [5, 10, 20, 40])
def test_few_steps_beat_ddim(spacing: Spacing, num_steps: int, mixture: ExactMixture) -> None:
    """They would not with a last step of second order, as lambda_0 = 20 is far from the rest."""
    ddim, ours = (
        errors(sampler, mixture, spacing, 950, 0, [num_steps])
        for sampler in (DDIM(), DPMSolverPP())
    )
    assert ours < 0.8 * ddim


def test_a_last_level_far_cleaner_than_the_rest_costs_more_than_ddim(
    mixture: ExactMixture,
) -> None:
    """The step to level 1 of "leading" goes far in lambda, on the slope of a short one."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for strategy, better in ((timesteps.leading, False), (timesteps.trailing, True)):
        levels = strategy(1000, 10)
        exact = mixture.flow(z, levels[0], 0)
        ddim, ours = (
            (sampler(mixture, z, levels) - exact).abs().max()
            for sampler in (DDIM(), DPMSolverPP())
        )
        assert (ours < ddim) == better


@every_schedule
def test_encoding_then_sampling_is_identity_in_the_limit(schedule: NoiseSchedule) -> None:
    denoiser = ExactGaussian(schedule)
    images = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    found = []
    for num_steps in (200, 400):
        levels = torch.linspace(950**0.5, 20**0.5, num_steps + 1, dtype=torch.float64) ** 2
        z = DPMSolverPP()(denoiser, images, levels.flip(0))
        found.append((DPMSolverPP()(denoiser, z, levels) - images).abs().max())
    assert found[1] < 2e-5
    assert (found[0] / found[1]).log2() > 1.7


def test_encoding_may_start_from_clean_data() -> None:
    """Where lambda is infinite: the second step must not look back over it."""
    denoiser = ExactGaussian(LinearSchedule())
    images = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    levels = torch.linspace(0, 950**0.5, 401, dtype=torch.float64) ** 2
    z = DPMSolverPP()(denoiser, images, levels)
    assert (z - denoiser.flow(images, 0, 950)).abs().max() < 1e-3


# Edges


@every_schedule
@pytest.mark.parametrize("ends", [(1000.0, 0.0), (500.0, 0.0), (0.0, 500.0)])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_few_steps_are_finite(
    schedule: NoiseSchedule, ends: tuple[float, float], num_steps: int
) -> None:
    z, _ = latents(0, range(2), (3, 4, 4))
    levels = torch.linspace(*ends, num_steps + 1, dtype=torch.float64)
    assert DPMSolverPP()(ExactGaussian(schedule), z, levels).isfinite().all()


def test_order_1_and_the_first_step_are_ddim(gaussian: ExactGaussian) -> None:
    z, _ = latents(0, range(2), (3, 4, 4))
    levels = timesteps.quadratic(1000, 10)
    assert torch.equal(DPMSolverPP(1)(gaussian, z, levels), DDIM()(gaussian, z, levels))
    first = DPMSolverPP()(gaussian, z, levels[:2])
    assert torch.equal(first, DDIM()(gaussian, z, levels[:2]))
    assert (DPMSolverPP()(gaussian, z, levels) - DDIM()(gaussian, z, levels)).abs().max() > 0.01


@every_schedule
def test_the_last_state_at_level_0_is_the_estimate_of_x(schedule: NoiseSchedule) -> None:
    z, _ = latents(0, range(2), (3, 4, 4))
    levels = timesteps.linear(1000, 5)
    *_, last = DPMSolverPP().trajectory(ExactGaussian(schedule), z, levels)
    # The cosine keeps sigma_0 = 4.5e-5 of the noise.
    torch.testing.assert_close(last.z, last.x, rtol=0, atol=3e-4)


@pytest.mark.parametrize("order", [0, 3, 2.5])
def test_an_unknown_order_is_refused(order: Any) -> None:
    with pytest.raises(ValueError, match=r"order must be one of \(1, 2\), got"):
        DPMSolverPP(order)


# Diffusers


class Torch64(types.ModuleType):
    """PyTorch, whose float32 is float64: diffusers' `step` casts states to float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@torch.no_grad()
def diffusers_dpm(
    beta: str,
    kind: PredictionType,
    clip: bool,
    spacing: str,
    dtype: torch.dtype,
    num_steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Tensor, Tensor]:
    """Its images, and the levels it visits.

    Of "leading" and "linspace" it takes S + 1 timesteps and leaves the last out, so the levels are
    not those of our strategies of the same name. It clips by "thresholding" with a largest value
    of 1. With the final sigma 0 its last step is of first order, and `lower_order_final`, which
    acts below 15 steps, changes nothing at order 2.
    """
    schedule = SCHEDULES[beta]
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule=beta,
        beta_start=getattr(schedule, "beta_start", 1e-4),
        beta_end=getattr(schedule, "beta_end", 0.02),
        prediction_type=KINDS[kind],
        timestep_spacing=spacing,
        thresholding=clip,
        sample_max_value=1.0,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(num_steps)
    levels = scheduler.timesteps.double() + 1
    if dtype == torch.float64 or beta == "squaredcos_cap_v2":
        scale = schedule(levels)
        ratio = scale.sigma / scale.alpha
        scheduler.sigmas = torch.cat([ratio, torch.zeros(1, dtype=torch.float64)])
    if dtype == torch.float64:
        monkeypatch.setattr(scheduling_dpmsolver_multistep, "torch", Torch64("torch"))
    network = SmallNetwork().to(dtype)
    z, _ = start(dtype)
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, t.expand(len(z))), t, z).prev_sample
    return z, timesteps.explicit(1000, levels.tolist())


def compare(
    beta: str,
    kind: PredictionType,
    clip: bool,
    spacing: str,
    dtype: torch.dtype,
    num_steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs, levels = diffusers_dpm(beta, kind, clip, spacing, dtype, num_steps, monkeypatch)
    denoiser = NetworkDenoiser(SmallNetwork().to(dtype), SCHEDULES[beta], kind, clip=clip)
    assert_same_images(DPMSolverPP()(denoiser, start(dtype)[0], levels), theirs)


@in_every_case
def test_the_solver_gives_the_images_of_diffusers(
    beta: str,
    kind: PredictionType,
    clip: bool,
    spacing: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare(beta, kind, clip, spacing, dtype, 10, monkeypatch)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 25])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_other_numbers_of_steps_give_the_images_of_diffusers(
    num_steps: int, spacing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare("linear", "eps", True, spacing, torch.float64, num_steps, monkeypatch)
