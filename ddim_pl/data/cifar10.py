"""CIFAR-10: 50,000 training and 10,000 test photographs of 32x32 pixels, held in memory."""

from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from ddim_pl.data.base import ImageDataModule, TensorImages

NUM_CLASSES = 10


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10 as uint8 images (3, 32, 32) of 10 classes, validated on its test split.

    Without a network, put `cifar-10-python.tar.gz` into `root`; it is checked and unpacked there.

    Args:
        root: Folder of the archive and of the unpacked files.
        download: Whether to download the archive if it is missing.
        flip: Whether training images are mirrored left to right with probability 1/2.
        **kwargs: Arguments of `ImageDataModule`.
    """

    def __init__(
        self, root: str = "data", download: bool = True, *, flip: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(flip=flip, **kwargs)
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        """Unpack the archive in `root`, downloading it first if that is needed and allowed.

        torchvision compares the MD5 sums of the archive and of every unpacked file, so an
        incomplete download is never used.

        Raises:
            FileNotFoundError: If neither `root` nor the network has the data.
        """
        if self.predicting:
            return
        archive = Path(self.root).expanduser() / CIFAR10.filename
        # If the archive is complete, torchvision's download only unpacks and needs no network.
        download = self.download or check_integrity(archive, CIFAR10.tgz_md5)
        self._open(train=True, download=download)

    def load(self, train: bool) -> TensorImages:
        """Return the training or the test split; errors as in `prepare_data`."""
        source = self._open(train, download=False)
        images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        return TensorImages(images, torch.tensor(source.targets), NUM_CLASSES)

    def _open(self, train: bool, download: bool) -> CIFAR10:
        try:
            return CIFAR10(self.root, train=train, download=download)
        # torchvision raises RuntimeError for missing files and for a wrong MD5 sum.
        except (OSError, HTTPException, RuntimeError) as error:
            offer = "" if self.download else ", or set `download: true`"
            raise FileNotFoundError(
                f"root must hold a complete CIFAR-10, got {self.root!r}, and it could not be "
                f"downloaded ({error}): put {CIFAR10.filename} from {CIFAR10.url} (MD5 "
                f"{CIFAR10.tgz_md5}) there, which is then unpacked without a network{offer}"
            ) from error
