"""Laws of a state's noise.

A law of noise is standardised: a state is `z_t = alpha_t x + sigma_t eps` with eps of mean 0 and
variance 1, Gaussian or Gamma ([Gamma]). To add one, write a frozen dataclass in a
file of this package.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.prediction import Prediction, eps_from_x
from ddim_pl.rng import Generators, gaussian_latents, image_generators, randn
from ddim_pl.scales import Scales, expand_like, float64
from ddim_pl.transitions import ddim_step, two_step_target

NEWTON_STEPS = 16
"""Of `Noise.implied_x` at most; it takes three or four, and eight next to the support's edge."""


class Noise(ABC):
    """A law of standardised noise: mean 0 and variance 1, independent dimensions, at every level.

    Subclasses are frozen dataclasses.
    """

    @property
    def is_gaussian(self) -> bool:
        """Whether the law is the normal one at every level, for which all samplers are made."""
        return False

    @abstractmethod
    def draw(
        self, shape: Sequence[int], scales: Scales, generator: Generators | None, like: Tensor
    ) -> Tensor:
        """Standardised noise `(B, ...)` of a level; other arguments and errors as for `randn`."""

    @abstractmethod
    def log_density(self, eps: Tensor, scales: Scales) -> Tensor:
        """Logarithm of the density at each entry of standardised noise `(B, ...)`, float64."""

    @abstractmethod
    def transport(self, eps: Tensor, t: Scales, s: Scales) -> Tensor:
        """Noise of level `s` that holds the same quantiles as the noise `eps` of level `t`.

        It is increasing in every entry of eps, and its own inverse with the levels exchanged.

        Args:
            eps: Standardised noise, `(B, ...)`.
            t: Level whose law it has.
            s: Level whose law it shall have, noisier or cleaner.
        """

    def step(self, prediction: Prediction, t: Scales, s: Scales) -> Tensor:
        """Deterministic step `alpha_s x + sigma_s eps_s`, eps_s holding the quantiles of eps.

        `eps_s = F_s^{-1}(F_t(eps))` by this law, so that with the true x the marginal at `s` is
        exact. For Gaussian noise it is DDIM with `eta = 0`. The levels may rise (encoding).

        Args:
            prediction: Estimates at level `t`, each `(B, ...)`.
            t: Level of the state.
            s: Level to go to.
        """
        return ddim_step(Prediction(prediction.x, self.transport(prediction.eps, t, s)), t, s)

    def implied_x(self, guess: Tensor, z: Tensor, z_s: Tensor, t: Scales, s: Scales) -> Tensor:
        """The x with which one `step` leads from `z` to `z_s`, float64 `(B, ...)`.

        The step ends in `z_s = alpha_s / alpha_t z - D(eps)` with `D(eps) = alpha_s sigma_t /
        alpha_t eps - sigma_s T(eps)` and `x = (z - sigma_t eps) / alpha_t`. For Gamma noise D
        increases, as the quantiles of a smaller shape are closer to one another (Saunders & Moran
        1978), and is concave, as a smaller shape is more skewed (van Zwet 1964): Newton's method
        finds its root from anywhere.

        Args:
            guess: A guess, `(B, ...)`: `two_step_target` of Gaussian noise is close.
            z: States at level `t`, float64.
            z_s: States at level `s`, float64; such as deterministic steps from `z` can reach.
            t: Level of the states.
            s: Cleaner level.
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
            if (step.abs() <= 1e-9 * (1 + eps.abs())).all():  # and the next one 1e-18
                break
        return (z - expand_like(t.sigma, z) * eps) / expand_like(t.alpha, z)

    def two_step_target(
        self, teacher: Denoiser, z: Tensor, t: Tensor, middle: Tensor, s: Tensor
    ) -> Tensor:
        """The x with which one `step` from `t` to `s` lands where a teacher's two do, `(B, ...)`.

        It is the target of progressive distillation ([PD], appendix G).

        Args:
            teacher: Makes the two steps.
            z: States at levels `t`, `(B, ...)`.
            t: Noisiest levels, `(B,)`.
            middle: Levels between.
            s: Cleanest levels.
        """
        start, mid, end = (teacher.schedule(scales) for scales in (t, middle, s))
        # In float64, since what a short step adds is told from the difference of its ends.
        z_t, x_t = float64(z), float64(teacher(z, t).x)
        z_mid = self.step(Prediction(x_t, eps_from_x(start, z_t, x_t)), start, mid)
        x_mid = float64(teacher(z_mid.to(z), middle).x)
        z_s = self.step(Prediction(x_mid, eps_from_x(mid, z_mid, x_mid)), mid, end)
        guess = two_step_target(x_t, x_mid, start, mid, end)
        return self.implied_x(guess, z_t, z_s, start, end).to(z)


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """Standard normal noise at every level ([DDPM])."""

    @property
    def is_gaussian(self) -> bool:
        """It is."""
        return True

    def draw(
        self, shape: Sequence[int], scales: Scales, generator: Generators | None, like: Tensor
    ) -> Tensor:
        """As `randn`."""
        return randn(shape, generator, like)

    def log_density(self, eps: Tensor, scales: Scales) -> Tensor:
        """`-(eps^2 + log(2 pi)) / 2`."""
        return -(float64(eps).square() + math.log(2 * math.pi)) / 2

    def transport(self, eps: Tensor, t: Scales, s: Scales) -> Tensor:
        """The noise itself: the law is the same at every level."""
        return eps

    def two_step_target(
        self, teacher: Denoiser, z: Tensor, t: Tensor, middle: Tensor, s: Tensor
    ) -> Tensor:
        """In closed form, a weighted mean of the teacher's two estimates."""
        start, mid, end = (teacher.schedule(scales) for scales in (t, middle, s))
        first = teacher(z, t)
        second = teacher(ddim_step(first, start, mid), middle)
        return two_step_target(first.x, second.x, start, mid, end)


def latents(
    seed: int,
    indices: Iterable[int],
    shape: Sequence[int],
    *,
    noise: Noise | None = None,
    scales: Scales | None = None,
) -> tuple[Tensor, list[torch.Generator]]:
    """Start noise `(B, *shape)` in float32 of the images `indices`, and their generators.

    The generators come back because a stochastic sampler goes on drawing from them.

    Args:
        seed: Seed of the images, see `image_generators`.
        indices: Which images, B numbers.
        shape: `(C, H, W)`.
        noise: Law of the noise; by default Gaussian.
        scales: Those of the level that sampling starts at; needed if the law is not Gaussian.

    Raises:
        ValueError: If a level is needed and none is given.
    """
    if noise is None or scales is None:
        if noise is not None and not noise.is_gaussian:
            raise ValueError(f"scales must be given for {noise}: its law is another at each level")
        return gaussian_latents(seed, indices, shape)
    generators = image_generators(seed, indices)
    size = (len(generators), *shape)
    return noise.draw(size, scales, generators, torch.empty(0)), generators
