"""DEQ-DDIM: the whole DDIM chain solved as a fixed point ([DEQ]).

A deterministic chain of S steps is one equation for all its states, `z = h(z; z_T)`: from the
estimates at all states, `ddim_chain` computes new states. One application of `h`, a *sweep*, is
one evaluation of the network on (samples x levels) and one cumulative sum. Since each state
depends only on earlier ones, S sweeps are exact; far fewer reach a tolerance.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ddim_pl.checks import check_at_least
from ddim_pl.denoiser import Denoiser
from ddim_pl.fixed_point import Anderson, Solver
from ddim_pl.rng import Generators
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.samplers.parallel import Estimates, free_memory, same_everywhere, trajectory_of
from ddim_pl.transitions import ddim_chain


class Chain(NamedTuple):
    """A solved chain of S steps.

    Attributes:
        states: At all levels but the first, `(B, S, ...)`.
        residuals: Relative residual of every sweep, `(sweeps, B)` float64; NaN where a sample had
            converged before.
        sweeps: Number of sweeps for each sample, `(B,)`.
        converged: Whether a sample's residual reached the tolerance, `(B,)`.
        evaluations: Number of network evaluations for each sample, `(B,)`.
    """

    states: Tensor
    residuals: Tensor
    sweeps: Tensor
    converged: Tensor
    evaluations: Tensor


@dataclass(frozen=True)
class DEQ(Sampler):
    """Deterministic DDIM, all S steps solved at once ([DEQ], section 4).

    The images are those of `DDIM()` from the same latents, to the solver's tolerance; this form of
    the chain allows clipped estimates. A sample that does not converge is returned at its least
    residual, with a warning. There is no stochastic form: eta is 0.

    Args:
        solver: Solver of the equation, see `ddim_pl.fixed_point`.
        first_guess: Number of sequential DDIM steps that make the first guess; 0 extends the first
            estimate to all levels.
        max_batch: Maximum number of states in one network evaluation; None evaluates all (samples
            x levels) together. Fewer take less memory and give the same images.
        split_levels: Distribute the states over all processes, which must have the same latents,
            with one exchange in each sweep; otherwise each process works alone.

    Raises:
        ValueError: If an argument is out of range.
    """

    solver: Solver = field(default_factory=lambda: Anderson(max_sweeps=30))
    first_guess: int = 0
    max_batch: int | None = None
    split_levels: bool = False
    is_deterministic = True  # though it cannot encode

    def __post_init__(self) -> None:
        check_at_least(1, max_batch=self.max_batch)
        check_at_least(0, first_guess=self.first_guess)

    def num_evaluations(self, levels: Tensor) -> int:
        """The maximum; `solve` returns the number for each sample."""
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
                f"sweeps: relative residual up to {least.max():.2g}, tolerance "
                f"{self.solver.tolerance:g}; raise max_sweeps or the tolerance",
                stacklevel=2,
            )
        yield from trajectory_of(denoiser, z, chain.states, levels)

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
            ValueError: If the states do not fit into memory.
        """
        steps = len(levels) - 1
        estimates = self.estimates(denoiser)
        problem = self._memory_problem(z, steps)
        if estimates.split:
            same_everywhere(z, levels, denoiser.label, problem)
        elif problem is not None:
            raise ValueError(problem)
        scales = denoiser.schedule.step_end(levels)
        evaluations = 1
        first = estimates.first(z, levels)
        if start is None:
            guess, used = self._guess(denoiser, z, levels, first)
            start, evaluations = ddim_chain(z, guess, scales), used

        def sweep(states: Tensor) -> Tensor:
            if steps == 1:
                return ddim_chain(z, first, scales)
            rest = estimates.of_chain(states[:, :-1], levels[1:-1])
            return ddim_chain(z, torch.cat([first, rest], 1), scales)

        found = self.solver(sweep, start)
        return Chain(*found, evaluations + found.sweeps * (steps - 1))

    def _guess(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, first: Tensor
    ) -> tuple[Tensor, int]:
        """Estimates `(B, S, ...)` of a few steps, each held until the next; and their number."""
        steps = len(levels) - 1
        knots = torch.linspace(0, steps, min(max(self.first_guess, 1), steps) + 1).round().long()
        x, held = first[:, 0], []
        for i, (j, k) in enumerate(knots.unfold(0, 2, 1).tolist()):
            if i:
                x = denoiser(z, levels[j]).x
            held.append(x[:, None].expand(-1, k - j, *x.shape[1:]))
            pair = denoiser.schedule.step_end(levels[[j, k]])
            z = ddim_chain(z, x[:, None], pair)[:, 0]
        return torch.cat(held, 1), len(held)

    def estimates(self, denoiser: Denoiser) -> Estimates:
        """How this sampler evaluates a denoiser on many states."""
        return Estimates(denoiser, max_batch=self.max_batch, split=self.split_levels)

    def _memory_problem(self, z: Tensor, steps: int) -> str | None:
        """An error message if the iterates and residuals do not fit into memory, else None."""
        memory = getattr(self.solver, "memory", 1)
        needed = (2 * memory + 6) * steps * z.numel() * z.element_size()
        free = free_memory(z.device)
        if needed <= free:
            return None
        fits = int(len(z) * free / needed)
        return (
            f"the states of a chain of {steps} steps for {len(z)} samples need "
            f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free: "
            + (f"give at most {fits} samples at once, or use" if fits else "use")
            + " ParaDiGMS, whose window is shorter than the chain"
        )
