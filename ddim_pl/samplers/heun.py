"""Heun's method for the probability-flow ODE ([EDM])."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.prediction import Prediction
from ddim_pl.rng import Generators
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.transitions import ddim_step, ode_step


def trapezoid(denoiser: Denoiser, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
    """Mean `(B, ...)` of the noise estimates at both ends of a DDIM step.

    Args:
        denoiser: Estimates of the clean image and the noise.
        prediction: Its estimates at level `t`, each `(B, ...)`.
        t: Level of the state.
        s: Level to go to.
    """
    ahead = ddim_step(prediction, denoiser.schedule(t), denoiser.schedule(s))
    return (prediction.eps + denoiser(ahead, s).eps) / 2


@dataclass(frozen=True)
class Heun(Sampler):
    """Second-order Heun steps ([EDM], algorithm 1 with `S_churn = 0`).

    `y_s = y_t + (r_s - r_t) (eps_t + eps_s) / 2` with `y = z / alpha` and `r = sigma / alpha`,
    where `eps_s` is estimated at the end of a DDIM step. Two network evaluations per step; one for
    the step to level 0, which is DDIM, also for schedules whose level 0 has noise.

    A long first step from almost pure noise, where r is huge, is unstable: at the last level of
    `CosineLogSNRSchedule`, r = 22,000, take many steps of "uniform_log_snr" or start below it.
    """

    encodes = True
    divides_by_signal = True

    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Yield the state after each step; the levels may rise (encoding)."""
        for t, s in pairwise(levels):
            prediction = denoiser(z, t)
            eps = trapezoid(denoiser, prediction, t, s) if s > 0 else prediction.eps
            z = ode_step(prediction, eps, denoiser.schedule(t), denoiser.schedule.step_end(s))
            yield State(s, z, prediction.x)

    def num_evaluations(self, levels: Tensor) -> int:
        """Two per step, and one for the step to level 0."""
        return 2 * (len(levels) - 1) - int(levels[-1] == 0)
