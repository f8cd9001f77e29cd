"""The latent from which a deterministic sampler draws a given image, by gradient descent.

Minimise `||x - x_hat(z_T)||^2` over the latent `z_T` of each image (Pokle et al. 2022, section 5).
A method draws the images and says how their error reaches the latents: `Sequential` differentiates
through the whole chain, `Implicit` solves the chain at once and takes a gradient that is cheap.
The true gradient of a fixed point needs the inverse of `I - J`, J being the derivative of the map.
"""

import time
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm.auto import trange

from ddim_pl.denoiser import Denoiser
from ddim_pl.fixed_point import Anderson
from ddim_pl.prediction import Prediction
from ddim_pl.samplers.ddim import DDIM
from ddim_pl.samplers.deq import DEQ
from ddim_pl.scales import Scales, expand_like
from ddim_pl.transitions import ddim_step


class Carry(NamedTuple):
    """A solution, from which that for other latents is sought.

    Attributes:
        latents: `(B, ...)`.
        states: At all levels but the first, `(B, S, ...)`.
    """

    latents: Tensor
    states: Tensor


class Drawn(NamedTuple):
    """Images with a gradient.

    Attributes:
        images: `(B, ...)`, attached to the latents they were drawn from.
        carry: What the method would like to be given next time, if anything.
        evaluations: Forward passes of the network for each sample, those that the gradient will
            repeat included, `(B,)`.
        is_exact: Whether the images are `DDIM`'s to rounding, not to a solver's tolerance.
    """

    images: Tensor
    carry: Carry | None
    evaluations: Tensor
    is_exact: bool


class Method(ABC):
    """A way to draw images with a gradient."""

    @abstractmethod
    def draw(self, denoiser: Denoiser, z: Tensor, levels: Tensor, carry: Carry | None) -> Drawn:
        """Draw images from the latents.

        Args:
            denoiser: Estimates of the clean image and the noise.
            z: Latents at level `levels[0]`, `(B, ...)`, which take a gradient.
            levels: Falling levels, `(S + 1,)`.
            carry: What the call before gave; None at the first.
        """


