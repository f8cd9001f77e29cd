"""Distillation in a single step ([KD]).

A deterministic teacher maps each latent to an image; the student learns that map, `x = student(z,
T)`, by regression on pairs that were made beforehand.
"""

from functools import cached_property, partial
from typing import Any, cast

import lightning as L
from torch import Tensor, nn

from ddim_pl.checks import check_at_least, check_one_of
from ddim_pl.data.teacher_pairs import PAIR_SEED, PairBatch, PairStore, TeacherPairsDataModule
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.lightning_internals import datamodule_of
from ddim_pl.noise import latents
from ddim_pl.prediction import PredictionType
from ddim_pl.rng import StepGenerators, share_noise
from ddim_pl.samplers import Sampler
from ddim_pl.samplers.gamma import default_sampler
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.timesteps import make_levels
from ddim_pl.training.base import Batch, DiffusionModule, LossKind
from ddim_pl.training.distillation import Distillation
from ddim_pl.training.ema import Decay
from ddim_pl.training.pairs import check_teacher_sampler, make_pairs_on_all, recipe_of
from ddim_pl.training.reduced import NetworkPrecision

NUM_EVALUATED = 50_000
"""Images of the module's own seed that no pair may share a latent with."""


class LuhmanDistillation(Distillation):
    """Train a student that samples in one network evaluation.

    The student begins with the teacher's weights and sees the last level only. `fit` first makes
    the pairs that are missing; its data module is `TeacherPairsDataModule`.

    Args:
        network: By default a copy of the teacher's; given when this module is loaded.
        schedule: By default the teacher's.
        loss: "l2", half the squared error ([KD], eq. 8), or "l1", the absolute
            one, as in their CIFAR-10 experiment.
        prediction: How the student's output is read; by default "residual", `x = z - F`, if the
            teacher predicts eps, as in the paper, and else as the teacher's.
        teacher_sampler: Deterministic; by default that of the noise, which for Gaussian noise is
            DDIM with eta = 0.
        teacher_timesteps: Strategy of the teacher's levels; the paper has "quadratic", and on LSUN
            "linear".
        teacher_num_steps: The teacher's steps; the paper has 100, and 50 on LSUN.
        teacher_precision: The teacher's `sampling_precision` while it draws pairs; by default its
            own.
        pair_batch_size: Images in a batch while pairs are made, on each device.
        ema_decay: As in `DiffusionModule`; the paper has 0.995.
        **kwargs: Arguments of `Distillation`. The paper's optimiser is Adam with betas 0.9 and
            0.98. With `compile` the teacher that makes the pairs is compiled too. The pairs'
            latents have this module's `noise_source`; "philox" makes them on the device.

    Raises:
        ValueError: If the teacher cannot be read or does not fit, its sampler is stochastic, or an
            argument is out of range.
    """

    distilled_steps = 1

    def __init__(
        self,
        network: nn.Module | None = None,
        schedule: NoiseSchedule | None = None,
        *,
        loss: LossKind = "l2",
        prediction: PredictionType | None = None,
        teacher_sampler: Sampler | None = None,
        teacher_timesteps: str = "quadratic",
        teacher_num_steps: int = 100,
        teacher_precision: NetworkPrecision | None = None,
        pair_batch_size: int = 500,
        ema_decay: float | Decay = 0.995,
        **kwargs: Any,
    ) -> None:
        check_one_of(LossKind, loss=loss)
        check_at_least(1, pair_batch_size=pair_batch_size)
        if teacher_precision is not None:
            check_one_of(NetworkPrecision, teacher_precision=teacher_precision)
        if teacher_sampler is not None:
            check_teacher_sampler(teacher_sampler)
        _check_prediction(prediction)
        self.teacher_timesteps, self.teacher_num_steps = teacher_timesteps, teacher_num_steps
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
        self.teacher_sampler = teacher_sampler or default_sampler(self.noise)
        self.check_noise(self.teacher_sampler)
        self.teacher_precision, self.pair_batch_size = teacher_precision, pair_batch_size
        _ = self.teacher_levels  # a wrong strategy or number of steps is an error now, not at fit

    @staticmethod
    def prediction_from(teacher: PredictionType) -> PredictionType:
        """As the teacher's, but "residual" where the teacher predicts eps."""
        return "residual" if teacher == "eps" else teacher

    @cached_property
    def teacher_levels(self) -> Tensor:
        """Levels that the teacher visits, `(S + 1,)`."""
        return make_levels(self.teacher_timesteps, self.schedule, self.teacher_num_steps)

    @property
    def teacher_steps(self) -> int:
        """Steps that the teacher takes."""
        return len(self.teacher_levels) - 1

    def loss(self, denoiser: NetworkDenoiser, batch: Batch, generators: StepGenerators) -> Tensor:
        """Error of the student's image against the teacher's, `(B,)`."""
        pairs = cast(PairBatch, batch)
        x = denoiser.without_clipping()(pairs.latents, self.levels[0]).x
        error = x - pairs.images
        each = error.abs() if self.loss_kind == "l1" else error.square() / 2
        return each.flatten(1).mean(1)

    # ---- Lightning ----------------------------------------------------------------------------

    def check_data(self, datamodule: L.LightningDataModule | None) -> None:
        """Check that there are pairs of this teacher, or a place for them."""
        self._open(datamodule)

    def _open(self, data: L.LightningDataModule | None) -> tuple[DiffusionModule, PairStore]:
        """The teacher, and its pairs, of which some may not be made yet."""
        if not isinstance(data, TeacherPairsDataModule):
            raise ValueError(
                "the data module of LuhmanDistillation must be "
                f"ddim_pl.data.teacher_pairs.TeacherPairsDataModule, got {type(data).__name__}"
            )
        self._check_latents(data)
        teacher = self.read_teacher()
        teacher.noise_source = self.noise_source
        if self.teacher_precision is not None:
            teacher.sampling_precision = self.teacher_precision
        # Without a trainer, what it has by default.
        precision = "32-true" if data.trainer is None else str(data.trainer.precision)
        first = teacher.schedule(self.teacher_levels[0])
        store = data.open(
            recipe_of(teacher, self.teacher_sampler, self.teacher_levels, precision=precision),
            partial(latents, noise=teacher.noise, scales=first, compile=self.compiles),
        )
        return teacher, store

    def _check_latents(self, data: TeacherPairsDataModule) -> None:
        """Check that the student will be evaluated on other latents than it is trained on."""

        def shares(pair_seed: int) -> bool:
            return share_noise(self.noise_source, self.seed, NUM_EVALUATED, pair_seed, count)

        count = data.num_pairs + data.num_validation
        if shares(data.pair_seed):
            candidates = range(PAIR_SEED, PAIR_SEED + 1000)
            other = next((seed for seed in candidates if not shares(seed)), PAIR_SEED)
            raise ValueError(
                f"pair_seed must share no latents with the first {NUM_EVALUATED} images of seed "
                f"{self.seed}, on which the student is evaluated, got {data.pair_seed} for "
                f"{count} pairs: give another, such as {other}"
            )

    def on_fit_start(self) -> None:
        """Make the pairs that are missing, and begin from the teacher if this is a new run."""
        trainer = self.trainer
        teacher, store = self._open(datamodule_of(trainer))
        if trainer.ckpt_path is None:
            self.load_weights_from(teacher)
        teacher.to(self.device)
        if self.compiles:  # in place, after the digest of its weights is taken
            teacher.average.module.compile()
        make_pairs_on_all(
            trainer,
            store,
            teacher,
            self.teacher_sampler,
            self.teacher_levels,
            batch_size=self.pair_batch_size,
            progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
        )

    def settings_of_origin(self) -> dict[str, Any]:
        """How the teacher drew its pairs."""
        return {
            "teacher_sampler": str(self.teacher_sampler),
            "teacher_num_steps": len(self.teacher_levels) - 1,
            "teacher_timesteps": self.teacher_timesteps,
        }

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log no loss: it needs pairs, and a test has real images."""


def _check_prediction(prediction: PredictionType | None) -> None:
    if prediction == "eps":
        raise ValueError(
            "prediction must be 'residual', 'x' or 'v' for a student of one step, got 'eps': at "
            "the last level eps says nothing of the image"
        )
