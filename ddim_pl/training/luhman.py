"""Distillation in a single step ([KD]).

A deterministic teacher maps each latent to an image; the student learns that map, `x = student(z,
T)`, by regression on pairs that were made beforehand.
"""

from typing import Any, cast

from torch import Tensor, nn

from ddim_pl.checks import check_one_of
from ddim_pl.data.teacher_pairs import PairBatch
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.prediction import PredictionType
from ddim_pl.rng import StepGenerators
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.training.base import Batch, LossKind
from ddim_pl.training.ema import Decay
from ddim_pl.training.pair_distillation import PairDistillation


class LuhmanDistillation(PairDistillation):
    """Train a student that samples in one network evaluation.

    The student begins with the teacher's weights and sees the last level only. The paper's teacher
    takes 100 "quadratic" steps, and 50 "linear" ones on LSUN.

    Args:
        network: By default a copy of the teacher's; given when this module is loaded.
        schedule: By default the teacher's.
        loss: "l2", half the squared error ([KD], eq. 8), or "l1", the absolute
            one, as in their CIFAR-10 experiment.
        prediction: How the student's output is read; by default "residual", `x = z - F`, if the
            teacher predicts eps, as in the paper, and else as the teacher's.
        ema_decay: As in `DiffusionModule`; the paper has 0.995.
        **kwargs: Arguments of `PairDistillation`. The paper's optimiser is Adam with betas 0.9 and
            0.98.

    Raises:
        ValueError: As in `PairDistillation`, or if the prediction says nothing at the last level.
    """

    distilled_steps = 1

    def __init__(
        self,
        network: nn.Module | None = None,
        schedule: NoiseSchedule | None = None,
        *,
        loss: LossKind = "l2",
        prediction: PredictionType | None = None,
        ema_decay: float | Decay = 0.995,
        **kwargs: Any,
    ) -> None:
        check_one_of(LossKind, loss=loss)
        _check_prediction(prediction)
        super().__init__(
            network,
            schedule,
            prediction=prediction,
            ema_decay=ema_decay,
            sampler=None,
            timesteps="linear",
            num_steps=1,
            last_level=0.0,
            **kwargs,
        )
        self.loss_kind = loss

    @staticmethod
    def prediction_from(teacher: PredictionType) -> PredictionType:
        """As the teacher's, but "residual" where the teacher predicts eps."""
        return "residual" if teacher == "eps" else teacher

    def loss(self, denoiser: NetworkDenoiser, batch: Batch, generators: StepGenerators) -> Tensor:
        """Error of the student's image against the teacher's, `(B,)`."""
        pairs = cast(PairBatch, batch)
        x = denoiser.without_clipping()(pairs.latents, self.levels[0]).x
        error = x - pairs.images
        each = error.abs() if self.loss_kind == "l1" else error.square() / 2
        return each.flatten(1).mean(1)


def _check_prediction(prediction: PredictionType | None) -> None:
    if prediction == "eps":
        raise ValueError(
            "prediction must be 'residual', 'x' or 'v' for a student of one step, got 'eps': at "
            "the last level eps says nothing of the image"
        )
