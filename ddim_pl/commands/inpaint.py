"""`main.py inpaint`: fill the unknown part of images ([RePaint])."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from ddim_pl.checks import check_at_least
from ddim_pl.commands.sources import RealImages, image_source, read_mask
from ddim_pl.evaluation.plots import label_rows
from ddim_pl.evaluation.worker import Earlier, Worker, on_every_worker
from ddim_pl.images import to_uint8, write_png
from ddim_pl.samplers import RePaint
from ddim_pl.training import DiffusionModule

GRID_IMAGES = 16


def inpaint(
    trainer: L.Trainer,
    model: DiffusionModule,
    datamodule: L.LightningDataModule | None = None,
    ckpt_path: str | None = None,
    *,
    images: Sequence[str] | None = None,
    mask: str = "half",
    label: int | None = None,
    num_images: int = 8,
    num_fills: int = 3,
    eta: float = 1.0,
    jump_length: int = 10,
    num_resamples: int = 10,
    seed: int | None = None,
    batch_size: int = 250,
    output: str | None = None,
) -> None:
    """Fill the masked part of images by RePaint, several times each.

    Writes each filling as `images/<image>-<filling>.png`, and `grid.png`: a row of images, one of
    what is known of them, and a row for each filling. The known part stays as it is. The steps are
    the checkpoint's own, or those of `--model.timesteps` and `--model.num_steps`; the paper takes
    250.

    Args:
        trainer: Gives the devices.
        model: The model.
        datamodule: Gives its validation images, unless `images` are given.
        ckpt_path: Checkpoint, or "last".
        images: Image files.
        mask: What is known: "half" (the left one), "expand" (a square in the centre), "centre"
            (all but that square), "lines" (every second row), "pixels" (one of four), or an image
            file, white where known.
        label: Class of `images`, if the model has classes.
        num_images: How many validation images; not used with `images`.
        num_fills: Fillings of each image.
        eta: Noise of the denoising steps; 1 is the paper's.
        jump_length: Steps of a jump back, the paper's j.
        num_resamples: Passes through each stretch, the paper's r; 1 is no jump.
        seed: Seed of the noise; by default that of training.
        batch_size: Images in a batch, on each worker.
        output: Folder to write to, without images of an earlier call; by default `inpaint` in the
            checkpoint's run, from which those are removed.

    Raises:
        ValueError: If the noise is not Gaussian, an image or the mask cannot be read, a number
            does not fit, or the folder holds the images of an earlier call.
    """
    check_at_least(1, num_images=num_images, num_fills=num_fills, batch_size=batch_size)
    check_at_least(0, seed=seed)
    if not model.noise.is_gaussian:
        raise ValueError(
            f"noise must be Gaussian for inpaint, got {model.noise}: give another checkpoint"
        )
    method = RePaint(eta, jump_length, num_resamples)
    method.num_evaluations(model.levels)  # says what is wrong
    known = read_mask(model, datamodule, mask)
    source = image_source(model, datamodule, images, label, num_images)

    def work(worker: Worker) -> None:
        old = ("images/*.png", "grid.png")
        earlier: Earlier = "remove" if output is None else "refuse"
        folder = worker.folder(output, "inpaint", results=old, earlier=earlier)
        real = source(worker)
        filled = _fill(worker, real, known, num_fills, method, batch_size, seed)
        if worker.is_first:
            _write(folder, real, known, filled)

    on_every_worker(trainer, model, work, ckpt_path=ckpt_path)


def _fill(
    worker: Worker,
    real: RealImages,
    known: Tensor,
    num_fills: int,
    method: RePaint,
    batch_size: int,
    seed: int | None,
) -> Tensor:
    """Fillings `(F, B, C, H, W)`, uint8, on all workers."""
    model, count = worker.model, len(real.images)
    filled = torch.zeros(num_fills * count, *model.image_shape, dtype=torch.int32)
    for some in worker.batches(range(num_fills * count), batch_size, "filling"):
        which = torch.tensor(list(some)) % count
        z, generators = model.latents(some, model.levels[0], seed=seed)
        label = None if real.label is None else real.label[which]
        denoiser = model.conditioned(label, sampling=True)
        with worker.precision():
            found = method(
                denoiser,
                z,
                model.levels,
                image=real.images[which],
                mask=known,
                generator=generators,
                progress=worker.shows_progress,
            )
        filled[list(some)] = to_uint8(found).cpu().int()
    return worker.all_reduce(filled).to(torch.uint8).unflatten(0, (num_fills, count))


def _write(folder: Path, real: RealImages, known: Tensor, filled: Tensor) -> None:
    """Write the fillings and the page of rows."""
    for number, images in enumerate(filled):
        for index, image in enumerate(images):
            write_png(image, folder / "images" / f"{index:06d}-{number}.png")
    masked = torch.where(known, real.images, 0)
    rows = {"images": to_uint8(real.images), "known": to_uint8(masked)}
    rows |= {f"filled {number + 1}": images for number, images in enumerate(filled)}
    pages = [images[:GRID_IMAGES] for images in rows.values()]
    label_rows(folder / "grid.png", list(rows), pages)
    print(f"{filled.shape[1]} images, filled {len(filled)} times each, are in {folder}")
