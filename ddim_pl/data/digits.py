"""Scikit-learn's digits: 1,797 scans of 8x8 pixels that need no download.

Scikit-learn is imported where digits are read: every command imports this module.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim_pl.data.base import ImageDataModule, TensorImages

NUM_CLASSES = 10


def digits_arrays() -> tuple[Tensor, Tensor]:
    """Return all digits: uint8 images (1797, 1, 8, 8) over 0 to 255, int64 labels (1797,)."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    # A scan counts the inked pixels of 4x4 blocks, so it takes the 17 values 0 to 16.
    images = np.round(scans.reshape(-1, 1, 8, 8) * 255 / 16).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def digits_split() -> tuple[Tensor, Tensor]:
    """Return the indices, ascending, of 1,437 training and 360 held-out digits.

    The split is fixed and stratified by class. The data module and the feature extractor of
    `ddim_pl.metrics.digits` hold out the same images.
    """
    from sklearn.model_selection import train_test_split

    _, labels = digits_arrays()
    train, heldout = train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=labels.numpy()
    )
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(heldout))


class DigitsDataModule(ImageDataModule):
    """Digits as uint8 images (1, 8, 8) of 10 classes, never mirrored.

    Args:
        batch_size: Images per device and step, at least 1.
        holdout: False trains and validates on all 1,797 images, as is usual where a Fréchet
            distance is measured against the training images. True trains on the 1,437 training
            images of `digits_split` and validates on the 360 others.
        **kwargs: Arguments of `ImageDataModule`, without `flip`.
    """

    def __init__(self, batch_size: int = 128, *, holdout: bool = False, **kwargs: Any) -> None:
        super().__init__(batch_size, flip=False, **kwargs)
        self.holdout = holdout

    def load(self, train: bool) -> TensorImages:
        """Return all digits, or with `holdout` one part of `digits_split`."""
        images, labels = digits_arrays()
        if self.holdout:
            train_indices, heldout_indices = digits_split()
            chosen = train_indices if train else heldout_indices
            images, labels = images[chosen], labels[chosen]
        return TensorImages(images, labels, NUM_CLASSES)
