"""DDIM and DDPM against diffusers' schedulers, on the same network, latents and noise.

Each comparison is made twice. In float32 with diffusers' own tables the images agree to 1e-4. In
float64, with the tables formed in float64 inside diffusers' scheduler, they agree to rounding: an
error of a formula cannot hide in the tolerance there.

Where diffusers departs from the papers, a test below says how and steps it as the papers do.
"""

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from peers import (
    SCHEDULES,
    SPACINGS,
    SmallNetwork,
    assert_same_images,
    diffusers_arguments,
    float64_tables,
    in_every_case,
    start,
)
from torch import Tensor, nn

from ddim_pl import timesteps
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.prediction import PredictionType
from ddim_pl.rng import randn
from ddim_pl.samplers import DDIM, Ancestral
from ddim_pl.schedules import LinearSchedule, ZeroTerminalSNR
from ddim_pl.transitions import Variance


@torch.no_grad()
def walk(
    scheduler: Any,
    network: nn.Module,
    num_steps: int,
    dtype: torch.dtype,
    step: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Diffusers' loop; `step(output, t, z, noise)` gets the noise that our samplers draw."""
    z, generators = start(dtype)
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        output = network(z, t.expand(len(z)))
        z = step(output, t, z, randn(z.shape, generators, z))
    return z


def diffusers_ddim(
    scheduler: DDIMScheduler,
    network: nn.Module,
    num_steps: int,
    dtype: torch.dtype,
    eta: float,
    *,
    rederive: bool = True,
) -> Tensor:
    """Walk with DDIMScheduler, over the timesteps that it lists.

    `DDIMScheduler.step` takes `t - T // S` for the next timestep, which is not the next in its own
    list when the spacing is uneven (linspace, and trailing where S does not divide T). A number
    of steps `T / gap` makes it look at the right one.
    """

    def step(output: Tensor, t: Tensor, z: Tensor, noise: Tensor) -> Tensor:
        gap = gaps[int(t)]
        scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, gap)
        return scheduler.step(
            output,
            int(t),
            z,
            eta=eta,
            use_clipped_model_output=rederive,
            variance_noise=noise if eta else None,
        ).prev_sample

    scheduler.set_timesteps(num_steps)
    ends = [*scheduler.timesteps.tolist(), -1]
    gaps = {t: t - following for t, following in pairwise(ends)}
    return walk(scheduler, network, num_steps, dtype, step)


def diffusers_ddpm(
    scheduler: DDPMScheduler,
    network: nn.Module,
    num_steps: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    *,
    noisy_end: bool = False,
) -> Tensor:
    """Walk with DDPMScheduler.

    It adds noise wherever the timestep is not 0, hence also in the step to clean data if the list
    ends above timestep 0 ("trailing"). With "fixed_large" that is the noise of the whole level,
    and with "fixed_small" 1e-10, as it clamps the variance 0 at 1e-20. [DDPM],
    algorithm 2, adds none there, nor do we: the last noise is left out unless `noisy_end`.
    """

    def step(output: Tensor, t: Tensor, z: Tensor, noise: Tensor) -> Tensor:
        if t == scheduler.timesteps[-1] and not noisy_end:
            noise = torch.zeros_like(noise)
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise)
        return scheduler.step(output, int(t), z).prev_sample

    return walk(scheduler, network, num_steps, dtype, step)


def use_tables(scheduler: Any, beta: str, dtype: torch.dtype) -> None:
    """Diffusers' own tables in float32, but for the squared cosine.

    There float32 alone costs diffusers up to 3e-3 in clipped images: `1 - abar` is formed from a
    rounded `abar`, `1 - 0.999` holds 4 digits, and in the first step at eta = 1 the scale of the
    kept noise is a difference of nearly equal numbers.
    """
    if dtype == torch.float64 or beta == "squaredcos_cap_v2":
        float64_tables(scheduler, SCHEDULES[beta])


def compare_ddim(
    beta: str,
    kind: PredictionType,
    clip: bool,
    spacing: str,
    eta: float,
    num_steps: int,
    dtype: torch.dtype,
) -> None:
    network = SmallNetwork().to(dtype)
    z, generators = start(dtype)
    levels = timesteps.make_levels(spacing, LinearSchedule(), num_steps)
    denoiser = NetworkDenoiser(network, SCHEDULES[beta], kind, clip=clip)
    scheduler = DDIMScheduler(**diffusers_arguments(beta, kind, clip, spacing))
    use_tables(scheduler, beta, dtype)
    ours = DDIM(eta)(denoiser, z, levels, generator=generators)
    assert_same_images(ours, diffusers_ddim(scheduler, network, num_steps, dtype, eta))


