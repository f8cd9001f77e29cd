"""CelebA: 202,599 aligned photographs of faces, cropped as in the experiments of DDIM."""

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torchvision.datasets import CelebA
from torchvision.datasets.utils import (
    check_integrity,
    download_file_from_google_drive,
    extract_archive,
)

from ddim_pl.checks import check_at_least
from ddim_pl.data.base import ImageDataModule, ImageSet
from ddim_pl.data.image_folder import Box, image_set
from ddim_pl.data.squares import Squaring

HOME = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
ARCHIVE = "img_align_celeba.zip"
IMAGES = "img_align_celeba"
PARTITION = "list_eval_partition.txt"
# Numbers of the splits in the partition file; the third is "test".
TRAIN, VALID = "0", "1"
# 128x128 pixels around column 89, row 121, of 178x218.
FACE: Box = (89 - 64, 121 - 64, 89 + 64, 121 + 64)
ALIGNED = (178, 218)


@dataclass(frozen=True)
class FaceSquaring(Squaring):
    """As `Squaring`, after the face is cut out of what has the size of an aligned photograph."""

    def __call__(self, image: Image.Image, image_size: int) -> Image.Image:
        """Return the square of `image_size` by `image_size` pixels."""
        face = image.crop(FACE) if image.size == ALIGNED else image
        return super().__call__(face, image_size)


class CelebADataModule(ImageDataModule):
    """CelebA as uint8 images (3, `image_size`, `image_size`) of one class.

    Trains on the 162,770 images of the "train" split and validates on the 19,867 of "valid". The
    square FACE of an aligned image is resized by an antialiased bilinear filter, as in the code of
    [DDIM]. At 64 pixels the set takes 2 GB of memory in each process. Above 93 it
    exceeds 4 GiB and its images are decoded on demand, see `image_set`: set `num_workers` then.

    Without a network, or without the package gdown that the download needs, put
    `img_align_celeba.zip` and `list_eval_partition.txt` into the folder `celeba` of `root`. They
    are checked there and the archive is unpacked.

    Args:
        root: Folder of the folder `celeba`.
        download: Whether to download the two files if they are missing.
        image_size: Side of the square images, at least 1; above 128 enlarges them.
        flip: Whether training images are mirrored left to right with probability 1/2.
        **kwargs: Arguments of `ImageDataModule`.

    Raises:
        ValueError: If a number is out of range; at `setup`, if an image is broken.
    """

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        *,
        image_size: int = 64,
        flip: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(flip=flip, **kwargs)
        check_at_least(1, image_size=image_size)
        self.root = root
        self.download = download
        self.image_size = image_size
        self.squaring = FaceSquaring()

    def prepare_data(self) -> None:
        """Unpack the archive, downloading it and the partition first if needed.

        Raises:
            FileNotFoundError: If neither `root` nor the network has a file with its MD5 sum.
        """
        if self.predicting:
            return
        self._fetch(PARTITION)
        if (self._folder / IMAGES).is_dir():
            return
        self._fetch(ARCHIVE)
        # Elsewhere first: an interruption must not leave an incomplete folder under this name.
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
            squaring=Squaring(),
            box=FACE,
        )

    @property
    def _folder(self) -> Path:
        return Path(self.root).expanduser() / CelebA.base_folder

    def _names(self, split: str) -> list[str]:
        """Return the file names of a split, after checking that all images exist."""
        if not self._has(PARTITION):
            raise self._absent(f"no complete {PARTITION}")
        images = self._folder / IMAGES
        if not images.is_dir():
            raise self._absent(f"no folder {IMAGES}")
        rows = [line.split() for line in (self._folder / PARTITION).read_text().splitlines()]
        absent = sorted({name for name, _ in rows}.difference(os.listdir(images)))
        if absent:
            raise FileNotFoundError(
                f"{str(images)!r} must hold {len(rows)} images, got {len(absent)} fewer, "
                f"{absent[0]} first: remove that folder and put {ARCHIVE} beside it, which is "
                "then unpacked"
            )
        return [name for name, number in rows if number == split]

    def _has(self, name: str) -> bool:
        return check_integrity(self._folder / name, _source(name)[1])

    def _fetch(self, name: str) -> None:
        """Download a file unless it exists, and compare its MD5 sum."""
        if self._has(name):
            return
        if not self.download:
            raise self._absent(f"no complete {name}")
        file_id, md5 = _source(name)
        try:
            download_file_from_google_drive(file_id, self._folder, name, md5)
        # RuntimeError without gdown or with a wrong sum; gdown itself may raise other errors.
        except Exception as error:
            raise self._absent(f"{name}: {error}") from error

    def _absent(self, reason: str) -> FileNotFoundError:
        files = " and ".join(f"{name} (MD5 {_source(name)[1]})" for name in (ARCHIVE, PARTITION))
        offer = "" if self.download else ", or set `download: true`"
        return FileNotFoundError(
            f"root must hold a complete CelebA, got {self.root!r}, and it could not be downloaded "
            f"({reason}): put {files} from {HOME} into {str(self._folder)!r}; the archive is then "
            f"unpacked without a network{offer}"
        )


def _source(name: str) -> tuple[str, str]:
    """Return a file's id for the download and its MD5 sum."""
    return next((file_id, md5) for file_id, md5, file in CelebA.file_list if file == name)
