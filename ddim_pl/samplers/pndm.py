"""Pseudo numerical methods ([PNDM])."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ddim_pl.checks import check_one_of
from ddim_pl.denoiser import Denoiser
from ddim_pl.prediction import Prediction
from ddim_pl.rng import Generators
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.samplers.heun import trapezoid
from ddim_pl.transitions import ode_step

Warmup = Literal["prk", "plms"]

# Adams-Bashforth weights of 1 to 4 estimates, newest first.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True)
class PNDM(Sampler):
    """A linear multistep estimate of the noise, then a DDIM step along it ([PNDM], algorithm 2).

    A step uses `(55 eps_0 - 59 eps_1 + 37 eps_2 - 9 eps_3) / 24` of the estimates at the last four
    levels (eq. 12). These weights assume levels that are evenly spaced, or a smooth function of
    the step's index. The method is of second order, as the DDIM step assumes constant noise. One
    network evaluation per step, except for the first steps, which have no history:

    - "prk": the first three steps are pseudo Runge-Kutta steps of four evaluations each (eq. 13),
      with midpoint levels, as in the paper: S + 9 evaluations in total.
    - "plms": the first step is a Heun step of two evaluations, the next two are multistep of lower
      order, as in [LDM] and diffusers' `skip_prk_steps`: S + 1 in total.

    The step to level 0 is always multistep with the available history, since the network is not
    trained on clean data: a single step is DDIM. With two to four uneven steps, or a long first
    step from almost pure noise (see `Heun`), DDIM is more stable.

    Args:
        warmup: Kind of the first steps.

    Raises:
        ValueError: If `warmup` is unknown.
    """

    warmup: Warmup = "plms"
    encodes = True
    divides_by_signal = True

    def __post_init__(self) -> None:
        check_one_of(Warmup, warmup=self.warmup)

    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Yield the state after each step; the levels may rise (encoding)."""
        warm = runge_kutta if self.warmup == "prk" else trapezoid
        history: list[Tensor] = []  # newest first
        for i, (t, s) in enumerate(pairwise(levels)):
            prediction = denoiser(z, t)
            history = [prediction.eps, *history[:3]]
            if i < self._num_warm(levels):
                eps = warm(denoiser, prediction, t, s)
            else:
                terms = zip(ADAMS_BASHFORTH[len(history) - 1], history, strict=True)
                eps = sum((w * e for w, e in terms), torch.zeros_like(z))
            z = ode_step(prediction, eps, denoiser.schedule(t), denoiser.schedule.step_end(s))
            yield State(s, z, prediction.x)

    def num_evaluations(self, levels: Tensor) -> int:
        """One per step, and per warm-up step three more with "prk", one more with "plms"."""
        more = 3 if self.warmup == "prk" else 1
        return len(levels) - 1 + more * self._num_warm(levels)

    def _num_warm(self, levels: Tensor) -> int:
        """Number of warm-up steps, none of them to level 0."""
        return min(3 if self.warmup == "prk" else 1, len(levels) - 1 - int(levels[-1] == 0))


def runge_kutta(denoiser: Denoiser, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
    """Noise `(B, ...)` of a pseudo Runge-Kutta step: `(e1 + 2 e2 + 2 e3 + e4) / 6` (eq. 13).

    Args:
        denoiser: Estimates of the clean image and the noise.
        prediction: Its estimates at level `t`, each `(B, ...)`.
        t: Level of the state.
        s: Level to go to.
    """
    total = eps = prediction.eps
    middle = (t + s) / 2
    for level, weight in ((middle, 2), (middle, 2), (s, 1)):
        z = ode_step(prediction, eps, denoiser.schedule(t), denoiser.schedule(level))
        eps = denoiser(z, level).eps
        total = total + weight * eps
    return total / 6
