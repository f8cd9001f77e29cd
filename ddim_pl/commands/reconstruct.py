"""`main.py reconstruct`: how well images come back from their latents ([DDIM], section 5.4)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ddim_pl.checks import check_at_least
from ddim_pl.commands.sources import (
    RealImages,
    check_deterministic,
    image_source,
    unclipped,
    unclipped_sampler,
)
from ddim_pl.evaluation.plots import label_rows
from ddim_pl.evaluation.tables import markdown, scatter, write_csv, write_text
from ddim_pl.evaluation.worker import Worker, on_every_worker
from ddim_pl.images import to_uint8
from ddim_pl.inversion import reconstruct as encode_and_sample
from ddim_pl.timesteps import has_own_length, make_levels
from ddim_pl.training import DiffusionModule

STEPS = (10, 20, 50, 100, 200, 500, 1000)
GRID_IMAGES = 16


def reconstruct(
    trainer: L.Trainer,
    model: DiffusionModule,
    datamodule: L.LightningDataModule | None = None,
    ckpt_path: str | None = None,
    *,
    images: Sequence[str] | None = None,
    label: int | None = None,
    num_images: int = 64,
    num_steps: Sequence[int] | None = None,
    timesteps: str = "trailing",
    batch_size: int = 250,
    output: str | None = None,
) -> None:
    """Encode images and sample them again, with more and more steps: table 2 of the DDIM paper.

    Writes `reconstruct.csv` and `reconstruct.md` with the mean squared error per dimension, images
    scaled to [0, 1] as in the paper, and `grid.png`: a row of images, then one for each number of
    steps.

    Args:
        trainer: Gives the devices.
        model: The model; its sampler must be deterministic.
        datamodule: Gives its validation images, unless `images` are given.
        ckpt_path: Checkpoint, or "last".
        images: Image files.
        label: Class of `images`, if the model has classes.
        num_images: How many validation images; not used with `images`.
        num_steps: Numbers of steps; by default 10, 20, 50, 100, 200, 500, 1000, as far as there
            are levels.
        timesteps: Strategy of the levels.
        batch_size: Images in a batch, on each worker.
        output: Folder to write to; by default `reconstruct` in the checkpoint's run.

    Raises:
        ValueError: If the sampler is stochastic, an image cannot be read, or a number does not
            fit.
    """
    check_at_least(1, num_images=num_images, batch_size=batch_size)
    check_deterministic(model.sampler)
    steps = num_steps or [n for n in STEPS if n <= model.schedule.num_levels]
    all_levels = [make_levels(timesteps, model.schedule, n, model.last_level) for n in steps]
    if has_own_length(timesteps):
        all_levels = all_levels[:1]
    source = image_source(model, datamodule, images, label, num_images)

    def work(worker: Worker) -> None:
        folder = worker.folder(output, "reconstruct", results=("grid.png", "reconstruct.*"))
        real = source(worker)
        shown = [("images", real.images)]
        rows = []
        for i, levels in enumerate(all_levels):
            count = len(levels) - 1
            text = f"{count} steps ({i + 1} of {len(all_levels)})"
            back = _there_and_back(worker, real, levels, batch_size, text)
            shown.append((f"{count} steps", back))
            error = ((back - real.images).double() / 2).square().flatten(1).mean(1)
            evaluations = 2 * model.sampler.num_evaluations(levels)
            row = {"steps": count, "network evaluations": evaluations}
            rows.append({**row, "error": float(error.mean()), "standard error": scatter(error)})
        if worker.is_first:
            text = f"{unclipped_sampler(model)}, {timesteps} levels"
            _write(folder, shown, rows, f"{text}, precision {worker.trainer.precision}")

    on_every_worker(trainer, model, work, ckpt_path=ckpt_path)


def _write(
    folder: Path, shown: list[tuple[str, Tensor]], rows: list[dict[str, Any]], text: str
) -> None:
    """Write the table and the page of images."""
    few = [to_uint8(images[:GRID_IMAGES]) for _, images in shown]
    label_rows(folder / "grid.png", [name for name, _ in shown], few)
    write_csv(folder / "reconstruct.csv", rows)
    text = (
        f"Mean squared error per dimension, [0, 1], of {len(shown[0][1])} images; {text}.\n\n"
        f"{markdown(rows)}"
    )
    write_text(folder / "reconstruct.md", text)
    print(f"\n{text}\nThe images are in {folder / 'grid.png'}")


def _there_and_back(
    worker: Worker, real: RealImages, levels: Tensor, batch_size: int, text: str
) -> Tensor:
    """Reconstructions of all images on all workers, `(B, C, H, W)` on the CPU."""
    model, back = worker.model, torch.zeros_like(real.images)
    for some in worker.batches(range(len(real.images)), batch_size, text):
        batch = list(some)
        denoiser = unclipped(model, None if real.label is None else real.label[batch])
        with worker.precision():
            x = real.images[batch].to(model.device)
            found = encode_and_sample(denoiser, x, levels, sampler=unclipped_sampler(model))
        back[batch] = found.float().cpu()
    return worker.all_reduce(back)
