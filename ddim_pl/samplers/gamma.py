"""Samplers of Gamma diffusion ([Gamma]).

With `z_t = alpha_t x + sigma_t eps_t`, eps_t a standardised Gamma variable of shape `K_t`, each
sampler computes eps_s from eps_t. Given the true x, `GammaExact` and `GammaQuantile` have the
Gamma marginal for every pair of levels, `GammaMoment` its mean and variance, `GammaReport` only
its mean; docs/gamma.md has the proofs. The start states must have Gamma noise too, which
`ddim_pl.noise.latents` draws.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest

import torch
from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.noise import GammaNoise, Noise
from ddim_pl.noise.gamma import standardised_beta, standardised_gamma
from ddim_pl.noise.gamma_steps import report_step, thinning_shapes, thinning_step
from ddim_pl.prediction import Prediction
from ddim_pl.rng import Generators
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.samplers.ddim import DDIM
from ddim_pl.scales import Scales, expand_like
from ddim_pl.transitions import ddim_noise_scale, ddim_step


@dataclass(frozen=True)
class GammaSampler(Sampler):
    """Base class of the samplers of Gamma diffusion; subclasses implement `step`.

    Args:
        theta_0: Scale of the noise, that of the model's `GammaNoise`.

    Raises:
        ValueError: If `theta_0` is not positive.
    """

    theta_0: float = 0.001

    def __post_init__(self) -> None:
        _ = self.noise

    @property
    def noise(self) -> GammaNoise:
        """Gamma noise."""
        return GammaNoise(self.theta_0)

    @abstractmethod
    def step(
        self, prediction: Prediction, t: Scales, s: Scales, generator: Generators | None
    ) -> Tensor:
        """States at level `s` from estimates at level `t`."""

    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Yield the state after each step."""
        for t, s in pairwise(levels):
            prediction = denoiser(z, t)
            z = self.step(
                prediction, denoiser.schedule(t), denoiser.schedule.step_end(s), generator
            )
            yield State(s, z, prediction.x)


