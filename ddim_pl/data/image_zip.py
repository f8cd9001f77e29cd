"""A zip archive of images and labels, as EDM's `dataset_tool.py` writes it, read as it is.

Such an archive holds images, most often uncompressed PNGs, and `dataset.json`, whose `labels` are
`[name, class]` for each image, or null. The images come in alphabetical order, as in the code of
[EDM].
"""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim_pl.data.encoded import Encoded, stamps_of
from ddim_pl.data.folders import EXTENSIONS
from ddim_pl.data.image_folder import FileDataModule, LabelledFiles

LABELS = "dataset.json"
LOCAL_HEADER = 30
"""Bytes before the name of a member, of which the last four hold the lengths of what follows."""


class ZipImages:
    """The images in a zip archive, by number.

    Args:
        root: The archive.

    Raises:
        ValueError: If it is no zip archive, holds no image, or an image is encrypted or compressed
            in another way than by deflating.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with _archive(root) as archive:
            members = [m for m in archive.infolist() if _is_image(m.filename)]
        members.sort(key=lambda member: member.filename)
        _check_members(root, members)
        # Millions of `ZipInfo`s take gigabytes.
        self._names = np.array([os.fsencode(member.filename) for member in members])
        columns = ("header_offset", "compress_size", "CRC", "compress_type")
        self._members = np.array(
            [[getattr(member, column) for column in columns] for member in members], np.int64
        )
        # Reading at a place moves nothing, so that threads and forked processes share it.
        self._handle = os.open(root, os.O_RDONLY)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file."""
        return {name: value for name, value in self.__dict__.items() if name != "_handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the file anew, in a process that is not forked."""
        self.__dict__.update(state)
        self._handle = os.open(self.root, os.O_RDONLY)

    def __del__(self) -> None:
        """Close the file."""
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._members)

    def __getitem__(self, index: int) -> Encoded:
        """Return the bytes of an image, after comparing their checksum.

        Raises:
            ValueError: If the archive is damaged there.
        """
        name = f"{self.root}, {self.name(index)},"
        begin, size, checksum, compression = (int(each) for each in self._members[index])
        header = os.pread(self._handle, LOCAL_HEADER, begin)
        after = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        content = os.pread(self._handle, size, begin + LOCAL_HEADER + after)
        try:
            if compression == zipfile.ZIP_DEFLATED:
                content = zlib.decompress(content, -zlib.MAX_WBITS)
            if header[:4] != b"PK\x03\x04" or zlib.crc32(content) != checksum:
                raise ValueError("it does not match its checksum")
        except (zlib.error, ValueError) as error:
            raise ValueError(
                f"{name} cannot be read ({error}): the archive is damaged, copy or make it again"
            ) from error
        return Encoded(name.removesuffix(","), content)

    def name(self, index: int) -> str:
        """The name of an image in the archive."""
        return os.fsdecode(self._names[index])

    def digest(self) -> str:
        """A digest of the names."""
        return hashlib.sha256(b"\n".join(self._names.tolist())).hexdigest()

    def stamps(self) -> np.ndarray[Any, Any]:
        """Size and time of the archive, int64 (1, 2)."""
        return stamps_of([self.root])

    def identities(self) -> Iterator[str]:
        """Names and checksums of all images."""
        yield self.digest()
        yield hashlib.sha256(self._members[:, 2].tobytes()).hexdigest()


def labels_in(root: Path, images: ZipImages) -> tuple[Tensor, int]:
    """Return the classes of the images, int64 (N,), and how many there are.

    Without labels all images are of one class. As in the code of [EDM], the number of classes is
    the largest and one.

    Raises:
        ValueError: If `dataset.json` cannot be read, or a label is missing or no whole number.
    """
    count = len(images)
    given = _given_labels(root)
    if given is None:
        return torch.zeros(count, dtype=torch.int64), 1
    labels = [given.get(images.name(index).replace("\\", "/")) for index in range(count)]
    for index, label in enumerate(labels):
        if type(label) is not int or label < 0:
            raise ValueError(
                f"{root}, {LABELS}, must give each image a whole number from 0 as its class, got "
                f"{label!r} for {images.name(index)}: make the archive again, or set `labels: "
                "false` to leave the classes out"
            )
    found = torch.tensor(labels, dtype=torch.int64)
    return found, int(found.max()) + 1


class ImageZipDataModule(FileDataModule):
    """A zip archive of EDM's `dataset_tool.py`, as uint8 images.

    The archive is read where it lies, not unpacked. Images of another size are resized, see
    `FileDataModule`; those of `dataset_tool.py` are square already.

    Args:
        root: The archive of training images.
        image_size: Side of the square images, at least 1.
        val_root: An archive of images to validate on, with the same classes; `root` if None.
        labels: Whether to read the classes in `dataset.json`; otherwise all images are of one.
        **kwargs: Arguments of `FileDataModule`.

    Raises:
        ValueError: As for `FileDataModule`; at `setup`, if an archive is missing or damaged, or
            its labels are wrong, see `labels_in`.
    """

    def __init__(
        self,
        root: str,
        image_size: int,
        *,
        val_root: str | None = None,
        labels: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, **kwargs)
        self.root = root
        self.val_root = val_root
        self.labels = labels

    @property
    def validates_apart(self) -> bool:
        """Whether there is a `val_root`."""
        return self.val_root is not None

    def labelled(self, train: bool, *, report: bool) -> LabelledFiles:
        """The images of `root` or of `val_root`."""
        images, labels, num_classes = self._read(self.root)
        if not train:
            assert self.val_root is not None
            images, labels, found = self._read(self.val_root)
            if found > num_classes:
                raise ValueError(
                    f"val_root must hold classes below {num_classes}, as {self.root} does, got "
                    f"{found - 1} in {self.val_root}: give an archive of the same classes"
                )
        return LabelledFiles(images, labels, num_classes, images.root.stem)

    def _read(self, archive: str) -> tuple[ZipImages, Tensor, int]:
        root = Path(archive).expanduser()
        images = ZipImages(root)
        if self.labels:
            return images, *labels_in(root, images)
        return images, torch.zeros(len(images), dtype=torch.int64), 1


@contextmanager
def _archive(root: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(root)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"root must be a zip archive of images, got {str(root)!r} ({error}): give one that "
            "EDM's dataset_tool.py has written; a folder is read by ImageFolderDataModule"
        ) from error
    with archive:
        yield archive


def _is_image(name: str) -> bool:
    path = Path(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in EXTENSIONS and not hidden


def _check_members(root: Path, members: list[zipfile.ZipInfo]) -> None:
    if not members:
        raise ValueError(
            f"root must hold images, got {str(root)!r} without any: put files ending in "
            f"{', '.join(sorted(EXTENSIONS))} there (latents in .npy files are not supported)"
        )
    for member in members:
        if member.flag_bits & 1 or member.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise ValueError(
                f"{root}, {member.filename}, must be stored or deflated, without encryption: "
                "write the archive again, best by zip -0, as images are compressed already"
            )


def _given_labels(root: Path) -> dict[str, Any] | None:
    """Labels by name, or None."""
    with _archive(root) as archive:
        if LABELS not in archive.namelist():
            return None
        try:
            labels = json.loads(archive.read(LABELS))["labels"]
            return None if labels is None else {str(name): label for name, label in labels}
        except Exception as error:  # the bytes may say anything
            raise ValueError(
                f"{root}, {LABELS}, must hold labels as [name, class] for each image, got "
                f"something else ({type(error).__name__}: {error}): make the archive again, or "
                "set `labels: false` to leave the classes out"
            ) from error
