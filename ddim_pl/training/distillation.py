"""What the distillation methods share: a teacher, what is inherited from it, and dropout."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from ddim_pl.clipping import Clipping
from ddim_pl.denoiser import NetworkDenoiser, TimeInput
from ddim_pl.noise import Noise
from ddim_pl.prediction import (
    LossWeight,
    PredictionType,
    eps_from_x,
    has_unit_weight,
    output_error_weight,
    target,
)
from ddim_pl.rng import NoiseSource
from ddim_pl.scales import expand_like
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.training.base import DiffusionModule
from ddim_pl.training.hyperparameters import filled
from ddim_pl.training.loading import load
from ddim_pl.training.origin import KEY

DEFAULTS = {
    "time_input": "index",
    "sigma_data": 1.0,
    "clip": True,
    "noise_source": "generators",
}
"""Arguments of a student that is loaded without a teacher and was given none."""


class Distillation(DiffusionModule):
    """A student that begins with the averaged weights of a teacher.

    Args:
        network: By default a copy of the teacher's; given when this module is loaded.
        schedule: By default the teacher's.
        noise: By default the teacher's.
        teacher: Checkpoint of the teacher, any of this package.
        dropout: Dropout of the student.
        prediction: As in `DiffusionModule`; by default `prediction_from` the teacher's.
        time_input: By default the teacher's.
        sigma_data: By default the teacher's.
        image_shape: By default the teacher's.
        clip: Clip the student's estimates when it samples; by default as the teacher does.
        noise_source: By default the teacher's, so that images of one seed begin at one latent.
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
        sigma_data: float | None = None,
        image_shape: tuple[int, int, int] | None = None,
        clip: bool | Clipping | None = None,
        noise_source: NoiseSource | None = None,
        **kwargs: Any,
    ) -> None:
        read = load(teacher, name="teacher") if teacher is not None and network is None else None
        student: dict[str, Any] = {"schedule": schedule, "noise": noise, "prediction": prediction}
        student |= {"time_input": time_input, "sigma_data": sigma_data, "clip": clip}
        student |= {"image_shape": image_shape, "noise_source": noise_source}
        if read is not None:
            network = self.network_from(read, dropout)
            found = {name: getattr(read, name) for name in student}
            found["prediction"] = self.prediction_from(read.prediction)
            student = filled(student, found)
        if network is None:
            raise ValueError("teacher must be given: a checkpoint to distil")
        _check_guidance(kwargs.get("guidance"), network)
        set_dropout(network, dropout)
        default = DEFAULTS | {"prediction": self.prediction_from("eps")}
        super().__init__(network, **filled(student, default), **kwargs)
        self.teacher_path, self.read_prediction = teacher, read and read.prediction
        self.read_guidance = None if read is None else read.guidance
        if read is not None:
            self.origin = read.origin
            self.record_arguments(network=network, **student)
            self.check_teacher(read)
            Distillation.load_weights_from(self, read)  # not an override

    learns_guidance = False
    """Whether the student learns what its teacher does with guidance."""

    has_more_weights = False
    """Whether the student's network has weights that its teacher's lacks."""

    def network_from(self, teacher: DiffusionModule, dropout: float) -> nn.Module:
        """The student's network, made from the teacher's."""
        return student_network(teacher, dropout)

    @staticmethod
    def prediction_from(teacher: PredictionType) -> PredictionType:
        """Default prediction type of a student whose teacher has this one."""
        return teacher

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record this distillation."""
        self.record_origin()
        super().on_save_checkpoint(checkpoint)

    def record_origin(self) -> None:
        """Put this distillation, without folders of this machine, behind the teacher's origin.

        Only in a fit: else the origin is as a checkpoint has it, whatever is given now.
        """
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        teacher = None if self.teacher_path is None else Path(self.teacher_path).name
        own = {"by": type(self).__name__, "teacher": teacher, "updates": self.global_step}
        before = self.origin[:-1] if self._is_recorded else self.origin
        self.origin, self._is_recorded = (*before, own | self.settings_of_origin()), True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Know whether the origin has this distillation already."""
        super().on_load_checkpoint(checkpoint)
        if KEY in checkpoint:
            self._is_recorded = bool(self.origin) and self.origin[-1]["by"] == type(self).__name__

    _is_recorded = False

    def settings_of_origin(self) -> dict[str, Any]:
        """What else is to be known of this distillation, as plain data."""
        return {}

    given_teacher_prediction: PredictionType | None = None
    """What the teacher predicts, where it is said because `network` is given."""

    @property
    def first_prediction(self) -> PredictionType:
        """What the teacher predicts."""
        return self.given_teacher_prediction or self.read_prediction or self.prediction

    def check_first_prediction(self, teacher: DiffusionModule) -> None:
        """Check that a teacher predicts what it is read as.

        Raises:
            ValueError: If it does not.
        """
        if teacher.prediction != self.first_prediction:
            raise ValueError(
                f"teacher {self.teacher_path!r} predicts {teacher.prediction!r}, but is read as "
                f"{self.first_prediction!r}: set teacher_prediction to the former"
            )

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
            ValueError: If image size, schedule, noise, input or network differ, or the teacher
                was distilled to another number of steps.
        """
        path = self.teacher_path
        guidance = teacher.sampling_guidance
        if guidance is not None and not guidance.is_input and not self.learns_guidance:
            raise ValueError(
                f"teacher {path!r} has guidance {guidance}, which is for drawing images and not "
                "distilled: distil it first by GuidanceDistillation, or give what main.py export "
                "--model.guidance null --model.guidance_interval null writes"
            )
        for name in ("image_shape", "schedule", "noise", "time_input", "sigma_data"):
            theirs, ours = getattr(teacher, name), getattr(self, name)
            if theirs != ours:
                raise ValueError(
                    f"teacher {path!r} has {name} {theirs}, but the student is given {ours}: "
                    f"leave {name if name != 'image_shape' else 'network'} out to take the "
                    "teacher's"
                )
        self.check_weights(teacher)
        self.check_steps(teacher)

    def check_weights(self, teacher: DiffusionModule) -> None:
        """Check that the student's network has the teacher's weights, of the same meaning.

        Raises:
            ValueError: If it has not.
        """
        self.check_shapes(teacher.average.module, self.network)
        theirs, ours = teacher.denoiser.guidance_range, self.denoiser.guidance_range
        if theirs != ours:
            raise ValueError(
                f"teacher {self.teacher_path!r} has guidance_range {theirs}, but the student's "
                f"network {ours}: leave network out to take the teacher's"
            )

    def check_shapes(self, *networks: nn.Module) -> None:
        """Check that the teacher's network and the student's have the same weights.

        Raises:
            ValueError: If they have not.
        """
        theirs, ours = ({k: v.shape for k, v in each.state_dict().items()} for each in networks)
        if theirs != ours:
            different = min(set(theirs.items()) ^ set(ours.items()))[0]
            raise ValueError(
                f"teacher {self.teacher_path!r} has another network than the student "
                f"({different} differs): leave network out to take the teacher's"
            )

    def check_steps(self, teacher: DiffusionModule) -> None:
        """Check that a teacher knows the steps that it is to take.

        Raises:
            ValueError: If it was distilled to others.
        """
        known, sampler = teacher.distilled_steps, teacher.distilled_sampler
        if known is not None and (known != self.teacher_steps or sampler is not None):
            of = "" if sampler is None else f"of {sampler} "
            raise ValueError(
                f"teacher {self.teacher_path!r} was distilled to {known} steps {of}"
                f"and not trained at other levels, but its student needs {self.teacher_steps}"
            )

    def load_weights_from(self, teacher: DiffusionModule) -> None:
        """Take over the averaged weights of a teacher."""
        for network in (self.network, self.average.module):
            copy_weights(teacher.average.module, network, only_shared=self.has_more_weights)

    def on_fit_start(self) -> None:
        """Begin with the teacher's weights, unless a run resumes from a checkpoint."""
        # Also if a network is given: a config from a checkpoint names both.
        if self.teacher_path is not None and self.trainer.ckpt_path is None:
            self.load_weights_from(self.read_teacher())


