"""Batches of any loader, as training takes them: float images in [-1, 1], then their labels.

The data modules of this package yield such batches. A loader of the user's own may yield a tensor
of images, a tuple or a list (images, labels), or a dict.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ddim_pl.data.base import Batch
from ddim_pl.data.teacher_pairs import PairBatch
from ddim_pl.images import from_uint8

NUM_CHECKED = 4
"""Batches whose values are looked at, for which the host waits for the device."""

LARGEST = 1.5
"""Largest absolute value of images that count as about [-1, 1]."""


class BatchReader:
    """Brings the batches of any loader into one form, and refuses what it cannot.

    Args:
        shape: (C, H, W) of the model's images.
        num_classes: Classes that the model is conditioned on; None if it takes no labels.
    """

    keys = ("images", "labels")
    """Where a dict holds the images and the labels; set it on the object for other names."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int | None) -> None:
        self.shape = shape
        self.num_classes = num_classes
        self._seen = 0
        self._least = torch.inf

    def __call__(self, batch: Any) -> tuple[Any, ...]:
        """Return a batch as a tuple: images `(B, C, H, W)` in [-1, 1], labels, and what follows.

        uint8 images are converted. A `Batch` or a `PairBatch` stays what it is.

        Raises:
            ValueError: If the images are not float or uint8 `(B, C, H, W)` of the model's shape;
                if float ones are not finite or far outside [-1, 1], which is looked at in the
                first batches; or if a model with classes gets no labels of its classes.
        """
        parts = self._parts(batch)
        given = parts[0]
        _check_images(given, self.shape)
        self._check_labels(parts)
        # Images of this package's modules were uint8, and a teacher's may lie anywhere.
        if not isinstance(batch, Batch | PairBatch) and self._seen < NUM_CHECKED:
            self._check_values(parts)
        if isinstance(batch, Batch | PairBatch) and given.is_floating_point():
            return batch
        images = from_uint8(given) if given.dtype == torch.uint8 else given
        if images.dtype == torch.float64:  # as numpy makes them; a double trainer sets the default
            images = images.to(torch.get_default_dtype())
        return (images, *parts[1:])

    def _parts(self, batch: Any) -> tuple[Any, ...]:
        if isinstance(batch, Tensor):
            return (batch,)
        if isinstance(batch, Mapping):
            if self.keys[0] not in batch:
                raise ValueError(
                    f"batch must hold {self.keys[0]!r}, got a dict of "
                    f"{', '.join(map(repr, batch)) or 'nothing'}: rename it in the loader, or set "
                    "model.read_batch.keys to its names of the images and the labels"
                )
            return tuple(batch[key] for key in self.keys if key in batch)
        if isinstance(batch, tuple | list) and batch:
            return tuple(batch)
        raise ValueError(
            "batch must be a tensor of images, a tuple (images, labels) or a dict, got "
            f"{type(batch).__name__}: change what the loader yields"
        )

    def _check_labels(self, parts: tuple[Any, ...]) -> None:
        if self.num_classes is None:
            return
        labels = parts[1] if len(parts) > 1 else None
        if not isinstance(labels, Tensor):
            raise ValueError(
                f"batch must hold labels for a model of {self.num_classes} classes, got "
                f"{type(labels).__name__}: yield (images, labels), or leave num_classes out of "
                "the network"
            )
        whole = not (labels.is_floating_point() or labels.dtype == torch.bool)
        if not whole or labels.shape != parts[0].shape[:1]:
            raise ValueError(
                f"labels must be whole numbers of shape ({len(parts[0])},), got {labels.dtype} of "
                f"shape {tuple(labels.shape)}: give the number of each image's class"
            )

    def _check_values(self, parts: tuple[Any, ...]) -> None:
        """Check what only the values show, in the first batches."""
        self._seen += 1
        images = parts[0]
        if self.num_classes is not None:
            low, high = (int(each) for each in parts[1].aminmax())
            if not 0 <= low <= high < self.num_classes:
                raise ValueError(
                    f"labels must lie in [0, {self.num_classes - 1}], got {low} to {high}: count "
                    "the classes from 0, and set num_classes of the network to their number"
                )
        if images.dtype == torch.uint8:
            self._least = -1.0
            return
        least, most = (float(each) for each in images.aminmax())
        if not max(-least, most) <= LARGEST:  # also if one is not a number
            raise ValueError(
                f"images must lie in about [-1, 1], got {least:g} to {most:g}: rescale them in "
                "the loader, or yield uint8"
            )
        self._least = min(self._least, least)
        if self._seen == NUM_CHECKED and self._least >= 0:
            rank_zero_warn(
                f"images must lie in [-1, 1], but no value of the first {NUM_CHECKED} batches is "
                "below 0: if theirs is [0, 1], scale them by 2 * x - 1, or yield uint8"
            )


def _check_images(images: Any, shape: tuple[int, int, int]) -> None:
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images must be a tensor (B, {', '.join(map(str, shape))}), got "
            f"{type(images).__name__}: yield the images of a batch first, as one tensor"
        )
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(
            f"images must be float in [-1, 1] or uint8, got {images.dtype}: convert them in the "
            "loader"
        )
    got = tuple(images.shape)
    if len(got) == 4 and got[1:] == shape and got[0] > 0:
        return
    channels, height, width = shape
    if got == shape:
        remedy = "give the DataLoader a batch_size, or unsqueeze(0)"
    elif got[1:] == (height, width) and channels == 1:
        remedy = "insert the channel with unsqueeze(1)"
    elif got[1:] == (height, width, channels):
        remedy = "move the channels to the front with permute(0, 3, 1, 2)"
    else:
        remedy = "change the images, or in_channels and image_size of the network"
    wanted = ", ".join(map(str, shape))
    raise ValueError(f"images must have the model's shape (B, {wanted}), got {got}: {remedy}")
