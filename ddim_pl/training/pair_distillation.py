"""What distillations on pairs share: a teacher's images and their latents, made beforehand."""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor, nn

from ddim_pl.checks import check_at_least, check_one_of
from ddim_pl.data.teacher_pairs import PAIR_SEED, PairStore, TeacherPairsDataModule
from ddim_pl.lightning_internals import datamodule_of
from ddim_pl.noise import latents
from ddim_pl.rng import share_noise
from ddim_pl.samplers import Sampler
from ddim_pl.samplers.gamma import default_sampler
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.timesteps import make_levels
from ddim_pl.training.base import DiffusionModule
from ddim_pl.training.distillation import Distillation
from ddim_pl.training.pairs import check_teacher_sampler, make_pairs_on_all, recipe_of
from ddim_pl.training.reduced import NetworkPrecision

NUM_EVALUATED = 50_000
"""Images of the module's own seed that no pair may share a latent with."""


class PairDistillation(Distillation):
    """A student that learns from pairs (latent, image) of a deterministic teacher.

    `fit` first makes the pairs that are missing; its data module is `TeacherPairsDataModule`.
    Subclasses say what is learnt from a batch, a `PairBatch`.

    Args:
        network: By default a copy of the teacher's; given when this module is loaded.
        schedule: By default the teacher's.
        teacher_sampler: Deterministic; by default that of the noise, which for Gaussian noise is
            DDIM with eta = 0.
        teacher_timesteps: Strategy of the teacher's levels.
        teacher_num_steps: The teacher's steps.
        teacher_guidance: Weight of the guidance that the teacher draws its images with, see
            `ddim_pl.guidance`; by default its own. The student draws such images without any.
        teacher_precision: The teacher's `sampling_precision` while it draws pairs; by default its
            own.
        pair_batch_size: Images in a batch while pairs are made, on each device.
        **kwargs: Arguments of `Distillation`. With `compile` the teacher that makes the pairs is
            compiled too. The pairs' latents have this module's `noise_source`; "philox" makes them
            on the device.

    Raises:
        ValueError: If the teacher cannot be read or does not fit, its sampler is stochastic, or an
            argument is out of range.
    """

    learns_guidance = True

    def __init__(
        self,
        network: nn.Module | None = None,
        schedule: NoiseSchedule | None = None,
        *,
        teacher_sampler: Sampler | None = None,
        teacher_timesteps: str = "quadratic",
        teacher_num_steps: int = 100,
        teacher_guidance: float | None = None,
        teacher_precision: NetworkPrecision | None = None,
        pair_batch_size: int = 500,
        **kwargs: Any,
    ) -> None:
        check_at_least(1, pair_batch_size=pair_batch_size)
        if teacher_precision is not None:
            check_one_of(NetworkPrecision, teacher_precision=teacher_precision)
        if teacher_sampler is not None:
            check_teacher_sampler(teacher_sampler)
        self.teacher_timesteps, self.teacher_num_steps = teacher_timesteps, teacher_num_steps
        super().__init__(network, schedule, **kwargs)
        self.teacher_sampler = teacher_sampler or default_sampler(self.noise)
        self.check_noise(self.teacher_sampler)
        if self.denoiser.guidance_range is not None:
            raise ValueError(
                f"teacher must not take the weight of guidance as an input for "
                f"{type(self).__name__}, whose pairs have one: give the teacher that it was "
                "distilled from, and teacher_guidance"
            )
        self.teacher_precision, self.pair_batch_size = teacher_precision, pair_batch_size
        self.teacher_guidance = teacher_guidance
        if teacher_guidance is None and self.read_guidance is not None:
            self.teacher_guidance = self.read_guidance
            self.record_arguments(teacher_guidance=self.read_guidance)
        _ = self.teacher_levels  # a wrong strategy or number of steps is an error now, not at fit

    @cached_property
    def teacher_levels(self) -> Tensor:
        """Levels that the teacher visits, `(S + 1,)`."""
        return make_levels(self.teacher_timesteps, self.schedule, self.teacher_num_steps)

    @property
    def teacher_steps(self) -> int:
        """Steps that the teacher takes."""
        return len(self.teacher_levels) - 1

    # ---- Lightning ----------------------------------------------------------------------------

    def check_data(self, datamodule: L.LightningDataModule | None) -> None:
        """Check that there are pairs of this teacher, or a place for them."""
        self._open(datamodule)

    def _open(self, data: L.LightningDataModule | None) -> tuple[DiffusionModule, PairStore]:
        """The teacher, and its pairs, of which some may not be made yet."""
        if not isinstance(data, TeacherPairsDataModule):
            raise ValueError(
                f"the data module of {type(self).__name__} must be "
                f"ddim_pl.data.teacher_pairs.TeacherPairsDataModule, got {type(data).__name__}"
            )
        self._check_latents(data)
        teacher = self.read_teacher()
        teacher.noise_source = self.noise_source
        if self.teacher_guidance is not None:
            if teacher.null_class is None:
                raise ValueError(
                    "teacher_guidance must be left out for a teacher without a null class, got "
                    f"{self.teacher_guidance}: train one with label_dropout"
                )
            teacher.guidance = self.teacher_guidance
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
        guided = self.teacher_guidance is not None
        return {
            **({"teacher_guidance": self.teacher_guidance} if guided else {}),
            "teacher_sampler": str(self.teacher_sampler),
            "teacher_num_steps": len(self.teacher_levels) - 1,
            "teacher_timesteps": Path(self.teacher_timesteps).name,
        }

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log no loss: it needs pairs, and a test has real images."""
