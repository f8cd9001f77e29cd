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
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ddim_pl.data.encoded import Encoded, stamps_of
from ddim_pl.data.folders import EXTENSIONS
from ddim_pl.data.image_folder import FileDataModule, LabelledFiles
from ddim_pl.data.numbered import count_classes

LABELS = "dataset.json"
LOCAL_HEADER = 30
"""Bytes before the name of a member, of which the last four hold the lengths of what follows."""


class ZipImages:
    """The images in a zip archive, by number.

    Args:
        root: The archive.

    Raises:
        ValueError: If it is no zip archive, holds no image or one twice, or an image is encrypted,
            compressed in another way than by deflating, or said to be larger than the archive.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with _archive(root) as archive:
            members = [m for m in archive.infolist() if _is_image(m)]
            others = {*archive.namelist()} - {LABELS, *(m.filename for m in members)}
            self.num_skipped = len(others)
        members.sort(key=lambda member: member.filename)
        _check_members(root, members)
        # Millions of `ZipInfo`s take gigabytes.
        self._names = np.array([os.fsencode(member.filename) for member in members])
        columns = ("header_offset", "compress_size", "file_size", "CRC", "compress_type")
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
        place = f"{self.root}, {self.name(index)}"
        try:
            return Encoded(place, self._content(index))
        except (OSError, zlib.error, ValueError) as error:
            raise ValueError(
                f"{place}, cannot be read ({error}): the archive is damaged, copy or make it again"
            ) from error

    def _content(self, index: int) -> bytes:
        begin, packed, size, checksum, compression = (int(each) for each in self._members[index])
        name: bytes = self._names[index]
        header = os.pread(self._handle, LOCAL_HEADER + len(name), begin)
        after = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        content = os.pread(self._handle, packed, begin + LOCAL_HEADER + after)
        if compression == zipfile.ZIP_DEFLATED:
            # Not more than is said: a small file may hold gigabytes of zeros.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        if header[:4] != b"PK\x03\x04" or zlib.crc32(content) != checksum:
            raise ValueError("it does not match its checksum")
        # The list of members has no checksum. Other names may be written in another way there.
        if name.isascii() and header[LOCAL_HEADER:] != name:
            raise ValueError(f"its own header names it {os.fsdecode(header[LOCAL_HEADER:])!r}")
        return content

    def name(self, index: int) -> str:
        """The name of an image in the archive."""
        return os.fsdecode(self._names[index])

    def digest(self) -> str:
        """A digest of the names and of the checksums, which stand in the archive."""
        digest = hashlib.sha256(b"\n".join(self._names.tolist()))
        digest.update(self._members[:, 3].tobytes())
        return digest.hexdigest()

    def stamps(self) -> np.ndarray[Any, Any]:
        """Size and time of the archive, int64 (1, 2)."""
        return stamps_of([self.root])

    def identities(self) -> Iterator[str]:
        """The digest, which depends on the content."""
        yield self.digest()


def labels_in(root: Path, images: ZipImages, *, report: bool = True) -> tuple[Tensor, int]:
    """Return the classes of the images, int64 (N,), and how many there are; 0 without labels.

    Where `dataset.json` says that there are none, all images are of class 0. As in the code of
    [EDM], the number of classes is the largest and one.

    Args:
        root: The archive.
        images: Its images.
        report: Warn of classes without images.

    Raises:
        ValueError: If `dataset.json` is missing or cannot be read, labels an image twice or one
            that is not there, or a label is missing or no whole number.
    """
    count = len(images)
    given = _given_labels(root)
    if given is None:
        return torch.zeros(count, dtype=torch.int64), 0
    names = [images.name(index).replace("\\", "/") for index in range(count)]
    labels = [given.pop(name, None) for name in names]
    for name, label in zip(names, labels, strict=True):
        if type(label) is not int or label < 0:
            raise ValueError(
                f"{root}, {LABELS}, must give each image a whole number from 0 as its class, got "
                f"{label!r} for {name}: make the archive again, or set `labels: false` to leave "
                "the classes out"
            )
    if given:
        raise ValueError(
            f"{root}, {LABELS}, must give labels to the images that are there, got {len(given)} "
            f"more, {min(given)} first: the archive is not complete, copy or make it again, or "
            "set `labels: false` to leave the classes out"
        )
    num_classes = count_classes(labels, f"{root}, {LABELS},", report=report)
    return torch.tensor(labels, dtype=torch.int64), num_classes


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
        images, labels, num_classes = self._read(self.root, report=report and train)
        if not train:
            assert self.val_root is not None
            images, labels, found = self._read(self.val_root, report=report, warn=False)
            if bool(found) != bool(num_classes):
                raise ValueError(
                    f"val_root must give the classes of its images in {LABELS} as root does, got "
                    f"{found} classes in {self.val_root} and {num_classes} in {self.root}: give "
                    "other archives, or set `labels: false` to leave the classes out"
                )
            if found > num_classes:
                raise ValueError(
                    f"val_root must hold classes below {num_classes}, as {self.root} does, got "
                    f"{found - 1} in {self.val_root}: give an archive of the same classes"
                )
        return LabelledFiles(images, labels, max(1, num_classes), images.root.stem)

    def _read(
        self, archive: str, *, report: bool, warn: bool = True
    ) -> tuple[ZipImages, Tensor, int]:
        images = ZipImages(Path(archive).expanduser())
        labels, num_classes = torch.zeros(len(images), dtype=torch.int64), 0
        if self.labels:
            labels, num_classes = labels_in(images.root, images, report=report and warn)
        if report:
            classes = f"{num_classes} classes" if num_classes else "no classes"
            skipped = f", {images.num_skipped} other files skipped" if images.num_skipped else ""
            rank_zero_info(f"{images.root}: {len(images)} images, {classes}{skipped}")
        return images, labels, num_classes


@contextmanager
def _archive(root: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(root)
    except Exception as error:  # zipfile raises a dozen kinds
        raise ValueError(
            f"root must be a zip archive of images, got {str(root)!r} ({error}): give one that "
            "EDM's dataset_tool.py has written; a folder is read by ImageFolderDataModule"
        ) from error
    with archive:
        yield archive


def _is_image(member: zipfile.ZipInfo) -> bool:
    path = Path(member.filename)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in EXTENSIONS and not hidden and not member.is_dir()


def _check_members(root: Path, members: list[zipfile.ZipInfo]) -> None:
    if not members:
        raise ValueError(
            f"root must hold images, got {str(root)!r} without any: put files ending in "
            f"{', '.join(sorted(EXTENSIONS))} there (latents in .npy files are not supported)"
        )
    size = root.stat().st_size
    for member in members:
        if member.flag_bits & 1 or member.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise ValueError(
                f"{root}, {member.filename}, must be stored or deflated, without encryption: "
                "write the archive again, best by zip -0, as images are compressed already"
            )
        if not 0 <= member.header_offset < size or member.compress_size > size:
            raise ValueError(
                f"{root}, {member.filename}, must lie in the archive's {size} bytes, got "
                f"{member.compress_size} from {member.header_offset} on: the archive is damaged, "
                "copy or make it again"
            )
    for one, two in pairwise(members):
        if one.filename == two.filename:
            raise ValueError(
                f"{root} must hold each image once, got {one.filename} twice: make the archive "
                "again"
            )


def _given_labels(root: Path) -> dict[str, Any] | None:
    """Labels by name; None where the archive says that there are none."""
    with _archive(root) as archive:
        if LABELS not in archive.namelist():
            raise ValueError(
                f"{root} must hold {LABELS} with the classes of its images, got none: set "
                "`labels: false` to leave the classes out"
            )
        try:
            labels = json.loads(archive.read(LABELS))["labels"]
            if labels is None:
                return None
            found = {str(name): label for name, label in labels}
            if len(found) < len(labels):
                twice = next(n for n, times in Counter(n for n, _ in labels).items() if times > 1)
                raise ValueError(f"{twice} stands twice")
            return found
        except Exception as error:  # the bytes may say anything
            raise ValueError(
                f"{root}, {LABELS}, must hold labels as [name, class] for each image, got "
                f"something else ({type(error).__name__}: {error}): make the archive again, or "
                "set `labels: false` to leave the classes out"
            ) from error
