"""Levels that suit a model: the cheapest way from T to 0 over measured one-step errors.

Follow a fine deterministic trajectory `z_0, z_1, ..., z_N` of the model. A DDIM step from its
state `i` straight to level `j` misses `z_j` by `cost(i, j) = E ||ddim(z_i; i -> j) - z_j||`, which
takes one network evaluation for each `i`, whatever the number of `j`. The levels of S steps are
those whose costs have the least sum, found by dynamic programming (Chen et al. 2024, "On the
trajectory regularity of ODE-based diffusion sampling", section 4; Watson et al. 2021 have the same
search over terms of the variational bound).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddim_pl.denoiser import Denoise
from ddim_pl.prediction import Prediction
from ddim_pl.samplers import DDIM
from ddim_pl.schedules import DiscreteSchedule, NoiseSchedule
from ddim_pl.transitions import ddim_step


def candidate_levels(schedule: NoiseSchedule, count: int = 200) -> Tensor:
    """Levels to choose from: about `count`, evenly spaced in the root of the level, and 0.

    They are the trained ones of a discrete schedule, and at least 1 for a continuous one.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    root = torch.linspace(schedule.num_levels**0.5, 1, count, dtype=torch.float64)
    levels = root**2
    levels[0] = schedule.num_levels
    if isinstance(schedule, DiscreteSchedule):
        levels = levels.round()
    levels = levels.unique().flip(0)
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def one_step_costs(
    denoiser: Denoise, z: Tensor, levels: Tensor, *, progress: bool = False
) -> Tensor:
    """Root mean square errors of single DDIM steps along a fine trajectory.

    Args:
        denoiser: The model.
        z: Start states at `levels[0]`, `(B, ...)`.
        levels: Fine levels `(N + 1,)`, decreasing.
        progress: Show a progress bar.

    Returns:
        Float64 costs `(N + 1, N + 1)`: entry `(i, j)` is the error of the step from level i to
        level `j > i`, over the standard deviation of the states there, which is what the error
        counts for in the image; infinite for `j <= i`.
    """
    schedule = denoiser.schedule
    walk = DDIM().trajectory(denoiser, z, levels, progress=progress)
    states = torch.stack([z, *(state.z for state in walk)])
    costs = torch.full((len(levels), len(levels)), torch.inf, dtype=torch.float64)
    spread = states.flatten(1).std(1)
    for i in range(len(levels) - 1):
        x, eps = denoiser(states[i], levels[i])
        s = schedule(levels[i + 1 :])  # to all later levels at once
        miss = ddim_step(Prediction(x[None], eps[None]), schedule(levels[i]), s) - states[i + 1 :]
        costs[i, i + 1 :] = miss.square().flatten(1).mean(1).sqrt() / spread[i + 1 :]
    return costs


def cheapest_levels(costs: Tensor, levels: Tensor, num_steps: int) -> Tensor:
    """The levels `(S + 1,)` from first to last whose steps have the least sum of costs.

    Args:
        costs: Costs of the steps, `(N + 1, N + 1)`, see `one_step_costs`.
        levels: Levels to choose from, `(N + 1,)`.
        num_steps: S, from 1 to N.

    Raises:
        ValueError: If there are fewer than `num_steps` steps to choose from.
    """
    last = len(levels) - 1
    if not 1 <= num_steps <= last:
        raise ValueError(
            f"num_steps must lie in [1, {last}], the candidate levels less one, got {num_steps}"
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


def adaptive_levels(
    denoiser: Denoise, z: Tensor, num_steps: Sequence[int], *, progress: bool = False
) -> list[Tensor]:
    """Levels for each number of steps, from one measurement on start states `z` `(B, ...)`."""
    levels = candidate_levels(denoiser.schedule)
    costs = one_step_costs(denoiser, z, levels, progress=progress)
    return [cheapest_levels(costs, levels, each) for each in num_steps]
