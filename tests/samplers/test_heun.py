"""Heun's method against the exact flow and against diffusers."""

import pytest
import torch
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from exact import ExactGaussian, ExactMixture
from orders import SPACINGS, Spacing, errors, even, log_snr, order, quadratic
from peers import SCHEDULES, SmallNetwork, assert_same_images, diffusers_arguments, start
from peers import SPACINGS as SPACINGS_OF_DIFFUSERS
from torch import Tensor

from ddim_pl import timesteps
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.noise import latents
from ddim_pl.prediction import PredictionType
from ddim_pl.samplers import DDIM, Heun
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule

# Diffusers asks NumPy for an array of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

every_schedule = pytest.mark.parametrize(
    "schedule", [LinearSchedule(), CosineLogSNRSchedule()], ids=["linear", "cosine"]
)

# Order


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("start", "end"), [(950, 20), (20, 950)])
def test_heun_is_of_second_order_and_ddim_of_first(
    start: float, end: float, spacing: Spacing, mixture: ExactMixture
) -> None:
    assert abs(order(Heun(), mixture, spacing, start, end) - 2) < 0.1
    assert abs(order(DDIM(), mixture, spacing, start, end) - 1) < 0.1


@pytest.mark.parametrize("spacing", [even, quadratic])
def test_heun_is_of_second_order_down_to_level_0(spacing: Spacing, mixture: ExactMixture) -> None:
    """The one DDIM step at the end has a local error of second order."""
    assert abs(order(Heun(), mixture, spacing, 950, 0) - 2) < 0.1


def test_a_start_from_pure_noise_needs_levels_even_in_the_log_snr(mixture: ExactMixture) -> None:
    """The end of a step counts `r_t - r_s`, and the cosine's last level has r = 22,000."""
    assert abs(order(Heun(), mixture, log_snr, 1000, 20) - 2) < 0.2
    assert errors(Heun(), mixture, log_snr, 1000, 20, [20]) < 0.1
    assert errors(Heun(), mixture, even, 1000, 20, [20]) > 1


@every_schedule
def test_encoding_then_sampling_is_identity_at_second_order(schedule: NoiseSchedule) -> None:
    denoiser = ExactGaussian(schedule)
    images = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    found = []
    for num_steps in (100, 200, 400):
        levels = torch.linspace(950, 20, num_steps + 1, dtype=torch.float64)
        z = Heun()(denoiser, images, levels.flip(0))
        found.append((Heun()(denoiser, z, levels) - images).abs().max())
    assert found[-1] < 1e-4
    # The errors of the two ways may partly cancel, so that they fall faster than the square.
    assert (-torch.stack(found).log2().diff() > 1.8).all()


# Edges


@every_schedule
@pytest.mark.parametrize("ends", [(1000.0, 0.0), (500.0, 0.0), (0.0, 500.0)])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_few_steps_are_finite(
    schedule: NoiseSchedule, ends: tuple[float, float], num_steps: int
) -> None:
    z, _ = latents(0, range(2), (3, 4, 4))
    levels = torch.linspace(*ends, num_steps + 1, dtype=torch.float64)
    assert Heun()(ExactGaussian(schedule), z, levels).isfinite().all()


@every_schedule
def test_the_step_to_level_0_is_ddim(schedule: NoiseSchedule) -> None:
    z, _ = latents(0, range(2), (3, 4, 4))
    levels = torch.tensor([700.0, 0.0])
    denoiser = ExactGaussian(schedule)
    assert torch.equal(Heun()(denoiser, z, levels), DDIM()(denoiser, z, levels))


