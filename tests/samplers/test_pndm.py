"""Pseudo numerical methods against the exact flow and against diffusers."""

from typing import Any, get_args

import pytest
import torch
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from exact import ExactGaussian, ExactMixture
from orders import SPACINGS, Spacing, errors, even, log_snr, order, quadratic
from peers import SCHEDULES, SmallNetwork, assert_same_images, float64_tables, start
from torch import Tensor

from ddim_pl import timesteps
from ddim_pl.denoiser import Denoiser, NetworkDenoiser
from ddim_pl.noise import latents
from ddim_pl.prediction import PredictionType
from ddim_pl.samplers import DDIM, PNDM, Heun
from ddim_pl.samplers.pndm import ADAMS_BASHFORTH, Warmup
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule

every_schedule = pytest.mark.parametrize(
    "schedule", [LinearSchedule(), CosineLogSNRSchedule()], ids=["linear", "cosine"]
)
every_warmup = pytest.mark.parametrize("warmup", get_args(Warmup))

# Order


@every_warmup
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("start", "end"), [(950, 20), (20, 950)])
def test_pndm_is_of_second_order(
    start: float, end: float, spacing: Spacing, warmup: Warmup, mixture: ExactMixture
) -> None:
    """As the paper has it: the DDIM step takes the noise to be constant in `sigma / alpha`."""
    assert abs(order(PNDM(warmup), mixture, spacing, start, end) - 2) < 0.2


@every_warmup
@pytest.mark.parametrize("spacing", [even, quadratic])
def test_pndm_is_of_second_order_down_to_level_0(
    spacing: Spacing, warmup: Warmup, mixture: ExactMixture
) -> None:
    assert abs(order(PNDM(warmup), mixture, spacing, 950, 0) - 2) < 0.2


def test_a_start_from_pure_noise_needs_levels_even_in_the_log_snr(mixture: ExactMixture) -> None:
    """As for Heun; and Runge-Kutta, which looks further ahead, suffers most."""
    for warmup in get_args(Warmup):
        assert abs(order(PNDM(warmup), mixture, log_snr, 1000, 20) - 2) < 0.2
        assert errors(PNDM(warmup), mixture, log_snr, 1000, 20, [20]) < 0.1
    assert errors(PNDM("plms"), mixture, even, 1000, 20, [20]) > 1
    assert errors(PNDM("prk"), mixture, even, 1000, 20, [20]) > 1e3


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_weights_integrate_polynomials_over_the_next_step(count: int) -> None:
    """Of degree below their number, from values at 0, -1, -2, ... to the mean over [0, 1]."""
    nodes = -torch.arange(count, dtype=torch.float64)
    weights = torch.tensor(ADAMS_BASHFORTH[count - 1], dtype=torch.float64)
    for degree in range(count):
        mean = (weights * nodes**degree).sum()
        torch.testing.assert_close(mean.item(), 1 / (degree + 1), rtol=0, atol=1e-12)


@every_warmup
@every_schedule
def test_encoding_then_sampling_is_identity_in_the_limit(
    schedule: NoiseSchedule, warmup: Warmup
) -> None:
    denoiser = ExactGaussian(schedule)
    images = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    for num_steps, tolerance in ((30, 1e-3), (300, 1e-6)):
        levels = torch.linspace(950**0.5, 20**0.5, num_steps + 1, dtype=torch.float64) ** 2
        z = PNDM(warmup)(denoiser, images, levels.flip(0))
        assert (PNDM(warmup)(denoiser, z, levels) - images).abs().max() < tolerance


# Edges


@every_warmup
@every_schedule
@pytest.mark.parametrize("ends", [(1000.0, 0.0), (500.0, 0.0), (0.0, 500.0)])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5])
def test_few_steps_are_finite(
    schedule: NoiseSchedule, ends: tuple[float, float], num_steps: int, warmup: Warmup
) -> None:
    z, _ = latents(0, range(2), (3, 4, 4))
    levels = torch.linspace(*ends, num_steps + 1, dtype=torch.float64)
    assert PNDM(warmup)(ExactGaussian(schedule), z, levels).isfinite().all()


@every_warmup
def test_one_step_to_level_0_is_ddim(warmup: Warmup, gaussian: ExactGaussian) -> None:
    z, _ = latents(0, range(2), (3, 4, 4))
    levels = torch.tensor([700.0, 0.0])
    assert torch.equal(PNDM(warmup)(gaussian, z, levels), DDIM()(gaussian, z, levels))


def test_the_first_step_of_plms_is_heun(gaussian: ExactGaussian) -> None:
    z, _ = latents(0, range(2), (3, 4, 4))
    levels = torch.tensor([700.0, 600.0])
    assert torch.equal(PNDM("plms")(gaussian, z, levels), Heun()(gaussian, z, levels))


@pytest.mark.parametrize("num_steps", [5, 10, 20])
@every_warmup
def test_few_steps_beat_ddim(warmup: Warmup, num_steps: int, mixture: ExactMixture) -> None:
    ddim, ours = (
        errors(sampler, mixture, quadratic, 900, 0, [num_steps])
        for sampler in (DDIM(), PNDM(warmup))
    )
    assert ours < ddim


