"""Encoding of images, interpolation between latents, and forward trajectories.

A deterministic sampler can be inverted: with rising levels it maps an image to the latent that
generates it ([DDIM], sections 4.3 and 5.4).
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.rng import Generators, randn
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.samplers.ddim import DDIM
from ddim_pl.scales import expand_like
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.transitions import ddim_forward, q_sample


def encode(
    denoiser: Denoiser,
    x: Tensor,
    levels: Tensor,
    *,
    sampler: Sampler | None = None,
    progress: bool = False,
) -> Tensor:
    """Latents `(B, ...)` from which a deterministic sampler generates the images.

    Args:
        denoiser: The model, without clipping, which cannot be inverted.
        x: Images, `(B, ...)`.
        levels: Decreasing levels, as for sampling, `(S + 1,)`; visited in reverse.
        sampler: A sampler that encodes, without clipping; by default DDIM with eta = 0.
        progress: Show a progress bar.

    Raises:
        ValueError: If the denoiser or the sampler clips, or it cannot take rising levels.
    """
    denoiser.check_unclipped("which encoding cannot undo")
    if sampler is not None and sampler.clip:
        raise ValueError(
            f"sampler must not clip, got {sampler}, which encoding cannot undo: set clip=False"
        )
    rising = torch.as_tensor(levels, dtype=torch.float64, device="cpu").flip(0)
    z = x
    start = denoiser.schedule(rising[0])
    if start.sigma == 0 and not denoiser.estimates_noise_of_clean_data:
        # An x-prediction gives no noise estimate at clean data: start half a step above.
        rising[0] = rising[1] / 2
        z = x * denoiser.schedule(rising[0]).alpha
    elif start.sigma > 0:
        z = x * start.alpha
    return (sampler or DDIM())(denoiser, z, rising, progress=progress)


def reconstruct(
    denoiser: Denoiser,
    x: Tensor,
    levels: Tensor,
    *,
    sampler: Sampler | None = None,
    progress: bool = False,
) -> Tensor:
    """Encode images, then sample from the latents, `(B, ...)`; arguments as for `encode`."""
    z = encode(denoiser, x, levels, sampler=sampler, progress=progress)
    return (sampler or DDIM())(denoiser, z, levels, progress=progress)


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """Spherical interpolation between latents, per image ([DDIM], eq. 67).

    `sin((1 - w) phi) / sin(phi) a + sin(w phi) / sin(phi) b` with the angle `phi` between them. It
    keeps the norm of Gaussian latents, which linear interpolation shrinks.

    Args:
        a: Latents at weight 0, `(B, ...)`.
        b: Latents at weight 1, `(B, ...)`.
        weight: In [0, 1], a number or `(B,)`.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    angle = cosine.clamp(-1, 1).arccos()
    weight = torch.as_tensor(weight, dtype=torch.float64, device=a.device)
    # For parallel latents the formula is 0 / 0; its limit is linear interpolation.
    straight = angle.sin() < 1e-6
    sine = torch.where(straight, 1.0, angle.sin())
    share_a = torch.where(straight, 1 - weight, torch.sin((1 - weight) * angle) / sine)
    share_b = torch.where(straight, weight, torch.sin(weight * angle) / sine)
    return expand_like(share_a, a) * a + expand_like(share_b, b) * b


def forward_trajectory(
    schedule: NoiseSchedule,
    x: Tensor,
    levels: Tensor,
    *,
    eta: float = 1.0,
    generator: Generators | None = None,
) -> Iterator[State]:
    """Yield noisy states of given images by DDIM's non-Markovian forward process.

    Every state has the marginal `q(z_t | x)`. `eta` sets how much of its noise a state passes on:
    all with `eta = 0`, as much as in DDPM with `eta = 1`.

    Args:
        schedule: Noise schedule.
        x: Clean images, `(B, ...)`.
        levels: Rising levels `(S,)`; the first has some noise.
        eta: In [0, 1], as in `DDIM`.
        generator: One generator, or one for each image.

    Raises:
        ValueError: If `eta` lies outside [0, 1], or the levels do not rise from a noisy one.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}: 1 is the process of DDPM")
    levels = torch.as_tensor(levels, dtype=torch.float64, device="cpu")
    if levels.ndim != 1 or len(levels) < 1 or not (levels.diff() > 0).all():
        raise ValueError(f"levels must rise strictly, got {levels.tolist()}")
    if schedule(levels[0]).sigma == 0:
        raise ValueError(
            f"levels must start where there is noise, got {levels[0]:g} first: leave it out"
        )
    return _forward(schedule, x, levels, eta, generator)


def _forward(
    schedule: NoiseSchedule, x: Tensor, levels: Tensor, eta: float, generator: Generators | None
) -> Iterator[State]:
    z = q_sample(x, randn(x.shape, generator, x), schedule(levels[0]))
    yield State(levels[0], z, x)
    for s, t in pairwise(levels):
        z, std = ddim_forward(z, x, schedule(s), schedule(t), eta=eta)
        if eta > 0:
            z = z + expand_like(std, z) * randn(z.shape, generator, z)
        yield State(t, z, x)
