"""CelebA: 202,599 aligned photographs of faces, cut to the square that DDIM's experiments have."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torchvision.datasets import CelebA
from torchvision.datasets.utils import (
    check_integrity,
    download_file_from_google_drive,
    extract_archive,
)

from ddim_pl.data.base import ImageDataModule, ImageSet
from ddim_pl.data.image_folder import Box, image_set

HOME = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
ARCHIVE = "img_align_celeba.zip"
IMAGES = "img_align_celeba"
PARTITION = "list_eval_partition.txt"
# Numbers of the splits in the partition file; its third is "test".
TRAIN, VALID = "0", "1"
# 128x128 pixels around column 89, row 121, of 178x218.
FACE: Box = (89 - 64, 121 - 64, 89 + 64, 121 + 64)


class CelebADataModule(ImageDataModule):
    """CelebA as uint8 images (3, `image_size`, `image_size`) of one class.

    Trains on the 162,770 images of the "train" split and validates on the 19,867 of "valid". Of an
    aligned image the square FACE is kept and reduced by a bilinear filter without aliasing, as in
    the code of Song et al. 2021. At 64 pixels the set takes 2 GB of memory in each process; above
    93 it exceeds 4 GiB and is decoded as it is needed, see `image_set`: set `num_workers` then.

    Without a network, or without the package gdown that the download needs, put
    `img_align_celeba.zip` and `list_eval_partition.txt` into the folder `celeba` of `root`; they
    are checked there and the archive is unpacked.

    Args:
        root: Folder of the folder `celeba`.
        download: Whether to download the two files where they are missing.
        image_size: Side of the square images, at least 1; above 128 enlarges them.
        batch_size: Images per device and step, at least 1.
        flip: Whether training images are mirrored left to right with probability 1/2.
        seed: Seed of the order of the training images, at least 0.
        num_workers: Processes which prepare batches; 0 is fastest for images held in memory.
        steps_per_epoch: Training batches per epoch; the whole batches of one pass if None.
        num_predict: Number of images to make when predicting, over all devices.

    Raises:
        ValueError: If a number is out of range; at `setup`, if an image is broken.
    """

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        *,
        image_size: int = 64,
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
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; it must be at least 1")
        self.root = root
        self.download = download
        self.image_size = image_size

    def prepare_data(self) -> None:
        """Unpack the archive, downloading it and the partition first where that is needed.

        Raises:
            FileNotFoundError: If a file can be had neither from `root` nor from the network, or
                does not have its MD5 sum.
        """
        if self.predicting:
            return
        self._fetch(PARTITION)
        if (self._folder / IMAGES).is_dir():
            return
        self._fetch(ARCHIVE)
        # Elsewhere first: a folder that an interruption left half full would pass for the whole.
        with TemporaryDirectory(dir=self._folder, prefix="unpacking-") as part:
            extract_archive(self._folder / ARCHIVE, part)
            Path(part, IMAGES).rename(self._folder / IMAGES)

    def load(self, train: bool) -> ImageSet:
        """Return the training or the validation split.

        Raises:
            FileNotFoundError: If the partition or an image is missing.
            ValueError: If an image is broken or too small.
        """
        paths = [self._folder / IMAGES / name for name in self._names(TRAIN if train else VALID)]
        return image_set(
            paths,
            torch.zeros(len(paths), dtype=torch.int64),
            1,
            image_size=self.image_size,
            channels=3,
            resize=True,
            box=FACE,
            resample=Image.Resampling.BILINEAR,
        )

    @property
    def _folder(self) -> Path:
        return Path(self.root).expanduser() / CelebA.base_folder

    def _names(self, split: str) -> list[str]:
        """Return the file names of a split, all of which are there."""
        if not self._has(PARTITION):
            raise self._absent(f"no whole {PARTITION} is there")
        images = self._folder / IMAGES
        if not images.is_dir():
            raise self._absent(f"no folder {IMAGES} is there")
        rows = [line.split() for line in (self._folder / PARTITION).read_text().splitlines()]
        absent = sorted({name for name, _ in rows}.difference(os.listdir(images)))
        if absent:
            raise FileNotFoundError(
                f"{str(images)!r} lacks {len(absent)} of {len(rows)} images, {absent[0]} first; "
                f"remove that folder and put {ARCHIVE} beside it, which is then unpacked"
            )
        return [name for name, number in rows if number == split]

    def _has(self, name: str) -> bool:
        return check_integrity(self._folder / name, _source(name)[1])

    def _fetch(self, name: str) -> None:
        """Download a file unless it is there, and compare its MD5 sum."""
        if self._has(name):
            return
        if not self.download:
            raise self._absent(f"no whole {name} is there")
        file_id, md5 = _source(name)
        try:
            download_file_from_google_drive(file_id, self._folder, name, md5)
        # RuntimeError without gdown or with a wrong sum, and whatever gdown itself may raise.
        except Exception as error:
            raise self._absent(f"{name}: {error}") from error

    def _absent(self, reason: str) -> FileNotFoundError:
        files = " and ".join(f"{name} (MD5 {_source(name)[1]})" for name in (ARCHIVE, PARTITION))
        offer = "" if self.download else ", or set `download: true`"
        return FileNotFoundError(
            f"CelebA is not in root={self.root!r}, or not whole, and could not be fetched "
            f"({reason}). Put {files} from {HOME} into {str(self._folder)!r}; the archive is then "
            f"unpacked without a network{offer}."
        )


def _source(name: str) -> tuple[str, str]:
    """Return a file's id for the download and its MD5 sum."""
    return next((file_id, md5) for file_id, md5, file in CelebA.file_list if file == name)