def compare_ddpm(
    beta: str,
    kind: PredictionType,
    clip: bool,
    spacing: str,
    variance: Variance,
    num_steps: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = SmallNetwork().to(dtype)
    z, generators = start(dtype)
    levels = timesteps.make_levels(spacing, LinearSchedule(), num_steps)
    denoiser = NetworkDenoiser(network, SCHEDULES[beta], kind, clip=clip)
    arguments = diffusers_arguments(beta, kind, clip, spacing)
    scheduler = DDPMScheduler(variance_type=f"fixed_{variance}", **arguments)
    use_tables(scheduler, beta, dtype)
    ours = Ancestral(variance)(denoiser, z, levels, generator=generators)
    assert_same_images(ours, diffusers_ddpm(scheduler, network, num_steps, dtype, monkeypatch))


@in_every_case
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_gives_the_images_of_diffusers(
    beta: str, kind: PredictionType, clip: bool, spacing: str, eta: float, dtype: torch.dtype
) -> None:
    """Diffusers re-derives eps from a clipped x only if told to, as it is here."""
    compare_ddim(beta, kind, clip, spacing, eta, 10, dtype)


@in_every_case
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_gives_the_images_of_diffusers(
    beta: str,
    kind: PredictionType,
    clip: bool,
    spacing: str,
    variance: Variance,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare_ddpm(beta, kind, clip, spacing, variance, 10, dtype, monkeypatch)


@pytest.mark.filterwarnings("ignore:.*'leading' starts")
@pytest.mark.parametrize("num_steps", [7, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])
def test_more_steps_and_uneven_steps_still_give_the_images_of_diffusers(
    clip: bool, spacing: str, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for eta in (0.0, 0.5, 1.0):
        compare_ddim("linear", "eps", clip, spacing, eta, num_steps, torch.float32)
    for variance in get_args(Variance):
        compare_ddpm("linear", "v", clip, spacing, variance, num_steps, torch.float32, monkeypatch)


def test_diffusers_draws_the_same_noise_from_the_same_generators() -> None:
    """Nothing patched: one generator per image goes to both."""
    network = SmallNetwork()
    denoiser = NetworkDenoiser(network, LinearSchedule())
    levels = timesteps.leading(1000, 10)
    for sampler, scheduler, extra in (
        (DDIM(1.0), DDIMScheduler(), {"eta": 1.0, "use_clipped_model_output": True}),
        (Ancestral(), DDPMScheduler(), {}),
        # The same law through the logarithm of the variance.
        (Ancestral(), DDPMScheduler(variance_type="fixed_small_log"), {}),
    ):
        z, generators = start(torch.float32)
        ours = sampler(denoiser, z, levels, generator=generators)
        z, generators = start(torch.float32)
        scheduler.set_timesteps(10)
        with torch.no_grad():
            for t in scheduler.timesteps:
                output = network(z, t.expand(len(z)))
                z = scheduler.step(output, t, z, generator=generators, **extra).prev_sample
        assert_same_images(ours, z)


def test_stable_diffusions_ddim_is_a_walk_to_level_1() -> None:
    """With `set_alpha_to_one=False` diffusers ends at index 0, that is level 1, not at clean data.

    Stable Diffusion adds `steps_offset=1`, which shifts every level up by one.
    """
    network = SmallNetwork()
    scheduler = DDIMScheduler(set_alpha_to_one=False, steps_offset=1)
    indices = timesteps.leading(1000, 10)[:-1]
    levels = timesteps.make_levels((indices + 1).tolist(), LinearSchedule(), 10, last_level=1)
    z, _ = start(torch.float32)
    ours = DDIM()(NetworkDenoiser(network, LinearSchedule()), z, levels)
    assert_same_images(ours, diffusers_ddim(scheduler, network, 10, torch.float32, 0.0))


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["v", "x"])
def test_ddim_from_a_level_without_signal_gives_the_images_of_diffusers(
    kind: PredictionType, eta: float, clip: bool
) -> None:
    """Its `rescale_betas_zero_snr`: the first step is from pure noise."""
    network, dtype = SmallNetwork().double(), torch.float64
    schedule = ZeroTerminalSNR()
    scheduler = DDIMScheduler(
        **diffusers_arguments("linear", kind, clip, "trailing"), rescale_betas_zero_snr=True
    )
    float64_tables(scheduler, schedule)
    z, generators = start(dtype)
    levels = timesteps.trailing(1000, 10)
    assert schedule(levels[0]).alpha == 0
    denoiser = NetworkDenoiser(network, schedule, kind, clip=clip)
    ours = DDIM(eta)(denoiser, z, levels, generator=generators)
    assert torch.isfinite(ours).all()
    assert_same_images(ours, diffusers_ddim(scheduler, network, 10, dtype, eta))


def test_diffusers_default_keeps_the_noise_estimate_of_the_image_before_clipping() -> None:
    """After clipping its `(x, eps)` explains z only with `use_clipped_model_output`."""
    network = SmallNetwork()
    z, _ = start(torch.float32)
    ours = DDIM()(NetworkDenoiser(network, LinearSchedule()), z, timesteps.leading(1000, 10))
    theirs = diffusers_ddim(DDIMScheduler(), network, 10, torch.float32, 0.0, rederive=False)
    assert (ours - theirs).abs().max() > 0.1


def test_diffusers_adds_noise_to_the_last_image_of_a_trailing_walk_with_large_variance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step from index 99 to clean data gets noise of scale sigma_100; the paper has none."""
    network = SmallNetwork()
    scheduler = DDPMScheduler(variance_type="fixed_large", timestep_spacing="trailing")
    clean = diffusers_ddpm(scheduler, network, 10, torch.float32, monkeypatch)
    noisy = diffusers_ddpm(scheduler, network, 10, torch.float32, monkeypatch, noisy_end=True)
    sigma = LinearSchedule()(100).sigma
    # 384 draws: the sample deviation has a relative standard error of 3.6 %; 4 of them.
    torch.testing.assert_close((noisy - clean).double().std(), sigma, rtol=0.15, atol=0)


@pytest.mark.parametrize("beta", SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_float32_images_are_those_of_float64(beta: str, spacing: str) -> None:
    """Clipped images; float32 rounds z to 6e-8 and alpha_T divides it by 1e-2 to 5e-5 at worst."""
    images = []
    for dtype in (torch.float32, torch.float64):
        z, generators = start(dtype)
        denoiser = NetworkDenoiser(SmallNetwork().to(dtype), SCHEDULES[beta], "v")
        levels = timesteps.make_levels(spacing, LinearSchedule(), 10)
        images.append(DDIM(1.0)(denoiser, z, levels, generator=generators).double())
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)
