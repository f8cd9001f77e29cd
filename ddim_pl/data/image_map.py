"""Decoded images in one file, which all processes of a machine map into memory.

A folder of maps holds, for each list of files, the images as `NAME-KEY.npy`, uint8 (N, C, H, W),
and `NAME.json`, which says of which files and how they were made. KEY is a digest of that, so that
one file never stands for another. What a stopped process has made is gone on with.
"""

import errno
import glob
import hashlib
import io
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm.auto import tqdm

from ddim_pl.damage import DamagedError, read_sealed, sealed
from ddim_pl.data.base import ImageSet
from ddim_pl.data.encoded import ImageSource
from ddim_pl.data.image_list import NUM_THREADS
from ddim_pl.files import check_writable, replacing
from ddim_pl.locks import alone_in

FORMAT = 1
LONGEST_NAME = 40
PROGRESS_BAR_FROM = 1000
BLOCK_BYTES = 2**26
"""Bytes that are decoded before they are written."""

RECORDED_EVERY = 10.0
"""Seconds after which it is recorded how many images are on the disk."""


class MappedImages(ImageSet):
    """An image set in a file that is mapped into memory: its pages are read when they are used.

    Args:
        labels: Classes, int64 (N,).
        num_classes: Number of classes.
        file: The images, a NumPy file of uint8 (N, C, H, W).
        digest: A name for all images.
    """

    def __init__(self, labels: Tensor, num_classes: int, file: Path, digest: str) -> None:
        self._file = file
        self._digest = digest
        count, channels, height, width = self._pixels.shape
        assert count == len(labels)
        super().__init__(labels, num_classes, (channels, height, width))

    @cached_property
    def _pixels(self) -> np.ndarray[Any, Any]:
        return np.asarray(np.load(self._file, mmap_mode="r", allow_pickle=False))

    def __getstate__(self) -> dict[str, Any]:
        """Without the pixels: a process that is not forked maps the file again."""
        return {name: value for name, value in self.__dict__.items() if name != "_pixels"}

    def images(self, indices: Tensor) -> Tensor:
        """Return the uint8 images (B, C, H, W) at int64 indices (B,)."""
        return torch.from_numpy(self._pixels[indices.numpy()])

    def digest(self) -> str:
        """A digest of names, sizes and times of the files, and of how they are decoded."""
        return self._digest


