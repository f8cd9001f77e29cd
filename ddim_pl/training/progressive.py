"""Progressive distillation (Salimans & Ho 2022).

A student of N steps learns to do in one DDIM step what its teacher does in two. Levels are `t = i
T / N` with `i` uniform in 1..N; the teacher steps `t -> t - T / 2N -> t - T / N`, and the target
is the x with which one step lands there too, `two_step_target`. Then the student, by its averaged
weights, becomes the teacher of a student with N / 2 steps. The whole ladder is one `fit`: which
round it is follows from the number of updates made.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ddim_pl.denoiser import NetworkDenoiser, TimeInput
from ddim_pl.noise import Noise
from ddim_pl.prediction import (
    LossWeight,
    PredictionType,
    check_loss_weight,
    eps_from_x,
    output_error_weight,
    target,
)
from ddim_pl.rng import StepGenerators
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.timesteps import linear
from ddim_pl.training.base import Batch, DiffusionModule, OptimizerCallable
from ddim_pl.training.ddpm import DDPM
from ddim_pl.training.hyperparameters import INSTANTIATOR, describe, import_path
from ddim_pl.training.teacher import (
    check_same_kind,
    check_steps,
    copy_weights,
    load_teacher,
    set_dropout,
    student_network,
)
from ddim_pl.transitions import (
    q_sample,
)


class Round(NamedTuple):
    """One rung of the ladder: a student of this many steps, trained with this many updates."""

    steps: int
    updates: int


class ProgressiveDistillation(DiffusionModule):
    """Halve the number of steps of a teacher, round after round.

    Network, schedule, noise and time input are the teacher's. Each round begins from its teacher's
    weights with a fresh optimizer state, a fresh average, and a rate that falls linearly to 0.
    Sampling and evaluation use the student of the present round with its own number of steps.

    Args:
        network: By default a copy of the teacher's; a checkpoint of this module holds it here.
        schedule: By default the teacher's.
        noise: By default the teacher's. The deterministic steps are those of its law,
            `Noise.step`, of which DDIM is the Gaussian case.
        teacher: Checkpoint of the teacher: any of this package, of eps-, x- or v-prediction; also
            a student, to go on from it.
        rounds: The ladder, `(student steps, updates)` each: the teacher's number of steps is twice
            that of the first student, and each student has half the steps of the one before.
        conversion_updates: Updates before the first round in which the student learns the
            teacher's own estimates at all levels: of use where the student predicts something
            else, as with an eps-prediction teacher.
        prediction: What the student predicts, "v" or "x"; "both" x and eps, if its teacher does.
        loss_weight: Weight on the squared error of x: "truncated_snr" or "snr_plus_one" (the
            paper's two), or any other of `ddim_pl.prediction.LossWeight`.
        clip_teacher: Clip the teacher's estimates to [-1, 1]; the paper does not.
        dropout: Dropout of the students; the paper has none.
        time_input: By default the teacher's.
        teacher_prediction: What the first teacher predicts; read from it.
        image_shape: As in `DiffusionModule`; by default the teacher's.
        clip: Clip a student's estimates when it samples; by default as the teacher does.
        optimizer: As in `DiffusionModule`.
        warmup_steps: Updates of each round over which the rate grows linearly.
        ema_decay: As in `DiffusionModule`; each round begins a new average.
        compile: As in `DiffusionModule`.
        seed: As in `DiffusionModule`.

    Raises:
        ValueError: If the ladder does not halve, the teacher cannot be read or does not fit, or an
            argument is out of range.
    """

    round: int = 0

    def __init__(
        self,
        network: nn.Module | None = None,
        schedule: NoiseSchedule | None = None,
        *,
        noise: Noise | None = None,
        rounds: list[tuple[int, int]],
        teacher: str | None = None,
        conversion_updates: int = 0,
        prediction: PredictionType = "v",
        loss_weight: LossWeight = "truncated_snr",
        clip_teacher: bool = False,
        dropout: float = 0.0,
        time_input: TimeInput | None = None,
        teacher_prediction: PredictionType | None = None,
        image_shape: tuple[int, int, int] | None = None,
        clip: bool | None = None,
        optimizer: OptimizerCallable | None = None,
        warmup_steps: int = 0,
        ema_decay: float = 0.9999,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        if prediction not in ("x", "v", "both"):
            raise ValueError(
                f"prediction must be 'v', 'x' or 'both' for a student, got {prediction!r}: at the "
                "last level eps says nothing of the image, and a student of one step sees no other"
            )
        check_loss_weight(prediction, loss_weight)
        self.rounds = _check_rounds(rounds)
        for name, value in {
            "conversion_updates": conversion_updates,
            "warmup_steps": warmup_steps,
        }.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        read = load_teacher(teacher) if teacher is not None and network is None else None
        if read is not None:
            # Under the arguments' own names, by which a checkpoint will hold what was found.
            network = student_network(read, dropout)
            schedule = schedule or read.schedule
            noise = noise or read.noise
            time_input = time_input or read.time_input
            teacher_prediction = read.prediction
            image_shape = image_shape or read.image_shape
            clip = read.clip if clip is None else clip
        if network is None:
            raise ValueError("teacher must be given: a checkpoint to distil")
        set_dropout(network, dropout)
        super().__init__(
            network,
            schedule,
            noise=noise,
            prediction=prediction,
            time_input=time_input or "index",
            image_shape=image_shape,
            clip=True if clip is None else clip,
            timesteps="linear",
            num_steps=self.rounds[-1].steps,
            optimizer=optimizer,
            ema_decay=ema_decay,
            compile=compile,
            seed=seed,
        )
        self.teacher_path = teacher
        self.teacher = student_network(self, 0.0).requires_grad_(False).eval()
        self.first_prediction: PredictionType = teacher_prediction or prediction
        self.conversion_updates = conversion_updates
        self.loss_weight = loss_weight
        self.clip_teacher = clip_teacher
        self.round_warmup = warmup_steps
        self.round = self.round_at(0)
        if read is not None:
            self._check_teacher(read)
            self.load_weights_from(read)

    # ---- the ladder ---------------------------------------------------------------------------

    @property
    def num_updates(self) -> int:
        """Updates of the whole ladder."""
        return self.conversion_updates + sum(each.updates for each in self.rounds)

    def round_at(self, update: int) -> int:
        """Index in `rounds` of the round that this update belongs to; -1 is the conversion."""
        end = self.conversion_updates
        if update < end:
            return -1
        for index, each in enumerate(self.rounds):
            end += each.updates
            if update < end:
                return index
        return len(self.rounds) - 1

    def start_of(self, index: int) -> int:
        """Updates before this round."""
        if index < 0:
            return 0
        return self.conversion_updates + sum(each.updates for each in self.rounds[:index])

    @property
    def student_steps(self) -> int:
        """Steps of the student in training, or when it is only converted, of its teacher."""
        return 2 * self.rounds[0].steps if self.round < 0 else self.rounds[self.round].steps

    @property
    def round_updates(self) -> int:
        """Updates of the present round."""
        return self._updates_of(self.round)

    @property
    def round_is_over(self) -> bool:
        """Whether all updates of the present round are made."""
        return self.global_step >= self.start_of(self.round) + self.round_updates

    @property
    def levels(self) -> Tensor:
        """Levels of the present student, `(N + 1,)`."""
        # A teacher that is being converted may have more steps than there are whole levels.
        most = self.schedule.num_levels if self.round < 0 else self.student_steps
        return linear(self.schedule.num_levels, min(self.student_steps, most))

    @property
    def distilled_steps(self) -> int | None:  # type: ignore[override]
        """Steps of the present student, the only ones it knows."""
        return None if self.round < 0 else self.student_steps

    def load_weights_from(self, teacher: DiffusionModule) -> None:
        """Begin the ladder with a teacher's weights, for the student and what it learns from."""
        for network in (self.network, self.average.module, self.teacher):
            copy_weights(teacher.average.module, network)
        self.average.n_averaged.zero_()
        self.round = self.round_at(0)

    def _check_teacher(self, teacher: DiffusionModule) -> None:
        """See that the ladder can begin from a teacher."""
        path = str(self.teacher_path)
        check_same_kind(teacher, self, path)
        if teacher.prediction != self.first_prediction:
            raise ValueError(
                f"teacher {path!r} predicts {teacher.prediction!r}, but is read as "
                f"{self.first_prediction!r}: set teacher_prediction, or leave network out"
            )
        check_steps(teacher, 2 * self.rounds[0].steps, path)

    def promote(self) -> None:
        """Make the averaged student the teacher of the next round, and begin that."""
        copy_weights(self.average.module, self.teacher)
        copy_weights(self.average.module, self.network)
        self.average.n_averaged.zero_()
        self.round += 1

    def student_checkpoint(self) -> dict[str, Any]:
        """The present student, by its averaged weights, as a checkpoint of a plain `DDPM`.

        It knows its levels, and needs neither this class nor the teacher.
        """
        weights = self.average.module.state_dict()
        state = {f"network.{name}": value for name, value in weights.items()}
        state |= {f"average.module.{name}": value for name, value in weights.items()}
        arguments = {
            "network": describe(self.network),
            "schedule": describe(self.schedule),
            "noise": describe(self.noise),
            "loss_weight": self.loss_weight,
            "prediction": self.prediction,
            "time_input": self.time_input,
            "image_shape": list(self.image_shape),
            "clip": self.clip,
            "sampler": describe(self.sampler),
            "timesteps": "linear",
            "num_steps": self.student_steps,
            "distilled_steps": self.student_steps,
            "seed": self.seed,
        }
        return {
            "pytorch-lightning_version": L.__version__,
            "epoch": self.current_epoch,
            "global_step": self.global_step,
            "state_dict": state | {"average.n_averaged": self.average.n_averaged},
            "hyper_parameters": {
                **arguments,
                "_class_path": import_path(DDPM),
                "_instantiator": INSTANTIATOR,
            },
        }

    def get_extra_state(self) -> dict[str, int]:
        """The round, so that the weights of a checkpoint say whose they are."""
        return {"round": self.round}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Go on in that round."""
        self.round = state["round"]

    # ---- what the method is -------------------------------------------------------------------

    @property
    def teacher_denoiser(self) -> NetworkDenoiser:
        """The teacher of the present round."""
        first = self.round < 0 or (self.round == 0 and self.conversion_updates == 0)
        prediction = self.first_prediction if first else self.prediction
        return NetworkDenoiser(
            self.teacher, self.schedule, prediction, self.clip_teacher, self.time_input
        )

    def loss(self, denoiser: NetworkDenoiser, batch: Batch, generators: StepGenerators) -> Tensor:
        """Weighted squared error of the student's x against the target, `(B,)`."""
        x = batch[0]
        teacher = self.teacher_denoiser.condition(denoiser.label)
        steps = self.student_steps
        step = self.schedule.num_levels / steps
        u = torch.rand(len(x), generator=generators.host, dtype=torch.float64)
        if self.round < 0:
            t = (1 - u) * self.schedule.num_levels
        else:
            # In this order the last level is T exactly, not a rounding above.
            t = ((u * steps).floor() + 1) * self.schedule.num_levels / steps
        scales = self.schedule(t)
        z = q_sample(x, self.noise.draw(x.shape, scales, generators.device, x), scales)
        with torch.no_grad():
            if self.round < 0:
                wanted = teacher(z, t).x
            else:
                end = (t - step).clamp(min=0)
                wanted = self.noise.two_step_target(teacher, z, t, t - step / 2, end)
        error = denoiser.output(z, t) - target(
            self.prediction, scales, wanted, eps_from_x(scales, z, wanted)
        )
        weights = output_error_weight(self.prediction, self.loss_weight, scales)
        return weights.to(x) * error.square().flatten(1).mean(1)

    # ---- Lightning ----------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "ProgressiveDistillation":
        """Set the student's mode; the teacher is only evaluated."""
        super().train(mode)
        self.teacher.eval()
        return self

    def setup(self, stage: str) -> None:
        """Compile; and see that the fit ends where the ladder does."""
        super().setup(stage)
        if self.compile_network:
            self.teacher.compile()
        if stage == "fit" and self.trainer.max_steps == -1:
            self.trainer.fit_loop.epoch_loop.max_steps = self.num_updates

    def check_data(self, datamodule: L.LightningDataModule | None) -> None:
        """See that there is a teacher that the ladder can begin from."""
        if self.teacher_path is not None:
            self._check_teacher(load_teacher(self.teacher_path))

    def on_fit_start(self) -> None:
        """Begin with the teacher's weights, unless a run goes on, whose checkpoint holds all.

        (A config that was read from a checkpoint names both a network and a teacher to read.)
        """
        if self.teacher_path is not None and self.trainer.ckpt_path is None:
            read = load_teacher(self.teacher_path)
            self._check_teacher(read)
            self.load_weights_from(read)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin the next round where the last one's updates are made."""
        while self.round < self.round_at(self.global_step):
            self.promote()
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    def configure_optimizers(self) -> Any:
        """Adam or what was given, with a rate that falls to 0 in each round."""
        configured = super().configure_optimizers()
        optimizer = configured["optimizer"]
        schedule = LambdaLR(optimizer, self._rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _rate(self, update: int) -> float:
        index = self.round_at(update)
        made = update - self.start_of(index)
        warm = min(1.0, (made + 1) / (self.round_warmup + 1))
        return warm * max(0.0, 1 - made / self._updates_of(index))

    def _updates_of(self, index: int) -> int:
        return self.conversion_updates if index < 0 else self.rounds[index].updates


def _check_rounds(rounds: Sequence[Sequence[int]]) -> tuple[Round, ...]:
    """The ladder, checked to halve."""
    ladder = []
    for each in rounds:
        if len(each) != 2 or min(each) < 1:
            raise ValueError(
                f"rounds must hold pairs (student steps, updates) of at least 1, got {list(each)}"
            )
        ladder.append(Round(*each))
    if not ladder:
        raise ValueError("rounds must hold at least one pair (student steps, updates)")
    for before, after in pairwise(ladder):
        if before.steps != 2 * after.steps:
            raise ValueError(
                f"rounds must halve the steps: after {before.steps} comes {before.steps / 2:g}, "
                f"got {after.steps}"
            )
    return tuple(ladder)
