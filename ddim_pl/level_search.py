"""Levels adapted to a model: those of least total one-step error.

Let `z_0, z_1, ..., z_N` be a fine deterministic trajectory of the model. A DDIM step from state
`i` directly to level `j` has the error `cost(i, j) = E ||ddim(z_i; i -> j) - z_j||`, which takes
one network evaluation for each `i` and all `j`. The levels of S steps are those of the least sum
of costs, found by dynamic programming ([GITS], section 4; [Watson] has the same search over terms
of the variational bound).
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from ddim_pl.checks import check_at_least
from ddim_pl.denoiser import Denoiser
from ddim_pl.prediction import Prediction
from ddim_pl.samplers import DDIM
from ddim_pl.schedules import DiscreteSchedule, NoiseSchedule
from ddim_pl.transitions import ddim_step


def candidate_levels(schedule: NoiseSchedule, count: int = 200) -> Tensor:
    """Candidate levels: about `count`, evenly spaced in the root of the level, and 0.

    They are integers for a discrete schedule, and all but the last are at least 1.
    """
    check_at_least(1, count=count)
    levels = torch.linspace(schedule.num_levels**0.5, 1, count, dtype=torch.float64) ** 2
    levels[0] = schedule.num_levels
    if isinstance(schedule, DiscreteSchedule):
        levels = levels.round()
    levels = levels.unique().flip(0)
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


class StepErrors(NamedTuple):
    """Errors of single DDIM steps along fine trajectories: float64 sums, on the CPU.

    Those of several batches or devices are added field by field.

    Attributes:
        misses: Squared errors of the steps from level i to level j, `(N + 1, N + 1)`.
        squares: Squares of the states at each level, `(N + 1,)`.
        sums: The states at each level, `(N + 1,)`.
        size: Number of values in the states of a level, `()`.
    """

    misses: Tensor
    squares: Tensor
    sums: Tensor
    size: Tensor

    @classmethod
    def none(cls, num_levels: int) -> Self:
        """Errors of no images, for `num_levels` levels."""
        shapes = ((num_levels, num_levels), (num_levels,), (num_levels,), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def costs(self) -> Tensor:
        """Root mean square errors of the steps, `(N + 1, N + 1)`.

        Entry `(i, j)` is the error of the step from level i to level `j > i`, over the standard
        deviation of the states there; infinite for `j <= i`.
        """
        variance = (self.squares - self.sums**2 / self.size) / (self.size - 1)
        # Constant images have variance 0, up to rounding.
        costs = (self.misses / self.size / variance.clamp(min=1e-12)).sqrt()
        later = torch.ones_like(costs, dtype=torch.bool).triu(1)
        return costs.where(later, torch.inf)


@torch.no_grad()
def one_step_errors(
    denoiser: Denoiser, z: Tensor, levels: Tensor, *, progress: bool = False
) -> StepErrors:
    """Errors of single DDIM steps between any two states of fine trajectories.

    Memory is a few times that of all states: pass many or large images in batches.

    Args:
        denoiser: The model.
        z: Start states at `levels[0]`, `(B, ...)`.
        levels: Fine levels `(N + 1,)`, decreasing.
        progress: Show a progress bar.
    """
    schedule = denoiser.schedule
    trajectory = DDIM().trajectory(denoiser, z, levels, progress=progress)
    states = torch.stack([z, *(state.z for state in trajectory)])
    misses = torch.zeros(len(levels), len(levels), dtype=torch.float64)
    for i in range(len(levels) - 1):
        x, eps = denoiser(states[i], levels[i])
        s = schedule.step_end(levels[i + 1 :])  # to all later levels at once
        miss = ddim_step(Prediction(x[None], eps[None]), schedule(levels[i]), s) - states[i + 1 :]
        misses[i, i + 1 :] = _sum(miss.square())
    size = torch.tensor(z.numel(), dtype=torch.float64)
    return StepErrors(misses, _sum(states.square()), _sum(states), size)


def cheapest_levels(costs: Tensor, levels: Tensor, num_steps: int) -> Tensor:
    """The levels `(S + 1,)` from first to last of the least sum of costs.

    Args:
        costs: Costs of the steps, `(N + 1, N + 1)`, see `StepErrors`.
        levels: Candidate levels, `(N + 1,)`.
        num_steps: S, from 1 to N.

    Raises:
        ValueError: If there are too few candidates.
    """
    last = len(levels) - 1
    if not 1 <= num_steps <= last:
        raise ValueError(
            f"num_steps must lie in [1, {last}], the number of candidate steps, got {num_steps}"
        )
    best = torch.full((last + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    origins = []
    for _ in range(num_steps):
        best, origin = (best[:, None] + costs).min(0)
        origins.append(origin)
    chosen = [last]
    for origin in reversed(origins):
        chosen.append(int(origin[chosen[-1]]))
    return levels[chosen[::-1]]


def _sum(values: Tensor) -> Tensor:
    """Sum over all but the first axis, float64 on the CPU."""
    return values.flatten(1).sum(1).cpu().double()