@pytest.mark.parametrize(
    ("warmup", "num_steps", "want"),
    [("plms", n, c) for n, c in ((1, 1), (2, 3), (3, 4), (4, 5), (10, 11))]
    + [("prk", n, c) for n, c in ((1, 1), (2, 5), (3, 9), (4, 13), (10, 19))],
)
def test_number_of_evaluations(
    warmup: Warmup, num_steps: int, want: int, gaussian: ExactGaussian
) -> None:
    levels = timesteps.linear(1000, num_steps)
    assert PNDM(warmup).num_evaluations(levels) == want
    assert PNDM(warmup).num_evaluations(levels + 1) >= want  # every first step looks ahead
    calls: list[float] = []

    class Counted(Denoiser):
        schedule = gaussian.schedule

        def __call__(self, z: Tensor, t: Tensor) -> Any:
            calls.append(t.item())
            return gaussian(z, t)

    PNDM(warmup)(Counted(), latents(0, range(1), (3, 4, 4))[0], levels)
    assert len(calls) == want
    assert 0 not in calls


def test_an_unknown_warmup_is_refused() -> None:
    name: Any = "euler"
    with pytest.raises(ValueError, match=r"warmup must be one of \('prk', 'plms'\), got 'euler'"):
        PNDM(name)


# Diffusers


@torch.no_grad()
def diffusers_pndm(
    network: SmallNetwork,
    beta: str,
    warmup: Warmup,
    num_steps: int,
    dtype: torch.dtype,
    kind: str = "epsilon",
    **arguments: Any,
) -> Tensor:
    """It cannot clip, and of the spacings only "leading" has the even gaps that its steps take.

    By default it ends at index 0 and not at clean data, where the last evaluation is for nothing;
    hence `set_alpha_to_one`.
    """
    schedule = SCHEDULES[beta]
    scheduler = PNDMScheduler(
        beta_schedule=beta,
        beta_start=getattr(schedule, "beta_start", 1e-4),
        beta_end=getattr(schedule, "beta_end", 0.02),
        skip_prk_steps=warmup == "plms",
        prediction_type=kind,
        **{"set_alpha_to_one": True, **arguments},
    )
    scheduler.set_timesteps(num_steps)
    if dtype == torch.float64 or beta == "squaredcos_cap_v2":
        float64_tables(scheduler, schedule)
        if not scheduler.config.set_alpha_to_one:
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    z, _ = start(dtype)
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, t.expand(len(z))), int(t), z).prev_sample
    return z


def ours(
    network: SmallNetwork,
    beta: str,
    warmup: Warmup,
    levels: Tensor,
    dtype: torch.dtype,
    kind: PredictionType = "eps",
) -> Tensor:
    denoiser = NetworkDenoiser(network, SCHEDULES[beta], kind, clip=False)
    return PNDM(warmup)(denoiser, start(dtype)[0], levels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@every_warmup
@pytest.mark.parametrize("num_steps", [4, 5, 10, 50])
@pytest.mark.parametrize("beta", SCHEDULES)
def test_pndm_gives_the_images_of_diffusers(
    beta: str, num_steps: int, warmup: Warmup, dtype: torch.dtype
) -> None:
    network = SmallNetwork().to(dtype)
    levels = timesteps.leading(1000, num_steps)
    theirs = diffusers_pndm(network, beta, warmup, num_steps, dtype)
    assert_same_images(ours(network, beta, warmup, levels, dtype), theirs)


@pytest.mark.filterwarnings("ignore:.*'leading' starts")
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_few_steps_of_plms_give_the_images_of_diffusers(num_steps: int) -> None:
    """Fewer than four steps of "prk" diffusers cannot set up."""
    network = SmallNetwork().double()
    levels = timesteps.leading(1000, num_steps)
    theirs = diffusers_pndm(network, "linear", "plms", num_steps, torch.float64)
    assert_same_images(ours(network, "linear", "plms", levels, torch.float64), theirs)
    with pytest.raises(ValueError, match="operands could not be broadcast"):
        diffusers_pndm(network, "linear", "prk", num_steps, torch.float64)


def test_stable_diffusions_plms_is_a_walk_to_level_1() -> None:
    network = SmallNetwork().double()
    levels = timesteps.leading(1000, 10) + 1
    theirs = diffusers_pndm(
        network, "linear", "plms", 10, torch.float64, set_alpha_to_one=False, steps_offset=1
    )
    assert_same_images(ours(network, "linear", "plms", levels, torch.float64), theirs)


@every_warmup
def test_diffusers_departs_where_we_keep_to_the_paper(warmup: Warmup) -> None:
    """It averages v, not eps, of different states; and it rounds half an odd gap down."""
    network = SmallNetwork().double()
    levels = timesteps.leading(1000, 10)
    theirs = diffusers_pndm(network, "linear", warmup, 10, torch.float64, "v_prediction")
    assert (ours(network, "linear", warmup, levels, torch.float64, "v") - theirs).abs().max() > 0.1
    levels = timesteps.leading(1000, 40)  # a gap of 25
    theirs = diffusers_pndm(network, "linear", warmup, 40, torch.float64)
    gap = (ours(network, "linear", warmup, levels, torch.float64) - theirs).abs().max()
    assert (gap > 1e-3) == (warmup == "prk")
