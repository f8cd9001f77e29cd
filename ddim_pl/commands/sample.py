"""`main.py sample`: images of a checkpoint."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from ddim_pl.checks import check_at_least
from ddim_pl.evaluation.manifest import write_manifest
from ddim_pl.evaluation.worker import Worker, check_label, on_every_worker
from ddim_pl.files import replacing
from ddim_pl.images import PngWriter, grid, to_uint8, write_png
from ddim_pl.training import DiffusionModule

GRID_IMAGES = 100
MOST_COLUMNS = 20


def sample(
    trainer: L.Trainer,
    model: DiffusionModule,
    ckpt_path: str | None = None,
    *,
    num_images: int = 64,
    first: int = 0,
    label: int | None = None,
    seed: int | None = None,
    batch_size: int = 250,
    png: bool = True,
    npz: bool = False,
    columns: int | None = None,
    output: str | None = None,
) -> None:
    """Draw images with a checkpoint's averaged weights: a grid, single PNGs, an NPZ.

    `manifest.json` beside them says how they were made.

    Image i of a seed is the same for any number of devices and any batch size. The sampler is the
    checkpoint's own, or what is given as `--model.sampler`, `--model.timesteps` and
    `--model.num_steps`. With the `split_levels` of `DEQ` or `ParaDiGMS` the devices share the
    levels of each image, otherwise the images.

    Args:
        trainer: Gives the devices.
        model: The model.
        ckpt_path: Checkpoint, or "last".
        num_images: How many.
        first: Index of the first image, to continue an earlier call, whose images stay; it is
            also in the names of the grid, the NPZ and the manifest.
        label: Class to sample; by default all in turn.
        seed: Seed of the images; by default that of training.
        batch_size: Images in a batch, on each worker.
        png: Write each image as `images/<index>.png`.
        npz: Write `samples.npz` with uint8 images `arr_0` (N, H, W, C) and, where there are
            classes, labels `arr_1` (N,), the form of guided-diffusion and EDM.
        columns: Images in a row of `grid.png`, of the first 100 images; by default one for each of
            up to 20 classes, else the grid is about square.
        output: Folder to write to, without images of an earlier call unless `first` continues it;
            by default `sample` in the checkpoint's run, from which those are removed.

    Raises:
        ValueError: If an argument is out of range, or the folder holds the images of another call.
    """
    check_at_least(1, num_images=num_images, batch_size=batch_size, columns=columns)
    check_at_least(0, first=first, seed=seed)
    check_label(model, label)
    indices = range(first, first + num_images)
    part = f"-from-{first:06d}" if first else ""
    recorded: dict[str, Any] = {"seed": seed, "label": label}
    recorded |= {"first": first, "num_images": num_images}

    def work(worker: Worker) -> None:
        folder = _folder(worker, output, first)
        if worker.is_first:
            file = folder / f"manifest{part}.json"
            write_manifest(file, worker.trainer, model, ckpt_path, **recorded)
        worker, writes = _sharing(worker, model)
        found = worker.sample_batches(indices, batch_size, "sampling", label=label, seed=seed)
        keep = indices if npz else indices[:GRID_IMAGES]
        kept = _write_each(found, folder if png and writes else None, keep)
        mine = torch.cat([torch.empty(0, *model.image_shape, dtype=torch.uint8), *kept])
        shown = _first_images(worker, mine, min(num_images, GRID_IMAGES))
        if npz and writes:
            _write_npz(worker, folder / f"samples{part}.npz", mine, model.label_of(indices), label)
        if worker.is_first:
            wide = columns or _columns_of(model, label)
            write_png(grid(shown, columns=wide), folder / f"grid{part}.png")
            print(f"{num_images} images are in {folder}")

    on_every_worker(trainer, model, work, ckpt_path=ckpt_path)


def _columns_of(model: DiffusionModule, label: int | None) -> int | None:
    """A column for each class, where images have them in turn."""
    few = model.num_classes is not None and model.num_classes <= MOST_COLUMNS
    return model.num_classes if few and label is None else None


def _folder(worker: Worker, output: str | None, first: int) -> Path:
    """Where to write: the run's own folder holds one set of images, another may be continued."""
    old: tuple[str, ...] = (f"images/{first:06d}.png",)
    if first == 0:
        old = ("images/*.png", "*.png", "*.npz", "manifest*.json")
    alone = output is None and first == 0
    return worker.folder(output, "sample", results=old, earlier="remove" if alone else "refuse")


def _sharing(worker: Worker, model: DiffusionModule) -> tuple[Worker, bool]:
    """The worker with its share of the images, all where devices share levels; if it writes."""
    if getattr(model.sampler, "split_levels", False):
        return worker.together(), worker.is_first
    return worker, True


def _write_each(
    found: Iterable[tuple[Sequence[int], Tensor]], folder: Path | None, keep: range
) -> list[Tensor]:
    """Write images as they are drawn, if there is a folder; return those to keep, uint8."""
    kept: list[Tensor] = []
    with PngWriter() as writer:
        for batch, images in found:
            pixels = to_uint8(images).cpu()
            for index, image in zip(batch, pixels, strict=True):
                if folder is not None:
                    writer.write(image, folder / "images" / f"{index:06d}.png")
            kept.append(pixels[: sum(index in keep for index in batch)])
    return kept


def _first_images(worker: Worker, mine: Tensor, count: int) -> Tensor:
    """The first images of all workers together, uint8 `(count, C, H, W)`."""
    first = torch.zeros(count, *mine.shape[1:], dtype=torch.int32)
    places = range(count)[worker.rank :: worker.world_size]
    first[list(places)] = mine[: len(places)].int()
    return worker.all_reduce(first).to(torch.uint8)


def _write_npz(
    worker: Worker, file: Path, mine: Tensor, labels: Tensor | None, label: int | None
) -> None:
    """Join the workers' images in the order of their indices, with their classes."""
    if not worker.is_first:
        np.save(file.parent / f".share-{worker.rank}.npy", mine.numpy())
    worker.barrier()
    if not worker.is_first:
        return
    files = [file.parent / f".share-{rank}.npy" for rank in range(1, worker.world_size)]
    shares = [mine.numpy(), *(np.load(each) for each in files)]
    images = np.empty((sum(map(len, shares)), *mine.shape[1:]), dtype=np.uint8)
    for rank, share in enumerate(shares):
        images[rank :: worker.world_size] = share
    for path in files:
        path.unlink()
    arrays = [images.transpose(0, 2, 3, 1)]
    if labels is not None:
        arrays.append(np.full(len(images), label) if label is not None else labels.numpy())
    with replacing(file) as part, part.open("wb") as stream:
        np.savez(stream, *arrays)
