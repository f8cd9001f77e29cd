"""The whole chain at once: DDIM as a fixed point (Pokle et al. 2022, "DEQ-DDIM").

A deterministic chain of S steps is one equation for all its states together, `z = h(z; z_T)`: from
estimates at all states, `ddim_chain` gives all states anew. Applying `h` is one evaluation of the
network on (samples x levels) and one cumulative sum, a *sweep*. Since each state depends on
earlier ones only, S sweeps are exact; far fewer come within a tolerance.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.fixed_point import Anderson, Solver
from ddim_pl.rng import Generators
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.samplers.parallel import (
    Estimates,
    check_max_batch,
    free_memory,
    same_everywhere,
)
from ddim_pl.transitions import ddim_chain, implied_x


class Chain(NamedTuple):
    """A chain of S steps that was solved at once.

    Attributes:
        states: At all levels but the first, `(B, S, ...)`.
        residuals: Relative residual of every sweep, `(sweeps, B)` float64; NaN where a sample had
            converged before.
        sweeps: Sweeps that each sample took, `(B,)`.
        converged: Whether a sample's residual fell to the tolerance, `(B,)`.
        evaluations: Evaluations of the network for each sample, `(B,)`.
    """

    states: Tensor
    residuals: Tensor
    sweeps: Tensor
    converged: Tensor
    evaluations: Tensor


@dataclass(frozen=True)
class DEQ(Sampler):
    """Deterministic DDIM, all S steps solved at once (Pokle et al. 2022, section 4).

    Draws what `DDIM()` draws from the same latents, to the solver's tolerance; clipped estimates
    are no obstacle to this form of the chain. A sample that does not converge is returned as it
    was when its residual was least, with a warning. There is no stochastic form: eta is 0.

    Args:
        solver: How the equation is solved, see `ddim_pl.fixed_point`.
        first_guess: Steps of a sequential DDIM that makes the first guess; 0 takes the straight
            line of the first estimate.
        max_batch: Most states in one evaluation of the network; None evaluates all (samples x
            levels) together. Fewer take less memory, and draw the same.
        split_levels: Share the states out over all processes, each of which must draw the same
            latents, with one exchange in each sweep; without it every process works for itself.

    Raises:
        ValueError: If an argument is out of range.
    """

    solver: Solver = field(default_factory=lambda: Anderson(max_sweeps=30))
    first_guess: int = 0
    max_batch: int | None = None
    split_levels: bool = False

    def __post_init__(self) -> None:
        check_max_batch(self.max_batch)
        if self.first_guess < 0:
            raise ValueError(f"first_guess must not be negative, got {self.first_guess}")

    @property
    def is_deterministic(self) -> bool:
        """It is, though it takes falling levels only."""
        return True

    def num_evaluations(self, levels: Tensor) -> int:
        """The most evaluations it can take; `solve` tells how many it took."""
        steps = len(levels) - 1
        return min(max(1, self.first_guess), steps) + (steps - 1) * self.solver.max_sweeps

    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Solve the chain, then yield its states, without gradients: see `ddim_pl.inversion`."""
        chain = self.solve(denoiser, z, levels)
        if not chain.converged.all():
            least = chain.residuals.nan_to_num(nan=torch.inf).min(0).values[~chain.converged]
            warnings.warn(
                f"{len(least)} of {len(z)} samples did not converge in {self.solver.max_sweeps} "
                f"sweeps: relative residual {least.max():.2g} at the most, tolerance "
                f"{self.solver.tolerance:g}; raise max_sweeps or the tolerance",
                stacklevel=2,
            )
        schedule = denoiser.schedule
        for k, s in enumerate(levels[1:]):
            state = chain.states[:, k]
            yield State(s, state, implied_x(z, state, schedule(levels[k]), schedule(s)))
            z = state

    @torch.no_grad()
    def solve(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, *, start: Tensor | None = None
    ) -> Chain:
        """Solve the chain.

        Args:
            denoiser: Estimates of the clean image and the noise.
            z: Start states at level `levels[0]`, `(B, ...)`.
            levels: Falling levels, `(S + 1,)`.
            start: First guess of the states, `(B, S, ...)`; by default that of `first_guess`.

        Raises:
            ValueError: If the chain's states do not fit into memory.
        """
        steps = len(levels) - 1
        estimates = self.estimates(denoiser)
        problem = self._memory_problem(z, steps)
        if estimates.split:
            same_everywhere(z, levels, denoiser.label, problem)
        elif problem is not None:
            raise ValueError(problem)
        scales = denoiser.schedule(levels)
        evaluations = 1
        first = denoiser(z, levels[0]).x[:, None]
        if estimates.split:  # its last bit may differ from device to device
            first = first.contiguous()
            torch.distributed.broadcast(first, 0)
        if start is None:
            guess, used = self._guess(denoiser, z, levels, first)
            start, evaluations = ddim_chain(z, guess, scales), used

        def sweep(states: Tensor) -> Tensor:
            if steps == 1:
                return ddim_chain(z, first, scales)
            rest = estimates.of_chain(states[:, :-1], levels[1:-1])
            return ddim_chain(z, torch.cat([first, rest], 1), scales)

        found = self.solver(sweep, start)
        return Chain(
            found.z,
            found.residuals,
            found.sweeps,
            found.converged,
            evaluations + found.sweeps * (steps - 1),
        )

    def _guess(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, first: Tensor
    ) -> tuple[Tensor, int]:
        """Estimates `(B, S, ...)` of few steps, each held until the next; and their number."""
        steps = len(levels) - 1
        knots = torch.linspace(0, steps, min(max(self.first_guess, 1), steps) + 1).round().long()
        x, held = first[:, 0], []
        for i, (j, k) in enumerate(knots.unfold(0, 2, 1).tolist()):
            if i:
                x = denoiser(z, levels[j]).x
            held.append(x[:, None].expand(-1, k - j, *x.shape[1:]))
            pair = denoiser.schedule(levels[[j, k]])
            z = ddim_chain(z, x[:, None], pair)[:, 0]
        return torch.cat(held, 1), len(held)

    def estimates(self, denoiser: Denoiser) -> Estimates:
        """How this sampler evaluates a denoiser on many states."""
        return Estimates(denoiser, max_batch=self.max_batch, split=self.split_levels)

    def _memory_problem(self, z: Tensor, steps: int) -> str | None:
        """Why iterates, residuals and their like have no room, if they have none."""
        memory = getattr(self.solver, "memory", 1)
        needed = (2 * memory + 6) * steps * z.numel() * z.element_size()
        free = free_memory(z.device)
        if needed <= free:
            return None
        fits = int(len(z) * free / needed)
        return (
            f"the states of a chain of {steps} steps for {len(z)} samples need "
            f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free: "
            + (f"draw at most {fits} samples at once, or use" if fits else "use")
            + " ParaDiGMS, whose window is shorter than the chain"
        )
