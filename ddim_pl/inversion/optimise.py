"""Latents from which a deterministic sampler generates given images, by gradient descent.

Minimise `||x - x_hat(z_T)||^2` over the latent `z_T` of each image ([DEQ], section 5). A method
generates the images and defines the gradient with respect to the latents: `Sequential`
differentiates through the whole chain, `Implicit` solves the chain as a fixed point and uses a
cheap gradient. The exact gradient of a fixed point needs the inverse of `I - J`, J being the
Jacobian of the map ([DEQ], eq. 13); `InverseJacobian` approximates it by a matrix of low rank.
"""

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm.auto import trange

from ddim_pl.checks import check_at_least
from ddim_pl.denoiser import Denoiser
from ddim_pl.fixed_point import Anderson
from ddim_pl.prediction import Prediction
from ddim_pl.samplers.ddim import DDIM
from ddim_pl.samplers.deq import DEQ, Chain
from ddim_pl.scales import Scales, expand_like, unsqueeze_like
from ddim_pl.transitions import ddim_step


class Carry(NamedTuple):
    """A solution to start the next solve from.

    Attributes:
        latents: `(B, ...)`.
        states: At all levels but the first, `(B, S, ...)`.
    """

    latents: Tensor
    states: Tensor


class Generated(NamedTuple):
    """Images with a gradient.

    Attributes:
        images: `(B, ...)`, attached to the latents.
        carry: What the method is given at its next call, if anything.
        evaluations: Forward passes of the network for each sample, including those that the
            backward pass repeats, `(B,)`.
        is_exact: Whether the images are those of `DDIM` to rounding, not to a solver's tolerance.
    """

    images: Tensor
    carry: Carry | None
    evaluations: Tensor
    is_exact: bool


class Method(ABC):
    """A way to generate images with a gradient."""

    @abstractmethod
    def generate(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, carry: Carry | None
    ) -> Generated:
        """Generate images from the latents.

        Args:
            denoiser: Estimates of the clean image and the noise.
            z: Latents at level `levels[0]`, `(B, ...)`, which require a gradient.
            levels: Falling levels, `(S + 1,)`.
            carry: That of the previous call; None at the first.
        """


@dataclass(frozen=True)
class Sequential(Method):
    """DDIM step by step, with the exact gradient of the whole chain: the baseline.

    Args:
        checkpointing: Keep only the states and evaluate the network again in the backward pass, so
            that memory does not grow by a network's activations with each step.
    """

    checkpointing: bool = True

    def generate(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, carry: Carry | None
    ) -> Generated:
        """Generate images by DDIM; nothing is carried."""

        def step(z: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return ddim_step(denoiser(z, t), denoiser.schedule(t), denoiser.schedule.step_end(s))

        steps = len(levels) - 1
        for t, s in pairwise(levels):
            # The step draws no random numbers: no generator state to restore.
            z = (
                checkpoint(step, z, t, s, use_reentrant=False, preserve_rng_state=False)
                if self.checkpointing
                else step(z, t, s)
            )
        passes = 2 * steps if self.checkpointing else steps
        return Generated(z, None, torch.full((len(z),), passes), is_exact=True)


@dataclass(frozen=True)
class Implicit(Method):
    """DDIM as a fixed point, with the gradient of one or a few applications of its map.

    The map is written with `y = z / alpha`, `y_k = y_0 + sum_{j < k} (r_{j+1} - r_j) eps_hat_j`
    and `r = sigma / alpha` ([DEQ], eq. 9). In this form `J = 0` is a useful approximation, since
    the last state depends on the latent directly. With one application only the first estimate has
    a gradient ("1-step", [DEQ], eq. 13 without the inverse). More applications are damped, `z <-
    (1 - tau) z + tau h(z)` from the fixed point on (the phantom gradient, [Phantom]).

    Args:
        deq: Solves the chain, from the previous solution if there is one. With a tolerance of 0 it
            makes all its sweeps, and one can be enough: the solution then follows the latents.
        applications: Number of applications of the map that the gradient passes through.
        damping: `tau` in (0, 1]; not used with one application.

    Raises:
        ValueError: If an argument is out of range.
    """

    deq: DEQ = field(
        default_factory=lambda: DEQ(Anderson(memory=3, damping=0.9, tolerance=1e-2, max_sweeps=15))
    )
    applications: int = 1
    damping: float = 0.1

    def __post_init__(self) -> None:
        check_at_least(1, applications=self.applications)
        _check_unclipped(self.deq)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}: the paper has 0.1")

    def generate(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, carry: Carry | None
    ) -> Generated:
        """Generate images by solving the chain; its states are carried."""
        chain = _solve(self.deq, denoiser, z.detach(), levels, carry)
        carry = Carry(z.detach().clone(), chain.states)
        count = chain.evaluations + 1
        first = denoiser(z, levels[0])
        y = _first_state(denoiser, first, levels)
        if self.applications == 1 or len(levels) == 2:
            scale = denoiser.schedule.step_end(levels[-1]).alpha
            # The solution's value, with the gradient of the first terms of the sum.
            images = chain.states[:, -1] + expand_like(scale, y) * (y - y.detach())
            return Generated(images, carry, count, is_exact=False)
        states = chain.states
        for _ in range(self.applications):
            image = eps_chain(self.deq, denoiser, y, states, levels)
            states = torch.lerp(states, image, self.damping)
        # The solution's value again: damping and rounding change it slightly.
        images = chain.states[:, -1] + (states[:, -1] - states[:, -1].detach())
        rest = self.applications * (len(levels) - 2)
        return Generated(images, carry, count + rest, is_exact=False)


