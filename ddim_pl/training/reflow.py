"""Rectified flow on a teacher's pairs ([Reflow]).

A denoiser learns from images and noise that were drawn apart, so that many paths cross at a state,
and its flow bends. Here noise and image are the latent and the image to which a teacher's flow
leads from it: paths that seldom cross. The model of these pairs has straighter paths, which fewer
steps follow.

The paper has states `(1 - s) x + s eps`. In the coordinates `z / alpha` those of every schedule
are straight lines between the two, and a DDIM step follows one: so schedule, network and
prediction stay the teacher's. In these terms the paper's loss has the weight `(1 + sqrt(SNR))^2`
on the squared error of x, near the default "snr_plus_one".
"""

from typing import Any, cast

from torch import Tensor, nn

from ddim_pl.checks import check_one_of
from ddim_pl.data.teacher_pairs import PairBatch
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.prediction import LossWeight, check_loss_weight
from ddim_pl.rng import StepGenerators
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.training.base import Batch
from ddim_pl.training.ddpm import LevelSampling, denoising_loss, draw_levels
from ddim_pl.training.pair_distillation import PairDistillation


class RectifiedFlow(PairDistillation):
    """Straighten the paths of a teacher.

    The student begins with the teacher's weights, knows all levels, and may be sampled with any
    number of steps, or straightened again, or distilled as any other teacher.

    Args:
        network: By default a copy of the teacher's; given when this module is loaded.
        schedule: By default the teacher's.
        teacher_timesteps: Strategy of the teacher's levels, which should begin at the last one.
        loss_weight: Weight on the squared error of x, of `ddim_pl.prediction.LossWeight`; by
            default "snr_plus_one", or "snr" where the student predicts eps.
        level_sampling: "uniform" or "antithetic", see `ddim_pl.training.ddpm.draw_levels`.
        **kwargs: Arguments of `PairDistillation`.

    Raises:
        ValueError: As in `PairDistillation`.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        schedule: NoiseSchedule | None = None,
        *,
        teacher_timesteps: str = "linear",
        loss_weight: LossWeight | None = None,
        level_sampling: LevelSampling = "uniform",
        **kwargs: Any,
    ) -> None:
        check_one_of(LevelSampling, level_sampling=level_sampling)
        super().__init__(network, schedule, teacher_timesteps=teacher_timesteps, **kwargs)
        own: LossWeight = "snr" if self.prediction == "eps" else "snr_plus_one"
        self.loss_weight, self.level_sampling = loss_weight or own, level_sampling
        check_loss_weight(self.prediction, self.loss_weight)

    def loss(self, denoiser: NetworkDenoiser, batch: Batch, generators: StepGenerators) -> Tensor:
        """Denoising loss of each image at a random level, with its own latent as noise, `(B,)`."""
        pairs = cast(PairBatch, batch)
        count = len(pairs.images)
        t = draw_levels(self.schedule, count, self.level_sampling, generators.host)
        return denoising_loss(denoiser, pairs.images, t, pairs.latents, weight=self.loss_weight)
