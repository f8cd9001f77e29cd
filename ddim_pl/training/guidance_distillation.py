"""Distillation of guidance ([Distilled], section 3.1): one network evaluation in place of two.

A student that takes the weight w as an input learns the guided estimate of its teacher,

    x_w = x_u + w (x_c - x_u),

at all levels, with w drawn anew for each image from a range. It is a model like its teacher: of
all levels, for any sampler. A ladder, TRACT or a consistency model that begins from it goes on
drawing w, so that their students of few steps take it too.
"""

from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.guidance import guided
from ddim_pl.networks.guidance_input import read_guidance_range
from ddim_pl.prediction import LossWeight, check_loss_weight
from ddim_pl.rng import StepGenerators
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.training.base import Batch, DiffusionModule
from ddim_pl.training.ddpm import draw_levels
from ddim_pl.training.distillation import (
    Distillation,
    copy_weights,
    draw_guidance,
    output_distance,
    student_network,
)
from ddim_pl.transitions import q_sample


class GuidanceDistillation(Distillation):
    """Learn a teacher's guided estimates, with the weight of guidance as an input.

    The student's network is the teacher's with a `guidance_range`, which begins as the teacher
    without guidance. `guidance` is the weight that it is evaluated with; 1 if none is given.

    Args:
        network: By default made from the teacher's; given when this module is loaded.
        schedule: By default the teacher's.
        guidance_range: The lowest and the highest weight, 1 among them. [Distilled] have 0 to 4 of
            what is one less, which is the default.
        loss_weight: Weight on the squared error of x, see `ddim_pl.prediction.LossWeight`; by
            default "truncated_snr", or for eps-prediction "snr".
        **kwargs: Arguments of `Distillation`.

    Raises:
        ValueError: If the teacher cannot be read, or does not know images without a class, or an
            argument is out of range.
    """

    learns_guidance = True
    has_more_weights = True

    def __init__(
        self,
        network: nn.Module | None = None,
        schedule: NoiseSchedule | None = None,
        *,
        guidance_range: tuple[float, float] = (1.0, 5.0),
        loss_weight: LossWeight | None = None,
        **kwargs: Any,
    ) -> None:
        self.guidance_range = read_guidance_range(guidance_range)
        super().__init__(network, schedule, **kwargs)
        found = self.denoiser.guidance_range
        if found != self.guidance_range:
            raise ValueError(
                f"guidance_range must be what the network was made with, {found}, got "
                f"{self.guidance_range}: leave it out, or begin anew from a teacher"
            )
        if self.null_class is None:
            raise ValueError(_UNGUIDED)
        self.loss_weight: LossWeight = loss_weight or (
            "snr" if self.prediction == "eps" else "truncated_snr"
        )
        check_loss_weight(self.prediction, self.loss_weight)
        self.teacher = _with_range(self.network, None).requires_grad_(False).eval()
        copy_weights(self.network, self.teacher, only_shared=True)

    @property
    def networks(self) -> list[nn.Module]:
        """The student's networks and its teacher's."""
        return [*super().networks, *([self.teacher] if hasattr(self, "teacher") else [])]

    def network_from(self, teacher: DiffusionModule, dropout: float) -> nn.Module:
        """The teacher's network with an input more.

        Raises:
            ValueError: If it cannot have one.
        """
        if teacher.null_class is None:
            raise ValueError(_UNGUIDED)
        plain = student_network(teacher, dropout)
        student = _with_range(plain, self.guidance_range)
        copy_weights(plain, student, only_shared=True)
        return student

    def check_teacher(self, teacher: DiffusionModule) -> None:
        """Check that the student can learn the teacher's guided estimates."""
        super().check_teacher(teacher)
        if teacher.prediction != self.prediction:
            raise ValueError(
                f"prediction must be the teacher's, {teacher.prediction!r}, got "
                f"{self.prediction!r}: leave it out"
            )
        if teacher.guidance_interval is not None:
            raise ValueError(
                f"teacher {self.teacher_path!r} has guidance_interval "
                f"{[*teacher.guidance_interval]}, but its student is guided at every level: give "
                "what main.py export --model.guidance_interval null writes"
            )

    def check_weights(self, teacher: DiffusionModule) -> None:
        """Check that the teacher's network is the student's without its input more.

        Raises:
            ValueError: If it is not.
        """
        if teacher.denoiser.guidance_range is not None:
            raise ValueError(
                f"teacher {self.teacher_path!r} takes the weight of guidance already: begin a "
                "ladder, TRACT or a consistency model from it"
            )
        self.check_shapes(teacher.average.module, _with_range(self.network, None))

    def check_steps(self, teacher: DiffusionModule) -> None:
        """Check that the teacher knows all levels.

        Raises:
            ValueError: If it was distilled to some steps.
        """
        if teacher.distilled_steps is not None:
            raise ValueError(
                f"teacher {self.teacher_path!r} was distilled to {teacher.distilled_steps} steps "
                "and not trained at other levels: distil its guidance first, then its steps"
            )

    def load_weights_from(self, teacher: DiffusionModule) -> None:
        """Begin with a teacher's weights, and no guidance."""
        super().load_weights_from(teacher)
        for network in (self.network, self.average.module):
            nn.init.zeros_(network.get_parameter("guidance_in.linear.weight"))
        copy_weights(teacher.average.module, self.teacher)

    def settings_of_origin(self) -> dict[str, Any]:
        """The weights of guidance."""
        return {"guidance_range": self.guidance_range}

    # ---- what the method is -------------------------------------------------------------------

    def loss(self, denoiser: NetworkDenoiser, batch: Batch, generators: StepGenerators) -> Tensor:
        """Weighted squared error of the student's x against the guided one, `(B,)`."""
        x = batch[0]
        denoiser = draw_guidance(denoiser, len(x), generators.host)
        t = draw_levels(self.schedule, len(x), "uniform", generators.host)
        scales = self.schedule(t)
        z = q_sample(x, self.noise.draw(x.shape, scales, generators.device, x), scales)
        return output_distance(
            denoiser, z, t, self._guided(denoiser, z, t), weight=self.loss_weight
        )

    @torch.no_grad()
    def _guided(self, denoiser: NetworkDenoiser, z: Tensor, t: Tensor) -> Tensor:
        """The teacher's guided estimate of x, which is not clipped: it is linear in w."""
        label, weight = denoiser.label, denoiser.guidance_weight
        assert label is not None
        assert self.null_class is not None
        teacher = replace(self._denoiser(self.teacher), clip=False)
        both = teacher.condition(torch.cat([label, torch.full_like(label, self.null_class)]))
        with_class, without = both(torch.cat([z, z]), torch.cat([t, t])).x.chunk(2)
        return guided(with_class, without, torch.as_tensor(weight))

    # ---- Lightning ----------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "GuidanceDistillation":
        """Set the student's mode; the teacher is only evaluated."""
        super().train(mode)
        self.teacher.eval()
        return self

    def check_data(self, datamodule: L.LightningDataModule | None) -> None:
        """Check that there is a teacher."""
        self.read_teacher()


_UNGUIDED = (
    "teacher must know images without a class, which guidance needs: train one with null_class: "
    "true and label_dropout: 0.1, see docs/sampling.md"
)


def _with_range(network: nn.Module, weights: list[float] | None) -> nn.Module:
    """A new network of the same kind, whose input for guidance has this range, or which has none.

    Raises:
        ValueError: If it is not known how.
    """
    arguments = getattr(network, "init_args", {})
    if "guidance_range" not in arguments:
        raise ValueError(
            "teacher must have a network that can take the weight of guidance as an input, got "
            f"{type(network).__name__}: UNet and SongUNet can"
        )
    return type(network)(**{**arguments, "guidance_range": weights})
