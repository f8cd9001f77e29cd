"""Real images for the commands that encode: files, or the data module's validation images."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor

from ddim_pl.data.base import ImageDataModule
from ddim_pl.data.image_folder import decode
from ddim_pl.data.squares import Squaring
from ddim_pl.denoiser import Denoiser
from ddim_pl.evaluation.worker import Worker, check_images, check_label
from ddim_pl.images import from_uint8
from ddim_pl.samplers import Sampler
from ddim_pl.training import DiffusionModule

WHITE = 127
"""Grey levels above it are white in a mask."""


class RealImages(NamedTuple):
    """Images `(B, C, H, W)` in [-1, 1] and their classes `(B,)`, if the model has classes."""

    images: Tensor
    label: Tensor | None


def read_images(
    model: DiffusionModule,
    datamodule: L.LightningDataModule | None,
    files: Sequence[str],
    label: int | None,
    *,
    needs_label: bool = True,
) -> RealImages:
    """Read image files in the model's size, cropped and resized as the data module's own.

    Raises:
        ValueError: If a file cannot be read, the model's images are no squares, or it has classes
            and no label is given.
    """
    channels, height, width = model.image_shape
    if height != width:
        raise ValueError(f"image_shape must be square to read files, got {model.image_shape}")
    check_label(model, label)
    if needs_label and model.num_classes is not None and label is None:
        raise ValueError(
            f"label must be given with images: the model has {model.num_classes} classes, and a "
            "file does not tell its own"
        )
    squaring = _squaring_of(datamodule)
    pixels = torch.stack([decode(Path(file), height, channels, squaring) for file in files])
    return RealImages(
        from_uint8(pixels), None if label is None else torch.full((len(files),), label)
    )


def _squaring_of(datamodule: L.LightningDataModule | None) -> Squaring:
    return datamodule.squaring if isinstance(datamodule, ImageDataModule) else Squaring()


def read_mask(
    model: DiffusionModule, datamodule: L.LightningDataModule | None, mask: str
) -> Tensor:
    """What is known of an image, boolean `(H, W)`.

    Args:
        model: Gives the size.
        datamodule: Its images are cropped and resized as the mask is.
        mask: A name of `known_parts`, or an image file, white where known.

    Raises:
        ValueError: If it is neither, or leaves nothing to fill.
    """
    _, height, width = model.image_shape
    parts = known_parts(height, width)
    if mask in parts:
        return parts[mask]
    if not Path(mask).is_file():
        raise ValueError(f"mask must be one of {sorted(parts)} or an image file, got {mask!r}")
    if height != width:
        raise ValueError(f"image_shape must be square to read files, got {model.image_shape}")
    known = decode(Path(mask), height, 1, _squaring_of(datamodule))[0] > WHITE
    if known.all():
        raise ValueError(f"mask must have a black part, which is filled, got {mask!r} without")
    return known


def known_parts(height: int, width: int) -> dict[str, Tensor]:
    """Masks `(H, W)` as in [RePaint], section 5, by name; True where the image is known."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    inside = (rows >= height // 4) & (rows < height - height // 4)
    inside = inside & (columns >= width // 4) & (columns < width - width // 4)
    every = torch.ones(height, width, dtype=torch.bool)
    return {
        "half": every & (columns < width // 2),
        "expand": inside,
        "centre": ~inside,
        "lines": every & (rows % 2 == 0),
        "pixels": (rows % 2 == 0) & (columns % 2 == 0),
    }


def validation_images(
    worker: Worker, datamodule: L.LightningDataModule | None, choose: Callable[[Tensor], Tensor]
) -> RealImages:
    """Some images of the validation set; `choose` says which, given all classes `(N,)`.

    The classes are all 0 for a model without them.
    """
    source = worker.images(datamodule).val_set
    labels = source.labels(torch.arange(len(source)))
    has_classes = worker.model.num_classes is not None
    indices = choose(labels if has_classes else torch.zeros_like(labels))
    return RealImages(from_uint8(source.images(indices)), labels[indices] if has_classes else None)


def image_source(
    model: DiffusionModule,
    datamodule: L.LightningDataModule | None,
    files: Sequence[str] | None,
    label: int | None,
    num_images: int,
    *,
    needs_label: bool = True,
) -> Callable[[Worker], RealImages]:
    """Where a command's images come from: files, read and checked now, or the validation set.

    Raises:
        ValueError: As `read_images`, or if neither gives images.
    """
    if files:
        given = read_images(model, datamodule, files, label, needs_label=needs_label)
        return lambda worker: given
    if label is not None:
        raise ValueError(
            f"label must be left out without images, got {label}: the data has classes of its own"
        )
    check_images(datamodule)
    return lambda worker: validation_images(
        worker, datamodule, lambda labels: torch.arange(min(num_images, len(labels)))
    )


def unclipped(model: DiffusionModule, label: Tensor | None) -> Denoiser:
    """The model as a denoiser that can encode: without guidance, which magnifies its errors."""
    return model.conditioned(label).without_clipping()


def unclipped_sampler(model: DiffusionModule) -> Sampler:
    """The model's sampler, to encode with."""
    return replace(model.sampler, clip=None)


def check_deterministic(sampler: Sampler) -> None:
    """Check that a sampler can encode.

    Raises:
        ValueError: If it is stochastic.
    """
    if not sampler.encodes:
        raise ValueError(
            f"{sampler} cannot encode: use a deterministic sampler that takes rising levels, as "
            "--model.sampler DDIM --model.sampler.eta 0, or GammaQuantile for Gamma noise"
        )
