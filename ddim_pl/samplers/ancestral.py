"""Ancestral sampling ([DDPM])."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ddim_pl.checks import check_one_of
from ddim_pl.denoiser import Denoiser
from ddim_pl.rng import Generators, randn
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.scales import expand_like
from ddim_pl.transitions import Variance, posterior


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Ancestral sampling with a fixed variance ([DDPM], algorithm 2).

    No noise is added in the step to level 0.

    Args:
        variance: "small" is the variance of the posterior, "large" that of the forward transition,
            sigma-hat in [DDIM], which needs many steps.

    Raises:
        ValueError: If `variance` is unknown.
    """

    variance: Variance = "small"

    def __post_init__(self) -> None:
        check_one_of(Variance, variance=self.variance)

    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Yield the state after each step."""
        for t, s in pairwise(levels):
            prediction = denoiser(z, t)
            z, std = posterior(
                z,
                prediction.x,
                denoiser.schedule(t),
                denoiser.schedule.step_end(s),
                variance=self.variance,
            )
            if s > 0:
                z = z + expand_like(std, z) * randn(z.shape, generator, z)
            yield State(s, z, prediction.x)
