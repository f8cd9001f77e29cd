"""Distillation in a single step (Luhman & Luhman 2021).

A deterministic teacher maps each latent to an image; the student learns that map, `x = student(z,
T)`, by regression on pairs that were drawn beforehand.
"""

import dataclasses
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, cast, get_args

import lightning as L
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ddim_pl.data.teacher_pairs import (
    PAIR_SEED,
    PairBatch,
    PairStore,
    TeacherPairsDataModule,
    shards_of,
)
from ddim_pl.denoiser import NetworkDenoiser, TimeInput
from ddim_pl.noise import Noise, latents
from ddim_pl.prediction import PredictionType
from ddim_pl.rng import StepGenerators, share_generators
from ddim_pl.samplers import Sampler
from ddim_pl.samplers.gamma import default_sampler
from ddim_pl.schedules import LinearSchedule, NoiseSchedule
from ddim_pl.timesteps import make_levels
from ddim_pl.training.base import (
    Batch,
    DiffusionModule,
    Loss,
    LRSchedulerCallable,
    OptimizerCallable,
)
from ddim_pl.training.fingerprint import fingerprint
from ddim_pl.training.teacher import (
    check_same_kind,
    check_steps,
    copy_weights,
    load_teacher,
    set_dropout,
    student_network,
)

NUM_JUDGED = 50_000
"""Images of the module's own seed that no pair may share a latent with."""