class ImageMap:
    """The map of a list of files in a folder, which is to be made or is there.

    Args:
        folder: The folder of maps.
        name: Of the list, in the names of the files.
        paths: The files, as they are now.
        decode: From a path to the uint8 image (C, H, W); its keywords are all that it depends on.
        shape: (C, H, W).
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        paths: ImageSource,
        decode: "partial[Tensor]",
        shape: tuple[int, int, int],
    ) -> None:
        self.folder = folder
        self._paths = paths
        self._decode = decode
        self._shape = (len(paths), *shape)
        self._recipe: dict[str, Any] = {
            "format": FORMAT,
            "shape": list(self._shape),
            "transform": {key: repr(value) for key, value in decode.keywords.items()},
            "names": paths.digest(),
            "files": hashlib.sha256(paths.stamps().tobytes()).hexdigest(),
        }
        place = hashlib.sha256(os.fsencode(os.path.abspath(paths.root))).hexdigest()[:16]
        self._name = f"{name[:LONGEST_NAME]}-{place}"
        self._key = hashlib.sha256(json.dumps(self._recipe).encode()).hexdigest()
        self._header = folder / f"{self._name}.json"
        self._file = folder / f"{self._name}-{self._key[:16]}.npy"
        self._part = self._file.with_suffix(".part")
        self._record = self._file.with_suffix(".part.json")

    def open(self, labels: Tensor, num_classes: int) -> MappedImages:
        """Return the images, once the map is made.

        Raises:
            ValueError: If it is not there.
        """
        problem = self._problem()
        if problem is not None:
            raise ValueError(
                f"cache must hold the decoded images of {self._paths.root}, got {self.folder} "
                f"({problem}): call prepare_data() first, and give runs that read images in "
                "different ways a folder each"
            )
        return MappedImages(labels, num_classes, self._file, self._key)

    def make(self) -> None:
        """Make the map unless it is there; waits for a process that makes it.

        Raises:
            ValueError: If the folder cannot be written to, the disk has too little room, or a file
                cannot be decoded; of a map that is begun nothing stays then.
            OSError: If the disk is full nevertheless; what is on it stays and is gone on with.
        """
        if self._problem() is None:
            return
        check_writable("cache", self.folder)
        with alone_in(self.folder, f".{self._name}.lock", wait=True):
            problem = self._problem()  # another process may have made it
            if problem is None:
                return
            done = self._done()
            kept = (self._part, self._record) if done else ()
            old = [*self.folder.glob(f"{glob.escape(self._name)}-*"), self._header]
            old = [each for each in old if each.exists() and each not in kept]
            self._check_room(done, old)
            for each in reversed(old):  # the header first
                each.unlink()
            gone_on = f", the first {done} are there already" if done else ""
            rank_zero_info(
                f"{self._paths.root}: its {len(self._paths)} images are decoded into "
                f"{self.folder} once ({_size(self._bytes)}{gone_on}): {problem}"
            )
            self._make(done)

    def _problem(self) -> str | None:
        """Why the map cannot be used, or None."""
        if not self._header.is_file():
            return "no whole set is there"
        try:
            found = read_sealed(self._header)
            if found == self._recipe:
                pixels = np.load(self._file, mmap_mode="r", allow_pickle=False)
                fits = pixels.shape == self._shape and pixels.dtype == np.uint8
                return None if fits else f"{self._file.name} is damaged"
        except (DamagedError, OSError, ValueError) as error:
            return f"those there are damaged: {error}"
        there, wanted = found.get("transform", {}), self._recipe["transform"]
        other = [key for key in wanted if there.get(key) != wanted[key]]
        if other:
            key = other[0]
            return f"those there are of {key} {there.get(key)}, not {wanted[key]}"
        return "those there are of other files, or of files that have changed"

    @property
    def _image_bytes(self) -> int:
        return int(np.prod(self._shape[1:]))

    @property
    def _bytes(self) -> int:
        return len(self._paths) * self._image_bytes

    def _done(self) -> int:
        """How many images a stopped process has left on the disk."""
        try:
            done = int(read_sealed(self._record)["done"])
            whole = self._part.stat().st_size - len(_file_header(self._shape))
        except (DamagedError, OSError, KeyError):
            return 0
        return done if whole >= done * self._image_bytes else 0

    def _check_room(self, done: int, old: list[Path]) -> None:
        needed = self._bytes - (self._part.stat().st_size if done else 0)
        free = shutil.disk_usage(self.folder).free + sum(each.stat().st_size for each in old)
        if needed > free:
            raise ValueError(
                f"cache must be in a folder with {_size(needed)} of free space for the "
                f"{len(self._paths)} images of {self._paths.root}, got {self.folder} with "
                f"{_size(free)}: make room, give another folder, or leave cache out"
            )

    def _make(self, done: int) -> None:
        try:
            with self._part.open("r+b" if done else "wb") as file:
                if not done:
                    file.write(_file_header(self._shape))
                file.seek(len(_file_header(self._shape)) + done * self._image_bytes)
                self._fill(file, done)
            self._part.replace(self._file)
            with replacing(self._header) as part:
                part.write_text(json.dumps(sealed(self._recipe)))
        except OSError as error:
            full = error.errno == errno.ENOSPC
            raise OSError(
                f"cache cannot be written to {self.folder} "
                f"({'no space is left' if full else error}): make room and start again; the "
                "images that are decoded already are kept"
            ) from error
        except ValueError:  # a broken file
            self._part.unlink()
            raise
        finally:
            if not self._part.exists():
                self._record.unlink(missing_ok=True)

    def _fill(self, file: BinaryIO, done: int) -> None:
        """Write the images from number `done` on, and record now and then that they are there."""
        count = len(self._paths)
        rows = min(count, max(1, BLOCK_BYTES // self._image_bytes))
        block = np.empty((rows, *self._shape[1:]), dtype=np.uint8)
        hidden = count <= PROGRESS_BAR_FROM or not sys.stderr.isatty()
        recorded = time.monotonic()

        def place(row: int) -> None:
            block[row] = self._decode(self._paths[done + row]).numpy()

        with (
            tqdm(total=count, initial=done, desc="Decoding images", disable=hidden) as bar,
            # PIL releases the interpreter lock while it decodes.
            ThreadPoolExecutor(NUM_THREADS) as pool,
        ):
            while done < count:
                some = min(rows, count - done)
                for _ in pool.map(place, range(some)):
                    bar.update()
                file.write(block[:some].data)
                done += some
                if done == count or time.monotonic() - recorded >= RECORDED_EVERY:
                    file.flush()
                    os.fsync(file.fileno())
                    recorded = time.monotonic()
                    with replacing(self._record) as part:
                        part.write_text(json.dumps(sealed({"done": done})))


def _file_header(shape: tuple[int, ...]) -> bytes:
    """The first bytes of a NumPy file of uint8."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
