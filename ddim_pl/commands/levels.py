"""`main.py levels`: the best levels for a checkpoint, see `ddim_pl.level_search`."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from torch import Tensor

from ddim_pl.checks import check_at_least
from ddim_pl.evaluation.worker import Worker, on_every_worker
from ddim_pl.files import check_writable
from ddim_pl.level_search import StepErrors, candidate_levels, cheapest_levels, one_step_errors
from ddim_pl.timesteps import save_levels
from ddim_pl.training import DiffusionModule

# Added to the model's seed: the latents are not those of the evaluation.
SEARCH_SEED = 1_000_003


def levels(
    trainer: L.Trainer,
    model: DiffusionModule,
    ckpt_path: str | None = None,
    *,
    num_steps: Sequence[int] = (5, 10, 20, 50),
    num_images: int = 256,
    batch_size: int = 64,
    output: str | None = None,
) -> None:
    """Search the levels at which a checkpoint's DDIM errs least, and write them as a small JSON.

    Give the file as `--model.timesteps FILE` to any command, with one of its numbers of steps.

    Args:
        trainer: Gives the devices.
        model: The model.
        ckpt_path: Checkpoint, or "last".
        num_steps: Numbers of steps to search for.
        num_images: Trajectories to measure on.
        batch_size: Trajectories in a batch, on each worker, of which all 200 states are kept.
        output: File to write; by default `levels.json` in the checkpoint's run.

    Raises:
        ValueError: If a number does not fit.
    """
    check_at_least(2, num_images=num_images)
    check_at_least(1, batch_size=batch_size)
    check_steps(model, num_steps)
    if output is not None and not output.endswith(".json"):
        raise ValueError(f"output must end in .json, got {output!r}")

    def work(worker: Worker) -> None:
        file = Path(output) if output else worker.folder(None, ".") / "levels.json"
        if worker.is_first:
            check_writable("output", file.parent)
        found = search_levels(worker, num_steps, num_images, batch_size)
        if worker.is_first:
            save_levels(file, model.schedule, found)
            for each in found:
                print(f"{len(each) - 1:4d} steps: " + ", ".join(f"{t:g}" for t in each.tolist()))
            print(f"They are in {file}")

    on_every_worker(trainer, model, work, ckpt_path=ckpt_path)


def check_steps(model: DiffusionModule, num_steps: Sequence[int]) -> None:
    """Check that there are enough candidate levels.

    Raises:
        ValueError: If not.
    """
    most = len(candidate_levels(model.schedule)) - 1
    for steps in num_steps:
        if not 1 <= steps <= most:
            raise ValueError(f"num_steps of adaptive levels must lie in [1, {most}], got {steps}")


def search_levels(
    worker: Worker, num_steps: Sequence[int], num_images: int, batch_size: int
) -> list[Tensor]:
    """The levels, the same on every device; each measures its share of the trajectories."""
    model = worker.model
    candidates = candidate_levels(model.schedule)
    errors = StepErrors.none(len(candidates))
    for batch in worker.batches(range(num_images), batch_size, "searching levels"):
        z, _ = model.latents(batch, candidates[0], seed=SEARCH_SEED + model.seed)
        denoiser = model.conditioned(model.label_of(batch), sampling=True)
        with worker.precision():
            more = one_step_errors(denoiser, z, candidates, progress=worker.shows_progress)
        errors = StepErrors(*(a + b for a, b in zip(errors, more, strict=True)))
    costs = StepErrors(*map(worker.all_reduce, errors)).costs()
    return worker.broadcast([cheapest_levels(costs, candidates, steps) for steps in num_steps])