class LuhmanDistillation(DiffusionModule):
    """Train a student that answers in one network evaluation.

    The student begins with the teacher's weights and sees the last level only. `fit` makes the
    pairs first, as far as they are missing; its data module is `TeacherPairsDataModule`.

    Args:
        network: By default a copy of the teacher's; a checkpoint of this module holds it here.
        schedule: By default the teacher's.
        noise: By default the teacher's.
        teacher: Checkpoint of the teacher.
        loss: "l2", half the squared error (Luhman & Luhman 2021, eq. 8), or "l1", the absolute
            one, as in their CIFAR-10 experiment.
        prediction: How the student's output is read; by default "residual", `x = z - F`, if the
            teacher predicts eps, as in the paper, and else as the teacher's.
        teacher_sampler: Deterministic; by default that of the noise, which for Gaussian noise is
            DDIM with eta = 0.
        teacher_timesteps: Strategy of the teacher's levels; the paper has "quadratic", and on LSUN
            "linear".
        teacher_num_steps: The teacher's steps; the paper has 100, and 50 on LSUN.
        pair_batch_size: Images in a batch while pairs are made, on each device.
        dropout: Dropout of the student.
        time_input: By default the teacher's.
        image_shape: By default the teacher's.
        clip: Clip the student's images to [-1, 1] when it samples; by default as the teacher does.
        optimizer: As in `DiffusionModule`; the paper has Adam with betas 0.9 and 0.98.
        lr_scheduler: As in `DiffusionModule`.
        warmup_steps: As in `DiffusionModule`.
        ema_decay: As in `DiffusionModule`; the paper has 0.995.
        compile: As in `DiffusionModule`; the teacher that draws the pairs is compiled too.
        seed: As in `DiffusionModule`.

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
        noise: Noise | None = None,
        teacher: str | None = None,
        loss: Loss = "l2",
        prediction: PredictionType | None = None,
        teacher_sampler: Sampler | None = None,
        teacher_timesteps: str = "quadratic",
        teacher_num_steps: int = 100,
        pair_batch_size: int = 500,
        dropout: float = 0.0,
        time_input: TimeInput | None = None,
        image_shape: tuple[int, int, int] | None = None,
        clip: bool | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        ema_decay: float = 0.995,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        if loss not in get_args(Loss):
            raise ValueError(f"loss must be one of {get_args(Loss)}, got {loss!r}")
        if pair_batch_size < 1:
            raise ValueError(f"pair_batch_size must be at least 1, got {pair_batch_size}")
        if teacher_sampler is not None:
            check_teacher_sampler(teacher_sampler)
        read = load_teacher(teacher) if teacher is not None and network is None else None
        if read is not None:
            # Under the arguments' own names, by which a checkpoint will hold what was found.
            network = student_network(read, dropout)
            schedule = schedule or read.schedule
            noise = noise or read.noise
            time_input = time_input or read.time_input
            prediction = prediction or _reading(read.prediction)
            image_shape = image_shape or read.image_shape
            clip = read.clip if clip is None else clip
        if network is None:
            raise ValueError("teacher must be given: a checkpoint to distil")
        if prediction == "eps":
            raise ValueError(
                "prediction must be 'residual', 'x' or 'v' for a student of one step, got 'eps': "
                "at the last level eps says nothing of the image"
            )
        set_dropout(network, dropout)
        last = float((schedule or LinearSchedule()).num_levels)
        super().__init__(
            network,
            schedule,
            noise=noise,
            prediction=prediction or "residual",
            time_input=time_input or "index",
            image_shape=image_shape,
            clip=True if clip is None else clip,
            timesteps=[last],
            num_steps=1,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            warmup_steps=warmup_steps,
            ema_decay=ema_decay,
            compile=compile,
            seed=seed,
        )
        self.teacher_path = teacher
        self.error = loss
        self.teacher_sampler = teacher_sampler or default_sampler(self.noise)
        self._check_noise(self.teacher_sampler)
        self.teacher_levels = make_levels(teacher_timesteps, self.schedule, teacher_num_steps)
        self.pair_batch_size = pair_batch_size
        if read is not None:
            check_same_kind(read, self, str(teacher))
            self.load_weights_from(read)

    def load_weights_from(self, teacher: DiffusionModule) -> None:
        """Take over a teacher's weights."""
        for network in (self.network, self.average.module):
            copy_weights(teacher.average.module, network)

    def loss(self, denoiser: NetworkDenoiser, batch: Batch, generators: StepGenerators) -> Tensor:
        """Error of the student's image against the teacher's, `(B,)`."""
        pairs = cast(PairBatch, batch)
        unclipped = dataclasses.replace(denoiser, clip=False)
        error = unclipped(pairs.latents, self.levels[0]).x - pairs.images
        each = error.abs() if self.error == "l1" else error.square() / 2
        return each.flatten(1).mean(1)

    # ---- Lightning ----------------------------------------------------------------------------

    def check_data(self, datamodule: L.LightningDataModule | None) -> None:
        """See that there are pairs of this teacher, or a place for them."""
        self._open(datamodule)

    def _open(self, data: L.LightningDataModule | None) -> tuple[DiffusionModule, PairStore]:
        """The teacher, and its pairs, of which some may not be made yet."""
        if not isinstance(data, TeacherPairsDataModule):
            raise ValueError(
                "LuhmanDistillation needs ddim_pl.data.teacher_pairs.TeacherPairsDataModule as "
                f"its data module, got {type(data).__name__}"
            )
        self._check_latents(data)
        if self.teacher_path is None:
            raise ValueError("teacher must be given for fit: a checkpoint to distil")
        teacher = load_teacher(self.teacher_path)
        check_same_kind(teacher, self, self.teacher_path)
        check_steps(teacher, len(self.teacher_levels) - 1, self.teacher_path)
        # Without a trainer, what it has by default.
        precision = "32-true" if data.trainer is None else str(data.trainer.precision)
        first = teacher.schedule(self.teacher_levels[0])
        store = data.open(
            recipe_of(teacher, self.teacher_sampler, self.teacher_levels, precision=precision),
            partial(latents, noise=teacher.noise, scales=first),
        )
        return teacher, store

    def _check_latents(self, data: TeacherPairsDataModule) -> None:
        """See that the student will be judged by images of other latents than it is taught."""

        def shares(pair_seed: int) -> bool:
            return share_generators(self.seed, NUM_JUDGED, pair_seed, count)

        count = data.num_pairs + data.num_validation
        if shares(data.pair_seed):
            candidates = range(PAIR_SEED, PAIR_SEED + 1000)
            other = next((seed for seed in candidates if not shares(seed)), PAIR_SEED)
            raise ValueError(
                f"pair_seed is {data.pair_seed}, of which {count} pairs share latents with the "
                f"first {NUM_JUDGED} images of seed {self.seed}, so that the student would be "
                f"judged by what it was trained on: give another, such as {other}"
            )

    def on_fit_start(self) -> None:
        """Make the pairs that are missing, and begin from the teacher if this is a new run."""
        teacher, store = self._open(self.trainer.datamodule)  # type: ignore[attr-defined]
        if self.trainer.ckpt_path is None:
            self.load_weights_from(teacher)
        bar = self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None
        teacher.to(self.device)
        if self.compile_network:  # in place, after the digest of its weights is taken
            teacher.average.module.compile()
        self.trainer.strategy.barrier("manifest read")  # by all, before one writes it
        if self.trainer.is_global_zero:
            store.begin()
        self.trainer.strategy.barrier("manifest written")  # before a shard is
        with self.trainer.precision_plugin.forward_context():
            make_pairs(
                store,
                teacher,
                self.teacher_sampler,
                self.teacher_levels,
                rank=self.trainer.global_rank,
                world_size=self.trainer.world_size,
                batch_size=self.pair_batch_size,
                progress=bar,
            )
        self.trainer.strategy.barrier("pairs made")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Leave the loss out: it is one of pairs, which a test does without."""


def check_teacher_sampler(sampler: Sampler) -> None:
    """See that a latent has one image.

    Raises:
        ValueError: If the sampler is stochastic.
    """
    if not sampler.is_deterministic:
        raise ValueError(
            f"the teacher's sampler must be deterministic, got {sampler}: with noise in it a "
            "latent has no one image; use DDIM with eta 0"
        )


def recipe_of(
    teacher: DiffusionModule, sampler: Sampler, levels: Tensor, *, precision: str
) -> dict[str, Any]:
    """All that a pair depends on but its seed and index; the precision is a trainer's."""
    return {
        "teacher": fingerprint(teacher),
        "sampler": str(sampler),
        "levels": levels.tolist(),
        "shape": list(teacher.image_shape),
        "num_classes": teacher.num_classes,
        "precision": precision,
    }


