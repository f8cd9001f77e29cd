"""Making pairs (latent, teacher's image) for single-step distillation."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import lightning as L
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddim_pl.data.teacher_pairs import PairStore
from ddim_pl.samplers import Sampler
from ddim_pl.training.base import DiffusionModule
from ddim_pl.training.fingerprint import fingerprint


def check_teacher_sampler(sampler: Sampler) -> None:
    """Check that a latent has one image.

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
    guidance = teacher.sampling_guidance
    recipe: dict[str, Any] = {
        # Before the digest, which differs with it, so that an error names it.
        "sampling_precision": teacher.sampling_precision,
        **({} if guidance is None or guidance.is_plain else {"guidance": str(guidance)}),
        "teacher": fingerprint(teacher),
        "sampler": str(sampler),
        "levels": levels.tolist(),
        "shape": list(teacher.image_shape),
        "num_classes": teacher.num_classes,
        "precision": precision,
    }
    if teacher.noise_source != "generators":  # folders of before have no such entry
        recipe["noise_source"] = teacher.noise_source
    return recipe


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

    A shard is written while the next one is sampled.

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
    shards = range(rank, store.num_shards, world_size)
    missing = [shard for shard in shards if not store.is_whole(shard)]
    total = sum(len(store.indices(shard)) for shard in missing)
    with (
        ThreadPoolExecutor(1) as writer,
        tqdm(total=total, desc="teacher pairs", unit="pair", disable=not progress) as bar,
    ):
        writing: Future[None] | None = None
        for shard in missing:
            parts = []
            indices = store.indices(shard)
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
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


def make_pairs_on_all(
    trainer: L.Trainer,
    store: PairStore,
    teacher: DiffusionModule,
    sampler: Sampler,
    levels: Tensor,
    *,
    batch_size: int,
    progress: bool,
) -> int:
    """Write the manifest, and call `make_pairs` in every process of a trainer."""
    trainer.strategy.barrier("manifest read")  # by all, before one writes it
    if trainer.is_global_zero:
        store.begin()
    trainer.strategy.barrier("manifest written")  # before a shard is
    with trainer.precision_plugin.forward_context():
        made = make_pairs(
            store,
            teacher,
            sampler,
            levels,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            batch_size=batch_size,
            progress=progress,
        )
    trainer.strategy.barrier("pairs made")
    return made