@dataclass(frozen=True)
class InverseJacobian(Method):
    """DDIM as a fixed point, with the gradient of [DEQ], eq. 13, and an approximate inverse.

    The gradient is that of the map by the latents, after the adjoint `u = v + J^T u` of the
    gradient v by the states is solved. Broyden's method solves it from `u = v`: each product with
    `J^T` adds one to the rank of its approximation of the inverse of `I - J^T`. Since J is
    strictly triangular, the first product corrects by the sum of all paths of two estimates.

    Args:
        deq: Solves the chain, as in `Implicit`.
        products: Number of products with `J^T`, one backward pass of the network on all states
            each; none would be the 1-step gradient of `Implicit`.

    Raises:
        ValueError: If there are no products, or `deq` clips.
    """

    deq: DEQ = field(
        default_factory=lambda: DEQ(Anderson(memory=3, damping=0.9, tolerance=1e-2, max_sweeps=15))
    )
    products: int = 12

    def __post_init__(self) -> None:
        check_at_least(1, products=self.products)
        _check_unclipped(self.deq)

    def generate(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, carry: Carry | None
    ) -> Generated:
        """Generate images by solving the chain; its states are carried."""
        chain = _solve(self.deq, denoiser, z.detach(), levels, carry)
        carry = Carry(z.detach().clone(), chain.states)
        y = _first_state(denoiser, denoiser(z, levels[0]), levels)
        alpha = expand_like(denoiser.schedule.step_end(levels[1:]).alpha[None], chain.states)
        direct = alpha * y[:, None]
        # The solution's value; all states depend on the latent through the first of them.
        states = chain.states + (direct - direct.detach())
        inner = len(levels) - 2
        if states.requires_grad and inner:
            states.register_hook(
                lambda v: self._adjoint(denoiser, y.detach(), chain.states, levels, v)
            )
        return Generated(states[:, -1], carry, chain.evaluations + 1 + inner, is_exact=False)

    def _adjoint(
        self, denoiser: Denoiser, y: Tensor, states: Tensor, levels: Tensor, v: Tensor
    ) -> Tensor:
        """`(I - J^T)^-1 v` at the fixed point, `(B, S, ...)`."""
        with torch.enable_grad():
            states = states.detach().requires_grad_(True)
            image = eps_chain(self.deq, denoiser, y, states, levels)

        def product(u: Tensor) -> Tensor:
            return torch.autograd.grad(image, states, u, retain_graph=True)[0]

        return broyden_adjoint(product, v, self.products)


