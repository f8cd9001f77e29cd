"""Progressive distillation ([PD]).

A student of N steps learns to do in one DDIM step what its teacher does in two. Levels are `t = i
T / N` with `i` uniform in 1..N; the teacher steps `t -> t - T / 2N -> t - T / N`, and the target
is the x for which one step leads to the same state: `ddim_pl.transitions.two_step_target`. Then
the student, by its averaged weights, becomes the teacher of a student with N / 2 steps.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.training.distillation import copy_weights
from ddim_pl.training.ladder import Ladder, Round


class ProgressiveDistillation(Ladder):
    """Halve the number of steps of a teacher, round after round.

    Each round begins from its teacher's weights with a fresh optimizer state, a fresh average, and
    a rate that grows in the warm-up and falls linearly to 0.

    The first teacher takes twice the steps of the first student, and each student half of those of
    the one before. The paper's loss weights are "truncated_snr" and "snr_plus_one"; it does not
    clip the teacher and has no dropout. Arguments are those of `Ladder`.

    Raises:
        ValueError: If the rounds do not halve, or as in `Ladder`.
    """

    @property
    def teacher_steps(self) -> int:
        """Steps of the first teacher."""
        return 2 * self.rounds[0].steps

    def check_rounds(self, rounds: Sequence[Round]) -> None:
        """Check that each student has half the steps of the one before."""
        for before, after in pairwise(rounds):
            if before.steps != 2 * after.steps:
                raise ValueError(
                    f"rounds must halve the steps: after {before.steps} comes "
                    f"{before.steps / 2:g}, got {after.steps}"
                )

    def promote(self) -> None:
        """Make the averaged student the teacher of the next round, and begin that."""
        copy_weights(self.average.module, self.teacher)
        copy_weights(self.average.module, self.network)
        self.average.restart()
        self.round_index += 1

    def draw_levels(self, count: int, generator: torch.Generator) -> Tensor:
        """The student's own levels, each equally likely."""
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        steps = self.student_steps
        # Multiply first: the last level is T exactly, and not rounded above it.
        return ((u * steps).floor() + 1) * self.schedule.num_levels / steps

    def target_of(self, teacher: NetworkDenoiser, z: Tensor, t: Tensor) -> Tensor:
        """The x with which one step equals two of the teacher."""
        step = self.schedule.num_levels / self.student_steps
        end = (t - step).clamp(min=0)
        return self.noise.two_step_target(teacher(z, t), teacher, z, t, t - step / 2, end)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin the next round, and forget the optimiser's state, where the last one ends."""
        before = self.round_index
        super().on_train_batch_start(batch, batch_idx)
        if self.round_index != before:
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    def rate_at(self, update: int) -> float:
        """Factor of the learning rate, which grows in the warm-up and falls to 0 in each round."""
        made = update - self.start_of(self.round_at(update))
        warm = min(1.0, (made + 1) / (self.round_warmup + 1))
        return warm * self.share_left(update)
