"""ParaDiGMS: DDIM solved on a sliding window of the chain ([ParaDiGMS])."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim_pl.checks import check_at_least
from ddim_pl.denoiser import Denoiser
from ddim_pl.rng import Generators
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.samplers.parallel import Estimates, same_everywhere, trajectory_of
from ddim_pl.scales import unsqueeze_like
from ddim_pl.transitions import ddim_chain


@dataclass(frozen=True)
class ParaDiGMS(Sampler):
    """Deterministic DDIM by Picard iteration on a window that slides along the chain.

    Each sweep evaluates the window's states together. The window then moves past the leading
    states that have settled, at least one; each sample has its own window. The images are those of
    `DDIM()` to the tolerance, with fewer evaluations at once than `DEQ` and without the memory of
    its solver.

    Args:
        window: Steps in the window; 1 is plain DDIM.
        tolerance: Relative change of a state in a sweep below which it has settled.
        max_batch: Maximum number of states in one network evaluation; by default all of a sweep.
        split_levels: As in `DEQ`.

    Raises:
        ValueError: If an argument is out of range.
    """

    window: int = 20
    tolerance: float = 1e-3
    max_batch: int | None = None
    split_levels: bool = False
    is_deterministic = True  # though it cannot encode

    def __post_init__(self) -> None:
        check_at_least(1, window=self.window, max_batch=self.max_batch)
        check_at_least(0, tolerance=self.tolerance)

    def num_evaluations(self, levels: Tensor) -> int:
        """The maximum; `solve` returns the number for each sample."""
        steps, window = len(levels) - 1, min(self.window, len(levels) - 1)
        return 1 + (steps - window) * window + window * (window + 1) // 2

    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Solve the chain, then yield its states, without gradients."""
        states, _, _ = self.solve(denoiser, z, levels)
        yield from trajectory_of(denoiser, z, states, levels)

    @torch.no_grad()
    def solve(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Solve the chain.

        Args:
            denoiser: Estimates of the clean image and the noise.
            z: Start states at level `levels[0]`, `(B, ...)`.
            levels: Falling levels, `(S + 1,)`.

        Returns:
            States at all levels but the first, `(B, S, ...)`; and for each sample the number of
            sweeps, `(B,)`, and of network evaluations, `(B,)`.
        """
        steps, batch = len(levels) - 1, len(z)
        window = min(self.window, steps)
        states = torch.empty(batch, steps, *z.shape[1:], dtype=z.dtype, device=z.device)
        at = torch.zeros(batch, dtype=torch.int64)  # where each window begins
        sweeps, evaluations = torch.zeros_like(at), torch.ones_like(at)
        offsets = torch.arange(window + 1)
        estimates = Estimates(denoiser, max_batch=self.max_batch, split=self.split_levels)
        if estimates.split:
            same_everywhere(z, levels, denoiser.label, None)
        # Estimates of the window's states, (B, W, ...): at first all the same, a straight line.
        first = estimates.first(z, levels)
        x = first.expand(-1, window, *first.shape[2:])
        while (at < steps).any():
            place = at[:, None] + offsets
            inside = place[:, :-1] < steps
            x, found, change = _sweep(estimates, z, x, levels, place)
            settled = change <= self.tolerance
            settled[:, 0] = True  # its start state is exact
            moved = (settled & inside).cumprod(1).sum(1)
            sweeps += moved > 0
            evaluations += inside.sum(1)
            sample, column = torch.where((offsets[:-1] < moved[:, None]) & inside)
            states[sample, place[sample, column]] = found[sample, column]
            at = at + moved
            z, x = _slide(z, x, found, moved)
        return states, sweeps, evaluations


def _sweep(
    estimates: Estimates, z: Tensor, x: Tensor, levels: Tensor, place: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """New estimates and states of the windows, `(B, W, ...)`, and the states' relative changes.

    These, `||after - before|| / ||after||`, are `(B, W)` on the CPU.

    Args:
        estimates: Estimates of the clean image.
        z: Start states of the windows, `(B, ...)`.
        x: Estimates of the clean image that the windows' states follow from, `(B, W, ...)`.
        levels: Falling levels, `(S + 1,)`.
        place: Indices of the windows' levels, `(B, W + 1)`. Beyond the end they stand for the last
            level, where a step changes nothing.
    """
    steps = len(levels) - 1
    scales = estimates.denoiser.schedule.step_end(levels[place.clamp(max=steps)])
    guess = ddim_chain(z, x, scales)
    inputs = torch.cat([z[:, None], guess[:, :-1]], 1)
    sample, column = torch.where(place[:, :-1] < steps)
    x = x.clone()
    x[sample, column] = estimates(inputs[sample, column], levels[place[sample, column]], sample)
    found = ddim_chain(z, x, scales)
    change, size = (each.flatten(2).norm(dim=2) for each in (found - guess, found))
    return x, found, (change / size.clamp(min=1e-30)).cpu()


def _slide(z: Tensor, x: Tensor, found: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Start states and estimates after each window moves on by `moved` states, `(B,)`."""
    rows, window = torch.arange(len(z)), x.shape[1]
    # States that are new in the window get the estimate of the last one.
    ahead = (torch.arange(window) + moved[:, None]).clamp(max=window - 1)
    z = torch.where(unsqueeze_like(moved > 0, z), found[rows, (moved - 1).clamp(min=0)], z)
    return z, x[rows[:, None], ahead]
