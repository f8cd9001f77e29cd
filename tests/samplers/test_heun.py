"""Heun's method against the exact flow and against diffusers."""

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from exact import ExactGaussian, ExactMixture, propagate
from orders import SPACINGS, Spacing, errors, even, log_snr, order, quadratic
from peers import SCHEDULES, SmallNetwork, assert_same_images, diffusers_arguments, start
from peers import SPACINGS as SPACINGS_OF_DIFFUSERS
from torch import Tensor

from ddim_pl import timesteps
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.noise import latents
from ddim_pl.prediction import PredictionType
from ddim_pl.rng import image_noise, randn
from ddim_pl.samplers import DDIM, Heun
from ddim_pl.schedules import CosineLogSNRSchedule, EDMSchedule, LinearSchedule, NoiseSchedule

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


# Churn: the authors' `edm_sampler` in their letters, re-evaluated by NumPy in float64

# s_churn, s_tmin, s_tmax, s_noise: none; [EDM], table 5, for CIFAR-10 and ImageNet; more than
# gamma allows; with no bounds, so that the noise would leave the schedule.
CHURNS = [
    (),
    (30.0, 0.01, 1.0, 1.007),
    (40.0, 0.05, 50.0, 1.003),
    (1000.0, 0.0, 50.0),
    (40.0,),
]
every_churn = pytest.mark.parametrize("churn", CHURNS, ids=str)


def mixture_of_the_paper(y: np.ndarray, sigma: float) -> np.ndarray:
    """D(y; sigma) of the mixture in `exact.py`, in the variables of [EDM]."""
    weights, means, stds = (np.array(v) for v in ((0.35, 0.65), (-0.8, 0.5), (0.25, 0.35)))
    variance = stds**2 + sigma**2
    apart = y[..., None] - means
    share = weights * np.exp(-(apart**2) / variance / 2) / np.sqrt(variance)
    share /= share.sum(-1, keepdims=True)
    return (share * (means + stds**2 / variance * apart)).sum(-1)


def edm_sampler(y, noises, num_steps, churn=0.0, least=0.0, most=math.inf, s_noise=1.0):
    """Algorithm 2 from `y / 80`, with a noise for each step and no level above 80."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigmas = (high + np.arange(num_steps) / (num_steps - 1) * (low - high)) ** 7
    y = y * sigmas[0]
    for t, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        gamma = min(churn / num_steps, np.sqrt(2) - 1) if least <= t <= most else 0.0
        hat = min(t + gamma * t, 80.0)
        if hat > t * (1 + 1e-9):
            y = y + np.sqrt(hat**2 - t**2) * s_noise * next(noises)
        slope = (y - mixture_of_the_paper(y, hat)) / hat
        euler = y + (after - hat) * slope
        if after:
            slope = (slope + (euler - mixture_of_the_paper(euler, after)) / after) / 2
        y = y + (after - hat) * slope
    return y


@every_churn
def test_images_are_those_of_edms_sampler_for_the_same_noise(churn: tuple[float, ...]) -> None:
    schedule, shape = EDMSchedule(), (4, 3, 5)
    z = latents(0, range(4), shape[1:])[0].double()

    def noises():
        generators = image_noise("generators", 7, range(4))
        while True:
            yield randn(shape, generators, z).numpy()

    # Their first state is 80 n; ours is of variance 1 for images of variance 1.
    want = edm_sampler(z.numpy() * math.sqrt(1 + 80**-2), noises(), 18, *churn)
    levels = timesteps.karras(schedule, 18)
    generators = image_noise("generators", 7, range(4))
    found = Heun(*churn)(ExactMixture(schedule), z, levels, generator=generators)
    np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=1e-6)
    if churn:
        assert not np.allclose(found.numpy(), edm_sampler(z.numpy(), noises(), 18), atol=1e-2)


def law_after(churn: float, num_steps: int, **arguments: float) -> tuple[float, float]:
    """Mean and variance of images from exact noise."""
    schedule = EDMSchedule()
    denoiser, levels = ExactGaussian(schedule), timesteps.karras(schedule, num_steps)
    mean, std = denoiser.marginal(levels[0], torch.zeros(1, dtype=torch.float64))
    # Its steps are taken one at a time, and each counts as all.
    sampler = Heun(churn / num_steps, **arguments)
    mean, variance = propagate(sampler, denoiser, levels, mean.expand(1), std.expand(1) ** 2)
    return mean.item(), variance.item()


@pytest.mark.slow
@pytest.mark.parametrize("churn", [0.0, 5.0, 20.0])
def test_churn_keeps_the_law_to_second_order(churn: float) -> None:
    errors = [abs(law_after(churn, steps)[1] / 0.25 - 1) for steps in (50, 100, 200)]
    assert errors[-1] < 4e-3
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3
    assert law_after(churn, 200)[0] == pytest.approx(0.3, abs=1e-4)


def test_more_noise_than_churn_takes_widens_the_law() -> None:
    assert law_after(20, 100, s_noise=1.05)[1] > 1.02 * law_after(20, 100)[1]


@pytest.mark.parametrize("source", ["generators", "philox"])
def test_churn_is_the_same_for_every_split_of_a_batch(source, gaussian: ExactGaussian) -> None:
    sampler, levels = Heun(5.0, 0.1, 3.0, 1.01), timesteps.karras(gaussian.schedule, 6)

    def images(indices: range) -> Tensor:
        z, generators = latents(0, indices, (3, 4, 4), noise_source=source)
        return sampler(gaussian, z, levels, generator=generators)

    whole = images(range(4))
    parts = torch.cat([images(range(1)), images(range(1, 4))])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)


def test_with_churn_heun_does_not_encode(gaussian: ExactGaussian) -> None:
    assert Heun().encodes
    assert not Heun(1.0).encodes
    with pytest.raises(ValueError, match="only a deterministic sampler encodes"):
        Heun(1.0)(gaussian, torch.zeros(1, 1), torch.tensor([0.0, 500.0]))


def test_its_name_says_only_what_is_not_as_by_default() -> None:
    assert str(Heun()) == repr(Heun()) == "Heun()"
    assert str(Heun(clip=False)) == "Heun(clip=False)"
    assert str(Heun(40.0, s_tmax=50.0)) == "Heun(s_churn=40.0, s_tmax=50.0)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"s_churn": -1.0}, "s_churn must be at least 0 and finite, got -1.0"),
        ({"s_churn": math.nan}, "s_churn must be at least 0"),
        ({"s_noise": 1.003}, "s_noise must be 1.0 without churn, .* got 1.003: set s_churn"),
        ({"s_tmin": 0.05}, "s_tmin must be 0.0 without churn"),
        ({"s_tmax": 50.0}, "s_tmax must be inf without churn"),
        ({"s_churn": 1.0, "s_tmin": 2.0, "s_tmax": 1.0}, "s_tmin < s_tmax, got 2.0 and 1.0"),
        ({"s_churn": 1.0, "s_noise": 0.0}, "s_noise must be positive and finite, got 0.0"),
    ],
)
def test_wrong_churn_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Heun(**arguments)


def test_churn_beyond_the_schedule_is_refused() -> None:
    denoiser, levels = ExactGaussian(EDMSchedule()), torch.tensor([1000.0, 0.0])
    with pytest.raises(ValueError, match=r"s_tmin must be below 80, .* got 80\.5: churn would"):
        Heun(1.0, s_tmin=80.5)(denoiser, torch.zeros(1, 1), levels)


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