@torch.no_grad()
def make_pairs(
    store: PairStore,
    teacher: DiffusionModule,
    sampler: Sampler,
    levels: Tensor,
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 500,
    progress: bool = False,
) -> int:
    """Draw this rank's shards that are missing or damaged; return how many.

    A shard is written while the next one is drawn.

    Args:
        store: Where to.
        teacher: Draws with its averaged weights.
        sampler: Deterministic sampler.
        levels: Its levels, `(S + 1,)`.
        rank: This process.
        world_size: Number of processes.
        batch_size: Images in a batch.
        progress: Show a progress bar.

    Raises:
        OSError: If the disk is full; the shards before are kept.
    """
    missing = [shard for shard in shards_of(store, rank, world_size) if not store.is_whole(shard)]
    total = sum(len(store.indices(shard)) for shard in missing)
    with (
        ThreadPoolExecutor(1) as writer,
        tqdm(total=total, desc="teacher pairs", unit="pair", disable=not progress) as bar,
    ):
        writing: Future[None] | None = None
        for shard in missing:
            parts = []
            for batch in _batches(store.indices(shard), batch_size):
                images = teacher.sample(
                    batch, sampler=sampler, levels=levels, seed=store.recipe["seed"]
                )
                parts.append(images.float().cpu())
                bar.update(len(batch))
            if writing is not None:
                writing.result()  # raises what the writing raised
            writing = writer.submit(store.write, shard, torch.cat(parts))
        if writing is not None:
            writing.result()
    return len(missing)


def _batches(indices: range, size: int) -> Iterable[range]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


def _reading(teacher: PredictionType) -> PredictionType:
    return "residual" if teacher == "eps" else teacher