def broyden_adjoint(product: Callable[[Tensor], Tensor], v: Tensor, products: int) -> Tensor:
    """Solve `u = v + J^T u` for each sample by Broyden's method ([Broyden]).

    Args:
        product: The product with `J^T`, `(B, ...)` to `(B, ...)`.
        v: Right-hand sides, `(B, ...)`.
        products: Number of calls of `product`, at least 1.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return unsqueeze_like((a * b).flatten(1).sum(1), v)

    lefts: list[Tensor] = []
    rights: list[Tensor] = []  # the inverse is I + sum of left right^T

    def inverse(r: Tensor) -> Tensor:
        return r + sum(a * dot(b, r) for a, b in zip(lefts, rights, strict=True))

    def transposed(r: Tensor) -> Tensor:
        return r + sum(b * dot(a, r) for a, b in zip(lefts, rights, strict=True))

    u = v
    residual = -product(u)
    for _ in range(products - 1):
        step = -inverse(residual)
        u = u + step
        before, residual = residual, u - product(u) - v
        change = inverse(residual - before)
        right = transposed(step)
        scale = dot(step, change)
        usable = scale.abs() > torch.finfo(v.dtype).eps * dot(step, step)
        lefts.append(torch.where(usable, (step - change) / torch.where(usable, scale, 1), 0))
        rights.append(right)
    return u - inverse(residual)


def _check_unclipped(deq: DEQ) -> None:
    if deq.clip:
        raise ValueError(
            f"deq must not clip, got {deq}, whose gradient is 0 where it does: leave its clip out"
        )


def _solve(deq: DEQ, denoiser: Denoiser, z: Tensor, levels: Tensor, carry: Carry | None) -> Chain:
    """Solve the chain from the carried solution; warn if it does not converge."""
    start = None
    if carry is not None:
        start = carry.states + _response(denoiser.schedule.step_end(levels), z - carry.latents)
    chain = deq.solve(denoiser, z, levels, start=start)
    if deq.solver.tolerance > 0 and not chain.converged.all():
        warnings.warn(
            f"{int((~chain.converged).sum())} of {len(z)} chains did not converge in "
            f"{deq.solver.max_sweeps} sweeps: raise max_sweeps or the tolerance",
            stacklevel=3,
        )
    return chain


def eps_chain(deq: DEQ, denoiser: Denoiser, y: Tensor, states: Tensor, levels: Tensor) -> Tensor:
    """One application of the map `h` in its form with eps, `(B, S, ...)`, with gradients.

    Args:
        deq: Defines how the network is evaluated.
        denoiser: Estimates of the clean image and the noise.
        y: The first state after the latents over its alpha, `(B, ...)`, see `_first_state`.
        states: States at all levels but the first, `(B, S, ...)`.
        levels: Falling levels, `(S + 1,)`.
    """
    scales = denoiser.schedule.step_end(levels[1:])
    values = (*scales, scales.sigma / scales.alpha)
    alpha, sigma, ratio = (expand_like(each[None], states) for each in values)
    inner = states[:, :-1]
    x = deq.estimates(denoiser).of_chain(inner, levels[1:-1])
    eps = (inner - alpha[:, :-1] * x) / sigma[:, :-1]
    sums = (ratio.diff(dim=1) * eps).cumsum(1)
    return alpha * (y[:, None] + torch.cat([torch.zeros_like(sums[:, :1]), sums], 1))


def _response(scales: Scales, change: Tensor) -> Tensor:
    """Approximate change `(B, S, ...)` of the states after the first to one of the latents.

    Exact for Gaussian data of standard deviation 1/2, the default of [EDM], under the exact flow,
    which keeps standardised states.
    """
    deviation = (scales.alpha**2 / 4 + scales.sigma**2).sqrt()
    change = change[:, None]
    return expand_like((deviation[1:] / deviation[0])[None], change) * change


def _first_state(denoiser: Denoiser, first: Prediction, levels: Tensor) -> Tensor:
    """`y_1 = z_1 / alpha_1` by a DDIM step; alpha at the last level is too small to divide by."""
    t, s = denoiser.schedule(levels[0]), denoiser.schedule.step_end(levels[1])
    z = ddim_step(first, t, s)
    return expand_like(1 / s.alpha, z) * z


class Progress(NamedTuple):
    """Progress of an inversion after an update.

    Attributes:
        update: Number of updates made.
        seconds: Time since the start.
        evaluations: Forward passes of the network for each sample, on average.
        loss: Mean over the images of `||x - x_hat||^2`, as the method generates them.
        best: The same of each image's best latent so far, as `DDIM` generates it.
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
        images: What `DDIM` generates from them, `(B, ...)`.
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
    stop_below: float | None = None,
    judge_every: int = 10,
    progress: bool = False,
) -> Inversion:
    """Find latents from which deterministic DDIM generates the images.

    Adam with a constant rate, each image independently. The latent of least loss is kept among
    those that are judged by the loss of DDIM: all, if the method generates exactly what `DDIM`
    does; else the first, the last and every `judge_every`-th.

    Args:
        denoiser: Estimates of the clean image and the noise, without clipping.
        x: Images, `(B, ...)`.
        levels: Falling levels, `(S + 1,)`.
        z: Initial latents at level `levels[0]`, `(B, ...)`: noise, or an encoding.
        method: How images are generated with a gradient; by default `Implicit`.
        num_updates: Maximum number of updates.
        lr: Learning rate of Adam.
        max_seconds: Stop after this time, if that comes first.
        stop_below: Stop when the best loss of every image is below this.
        judge_every: Updates between two judgements of a method that is not exact.
        progress: Show a progress bar.

    Raises:
        ValueError: If the denoiser clips, or an argument is out of range or of another shape.
    """
    _check_arguments(denoiser, x, z, num_updates, lr, judge_every, stop_below)
    method = method or Implicit()
    latents = z.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([latents], lr=lr)
    best = _Best(z.detach().clone(), torch.zeros_like(x))
    carry, curve, evaluations, begin = None, [], 0.0, time.perf_counter()
    end = begin + (math.inf if max_seconds is None else max_seconds)
    # One iteration more than updates, to judge the last latents too.
    bar = trange(num_updates + 1, desc="inverting", disable=not progress, leave=False)
    for update in bar:
        found = method.generate(denoiser, latents, levels, carry)
        losses = (found.images - x).square().flatten(1).sum(1)
        loss = float(losses.detach().mean())  # waits for the device
        carry, evaluations = found.carry, evaluations + float(found.evaluations.double().mean())
        last = update == num_updates or time.perf_counter() >= end
        if found.is_exact or last or update % judge_every == 0:
            now = latents.detach()
            images = found.images.detach() if found.is_exact else DDIM()(denoiser, now, levels)
            evaluations += 0 if found.is_exact else len(levels) - 1
            best.update(now, images, x)
        curve.append(Progress(update, time.perf_counter() - begin, evaluations, loss, best.mean))
        bar.set_postfix(loss=loss, refresh=False)
        if last or best.is_below(stop_below):
            break
        (latents.grad,) = torch.autograd.grad(losses.sum(), latents)
        optimizer.step()
    return Inversion(best.latents, best.images, best.losses, curve)


