"""`main.py interpolate`: what lies between two latents, or between two images."""

from collections.abc import Sequence
from functools import partial

import lightning as L
import torch
from torch import Tensor

from ddim_pl.checks import check_at_least
from ddim_pl.commands.sources import (
    RealImages,
    check_deterministic,
    read_images,
    unclipped,
    unclipped_sampler,
    validation_images,
)
from ddim_pl.evaluation.worker import Worker, check_images, check_label, on_every_worker
from ddim_pl.images import grid, to_uint8, write_png
from ddim_pl.inversion import encode, slerp
from ddim_pl.training import DiffusionModule


def interpolate(
    trainer: L.Trainer,
    model: DiffusionModule,
    datamodule: L.LightningDataModule | None = None,
    ckpt_path: str | None = None,
    *,
    images: Sequence[str] | None = None,
    from_data: bool = False,
    num_pairs: int = 8,
    num_points: int = 11,
    label: int | None = None,
    seed: int | None = None,
    batch_size: int = 250,
    output: str | None = None,
) -> None:
    """Sample from latents between two others, on the sphere: a row for each pair.

    The ends are two latents of the seed, or the latents of two images, in which case a row ends in
    the reconstructions of these. Writes `grid.png`.

    Args:
        trainer: Gives the devices.
        model: The model; its sampler must be deterministic.
        datamodule: Gives the images for `from_data`.
        ckpt_path: Checkpoint, or "last".
        images: Image files, an even number: the first with the second, and so on.
        from_data: Take the ends from the validation images, two of a class where there are
            classes.
        num_pairs: Rows; not used with `images`.
        num_points: Images in a row, the ends included.
        label: Class to sample; needed with `images` if the model has classes.
        seed: Seed of the latents; by default that of training.
        batch_size: Images in a batch, on each worker.
        output: Folder to write to; by default `interpolate` in the checkpoint's run.

    Raises:
        ValueError: If the sampler is stochastic, an image cannot be read, or the arguments do not
            fit one another.
    """
    check_at_least(1, num_pairs=num_pairs, batch_size=batch_size)
    check_at_least(2, num_points=num_points)
    check_at_least(0, seed=seed)
    check_label(model, label)
    check_deterministic(model.sampler)
    files = read_images(model, datamodule, _pairs(images), label) if images else None
    if from_data:
        if images:
            raise ValueError("images must be left out with from_data, which takes the data's")
        check_images(datamodule)

    def work(worker: Worker) -> None:
        folder = worker.folder(output, "interpolate", results=("grid.png",))
        real = files
        if from_data:
            real = validation_images(worker, datamodule, partial(_pair_classes, num_pairs))
        ends, labels = _ends(worker, real, num_pairs, label, seed)
        shown = _between(worker, ends, labels, num_points, batch_size, clip=real is None)
        if worker.is_first:
            write_png(grid(shown, columns=num_points), folder / "grid.png")
            print(f"{len(ends) // 2} rows of {num_points} images are in {folder / 'grid.png'}")

    on_every_worker(trainer, model, work, ckpt_path=ckpt_path)


def _between(
    worker: Worker,
    ends: Tensor,
    labels: Tensor | None,
    num_points: int,
    batch_size: int,
    *,
    clip: bool,
) -> Tensor:
    """All images of all rows, uint8, on all workers.

    Between images they are not clipped, so that the ends are their reconstructions.
    """
    model, count = worker.model, len(ends) // 2 * num_points
    shown = torch.zeros(count, *model.image_shape, dtype=torch.int32)
    for some in worker.batches(range(count), batch_size, "interpolating"):
        batch = torch.tensor(list(some))
        pair, point = batch // num_points, batch % num_points
        z = slerp(ends[2 * pair], ends[2 * pair + 1], point / (num_points - 1))
        classes = None if labels is None else labels[2 * pair]
        denoiser = model.conditioned(classes, sampling=True) if clip else unclipped(model, classes)
        sampler = model.sampler if clip else unclipped_sampler(model)
        with worker.precision():
            images = sampler(denoiser, z.to(model.device), model.levels)
        shown[batch] = to_uint8(images).cpu().int()
    return worker.all_reduce(shown).to(torch.uint8)


def _pairs(images: Sequence[str]) -> Sequence[str]:
    if len(images) % 2:
        raise ValueError(f"images must be an even number of files, in pairs, got {len(images)}")
    return images


def _pair_classes(num_pairs: int, labels: Tensor) -> Tensor:
    """Indices of two images of one class for each pair, `(2 P,)`, the classes in turn."""
    by_class = [torch.where(labels == c)[0][: 2 * num_pairs].tolist() for c in labels.unique()]
    rows = [members[2 * k : 2 * k + 2] for k in range(num_pairs) for members in by_class]
    chosen = [row for row in rows if len(row) == 2][:num_pairs]
    if not chosen:
        raise ValueError("from_data needs two validation images of one class; there are none")
    return torch.tensor(chosen).flatten()


def _ends(
    worker: Worker, real: RealImages | None, num_pairs: int, label: int | None, seed: int | None
) -> tuple[Tensor, Tensor | None]:
    """Latents `(2 P, C, H, W)`, neighbours paired, and their classes."""
    model = worker.model
    if real is not None:
        with worker.precision():
            z = encode(
                unclipped(model, real.label),
                real.images.to(model.device),
                model.levels,
                sampler=unclipped_sampler(model),
            )
        return z.cpu(), real.label
    first = list(range(num_pairs))
    # The partner of latent i is i + P, whatever its class: both ends have the class of the first.
    indices = [index for i in first for index in (i, i + num_pairs)]
    z = model.latents(indices, model.levels[0], seed=seed)[0].cpu()
    classes = model.label_of([i for i in first for _ in range(2)])
    if classes is not None and label is not None:
        classes = torch.full_like(classes, label)
    return z, classes
