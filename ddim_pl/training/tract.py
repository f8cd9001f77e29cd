"""TRACT, transitive closure time-distillation ([TRACT]).

A phase distils a teacher of n0 steps into a student of n1, which divides n0. Levels are those of
the teacher, `t = j T / n0` with j uniform in 1..n0; s is the student's level at or below `t - T /
n0`, the end of t's group. The teacher steps `t -> t' = t - T / n0`, and from there the student
itself, by a short average of its weights, steps to s in one: so that what is learnt near s carries
to the levels above, in one phase from 1024 steps to 32. The target is the x for which one step
from t leads where these two do, and where `t' = s` the teacher's own.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ddim_pl.checks import check_at_least
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.scales import expand_like
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.training.base import DiffusionModule
from ddim_pl.training.distillation import copy_weights
from ddim_pl.training.ema import Decay, ExponentialAverage
from ddim_pl.training.ladder import Ladder, Round

KEPT = 1e-3
"""What the average still holds, at a phase's end, of the weights at its beginning."""


class TRACT(Ladder):
    """Distil a teacher of many steps into one of few in one or two phases.

    A phase is a round of the ladder. Student, optimiser and averages go on from one phase to the
    next, and the rate is constant after the warm-up, as in the authors' code; they have Adam with
    rate 2e-4, gradients clipped to norm 1, and no dropout. Phases of some thousand updates gain by
    a rate that falls.

    Args:
        network: By default a copy of the teacher's; given when this module is loaded.
        schedule: By default the teacher's.
        rounds: The phases, `(student steps, updates)` each: [[32, U], [1, U]] in the paper.
        teacher_num_steps: Steps of the first teacher, a multiple of the first student's; 1024 in
            the paper.
        self_decay: Decay of the student's average that takes the second step, in [0, 1).
        linear_decay: Let the rate fall linearly to 0 in each phase.
        clip_teacher: Clip the estimates of both steps to [-1, 1].
        ema_decay: Decay of the average that is evaluated and becomes the next teacher; by default
            `0.001^(1 / updates)` of each phase.
        **kwargs: Arguments of `Ladder`.

    Raises:
        ValueError: If the numbers of steps do not divide each other, or as in `Ladder`.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        schedule: NoiseSchedule | None = None,
        *,
        rounds: list[tuple[int, int]],
        teacher_num_steps: int = 1024,
        self_decay: float = 0.5,
        linear_decay: bool = False,
        clip_teacher: bool = True,
        ema_decay: float | Decay | None = None,
        **kwargs: Any,
    ) -> None:
        check_at_least(1, teacher_num_steps=teacher_num_steps)
        if not 0 <= self_decay < 1:
            raise ValueError(f"self_decay must lie in [0, 1), got {self_decay}: 0.5 is usual")
        self.teacher_num_steps, self.given_ema_decay = teacher_num_steps, ema_decay
        self.linear_decay = linear_decay
        super().__init__(
            network,
            schedule,
            rounds=rounds,
            clip_teacher=clip_teacher,
            ema_decay=0.0 if ema_decay is None else ema_decay,
            **kwargs,
        )
        self.self_teacher = ExponentialAverage(self.teacher, self_decay)
        self._set_decay()

    @property
    def networks(self) -> list[nn.Module]:
        """The student's networks, its teacher's, and its short average."""
        found = super().networks
        return [*found, *([self.self_teacher.module] if hasattr(self, "self_teacher") else [])]

    # ---- the phases ---------------------------------------------------------------------------

    @property
    def teacher_steps(self) -> int:
        """Steps of the first teacher."""
        return self.teacher_num_steps

    @property
    def fine_steps(self) -> int:
        """Steps of the teacher of the present phase."""
        index = self.round_index
        return self.teacher_steps if index < 1 else self.rounds[index - 1].steps

    def check_rounds(self, rounds: Sequence[Round]) -> None:
        """Check that the steps of each student divide those of its teacher."""
        steps = [self.teacher_num_steps, *(each.steps for each in rounds)]
        for before, after in pairwise(steps):
            if before % after or before == after:
                raise ValueError(
                    f"rounds must each have a divisor of the steps before, which are {before}, "
                    f"got {after}; the first teacher has teacher_num_steps"
                )

    def load_weights_from(self, teacher: DiffusionModule) -> None:
        """Begin with a teacher's weights, in all networks."""
        super().load_weights_from(teacher)
        copy_weights(teacher.average.module, self.self_teacher.module)
        self.self_teacher.restart()
        self._set_decay()

    def promote(self) -> None:
        """Make the averaged student the teacher of the next phase; the student goes on."""
        copy_weights(self.average.module, self.teacher)
        self.round_index += 1
        self._set_decay()

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Continue in that phase."""
        super().set_extra_state(state)
        self._set_decay()

    def _set_decay(self) -> None:
        if self.given_ema_decay is None:
            self.average.decay = KEPT ** (1 / self.round_updates)

    def settings_of_origin(self) -> dict[str, Any]:
        """The phases up to the present one, and the first teacher's steps."""
        return {"teacher_num_steps": self.teacher_num_steps, **super().settings_of_origin()}

    # ---- what the method is -------------------------------------------------------------------

    def draw_levels(self, count: int, generator: torch.Generator) -> Tensor:
        """The teacher's levels, each equally likely."""
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        return ((u * self.fine_steps).floor() + 1) * self.schedule.num_levels / self.fine_steps

    def target_of(self, teacher: NetworkDenoiser, z: Tensor, t: Tensor) -> Tensor:
        """The x with which one step to the end of the group equals the teacher's and its own."""
        most, fine, coarse = self.schedule.num_levels, self.fine_steps, self.student_steps
        j = (t * fine / most).round()
        group = (j / (fine // coarse)).ceil() - 1
        end = group * most / coarse
        is_last = j - 1 == group * (fine // coarse)
        # Where the group ends with this step there is no second one; any level will do.
        middle = torch.where(is_last, (j - 0.5) * most / fine, (j - 1) * most / fine)
        first = teacher(z, t)
        own = self.self_denoiser.as_told(teacher)
        joined = self.noise.two_step_target(first, own, z, t, middle, end)
        return torch.where(expand_like(is_last.double(), joined) > 0, first.x, joined)

    @property
    def self_denoiser(self) -> NetworkDenoiser:
        """The student by its short average."""
        return replace(self._denoiser(self.self_teacher.module), clip=self.clip_teacher)

    # ---- Lightning ----------------------------------------------------------------------------

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the weights, then their averages."""
        super().optimizer_step(*args, **kwargs)
        if self._update_is_good:
            self.self_teacher.update_parameters(self.network)

    def rate_at(self, update: int) -> float:
        """Factor of the learning rate, which grows in the warm-up, of the first phase alone."""
        warm = min(1.0, (update + 1) / (self.round_warmup + 1))
        return warm * self.share_left(update) if self.linear_decay else warm