def test_one_step_is_that_of_the_paper(gaussian: ExactGaussian) -> None:
    """[EDM], algorithm 1, in their letters: states x = z / alpha at sigma = r."""
    z = latents(0, range(2), (3, 4, 4))[0].double()
    levels = torch.tensor([600.0, 400.0], dtype=torch.float64)
    (alpha, t), (alpha_next, t_next) = (
        (scale.alpha, scale.sigma / scale.alpha) for scale in map(gaussian.schedule, levels)
    )

    def slope(x: Tensor, alpha: Tensor, sigma: Tensor, level: Tensor) -> Tensor:
        return (x - gaussian(alpha * x, level).x) / sigma

    x = z / alpha
    d = slope(x, alpha, t, levels[0])
    euler = x + (t_next - t) * d
    d_next = slope(euler, alpha_next, t_next, levels[1])
    want = alpha_next * (x + (t_next - t) * (d + d_next) / 2)
    torch.testing.assert_close(Heun()(gaussian, z, levels), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("levels", "want"), [([900, 400, 0], 3), ([900, 400, 10], 4), ([0, 400], 2), ([900, 0], 1)]
)
def test_number_of_evaluations(levels: list[float], want: int) -> None:
    assert Heun().num_evaluations(torch.tensor(levels)) == want


# Diffusers


@torch.no_grad()
def diffusers_heun(
    scheduler: HeunDiscreteScheduler, network: SmallNetwork, beta: str, dtype: torch.dtype
) -> Tensor:
    """Its states are z / alpha, and it holds a table of r for the calls of the network."""
    z, _ = start(dtype)
    if dtype == torch.float64:
        scale = SCHEDULES[beta](scheduler.timesteps.double() + 1)
        ratio = scale.sigma / scale.alpha
        scheduler.sigmas = torch.cat([ratio, torch.zeros(1, dtype=torch.float64)])
    y = z * (scheduler.sigmas[0] ** 2 + 1).sqrt()
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(y, t), t.expand(len(z)))
        y = scheduler.step(output, t, y).prev_sample
    return y


def compare(
    beta: str, kind: PredictionType, clip: bool, spacing: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """With 28 steps "linspace" has integer timesteps. Elsewhere diffusers takes fractions of a
    level there and reads r off its table linearly, where our levels are rounded.
    """
    num_steps = 28 if spacing == "linspace" else 10
    network = SmallNetwork().to(dtype)
    scheduler = HeunDiscreteScheduler(**diffusers_arguments(beta, kind, clip, spacing))
    scheduler.set_timesteps(num_steps)
    levels = timesteps.make_levels(spacing, SCHEDULES[beta], num_steps)
    assert len(scheduler.timesteps) == Heun().num_evaluations(levels)
    denoiser = NetworkDenoiser(network, SCHEDULES[beta], kind, clip=clip)
    ours = Heun()(denoiser, start(dtype)[0], levels)
    return ours, diffusers_heun(scheduler, network, beta, dtype)


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])
@pytest.mark.parametrize("spacing", SPACINGS_OF_DIFFUSERS)
@pytest.mark.parametrize("kind", ["eps", "x", "v"])
@pytest.mark.parametrize("beta", SCHEDULES)
def test_heun_gives_the_images_of_diffusers_in_float64(
    beta: str, kind: PredictionType, clip: bool, spacing: str
) -> None:
    """The squared cosine starts at r = 20,000, which multiplies the roundings of z / alpha."""
    ours, theirs = compare(beta, kind, clip, spacing, torch.float64)
    if beta == "squaredcos_cap_v2" and spacing != "leading":
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
    else:
        assert_same_images(ours, theirs)


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])
@pytest.mark.parametrize("spacing", SPACINGS_OF_DIFFUSERS)
@pytest.mark.parametrize("kind", ["eps", "x", "v"])
@pytest.mark.parametrize("beta", ["linear", "scaled_linear"])
def test_heun_gives_the_images_of_diffusers_in_float32(
    beta: str, kind: PredictionType, clip: bool, spacing: str
) -> None:
    """With "x" diffusers divides the rounding of z / alpha, 1e-5, by r; we do not.

    There the float32 image is compared with diffusers' in float64.
    """
    ours, theirs = compare(beta, kind, clip, spacing, torch.float32)
    if kind == "x":
        theirs = compare(beta, kind, clip, spacing, torch.float64)[1].float()
    assert_same_images(ours, theirs)