@dataclass(frozen=True)
class GammaMoment(GammaSampler):
    """DDIM with Gamma noise in place of Gaussian noise ([Gamma], algorithm 4).

    A sum of Gamma variables of different scales is not a Gamma variable: with the true x, the mean
    and the variance of the marginal are right, its shape is not.

    Args:
        theta_0: Scale of the noise, that of the model's `GammaNoise`.
        eta: As in `DDIM`; 1 is the paper's DDPM.

    Raises:
        ValueError: If `theta_0` is not positive or `eta` lies outside [0, 1].
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        DDIM(self.eta)

    def step(
        self, prediction: Prediction, t: Scales, s: Scales, generator: Generators | None
    ) -> Tensor:
        """`ddim_step` with Gamma noise of level `s`."""
        x = prediction.x
        noise = self.noise.draw(x.shape, s, generator, x) if self.eta > 0 else None
        return ddim_step(prediction, t, s, eta=self.eta, noise=noise)


@dataclass(frozen=True)
class GammaReport(GammaSampler):
    """Gamma-DDIM of [Report], eq. 18, for comparison: its variance drifts.

    The step to a level without noise gives the estimate of x, as in [Report], eq. 8.

    Args:
        theta_0: Scale of the noise, that of the model's `GammaNoise`.
        eta: Scale of the fresh noise as in `DDIM`; [Report] does not specify it. By default 1, if
            `sigma` is not given.
        sigma: In place of eta, `sigma_t` itself: a constant, or a value for each step but that to
            a level without noise. With the levels `doubling`, `alpha_s / alpha_t` is the one that
            keeps the marginals: the noise is then drawn afresh in every step.

    Raises:
        ValueError: If `theta_0` is not positive, `eta` lies outside [0, 1], a sigma is negative or
            not finite, or both are given.
    """

    eta: float | None = None
    sigma: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        DDIM(1.0 if self.eta is None else self.eta)
        if self.sigma is None:
            return
        if self.eta is not None:
            raise ValueError(
                f"sigma must be None with eta {self.eta}, got {self.sigma}: give one of them"
            )
        if not isinstance(self.sigma, (int, float)):
            object.__setattr__(self, "sigma", tuple(self.sigma))
        values = self.sigma if isinstance(self.sigma, tuple) else (self.sigma,)
        for value in values:
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"sigma must be at least 0 and finite, got {value}: 0 is deterministic"
                )

    def step(
        self, prediction: Prediction, t: Scales, s: Scales, generator: Generators | None
    ) -> Tensor:
        """`report_step`; `sigma` must not be a list here."""
        x = prediction.x
        if s.sigma == 0:
            return expand_like(s.alpha, x) * x
        assert not isinstance(self.sigma, tuple)
        if self.sigma is None:
            c = ddim_noise_scale(t, s, 1.0 if self.eta is None else self.eta)
        else:
            c = torch.tensor(self.sigma, dtype=torch.float64)
        _, fresh = thinning_shapes(self.noise, t, s)
        noise = standardised_gamma(x.shape, fresh, generator, x)
        return report_step(prediction, noise, c, t, s)

    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Yield the state after each step."""
        if not isinstance(self.sigma, tuple):
            yield from super().steps(denoiser, z, levels, generator)
            return
        noisy = int((denoiser.schedule(levels[1:]).sigma > 0).sum())
        if len(self.sigma) != noisy:
            raise ValueError(
                f"sigma must have {noisy} values, one for each step to a level with noise, got "
                f"{len(self.sigma)}: change num_steps, or give a single number"
            )
        for pair, sigma in zip_longest(levels.unfold(0, 2, 1), self.sigma):
            for state in replace(self, sigma=sigma).steps(denoiser, z, pair, generator):
                z = state.z
                yield state


@dataclass(frozen=True)
class GammaExact(GammaSampler):
    """Ancestral sampling of Gamma diffusion: each step keeps a random share of the noise.

    It samples the posterior of the forward process, as `Ancestral` does for Gaussian noise, which
    is its limit as theta_0 tends to 0. With the true x the marginals are exact.

    Args:
        theta_0: Scale of the noise, that of the model's `GammaNoise`.

    Raises:
        ValueError: If `theta_0` is not positive.
    """

    def step(
        self, prediction: Prediction, t: Scales, s: Scales, generator: Generators | None
    ) -> Tensor:
        """`thinning_step`."""
        kept, removed = thinning_shapes(self.noise, t, s)
        shape = prediction.x.shape
        beta = standardised_beta(shape, kept, removed, generator, prediction.x)
        return thinning_step(prediction, beta, self.noise, t, s)


@dataclass(frozen=True)
class GammaQuantile(GammaSampler):
    """Deterministic sampling of Gamma diffusion: each step keeps the quantiles of the noise.

    The analogue of DDIM with `eta = 0`, which is its limit as theta_0 tends to 0; it encodes and
    interpolates. With the true x the marginals are exact.

    Args:
        theta_0: Scale of the noise, that of the model's `GammaNoise`.

    Raises:
        ValueError: If `theta_0` is not positive.
    """

    encodes = True

    def step(
        self, prediction: Prediction, t: Scales, s: Scales, generator: Generators | None
    ) -> Tensor:
        """`Noise.step`; the levels may rise (encoding)."""
        return self.noise.step(prediction, t, s)


def default_sampler(noise: Noise) -> Sampler:
    """The deterministic sampler for a law of noise, which encodes and can be distilled.

    Raises:
        ValueError: If there is none.
    """
    if noise.is_gaussian:
        return DDIM()
    if isinstance(noise, GammaNoise):
        return GammaQuantile(noise.theta_0)
    raise ValueError(f"sampler must be given for {noise}, got None: it has no default sampler")
