"""Exact denoisers: data distributions with known noisy marginals and ODE flow."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.noise import Noise
from ddim_pl.prediction import Prediction, eps_from_x
from ddim_pl.rng import randn
from ddim_pl.samplers import Sampler
from ddim_pl.scales import Scales, expand_like
from ddim_pl.schedules import NoiseSchedule

# Levels of steps, from and to. With theta_0 = 0.1 the Gamma shapes after them are 1.2 to 1e6.
PAIRS = [
    (1000.0, 999.0),
    (1000.0, 500.0),
    (1000.0, 30.0),
    (900.0, 700.5),
    (801.0, 633.0),
    (500.0, 499.0),
    (400.0, 100.0),
    (300.0, 31.5),
    (120.0, 60.0),
    (60.0, 59.0),
]


def _like(value: float | Tensor, z: Tensor) -> Tensor:
    """A number stays a float64 scalar; values per dimension take the dtype and device of `z`."""
    value = torch.as_tensor(value, dtype=torch.float64)
    return value if value.ndim == 0 else value.to(z)


@dataclass(frozen=True)
class ExactGaussian(Denoiser):
    """Data `N(mean, std^2)` with independent dimensions; numbers, or tensors that broadcast to z.

    The marginal at level `t` is `N(alpha_t mean, V_t)` with `V_t = alpha_t^2 std^2 + sigma_t^2`.
    Every operation is elementwise and there is no transcendental function of `z`, so that an image
    does not depend on its batch, to the last bit.
    """

    schedule: NoiseSchedule
    mean: float | Tensor = 0.3
    std: float | Tensor = 0.5

    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = self._scales(z, t)
        mean, std = _like(self.mean, z), _like(self.std, z)
        centred = (z - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return Prediction(mean + alpha * std**2 * centred, sigma * centred)

    def marginal(self, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the states at level `t`."""
        alpha, sigma = self._scales(like, t)
        mean, std = _like(self.mean, like), _like(self.std, like)
        return alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt()

    def flow(self, z: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        """The exact probability-flow ODE from level `t` to `s`: standardised states are kept."""
        (mean_t, std_t), (mean_s, std_s) = self.marginal(t, z), self.marginal(s, z)
        return mean_s + std_s / std_t * (z - mean_t)

    def _scales(self, z: Tensor, t: Tensor | float) -> Scales:
        scales = self.schedule(t)
        return Scales(expand_like(scales.alpha, z), expand_like(scales.sigma, z))


@dataclass(frozen=True)
class ExactConsistency(ExactGaussian):
    """The consistency function of the Gaussian: the end, without noise, of a state's trajectory.

    It is `mean + std (y - mean) / sqrt(std^2 + s^2)` with `y = z / alpha` and `s = sigma / alpha`,
    also where level 0 of the schedule has noise.
    """

    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        mean, deviation = self.marginal(t, z)
        x = _like(self.mean, z) + _like(self.std, z) * ((z - mean) / deviation)
        return Prediction(x, eps_from_x(self.schedule(t), z, x))


@dataclass(frozen=True)
class ExactMixture(Denoiser):
    """Every entry of z is its own sample of a one-dimensional mixture of Gaussians.

    In one dimension the probability-flow ODE keeps quantiles, so `F_s^{-1}(F_t(z))` is its flow.
    """

    schedule: NoiseSchedule
    weights: tuple[float, ...] = (0.35, 0.65)
    means: tuple[float, ...] = (-0.8, 0.5)
    stds: tuple[float, ...] = (0.25, 0.35)

    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        alpha, sigma, centred, variance = self._components(z.double(), t)
        logits = self._row("weights").log() - (centred**2 / variance + variance.log()) / 2
        share = logits.softmax(-1)
        x = self._row("means") + alpha * self._row("stds") ** 2 / variance * centred
        eps = sigma / variance * centred
        return Prediction((share * x).sum(-1).to(z), (share * eps).sum(-1).to(z))

    def tails(self, z: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mass below and above `z` in the marginal at level `t`: each precise where small."""
        _, _, centred, variance = self._components(z.double(), t)
        standard, weights = centred / variance.sqrt(), self._row("weights")
        below, above = torch.special.ndtr(standard), torch.special.ndtr(-standard)
        return (weights * below).sum(-1), (weights * above).sum(-1)

    def flow(self, z: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        """The exact probability-flow ODE from level `t` to `s`, by bisection in float64."""
        below, above = self.tails(z, t)
        low, high = torch.full_like(below, -20), torch.full_like(below, 20)
        for _ in range(60):  # 40 / 2^60 is below the resolution of float64
            middle = (low + high) / 2
            less, more = self.tails(middle, s)
            too_low = torch.where(below < above, less < below, more > above)
            low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        return (low + high) / 2

    def _row(self, name: str) -> Tensor:
        return torch.tensor(getattr(self, name), dtype=torch.float64)

    def _components(self, z: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(alpha, sigma)`, deviations from the components' means and variances, `(..., K)`."""
        scales, z = self.schedule(t), z[..., None]
        alpha, sigma = expand_like(scales.alpha, z), expand_like(scales.sigma, z)
        variance = alpha**2 * self._row("stds") ** 2 + sigma**2
        return alpha, sigma, z - alpha * self._row("means"), variance


def propagate(
    sampler: Sampler, denoiser: Denoiser, levels: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance after a sampler, from those at `levels[0]`, without Monte Carlo.

    The denoiser must be affine in z and elementwise. Then each step is `a z + b + c n`, and three
    images determine `a`, `b` and `c`: two with the same noise and a third with another.

    Args:
        sampler: The sampler, whose steps must not depend on one another.
        denoiser: Exact Gaussian denoiser.
        levels: Levels `(S + 1,)`.
        mean: Mean of the start states, float64, `(...)`.
        variance: Their variance, float64, `(...)`.
    """
    seeds = (0, 0, 1)
    z = torch.zeros(3, *mean.shape, dtype=torch.float64)
    z[1] = 1
    noise = randn(z.shape, _generators(seeds), z)
    for pair in levels.unfold(0, 2, 1):
        out = sampler(denoiser, z, pair, generator=_generators(seeds))
        a, c = out[1] - out[0], (out[2] - out[0]) / (noise[2] - noise[0])
        mean = a * mean + out[0] - c * noise[0]
        variance = a**2 * variance + c**2
    return mean, variance


def _generators(seeds: tuple[int, ...]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def two_steps(noise: Noise, teacher: Denoiser, z: Tensor, t: Tensor, step: float) -> Tensor:
    """The target of progressive distillation for steps of this length."""
    middle, s = t - step / 2, (t - step).clamp(min=0)
    return noise.two_step_target(teacher(z, t), teacher, z, t, middle, s)


class Distilled(Denoiser):
    """The student that equals its target exactly; its teacher may be one itself."""

    def __init__(self, noise: Noise, teacher: Denoiser, steps: int) -> None:
        self.noise, self.teacher, self.step = noise, teacher, 1000 / steps
        self.schedule = teacher.schedule

    def __call__(self, z: Tensor, t: Tensor | float) -> Prediction:
        t = torch.as_tensor(t, dtype=torch.float64).expand(len(z))
        x = two_steps(self.noise, self.teacher, z, t, self.step)
        return Prediction(x, eps_from_x(self.schedule(t), z, x))