def check_stop_below(stop_below: float | None) -> None:
    """Check the loss to stop at.

    Raises:
        ValueError: If it is not positive, and no inversion would stop.
    """
    if stop_below is not None and not stop_below > 0:
        raise ValueError(f"stop_below must be positive, got {stop_below}: [DEQ]'s code has 0.5")


def _check_arguments(
    denoiser: Denoiser,
    x: Tensor,
    z: Tensor,
    num_updates: int,
    lr: float,
    judge_every: int,
    stop_below: float | None,
) -> None:
    check_stop_below(stop_below)
    denoiser.check_unclipped("whose gradient is 0 where it clips")
    if z.shape != x.shape:
        raise ValueError(f"z must have the images' shape {tuple(x.shape)}, got {tuple(z.shape)}")
    check_at_least(0, num_updates=num_updates)
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}: 5e-3 is usual")
    check_at_least(1, judge_every=judge_every)


class _Best:
    """The latent of least loss of each image so far, the image it generates, and its loss."""

    def __init__(self, latents: Tensor, images: Tensor) -> None:
        self.latents = latents
        self.images = images
        self.losses = torch.full((len(images),), torch.inf, dtype=torch.float64)

    @property
    def mean(self) -> float:
        """Mean loss."""
        return float(self.losses.mean())

    def is_below(self, loss: float | None) -> bool:
        """Whether the losses of all images are below this one; not, if there is none."""
        return loss is not None and float(self.losses.max()) < loss

    def update(self, latents: Tensor, images: Tensor, x: Tensor) -> None:
        """Replace those whose images `(B, ...)` are closer to `x`."""
        losses = (images - x).square().flatten(1).sum(1).cpu().double()
        better = losses < self.losses
        self.losses = torch.where(better, losses, self.losses)
        mask = unsqueeze_like(better, x)
        self.latents = torch.where(mask, latents, self.latents)
        self.images = torch.where(mask, images, self.images)
