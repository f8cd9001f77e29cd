"""What the distillation methods share: a teacher, what is inherited from it, and dropout."""

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from ddim_pl.denoiser import TimeInput
from ddim_pl.noise import Noise
from ddim_pl.prediction import PredictionType
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.training.base import DiffusionModule
from ddim_pl.training.checkpoints import load


class Inherited(NamedTuple):
    """Arguments that a student has from its teacher where they are not given."""

    schedule: NoiseSchedule | None
    noise: Noise | None
    prediction: PredictionType | None
    time_input: TimeInput | None
    image_shape: tuple[int, int, int] | None
    clip: bool | None

    def or_of(self, teacher: DiffusionModule, prediction: PredictionType) -> "Inherited":
        """These, and where one is None the teacher's."""
        return Inherited(
            self.schedule or teacher.schedule,
            self.noise or teacher.noise,
            self.prediction or prediction,
            self.time_input or teacher.time_input,
            self.image_shape or teacher.image_shape,
            teacher.clip if self.clip is None else self.clip,
        )


class Distillation(DiffusionModule):
    """A student that begins with the averaged weights of a teacher.

    Args:
        network: By default a copy of the teacher's; a checkpoint of this module holds it here.
        schedule: By default the teacher's.
        noise: By default the teacher's.
        teacher: Checkpoint of the teacher, any of this package.
        dropout: Dropout of the student.
        prediction: As in `DiffusionModule`; by default what the method reads the teacher as.
        time_input: By default the teacher's.
        image_shape: By default the teacher's.
        clip: Clip the student's estimates when it samples; by default as the teacher does.
        **kwargs: Arguments of `DiffusionModule`.

    Raises:
        ValueError: If the teacher cannot be read or does not fit, or an argument is out of range.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        schedule: NoiseSchedule | None = None,
        *,
        noise: Noise | None = None,
        teacher: str | None = None,
        dropout: float = 0.0,
        prediction: PredictionType | None = None,
        time_input: TimeInput | None = None,
        image_shape: tuple[int, int, int] | None = None,
        clip: bool | None = None,
        **kwargs: Any,
    ) -> None:
        read = load(teacher, name="teacher") if teacher is not None and network is None else None
        student = Inherited(schedule, noise, prediction, time_input, image_shape, clip)
        if read is not None:
            network = student_network(read, dropout)
            student = student.or_of(read, self.prediction_from(read.prediction))
        if network is None:
            raise ValueError("teacher must be given: a checkpoint to distil")
        set_dropout(network, dropout)
        super().__init__(
            network,
            student.schedule,
            noise=student.noise,
            prediction=student.prediction or self.prediction_from("eps"),
            time_input=student.time_input or "index",
            image_shape=student.image_shape,
            clip=True if student.clip is None else student.clip,
            **kwargs,
        )
        self.teacher_path = teacher
        self.read_prediction = None if read is None else read.prediction
        if read is not None:
            self.record_arguments(network=network, **student._asdict())
            self.check_teacher(read)
            Distillation.load_weights_from(self, read)  # a subclass has no more networks yet

    @staticmethod
    def prediction_from(teacher: PredictionType) -> PredictionType:
        """How a student's output is read, by default, of a teacher that predicts this."""
        return teacher

    @property
    def teacher_steps(self) -> int:
        """Steps that the teacher takes."""
        raise NotImplementedError

    def read_teacher(self) -> DiffusionModule:
        """The teacher, on the CPU.

        Raises:
            ValueError: If none is given, or it cannot be read or does not fit.
        """
        if self.teacher_path is None:
            raise ValueError("teacher must be given for fit: a checkpoint to distil")
        teacher = load(self.teacher_path, name="teacher")
        self.check_teacher(teacher)
        return teacher

    def check_teacher(self, teacher: DiffusionModule) -> None:
        """Check that this student can begin from a teacher's weights and learn its steps.

        Raises:
            ValueError: If image size, schedule, noise, time input or network differ, or the
                teacher was distilled to another number of steps.
        """
        check_same_kind(teacher, self, str(self.teacher_path))
        if teacher.distilled_steps not in (None, self.teacher_steps):
            raise ValueError(
                f"teacher {self.teacher_path!r} was distilled to {teacher.distilled_steps} steps "
                f"and not trained at other levels, but its student needs {self.teacher_steps}"
            )

    def load_weights_from(self, teacher: DiffusionModule) -> None:
        """Take over the averaged weights of a teacher."""
        for network in (self.network, self.average.module):
            copy_weights(teacher.average.module, network)


def student_network(teacher: DiffusionModule, dropout: float) -> nn.Module:
    """A copy of the teacher's averaged network, with gradients and this much dropout."""
    network = copy.deepcopy(teacher.average.module)
    set_dropout(network, dropout)
    return network.requires_grad_(True).train()


def set_dropout(network: nn.Module, dropout: float) -> None:
    """Set the rate of every dropout layer, also in what the network says of its arguments."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    arguments = getattr(network, "init_args", None)
    if isinstance(arguments, dict) and "dropout" in arguments:
        arguments["dropout"] = dropout


def check_same_kind(teacher: DiffusionModule, student: DiffusionModule, path: str) -> None:
    """Check that a student can begin from a teacher's weights.

    Raises:
        ValueError: If image size, schedule, noise, time input or network differ.
    """
    pairs = {
        "image_shape": (teacher.image_shape, student.image_shape),
        "schedule": (teacher.schedule, student.schedule),
        "noise": (teacher.noise, student.noise),
        "time_input": (teacher.time_input, student.time_input),
    }
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ValueError(
                f"teacher {path!r} has {name} {theirs}, but the student is given {ours}: leave "
                f"{name if name != 'image_shape' else 'network'} out to take the teacher's"
            )
    theirs_state = {k: v.shape for k, v in teacher.average.module.state_dict().items()}
    ours_state = {k: v.shape for k, v in student.network.state_dict().items()}
    if theirs_state != ours_state:
        different = sorted(set(theirs_state.items()) ^ set(ours_state.items()))
        raise ValueError(
            f"teacher {path!r} has another network than the student ({different[0][0]} differs): "
            "leave network out to take the teacher's"
        )


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers of one network into another of the same kind."""
    for name, value in target.state_dict().items():
        value.copy_(source.state_dict()[name])
