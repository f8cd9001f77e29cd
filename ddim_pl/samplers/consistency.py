"""Sampling of consistency models ([CM])."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.rng import Generators, randn
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.transitions import q_sample


@dataclass(frozen=True)
class Consistency(Sampler):
    """Estimate the image, add fresh noise down to the next level, and estimate again.

    [CM], algorithm 1. Nothing of the noise before is kept, so that a step is as good as the
    denoiser's single estimate: it is made for `ddim_pl.training.ConsistencyModel`, and for no
    teacher. The levels may be any; those that a student learned for are its own.

    No noise is added in the step to level 0.
    """

    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Yield the state after each step."""
        for t, s in pairwise(levels):
            z = x = denoiser(z, t).x
            if s > 0:
                z = q_sample(x, randn(x.shape, generator, x), denoiser.schedule(s))
            yield State(s, z, x)
