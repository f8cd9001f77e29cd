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
from ddim_pl.data.image_folder import Box, ImageFiles
from ddim_pl.data.image_list import ImageList
from ddim_pl.data.squares import Squaring
from ddim_pl.locks import alone_in

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
    [DDIM]. At 64 pixels the set takes 2 GB of memory in each process. Above 93 it exceeds 4 GiB
    and its images are decoded on demand, see `ImageFiles`: set `num_workers` then, or `cache`.

    Without a network, or without the package gdown that the download needs, put
    `img_align_celeba.zip` and `list_eval_partition.txt` into the folder `celeba` of `root`. They
    are checked there and the archive is unpacked.

    Args:
        root: Folder of the folder `celeba`.
        download: Whether to download the two files if they are missing.
        image_size: Side of the square images, at least 1; above 128 enlarges them.
        flip: Whether training images are mirrored left to right with probability 1/2.
        cache: Folder in which all images are kept decoded, see `ImageFolderDataModule`.
        **kwargs: Arguments of `ImageDataModule`.

    Raises:
        ValueError: If a number is out of range; at `setup`, if an image is broken or the `cache`
            is not made.
    """

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        *,
        image_size: int = 64,
        flip: bool = True,
        cache: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(flip=flip, **kwargs)
        check_at_least(1, image_size=image_size)
        self.root = root
        self.download = download
        self.image_size = image_size
        self.cache = cache
        self.squaring = FaceSquaring()

    def prepare_data(self) -> None:
        """Unpack the archive, downloading it and the partition first if needed; fill the `cache`.

        Raises:
            FileNotFoundError: If neither `root` nor the network has a file with its MD5 sum.
            ValueError: As at `setup`; or the `cache` cannot be written to or is too small.
        """
        if self.predicting or self._train_set is not None:
            return
        self._fetch(PARTITION)
        if not (self._folder / IMAGES).is_dir():
            # Nodes with one disk, and runs that begin at once, do it once.
            with alone_in(self._folder, ".unpacking.lock", wait=True):
                if not (self._folder / IMAGES).is_dir():
                    self._unpack()
        for split in (TRAIN, VALID):
            self._files(split).prepare()

    def _unpack(self) -> None:
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
        files = self._files(TRAIN if train else VALID)
        return files.load(torch.zeros(len(files.paths), dtype=torch.int64), 1)

    def _files(self, split: str) -> ImageFiles:
        return ImageFiles(
            ImageList.of(self._folder / IMAGES, self._names(split), {}, {}),
            image_size=self.image_size,
            channels=3,
            squaring=Squaring(),
            box=FACE,
            cache=self.cache,
            name=f"celeba-{'train' if split == TRAIN else 'valid'}",
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
