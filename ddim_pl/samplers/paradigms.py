"""A window of the chain at once: ParaDiGMS (Shih et al. 2023)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.rng import Generators
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.samplers.parallel import Estimates, check_max_batch, same_everywhere
from ddim_pl.transitions import ddim_chain, implied_x


@dataclass(frozen=True)
class ParaDiGMS(Sampler):
    """Deterministic DDIM by Picard iteration on a window that slides along the chain.

    In each sweep the window's states are evaluated together; then it moves on past the leading
    states that have settled, one at least. The window of each sample moves on its own. Draws what
    `DDIM()` draws, to the tolerance, with fewer evaluations at once than `DEQ` and without the
    memory of its solver.

    Args:
        window: Steps in the window.
        tolerance: Relative change of a state, in a sweep, below which it has settled.
        max_batch: Most states in one evaluation of the network; by default all of a sweep.
        split_levels: As in `DEQ`.

    Raises:
        ValueError: If an argument is out of range.
    """

    window: int = 20
    tolerance: float = 1e-3
    max_batch: int | None = None
    split_levels: bool = False

    def __post_init__(self) -> None:
        check_max_batch(self.max_batch)
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}: 1 is plain DDIM")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {self.tolerance}: 1e-3 is usual")

    @property
    def is_deterministic(self) -> bool:
        """It is, though it takes falling levels only."""
        return True

    def num_evaluations(self, levels: Tensor) -> int:
        """The most evaluations it can take; `solve` tells how many it took."""
        steps, window = len(levels) - 1, min(self.window, len(levels) - 1)
        return 1 + (steps - window) * window + window * (window + 1) // 2

    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Solve the chain, then yield its states, without gradients."""
        states, _, _ = self.solve(denoiser, z, levels)
        schedule = denoiser.schedule
        for k, s in enumerate(levels[1:]):
            state = states[:, k]
            yield State(s, state, implied_x(z, state, schedule(levels[k]), schedule(s)))
            z = state

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
            States at all levels but the first, `(B, S, ...)`; the sweeps that each sample took,
            `(B,)`; and its evaluations of the network, `(B,)`.
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
        # What the states of the window follow from, (B, W, ...): first a straight line.
        first = denoiser(z, levels[0]).x[:, None]
        if estimates.split:  # its last bit may differ from device to device
            first = first.contiguous()
            torch.distributed.broadcast(first, 0)
        x = first.expand(-1, window, *first.shape[2:])
        while (at < steps).any():
            place = at[:, None] + offsets  # beyond the end: the last level, of no effect
            scales = denoiser.schedule(levels[place.clamp(max=steps)])
            inside = place[:, :-1] < steps
            guess = ddim_chain(z, x, scales)
            inputs = torch.cat([z[:, None], guess[:, :-1]], 1)
            sample, column = torch.where(inside)
            x = x.clone()
            x[sample, column] = estimates(
                inputs[sample, column],
                levels[place[sample, column]],
                sample,
            )
            found = ddim_chain(z, x, scales)
            settled = _relative_change(guess, found) <= self.tolerance
            settled[:, 0] = True  # its start is exact
            moved = (settled & inside).cumprod(1).sum(1)
            sweeps += moved > 0
            evaluations += inside.sum(1)
            sample, column = torch.where((offsets[:-1] < moved[:, None]) & inside)
            states[sample, place[sample, column]] = found[sample, column]
            at = at + moved
            ahead = (offsets[:-1] + moved[:, None]).clamp(max=window - 1)
            rows = torch.arange(batch)
            x = x[rows[:, None], ahead]  # the estimate of the last state serves those beyond it
            z = torch.where(
                (moved > 0).to(z.device).reshape(-1, *(1,) * (z.ndim - 1)),
                found[rows, (moved - 1).clamp(min=0)],
                z,
            )
        return states, sweeps, evaluations


def _relative_change(before: Tensor, after: Tensor) -> Tensor:
    """`||after - before|| / ||after||` of each state, `(B, W)` on the CPU."""
    change = (after - before).flatten(2).norm(dim=2)
    return (change / after.flatten(2).norm(dim=2).clamp(min=1e-30)).cpu()
