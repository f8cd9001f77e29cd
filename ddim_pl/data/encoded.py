"""Image files that are no files of their own, but lie in an archive or a table."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Encoded:
    """What would be an image file: its name, for messages, and its bytes."""

    name: str
    content: bytes

    def __str__(self) -> str:
        """Return the name."""
        return self.name


class ImageSource(Protocol):
    """Image files by number, in a fixed order, which several threads may read."""

    @property
    def root(self) -> Path:
        """The folder or file that holds them."""

    def __len__(self) -> int:
        """Return the number of files."""

    def __getitem__(self, index: int, /) -> Path | Encoded:
        """Return a file."""

    def digest(self) -> str:
        """A digest of the names."""

    def stamps(self) -> np.ndarray[Any, Any]:
        """Sizes in bytes and times in nanoseconds of the files on the disk, int64 `(N, 2)`."""

    def identities(self) -> Iterable[str]:
        """Texts that change when an image may have changed."""


def stamps_of(paths: Iterable[Path]) -> np.ndarray[Any, Any]:
    """Sizes in bytes and times in nanoseconds of files, int64 `(N, 2)`."""
    found = [path.stat() for path in paths]
    return np.array([(each.st_size, each.st_mtime_ns) for each in found], dtype=np.int64)
