"""CIFAR-10: 50,000 training and 10,000 test photographs of 32x32 pixels, held in memory."""

from http.client import HTTPException
from pathlib import Path

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
        download: Whether to download the archive where it is missing.
        batch_size: Images per device and step, at least 1.
        flip: Whether training images are mirrored left to right with probability 1/2.
        seed: Seed of the order of the training images, at least 0.
        num_workers: Processes which prepare batches; 0 is fastest for images held in memory.
        steps_per_epoch: Training batches per epoch; the whole batches of one pass if None.
        num_predict: Number of images to make when predicting, over all devices.
    """

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        *,
        batch_size: int = 128,
        flip: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        steps_per_epoch: int | None = None,
        num_predict: int = 64,
    ) -> None:
        super().__init__(
            batch_size,
            flip=flip,
            seed=seed,
            num_workers=num_workers,
            steps_per_epoch=steps_per_epoch,
            num_predict=num_predict,
        )
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        """Unpack the archive in `root`, downloading it first where that is allowed and needed.

        What a broken download leaves behind never passes for the archive: torchvision compares the
        MD5 sums of the archive and of every unpacked file.

        Raises:
            FileNotFoundError: If the data can be had neither from `root` nor from the network.
        """
        if self.predicting:
            return
        archive = Path(self.root).expanduser() / CIFAR10.filename
        # With a whole archive in place torchvision's download only unpacks, and needs no network.
        if self.download or check_integrity(archive, CIFAR10.tgz_md5):
            self._open(train=True, download=True)
        else:
            self._open(train=True, download=False)

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
                f"CIFAR-10 is not in root={self.root!r}, or not whole, and could not be fetched "
                f"({error}). Put {CIFAR10.filename} from {CIFAR10.url} (MD5 {CIFAR10.tgz_md5}) "
                f"into that folder; it is then unpacked without a network{offer}."
            ) from error
