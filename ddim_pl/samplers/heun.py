"""Heun's method for the probability-flow ODE, and its stochastic form, "churn" ([EDM])."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.prediction import Prediction
from ddim_pl.rng import Generators, randn
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.transitions import ddim_step, forward_step, ode_step


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
    """Second-order Heun steps ([EDM], algorithm 2; algorithm 1 with `s_churn = 0`).

    `y_s = y_t + (r_s - r_t) (eps_t + eps_s) / 2` with `y = z / alpha` and `r = sigma / alpha`,
    where `eps_s` is estimated at the end of a DDIM step. Two network evaluations per step; one for
    the step to level 0, which is DDIM, also for schedules whose level 0 has noise.

    A long first step from almost pure noise, where r is huge, is unstable: at the last level of
    `CosineLogSNRSchedule`, r = 22,000, take many steps of "uniform_log_snr" or start below it.

    With churn, a step from a level with `r` in `[s_tmin, s_tmax]` begins at `(1 + gamma) r`, where
    `gamma = min(s_churn / S, sqrt(2) - 1)` for S steps: noise is added, so that the law of the
    states is kept and errors of the steps before fade. The noise is raised no further than to the
    schedule's last level; EDM's goes beyond, where `s_tmax` lets it.

    Args:
        s_churn: Amount of churn, at least 0. [EDM], table 5, has 30 for CIFAR-10 (with 0.01, 1 and
            1.007 for the others), 40 for ImageNet (0.05, 50, 1.003).
        s_tmin: Least `sigma / alpha` with churn, at least 0.
        s_tmax: Largest `sigma / alpha` with churn, above `s_tmin`.
        s_noise: Standard deviation of the noise that is added, positive; somewhat above 1 against
            networks that remove too much.

    Raises:
        ValueError: If an argument is out of range, or has no effect because `s_churn` is 0 or, in
            a call, `s_tmin` is beyond the schedule.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    divides_by_signal = True

    def __post_init__(self) -> None:
        _check(self)

    def __repr__(self) -> str:
        """Only what is not as by default, so that finished cells and pairs keep their names."""
        shown = [each for each in fields(self) if each.repr]
        given = [each.name for each in shown if getattr(self, each.name) != each.default]
        values = ", ".join(f"{name}={getattr(self, name)}" for name in given)
        return f"{type(self).__name__}({values})"

    @property
    def encodes(self) -> bool:
        """Without churn."""
        return self.s_churn == 0

    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Yield the state after each step; without churn the levels may rise (encoding)."""
        schedule = denoiser.schedule
        self._check_reach(schedule)
        for t, s in pairwise(levels):
            raised = self._raised(schedule, t, len(levels) - 1)
            if raised > t:
                noise = self.s_noise * randn(z.shape, generator, z)
                z = forward_step(z, noise, schedule(t), schedule(raised))
            prediction = denoiser(z, raised)
            eps = trapezoid(denoiser, prediction, raised, s) if s > 0 else prediction.eps
            z = ode_step(prediction, eps, schedule(raised), schedule.step_end(s))
            yield State(s, z, prediction.x)

    def _check_reach(self, schedule: NoiseSchedule) -> None:
        last = schedule(schedule.num_levels)
        most = (last.sigma / last.alpha).item()
        if self.s_churn and self.s_tmin >= most:
            raise ValueError(
                f"s_tmin must be below {most:.4g}, the largest noise of {schedule}, got "
                f"{self.s_tmin}: churn would have no effect"
            )

    def _raised(self, schedule: NoiseSchedule, t: Tensor, num_steps: int) -> Tensor:
        """Level that a step from `t` begins at."""
        if self.s_churn == 0:
            return t
        scales = schedule(t)
        if not self.s_tmin <= scales.sigma / scales.alpha <= self.s_tmax:
            return t
        gamma = min(self.s_churn / num_steps, math.sqrt(2) - 1)
        return torch.maximum(t, schedule.level_at(scales.log_snr - 2 * math.log1p(gamma)))

    def num_evaluations(self, levels: Tensor) -> int:
        """Two per step, and one for the step to level 0."""
        return 2 * (len(levels) - 1) - int(levels[-1] == 0)


def _check(sampler: Heun) -> None:
    if not 0 <= sampler.s_churn < math.inf:
        raise ValueError(
            f"s_churn must be at least 0 and finite, got {sampler.s_churn}: 0 is no churn, and "
            "EDM has 30 to 80"
        )
    for each in fields(Heun):
        value = getattr(sampler, each.name)
        if each.name.startswith("s_") and sampler.s_churn == 0 and value != each.default:
            raise ValueError(
                f"{each.name} must be {each.default} without churn, on which alone it has an "
                f"effect, got {value}: set s_churn, or leave it out"
            )
    if not 0 <= sampler.s_tmin < sampler.s_tmax:
        raise ValueError(
            f"s_tmin and s_tmax must satisfy 0 <= s_tmin < s_tmax, got {sampler.s_tmin} and "
            f"{sampler.s_tmax}: EDM has 0.05 and 50 for ImageNet"
        )
    if not 0 < sampler.s_noise < math.inf:
        raise ValueError(
            f"s_noise must be positive and finite, got {sampler.s_noise}: 1 keeps the law"
        )
