"""`main.py sample`: images of a checkpoint."""

from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor

from ddim_pl.commands.devices import Device, at_least, check_label, on_every_device
from ddim_pl.files import replacing
from ddim_pl.images import grid, to_uint8, write_png
from ddim_pl.training import DiffusionModule

GRID_IMAGES = 100


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

    Image i of a seed is the same for any number of devices and any batch size. The sampler is the
    checkpoint's own, or what is given as `--model.sampler`, `--model.timesteps` and
    `--model.num_steps`.

    Args:
        trainer: Gives the devices.
        model: The model.
        ckpt_path: Checkpoint, or "last".
        num_images: How many.
        first: Index of the first image, to go on where an earlier call ended, whose images stay.
        label: Class to draw; by default all in turn.
        seed: Seed of the images; by default that of training.
        batch_size: Images in a batch, on each device.
        png: Write each image as `<index>.png`.
        npz: Write `samples.npz` with uint8 images `arr_0` (N, H, W, C) and, where there are
            classes, labels `arr_1` (N,), the form of guided-diffusion and EDM.
        columns: Images in a row of `grid.png`, of the first 100 images.
        output: Folder to write to; by default `sample` in the checkpoint's run.

    Raises:
        ValueError: If an argument is out of range.
    """
    at_least(1, num_images=num_images, batch_size=batch_size)
    at_least(0, first=first, seed=seed or 0)
    check_label(model, label)
    indices = range(first, first + num_images)

    def work(device: Device) -> None:
        folder = device.folder(output, "sample")
        if device.is_first and output is None and first == 0:
            # The run's folder holds one set of images.
            for old in (*folder.glob("*.png"), *folder.glob("*.npz")):
                old.unlink()
        device.wait()
        shown = torch.zeros(min(num_images, GRID_IMAGES), *model.image_shape, dtype=torch.int32)
        kept: list[Tensor] = []
        for batch, images in device.draw(indices, batch_size, "drawing", label=label, seed=seed):
            pixels = to_uint8(images).cpu()
            for index, image in zip(batch, pixels, strict=True):
                if png:
                    write_png(image, folder / f"{index:06d}.png")
                if index - first < len(shown):
                    shown[index - first] = image
            kept += [pixels] if npz else []
        shown = device.sum(shown).to(torch.uint8)
        if npz:
            _write_npz(device, folder, kept, model, indices, label)
        if device.is_first:
            write_png(grid(shown, columns=columns), folder / "grid.png")
            print(f"{num_images} images are in {folder}")

    on_every_device(trainer, model, work, ckpt_path=ckpt_path)


def _write_npz(
    device: Device,
    folder: Path,
    kept: list[Tensor],
    model: DiffusionModule,
    indices: range,
    label: int | None,
) -> None:
    """Join the devices' images in the order of their indices."""
    mine = torch.cat([torch.empty(0, *model.image_shape, dtype=torch.uint8), *kept])
    if not device.is_first:
        np.save(folder / f".share-{device.rank}.npy", mine.numpy())
    device.wait()
    if not device.is_first:
        return
    images = np.empty((len(indices), *mine.shape[1:]), dtype=np.uint8)
    images[:: device.world_size] = mine.numpy()
    for rank in range(1, device.world_size):
        share = folder / f".share-{rank}.npy"
        images[rank :: device.world_size] = np.load(share)
        share.unlink()
    arrays = [images.transpose(0, 2, 3, 1)]
    labels = model.label_of(indices)
    if labels is not None:
        arrays.append(np.full(len(images), label) if label is not None else labels.numpy())
    with replacing(folder / "samples.npz") as part, part.open("wb") as file:
        np.savez(file, *arrays)
