"""CIFAR-10: 50,000 training and 10,000 test photographs of 32x32 pixels, held in memory."""

from typing import Any

from ddim_pl.data.base import ImageDataModule, TensorImages
from ddim_pl.data.torchvision_sets import load, prepare


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
        if not self.predicting:
            prepare("CIFAR10", self.root, self.download)

    def load(self, train: bool) -> TensorImages:
        """Return the training or the test split; errors as in `prepare_data`."""
        return load("CIFAR10", self.root, self.download, train)
