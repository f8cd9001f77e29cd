"""`main.py pairs`: the pairs of a teacher, ahead of a distillation in one step."""

from pathlib import Path

import lightning as L

from ddim_pl.checks import check_at_least
from ddim_pl.data.teacher_pairs import PAIR_SEED, PairStore
from ddim_pl.evaluation.worker import Worker, on_every_worker
from ddim_pl.training import DiffusionModule
from ddim_pl.training.pairs import check_teacher_sampler, make_pairs_on_all, recipe_of


def pairs(
    trainer: L.Trainer,
    model: DiffusionModule,
    ckpt_path: str | None = None,
    *,
    folder: str,
    num_pairs: int,
    shard_size: int = 10_000,
    pair_seed: int = PAIR_SEED,
    batch_size: int = 500,
) -> None:
    """Draw pairs (latent, image) with a teacher, for students that train on them.

    `fit` makes the pairs itself when they are missing; this makes them alone, with the sampler,
    timesteps and number of steps of `--model`, which must be those of the distillation. What is
    there already is kept.

    Args:
        trainer: Gives the devices.
        model: The teacher; its sampler must be deterministic.
        ckpt_path: Checkpoint, or "last".
        folder: Where to write.
        num_pairs: How many; as many as the data module's num_pairs and num_validation together.
        shard_size: Pairs in a file.
        pair_seed: Seed of the latents; that of the data module, by default the same.
        batch_size: Images in a batch, on each worker.

    Raises:
        ValueError: If the sampler is stochastic, a number does not fit, or the folder holds the
            pairs of another teacher.
    """
    check_at_least(1, num_pairs=num_pairs, shard_size=shard_size, batch_size=batch_size)
    check_at_least(0, pair_seed=pair_seed)
    check_teacher_sampler(model.sampler)

    def work(worker: Worker) -> None:
        precision = str(worker.trainer.precision)
        recipe = recipe_of(model, model.sampler, model.levels, precision=precision)
        recipe["seed"] = pair_seed
        store = PairStore(Path(folder), recipe, num_pairs=num_pairs, shard_size=shard_size)
        made = make_pairs_on_all(
            worker.trainer,
            store,
            model,
            model.sampler,
            model.levels,
            batch_size=batch_size,
            progress=worker.shows_progress,
        )
        if worker.is_first:
            print(f"{num_pairs} pairs are in {folder}; {made} shards were made now")

    on_every_worker(trainer, model, work, ckpt_path=ckpt_path)
