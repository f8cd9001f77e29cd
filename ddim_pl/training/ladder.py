"""What distillations in rounds share: a ladder of students, each the teacher of the next.

All rounds are one `fit`: the round follows from the number of updates made.
"""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, Self

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ddim_pl.checks import check_at_least, check_one_of
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.lightning_internals import stop_after
from ddim_pl.prediction import (
    LossWeight,
    PredictionType,
    check_loss_weight,
)
from ddim_pl.rng import StepGenerators
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.timesteps import linear
from ddim_pl.training.base import Batch, DiffusionModule
from ddim_pl.training.ddpm import averaged_checkpoint
from ddim_pl.training.distillation import (
    Distillation,
    copy_weights,
    draw_guidance,
    output_distance,
    student_network,
)
from ddim_pl.training.hyperparameters import NotPlainError, describe
from ddim_pl.training.reduced import NetworkPrecision, ReducedCopy
from ddim_pl.transitions import q_sample


class Round(NamedTuple):
    """One rung of the ladder: a student of this many steps, trained with this many updates."""

    steps: int
    updates: int


class Ladder(Distillation):
    """Distil a teacher into students of fewer steps, round after round.

    Network, schedule, noise and the network's input are the teacher's. Sampling and evaluation use
    the student of the present round with its own number of steps. Subclasses say what a student
    learns: `draw_levels` and `target_of`.

    Args:
        network: By default a copy of the teacher's; given when this module is loaded.
        schedule: By default the teacher's.
        rounds: The ladder, `(student steps, updates)` each.
        conversion_updates: Updates before the first round in which the student learns the
            teacher's own estimates at all levels: useful where the student predicts something
            else, as with an eps-prediction teacher.
        prediction: What the student predicts, "v" or "x"; "both" x and eps, or "edm", if its
            teacher does.
        loss_weight: Weight on the squared error of x, of `ddim_pl.prediction.LossWeight`.
        clip_teacher: Clip the teacher's estimates to [-1, 1].
        teacher_prediction: What the first teacher predicts; needed only if `network` is given.
        teacher_precision: 32, or "bf16": the teacher of each round is evaluated by a bfloat16
            copy, see `ddim_pl.training.reduced`. Promotion, checkpoints and students are not.
        warmup_steps: Updates over which the rate grows linearly, of each round or of the first.
        **kwargs: Arguments of `Distillation`.

    Raises:
        ValueError: If the rounds do not fit each other, the teacher cannot be read or does not
            fit, or an argument is out of range.
    """

    round_index: int = 0

    def __init__(
        self,
        network: nn.Module | None = None,
        schedule: NoiseSchedule | None = None,
        *,
        rounds: list[tuple[int, int]],
        conversion_updates: int = 0,
        prediction: PredictionType = "v",
        loss_weight: LossWeight = "truncated_snr",
        clip_teacher: bool = False,
        teacher_prediction: PredictionType | None = None,
        teacher_precision: NetworkPrecision = 32,
        warmup_steps: int = 0,
        **kwargs: Any,
    ) -> None:
        _check_prediction(prediction, loss_weight)
        check_one_of(NetworkPrecision, teacher_precision=teacher_precision)
        check_at_least(0, conversion_updates=conversion_updates, warmup_steps=warmup_steps)
        self.rounds = self._read_rounds(rounds)
        # Updates before each round; the last number is the sum of all.
        self._starts = [*accumulate((r.updates for r in self.rounds), initial=conversion_updates)]
        self.given_teacher_prediction = teacher_prediction
        super().__init__(
            network,
            schedule,
            prediction=prediction,
            sampler=None,
            timesteps="linear",
            num_steps=self.rounds[-1].steps,
            last_level=0.0,
            lr_scheduler=None,
            warmup_steps=0,
            **kwargs,
        )
        self.teacher = student_network(self, 0.0).requires_grad_(False).eval()
        self.record_arguments(teacher_prediction=self.first_prediction)
        self.conversion_updates, self.loss_weight = conversion_updates, loss_weight
        self.clip_teacher, self.round_warmup = clip_teacher, warmup_steps
        self.teacher_precision, self._reduced_teacher = teacher_precision, ReducedCopy()
        self.lr_scheduler = partial(LambdaLR, lr_lambda=self.rate_at)
        self.round_index = self.round_at(0)

    @property
    def networks(self) -> list[nn.Module]:
        """The student's networks and its teacher's."""
        # The teacher is made from the others.
        return [*super().networks, *([self.teacher] if hasattr(self, "teacher") else [])]

    # ---- the ladder ---------------------------------------------------------------------------

    @property
    def num_updates(self) -> int:
        """Updates of the whole ladder."""
        return self._starts[-1]

    def round_at(self, update: int) -> int:
        """Index in `rounds` of the round that this update belongs to; -1 is the conversion."""
        return min(bisect_right(self._starts, update), len(self.rounds)) - 1

    def start_of(self, index: int) -> int:
        """Updates before this round."""
        return 0 if index < 0 else self._starts[index]

    @property
    def student_steps(self) -> int:
        """Steps of the student in training; while it is converted, those of its teacher."""
        return self.teacher_steps if self.round_index < 0 else self.rounds[self.round_index].steps

    def updates_of(self, index: int) -> int:
        """Updates of this round."""
        return self._starts[index + 1] - self.start_of(index)

    @property
    def round_updates(self) -> int:
        """Updates of the present round."""
        return self.updates_of(self.round_index)

    def share_left(self, update: int) -> float:
        """The share of its round's updates that are left before this one."""
        index = self.round_at(update)
        return max(0.0, 1 - (update - self.start_of(index)) / self.updates_of(index))

    @property
    def round_is_over(self) -> bool:
        """Whether all updates of the present round are made."""
        return self.global_step >= self._starts[self.round_index + 1]

    @property
    def levels(self) -> Tensor:
        """Levels of the present student, `(N + 1,)`."""
        # While it is converted these are the teacher's steps, which may exceed `num_levels`.
        most = self.schedule.num_levels if self.round_index < 0 else self.student_steps
        return linear(self.schedule.num_levels, min(self.student_steps, most))

    @property
    def distilled_steps(self) -> int | None:  # type: ignore[override]
        """Steps that the present student is trained for; None while it is converted."""
        return None if self.round_index < 0 else self.student_steps

    @abstractmethod
    def check_rounds(self, rounds: Sequence[Round]) -> None:
        """Check that each student can learn from the one before.

        Raises:
            ValueError: If one cannot.
        """

    def _read_rounds(self, rounds: Sequence[Sequence[int]]) -> tuple[Round, ...]:
        ladder = []
        for each in rounds:
            if len(each) != 2 or min(each) < 1:
                raise ValueError(
                    "rounds must hold pairs (student steps, updates) of at least 1, got "
                    f"{list(each)}"
                )
            ladder.append(Round(*each))
        if not ladder:
            raise ValueError("rounds must hold at least one pair (student steps, updates)")
        self.check_rounds(ladder)
        return tuple(ladder)

    def load_weights_from(self, teacher: DiffusionModule) -> None:
        """Begin the ladder with a teacher's weights, in the student and in its first teacher."""
        super().load_weights_from(teacher)
        copy_weights(teacher.average.module, self.teacher)
        self.average.restart()
        self.round_index = self.round_at(0)

    def check_teacher(self, teacher: DiffusionModule) -> None:
        """Check that the ladder can begin from a teacher."""
        super().check_teacher(teacher)
        self.check_first_prediction(teacher)

    @abstractmethod
    def promote(self) -> None:
        """Make the averaged student the teacher of the next round, and begin that."""

    @abstractmethod
    def draw_levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Levels at which the present student learns, `(count,)` float64.

        Args:
            count: How many.
            generator: Source of randomness, on the CPU.
        """

    @abstractmethod
    def target_of(self, teacher: NetworkDenoiser, z: Tensor, t: Tensor) -> Tensor:
        """The clean images that the present student is to estimate, `(B, ...)`.

        Args:
            teacher: The teacher, of the images' classes if there are some.
            z: States, `(B, ...)`.
            t: Their levels, of `draw_levels`.
        """

    def student_checkpoint(self) -> dict[str, Any]:
        """The present student, by its averaged weights, as a checkpoint of a plain `DDPM`.

        It knows its levels, and needs neither this class nor the teacher.
        """
        steps = self.student_steps
        self.record_origin()
        return averaged_checkpoint(self, num_steps=steps, distilled_steps=steps)

    def settings_of_origin(self) -> dict[str, Any]:
        """The rounds up to the present one."""
        rounds = [[each.steps, each.updates] for each in self.rounds[: self.round_index + 1]]
        return {"conversion_updates": self.conversion_updates, "rounds": rounds}

    def get_extra_state(self) -> dict[str, int]:
        """The round that a checkpoint's weights belong to."""
        return {"round": self.round_index}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Continue in that round."""
        self.round_index = state["round"]

    # ---- what the method is -------------------------------------------------------------------

    @property
    def teacher_denoiser(self) -> NetworkDenoiser:
        """The teacher of the present round, in `teacher_precision`."""
        first = self.round_index < 0 or (self.round_index == 0 and self.conversion_updates == 0)
        prediction = self.first_prediction if first else self.prediction
        is_full = self.teacher_precision == 32
        network = self.teacher if is_full else self._reduced_teacher.of(self.teacher)
        return replace(self._denoiser(network), prediction=prediction, clip=self.clip_teacher)

    def loss(self, denoiser: NetworkDenoiser, batch: Batch, generators: StepGenerators) -> Tensor:
        """Weighted squared error of the student's x against the target, `(B,)`."""
        x = batch[0]
        denoiser = draw_guidance(denoiser, len(x), generators.host)
        teacher = self.teacher_denoiser.as_told(denoiser)
        if self.round_index < 0:
            u = torch.rand(len(x), generator=generators.host, dtype=torch.float64)
            t = (1 - u) * self.schedule.num_levels
        else:
            t = self.draw_levels(len(x), generators.host)
        scales = self.schedule(t)
        z = q_sample(x, self.noise.draw(x.shape, scales, generators.device, x), scales)
        with torch.no_grad():
            wanted = teacher(z, t).x if self.round_index < 0 else self.target_of(teacher, z, t)
        return output_distance(denoiser, z, t, wanted, weight=self.loss_weight)

    # ---- Lightning ----------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Set the student's mode; the teacher is only evaluated."""
        super().train(mode)
        self.teacher.eval()
        return self

    def setup(self, stage: str) -> None:
        """Compile, and end the fit where the ladder ends.

        Raises:
            ValueError: If a student's checkpoint could not say how its network is built.
        """
        super().setup(stage)
        if stage == "fit":
            self._check_network()
        if stage == "fit" and self.trainer.max_steps == -1:
            stop_after(self.trainer, self.num_updates)

    def _check_network(self) -> None:
        try:
            describe(self.network)
        except NotPlainError as error:
            raise ValueError(
                f"network must say how it is built, got one that does not ({error}): set its "
                "attribute init_args to the arguments of its constructor, see docs/networks.md"
            ) from None

    def check_data(self, datamodule: L.LightningDataModule | None) -> None:
        """Check that there is a teacher that the ladder can begin from."""
        self.read_teacher()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin the next round where the last one's updates are made."""
        while self.round_index < self.round_at(self.global_step):
            self.promote()

    @abstractmethod
    def rate_at(self, update: int) -> float:
        """Factor of the learning rate at an update of the whole ladder."""


def _check_prediction(prediction: PredictionType, loss_weight: LossWeight) -> None:
    if prediction not in ("x", "v", "both", "edm"):
        raise ValueError(
            f"prediction must be 'v', 'x', 'both' or 'edm' for a student, got {prediction!r}: at "
            "the last level eps says nothing of the image, and a student of one step sees no other"
        )
    check_loss_weight(prediction, loss_weight)
