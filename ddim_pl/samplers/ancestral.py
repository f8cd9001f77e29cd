"""Ancestral sampling (Ho et al. 2020)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.rng import Generators, randn
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.scales import expand_like
from ddim_pl.transitions import Variance, posterior


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Ancestral sampling with a fixed variance (Ho et al. 2020, algorithm 2).

    No noise is added in the step to level 0.

    Args:
        variance: "small" is the variance of the posterior, "large" that of the forward transition,
            which Song et al. 2021 call sigma-hat and which needs many steps.

    Raises:
        ValueError: If `variance` is neither.
    """

    variance: Variance = "small"

    def __post_init__(self) -> None:
        if self.variance not in get_args(Variance):
            raise ValueError(
                f"variance must be one of {get_args(Variance)}, got {self.variance!r}"
            )

    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Yield the state after each step."""
        for t, s in pairwise(levels):
            prediction = denoiser(z, t)
            z, std = posterior(
                z, prediction.x, denoiser.schedule(t), denoiser.schedule(s), variance=self.variance
            )
            if s > 0:
                z = z + expand_like(std, z) * randn(z.shape, generator, z)
            yield State(s, z, prediction.x)