def _check_guidance(guidance: float | None, network: nn.Module) -> None:
    if guidance is not None and getattr(network, "guidance_range", None) is None:
        raise ValueError(
            f"guidance must be left out for a student, got {guidance}: it has not learned the "
            "steps of images without a class; distil guidance first, by GuidanceDistillation"
        )


def draw_guidance(
    denoiser: NetworkDenoiser, count: int, generator: torch.Generator
) -> NetworkDenoiser:
    """The denoiser with weights of guidance, each equally likely, if its network takes them.

    Args:
        denoiser: The denoiser of a batch.
        count: Images of the batch.
        generator: Source of randomness, on the CPU.
    """
    if denoiser.guidance_range is None:
        return denoiser
    low, high = denoiser.guidance_range
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    return replace(denoiser, guidance_weight=low + (high - low) * u)


def output_distance(
    denoiser: NetworkDenoiser, z: Tensor, t: Tensor, wanted: Tensor, *, weight: LossWeight
) -> Tensor:
    """Weighted squared error of a student's x, as one of its network's output, `(B,)`.

    Args:
        denoiser: The student.
        z: States, `(B, ...)`.
        t: Their levels, `(B,)`.
        wanted: The clean images that it is to estimate, `(B, ...)`.
        weight: Weight on the squared error of x.
    """
    scales, known = denoiser.schedule(t), {"sigma_data": denoiser.sigma_data}
    eps = eps_from_x(scales, z, wanted)
    error = denoiser.output(z, t) - target(denoiser.prediction, scales, wanted, eps, **known)
    errors = error.square().flatten(1).mean(1)
    if has_unit_weight(denoiser.prediction, weight):
        return errors
    weights = output_error_weight(denoiser.prediction, weight, scales, **known)
    return expand_like(weights, errors) * errors


def student_network(teacher: DiffusionModule, dropout: float) -> nn.Module:
    """A copy of the teacher's averaged network, with gradients and this much dropout."""
    # In the layout that a network made from a config has, so that resumed runs are exact.
    network = copy.deepcopy(teacher.average.module).to(memory_format=torch.contiguous_format)
    set_dropout(network, dropout)
    return network.requires_grad_(True).train()


def set_dropout(network: nn.Module, dropout: float) -> None:
    """Set the rate of every dropout layer, and `dropout` in the network's `init_args`."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    arguments = getattr(network, "init_args", None)
    if isinstance(arguments, dict) and "dropout" in arguments:
        arguments["dropout"] = dropout


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module, *, only_shared: bool = False) -> None:
    """Copy parameters and buffers of one network into another of the same kind.

    Args:
        source: The one.
        target: The other.
        only_shared: Leave out what the source does not have.
    """
    values = source.state_dict()
    for name, into in target.state_dict().items():
        if not only_shared or name in values:
            into.copy_(values[name])