@dataclass(frozen=True)
class Sequential(Method):
    """Step by step, with the exact gradient of the whole chain: the baseline.

    Args:
        checkpointing: Keep the states only, and evaluate the network once more on the way back, so
            that memory does not grow by a network's activations with each step.
    """

    checkpointing: bool = True

    def draw(self, denoiser: Denoiser, z: Tensor, levels: Tensor, carry: Carry | None) -> Drawn:
        """Draw images by DDIM; nothing is carried."""

        def step(z: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return ddim_step(denoiser(z, t), denoiser.schedule(t), denoiser.schedule(s))

        steps = len(levels) - 1
        for t, s in pairwise(levels):
            # One after the other: no state of the generators is to be kept for the repetition.
            z = (
                checkpoint(step, z, t, s, use_reentrant=False, preserve_rng_state=False)
                if self.checkpointing
                else step(z, t, s)
            )
        passes = 2 * steps if self.checkpointing else steps
        return Drawn(z, None, torch.full((len(z),), passes), is_exact=True)


@dataclass(frozen=True)
class Implicit(Method):
    """The chain as a fixed point, with the gradient of one application of its map, or of a few.

    The map is written with `y = z / alpha`, `y_k = y_0 + sum_{j < k} (r_{j+1} - r_j) eps_hat_j`
    and `r = sigma / alpha` (Pokle et al. 2022, eq. 9): there `J = 0` is a useful guess, as the
    last state depends on the latent directly. With one application only the first estimate takes a
    gradient ("1-step", their eq. 13 with the inverse left out); more are damped, `z <- (1 - tau) z
    + tau h(z)` from the fixed point on (the phantom gradient of Geng et al. 2021).

    Args:
        deq: Solves the chain, from the solution for the latents before if there is one. With a
            tolerance of 0 it makes all its sweeps, of which one can be enough: the solution then
            follows the latents.
        applications: How many applications of the map the gradient passes through.
        damping: Their `tau`, in (0, 1]; not used with one application.

    Raises:
        ValueError: If an argument is out of range.
    """

    deq: DEQ = field(
        default_factory=lambda: DEQ(Anderson(memory=3, damping=0.9, tolerance=1e-2, max_sweeps=15))
    )
    applications: int = 1
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.applications < 1:
            raise ValueError(f"applications must be at least 1, got {self.applications}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}: the paper has 0.1")

    def draw(self, denoiser: Denoiser, z: Tensor, levels: Tensor, carry: Carry | None) -> Drawn:
        """Draw images from the solved chain; its states are carried."""
        start = None
        if carry is not None:
            start = carry.states + _response(denoiser.schedule(levels), z.detach() - carry.latents)
        chain = self.deq.solve(denoiser, z.detach(), levels, start=start)
        if self.deq.solver.tolerance > 0 and not chain.converged.all():
            warnings.warn(
                f"{int((~chain.converged).sum())} of {len(z)} chains did not converge in "
                f"{self.deq.solver.max_sweeps} sweeps: raise max_sweeps or the tolerance",
                stacklevel=2,
            )
        carry = Carry(z.detach().clone(), chain.states)
        count = chain.evaluations + 1
        first = denoiser(z, levels[0])
        y = _first_state(denoiser, first, levels)
        if self.applications == 1 or len(levels) == 2:
            scale = denoiser.schedule(levels[-1]).alpha
            # The value of the solution with the gradient of the sum's first terms.
            images = chain.states[:, -1] + expand_like(scale, y) * (y - y.detach())
            return Drawn(images, carry, count, is_exact=False)
        states = chain.states
        for _ in range(self.applications):
            image = eps_chain(self.deq, denoiser, y, states, levels)
            states = torch.lerp(states, image, self.damping)
        # Again the solution's value: damping and rounding shift it a little.
        images = chain.states[:, -1] + (states[:, -1] - states[:, -1].detach())
        rest = self.applications * (len(levels) - 2)
        return Drawn(images, carry, count + rest, is_exact=False)


def eps_chain(deq: DEQ, denoiser: Denoiser, y: Tensor, states: Tensor, levels: Tensor) -> Tensor:
    """One application of the map `h` in its form with eps, `(B, S, ...)`, with gradients.

    Args:
        deq: Says how the network is evaluated.
        denoiser: Estimates of the clean image and the noise.
        y: The first state after the latents over its alpha, `(B, ...)`, see `_first_state`.
        states: States at all levels but the first, `(B, S, ...)`.
        levels: Falling levels, `(S + 1,)`.
    """
    level = denoiser.schedule(levels[1:])
    inner = states[:, :-1]
    alpha, ratio = level.alpha.to(states), (level.sigma / level.alpha).to(states)
    shape = (-1, *(1,) * (states.ndim - 2))
    x = deq.estimates(denoiser).of_chain(inner, levels[1:-1])
    sigma = level.sigma[:-1].to(states).reshape(shape)
    eps = (inner - alpha[:-1].reshape(shape) * x) / sigma
    sums = (ratio.diff().reshape(shape) * eps).cumsum(1)
    return alpha.reshape(shape) * (
        y[:, None] + torch.cat([torch.zeros_like(sums[:, :1]), sums], 1)
    )


def _response(levels: Scales, change: Tensor) -> Tensor:
    """About how the states after the first follow a change of the latents, `(B, S, ...)`.

    As for Gaussian data of deviation 1/2 (Karras et al. 2022), whose standardised states are kept.
    """
    deviation = (levels.alpha**2 / 4 + levels.sigma**2).sqrt()
    ratio = (deviation[1:] / deviation[0]).to(change)
    return ratio.reshape(-1, *(1,) * (change.ndim - 1)) * change[:, None]


def _first_state(denoiser: Denoiser, first: Prediction, levels: Tensor) -> Tensor:
    """`y_1 = z_1 / alpha_1` by an ordinary step: the last level's alpha is too small to divide."""
    t, s = denoiser.schedule(levels[0]), denoiser.schedule(levels[1])
    z = ddim_step(first, t, s)
    return expand_like(1 / s.alpha, z) * z


class Progress(NamedTuple):
    """How far an inversion is after an update.

    Attributes:
        update: Number of updates made.
        seconds: Since it began.
        evaluations: Forward passes of the network for each sample, on average.
        loss: Mean over the images of `||x - x_hat||^2` as the method draws them, after so many
            updates.
        best: The same of each image's best latent so far, as `DDIM` draws it.
    """

    update: int
    seconds: float
    evaluations: float
    loss: float
    best: float


class Inversion(NamedTuple):
    """Latents found for images.

    Attributes:
        latents: The best of each image, `(B, ...)`.
        images: What `DDIM` draws from them, step by step, `(B, ...)`.
        losses: `||x - x_hat||^2` of these, `(B,)` float64.
        curve: Progress at every update.
    """

    latents: Tensor
    images: Tensor
    losses: Tensor
    curve: list[Progress]


def invert(
    denoiser: Denoiser,
    x: Tensor,
    levels: Tensor,
    z: Tensor,
    *,
    method: Method | None = None,
    num_updates: int = 1000,
    lr: float = 5e-3,
    max_seconds: float | None = None,
    judge_every: int = 10,
    progress: bool = False,
) -> Inversion:
    """Find latents from which deterministic DDIM draws the images.

    Adam with a constant rate, each image by itself. The latent of least loss is kept, of those
    that are judged: all, if the method draws exactly what `DDIM` does; else the first, the last
    and some between, drawn step by step for that.

    Args:
        denoiser: Estimates of the clean image and the noise, not clipped, as that has no gradient.
        x: Images, `(B, ...)`.
        levels: Falling levels, `(S + 1,)`.
        z: First latents at level `levels[0]`, `(B, ...)`: noise, or an encoding.
        method: How images are drawn with a gradient; by default `Implicit`.
        num_updates: Most updates.
        lr: Rate of Adam.
        max_seconds: Stop after this time, if that comes first.
        judge_every: Updates between two judgements of a method that does not draw exactly.
        progress: Show a progress bar.

    Raises:
        ValueError: If the denoiser clips, or an argument is out of range or of another shape.
    """
    denoiser.check_unclipped("whose gradient is 0 where it clips")
    if z.shape != x.shape:
        raise ValueError(f"z must have the images' shape {tuple(x.shape)}, got {tuple(z.shape)}")
    if num_updates < 0:
        raise ValueError(f"num_updates must not be negative, got {num_updates}")
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}: 5e-3 is usual")
    if judge_every < 1:
        raise ValueError(f"judge_every must be at least 1, got {judge_every}")
    method = method or Implicit()
    latents = z.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([latents], lr=lr)
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    kept, images = z.detach().clone(), torch.zeros_like(x)
    carry, curve, evaluations = None, [], 0.0
    begin = time.perf_counter()
    # One draw more than updates: the last latents are judged too.
    bar = trange(num_updates + 1, desc="inverting", disable=not progress, leave=False)
    for update in bar:
        drawn = method.draw(denoiser, latents, levels, carry)
        losses = (drawn.images - x).square().flatten(1).sum(1)
        loss = float(losses.detach().mean())  # waits for the device
        carry, evaluations = drawn.carry, evaluations + float(drawn.evaluations.double().mean())
        late = max_seconds is not None and time.perf_counter() - begin >= max_seconds
        last = update == num_updates or late
        if drawn.is_exact or last or update % judge_every == 0:
            found = drawn.images.detach()
            if not drawn.is_exact:
                found = DDIM()(denoiser, latents.detach(), levels)
                evaluations += len(levels) - 1
            true = _losses(found, x)
            better = true < best
            best = torch.where(better, true, best)
            mask = better.to(x.device).reshape(-1, *(1,) * (x.ndim - 1))
            kept = torch.where(mask, latents.detach(), kept)
            images = torch.where(mask, found, images)
        seconds = time.perf_counter() - begin
        curve.append(Progress(update, seconds, evaluations, loss, float(best.mean())))
        bar.set_postfix(loss=loss, refresh=False)
        if last:
            break
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    return Inversion(kept, images, best, curve)


def _losses(images: Tensor, x: Tensor) -> Tensor:
    """`||x - x_hat||^2` of each image, `(B,)` float64 on the CPU."""
    return (images - x).square().flatten(1).sum(1).cpu().double()
