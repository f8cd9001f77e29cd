"""Laws of noise: the distribution of eps in `z_t = alpha_t x + sigma_t eps`.

eps has mean 0 and variance 1, and is Gaussian or Gamma ([Gamma]). To add a law, write a frozen
dataclass in a file of this package.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.prediction import Prediction, eps_from_x
from ddim_pl.rng import (
    Generators,
    ImageNoise,
    NoiseSource,
    gaussian_latents,
    image_noise,
    randn,
)
from ddim_pl.scales import Scales, expand_like, float64
from ddim_pl.transitions import ddim_step, two_step_target

NEWTON_STEPS = 16
"""Maximum in `Noise.implied_x`; it takes three or four, and eight at the edge of the support."""


class Noise(ABC):
    """A law of standardised noise, independent in each dimension; subclasses are dataclasses."""

    @property
    def is_gaussian(self) -> bool:
        """Whether the law is standard normal at every level."""
        return False

    @abstractmethod
    def draw(
        self, shape: Sequence[int], scales: Scales, generator: Generators | None, like: Tensor
    ) -> Tensor:
        """Standardised noise `(B, ...)` at a level; other arguments and errors as for `randn`."""

    @abstractmethod
    def log_density(self, eps: Tensor, scales: Scales) -> Tensor:
        """Log-density of each entry of standardised noise `(B, ...)`, float64."""

    @abstractmethod
    def transport(self, eps: Tensor, t: Scales, s: Scales) -> Tensor:
        """Noise at `s` with the same quantiles as the noise `eps` at `t`: `F_s^{-1}(F_t(eps))`.

        It increases with every entry of eps; exchanging the levels gives its inverse.

        Args:
            eps: Standardised noise, `(B, ...)`.
            t: Scales at the level of eps.
            s: Scales at the level of the result, noisier or cleaner.
        """

    def step(self, prediction: Prediction, t: Scales, s: Scales) -> Tensor:
        """Deterministic step `alpha_s x + sigma_s eps_s`, with eps_s transported from eps.

        With the true x the marginal at `s` is exact. For Gaussian noise it is DDIM with `eta = 0`.
        The levels may rise (encoding).

        Args:
            prediction: Estimates at `t`, each `(B, ...)`.
            t: Scales of the state.
            s: Scales at the level to go to.
        """
        return ddim_step(Prediction(prediction.x, self.transport(prediction.eps, t, s)), t, s)

    def implied_x(self, guess: Tensor, z: Tensor, z_s: Tensor, t: Scales, s: Scales) -> Tensor:
        """The x with which one `step` leads from `z` to `z_s`, float64 `(B, ...)`.

        The step gives `z_s = alpha_s / alpha_t z - D(eps)` with `D(eps) = alpha_s sigma_t /
        alpha_t eps - sigma_s T(eps)`, T being `transport`, and `x = (z - sigma_t eps) / alpha_t`.
        For Gamma noise D is increasing, as the quantiles of a smaller shape are closer to each
        other ([SaundersMoran]), and concave, as a smaller shape is more skewed ([vanZwet]), so
        that Newton's method converges from any guess.

        Args:
            guess: Initial guess, `(B, ...)`; `two_step_target` of Gaussian noise is close.
            z: States at `t`, float64.
            z_s: States at `s`, float64, which deterministic steps from `z` can reach.
            t: Scales of the states.
            s: Scales at a cleaner level.
        """
        slope = expand_like(s.alpha * t.sigma / t.alpha, z)
        wanted = expand_like(s.alpha / t.alpha, z) * z - z_s
        scale = expand_like(s.sigma, z)
        eps = (z - expand_like(t.alpha, z) * guess) / expand_like(t.sigma, z)
        for _ in range(NEWTON_STEPS):
            moved = self.transport(eps, t, s)
            # Q' in [0, 1): the derivative of the quantile map of the Gamma variables themselves.
            log_ratio = self.log_density(eps, t) - self.log_density(moved, s)
            ratio = (log_ratio.exp() * scale / slope).nan_to_num(0, 0, 0)
            step = slope * eps - scale * moved - wanted
            step = step / (slope * (1 - ratio.clamp(0, 1 - 1e-9)))
            eps = eps - step
            if (step.abs() <= 1e-9 * (1 + eps.abs())).all():  # the next step is 1e-18
                break
        return (z - expand_like(t.sigma, z) * eps) / expand_like(t.alpha, z)

    def two_step_target(
        self,
        first: Prediction,
        second: Denoiser,
        z: Tensor,
        t: Tensor,
        middle: Tensor,
        s: Tensor,
    ) -> Tensor:
        """The x with which one `step` from `t` to `s` equals two over `middle`, `(B, ...)`.

        It is the target of progressive distillation ([PD], appendix G) and of TRACT. At `s = 0` it
        is the second estimate, as in the authors' code, see `NoiseSchedule.step_end`.

        Args:
            first: The first step's estimates, at `t`.
            second: Denoiser of the second step.
            z: States at levels `t`, `(B, ...)`.
            t: Noisiest levels, `(B,)`.
            middle: Levels between, `(B,)`.
            s: Cleanest levels, `(B,)`.
        """
        start, mid = second.schedule(t), second.schedule(middle)
        end = second.schedule.step_end(s)
        # In float64, since x follows from the difference of the states.
        z_t, x_t = float64(z), float64(first.x)
        z_mid = self.step(Prediction(x_t, eps_from_x(start, z_t, x_t)), start, mid)
        x_mid = float64(second(z_mid.to(z), middle).x)
        z_s = self.step(Prediction(x_mid, eps_from_x(mid, z_mid, x_mid)), mid, end)
        guess = two_step_target(x_t, x_mid, start, mid, end)
        return self.implied_x(guess, z_t, z_s, start, end).to(z)


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """Standard normal noise at every level ([DDPM])."""

    is_gaussian = True

    def draw(
        self, shape: Sequence[int], scales: Scales, generator: Generators | None, like: Tensor
    ) -> Tensor:
        """Standard normal noise, see `randn`."""
        return randn(shape, generator, like)

    def log_density(self, eps: Tensor, scales: Scales) -> Tensor:
        """`-(eps^2 + log(2 pi)) / 2`."""
        return -(float64(eps).square() + math.log(2 * math.pi)) / 2

    def transport(self, eps: Tensor, t: Scales, s: Scales) -> Tensor:
        """The noise itself, since the law is the same at every level."""
        return eps

    def two_step_target(
        self,
        first: Prediction,
        second: Denoiser,
        z: Tensor,
        t: Tensor,
        middle: Tensor,
        s: Tensor,
    ) -> Tensor:
        """A weighted mean of the two estimates, see `transitions.two_step_target`."""
        start, mid = second.schedule(t), second.schedule(middle)
        end = second.schedule.step_end(s)
        x_mid = second(ddim_step(first, start, mid), middle).x
        return two_step_target(first.x, x_mid, start, mid, end)


def latents(
    seed: int,
    indices: Iterable[int] | Tensor,
    shape: Sequence[int],
    *,
    noise: Noise | None = None,
    scales: Scales | None = None,
    noise_source: NoiseSource = "generators",
    device: torch.device | str = "cpu",
    compile: bool = False,
) -> tuple[Tensor, list[torch.Generator] | ImageNoise]:
    """Start noise `(B, *shape)` in float32 of the images `indices`, and their generators.

    The generators are returned because a stochastic sampler draws from them next.

    Args:
        seed: Seed of the images, see `image_noise`.
        indices: Indices of the B images.
        shape: `(C, H, W)`.
        noise: Law of the noise; by default Gaussian.
        scales: Scales at the first level; required if the law is not Gaussian.
        noise_source: "generators" or "philox", see `image_noise`.
        device: Device of the result; "philox" draws there, the generators draw on the CPU.
        compile: Compile what "philox" draws with.

    Raises:
        ValueError: If scales are required and not given, or as by `image_noise`.
    """
    if noise is None or noise.is_gaussian:
        more: dict[str, Any] = {"noise_source": noise_source, "device": device, "compile": compile}
        return gaussian_latents(seed, indices, shape, **more)
    if scales is None:
        raise ValueError(f"scales must be given for {noise}, got None: its law depends on them")
    generators = image_noise(noise_source, seed, indices, device=device, compile=compile)
    size, like = (len(generators), *shape), torch.empty(0, device=device)
    return noise.draw(size, scales, generators, like), generators
