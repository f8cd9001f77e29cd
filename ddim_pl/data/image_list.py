"""Names of very many files: one block of bytes, mapped from a file that processes share.

A list of three million `Path`s takes 1.5 GB in each process, and a minute to make. Here the names
lie in one array, in the order of sorted paths, and a second array says where each ends. Both are
kept in the user's cache, together with the times of all folders: a file that appears, goes or is
renamed changes its folder's, so that the list is known to hold without a look at the files. Of the
two times of a folder programs set one, as when they unpack an archive; the other no program sets.

What was found of the files themselves holds as long as none has another size or time.
"""

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from ddim_pl.damage import DamagedError, read_sealed, sealed
from ddim_pl.data.encoded import ImageSource
from ddim_pl.files import cache_folder, replacing

FORMAT = 1
NUM_THREADS = min(16, os.cpu_count() or 1)
STATED_AT_ONCE = 1000
KEPT_FROM = 10_000
"""Files from which a list is kept; a shorter one is made at once."""

SETTLED = 2_000_000_000
"""Nanoseconds for which no folder may have changed: clocks of file systems are coarse."""


class ImageList(Sequence[Path]):
    """Sorted paths of files below a folder.

    Args:
        root: The folder.
        names: Paths relative to it, one behind the other, uint8.
        ends: Where each ends in `names`, int64 `(N,)`.
        folders: All folders that were read, with their times, see `times_of`.
        skipped: How many other files there are, by ending.
        counts: How many of the files each first-level subfolder holds, in the order of the files.
    """

    def __init__(
        self,
        root: Path,
        names: np.ndarray[Any, Any],
        ends: np.ndarray[Any, Any],
        folders: Mapping[str, list[int]],
        skipped: Mapping[str, int],
        counts: Mapping[str, int],
    ) -> None:
        self.root = root
        self.folders = folders
        self.skipped = skipped
        self.counts = counts
        self._names = names
        self._ends = ends

    @classmethod
    def of(
        cls,
        root: Path,
        files: Iterable[str],
        folders: Mapping[str, list[int]],
        skipped: Mapping[str, int],
    ) -> "ImageList":
        """A list of these files, given relative to the root, in the order of sorted paths."""
        # Paths compare part by part: what ends a part comes before all letters.
        ordered = sorted(files, key=lambda name: name.replace("/", "\0"))
        encoded = [os.fsencode(name) for name in ordered]
        names = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        counts = Counter(name.partition("/")[0] for name in ordered if "/" in name)
        return cls(root, names, ends, folders, skipped, counts)

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        """Return a path, or several."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return self.root / self.name(range(len(self))[index])

    def name(self, index: int) -> str:
        """A path relative to the root, with "/" between its parts."""
        begin = self._ends[index - 1] if index else 0
        return os.fsdecode(self._names[begin : self._ends[index]].tobytes())

    def names(self) -> Iterable[str]:
        """All relative paths."""
        return map(self.name, range(len(self)))

    def digest(self) -> str:
        """A digest of the names, without the folder's own."""
        digest = hashlib.sha256(self._ends.tobytes())
        digest.update(self._names.tobytes())
        return digest.hexdigest()

    def identities(self) -> Iterator[str]:
        """For each file its path, size and time."""
        for path in self:
            found = path.stat()
            yield f"{path} {found.st_size} {found.st_mtime_ns}\n"

    def stamps(self) -> np.ndarray[Any, Any]:
        """Sizes in bytes and times in nanoseconds of all files, int64 `(N, 2)`.

        Both are -1 of a file that is not there.
        """
        parts = [
            range(begin, min(begin + STATED_AT_ONCE, len(self)))
            for begin in range(0, len(self), STATED_AT_ONCE)
        ]
        with ThreadPoolExecutor(NUM_THREADS) as pool:  # a file system on a network answers late
            found = list(pool.map(self._stamps_of, parts))
        return np.concatenate([np.empty((0, 2), dtype=np.int64), *found])

    def _stamps_of(self, indices: range) -> np.ndarray[Any, Any]:
        stamps = np.full((len(indices), 2), -1, dtype=np.int64)
        for row, index in enumerate(indices):
            try:
                found = os.stat(f"{self.root}/{self.name(index)}")
            except OSError:  # whoever opens the file says what is wrong
                continue
            stamps[row] = found.st_size, found.st_mtime_ns
        return stamps

    def keep(self, place: Path) -> None:
        """Write the list to a file for `kept_list`; says so if that cannot be done."""
        body = np.concatenate([self._ends.view(np.uint8), self._names])
        head = {
            "format": FORMAT,
            "count": len(self),
            "folders": self.folders,
            "skipped": self.skipped,
            "counts": self.counts,
            "sha256": hashlib.sha256(body.data).hexdigest(),
        }
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 8)
        lengths = np.array([len(text)], dtype=np.int64).view(np.uint8)
        try:
            with replacing(place) as part, part.open("wb") as file:
                np.save(file, np.concatenate([lengths, np.frombuffer(text, np.uint8), body]))
        except OSError as error:
            rank_zero_warn(
                f"the list of the files in {self.root} cannot be kept in {place.parent} "
                f"({error.strerror}): set DDIM_PL_CACHE to a folder that can be written to"
            )


def place_of(root: Path) -> Path:
    """Where the list of a folder is kept."""
    name = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:32]
    return cache_folder() / "image-lists" / f"{name}.npy"


def kept_list(root: Path, place: Path) -> ImageList | None:
    """Return the list that was kept of a folder, mapped from its file, if no folder has changed.

    Warns if the file is damaged.
    """
    if not place.is_file():
        return None
    try:
        content = np.load(place, mmap_mode="r", allow_pickle=False)
        begin = 8 + int(content[:8].view(np.int64)[0])
        head = json.loads(content[8:begin].tobytes())
        body = content[begin:]
        if head["format"] != FORMAT:
            return None
        if head["sha256"] != hashlib.sha256(body.data).hexdigest():
            raise ValueError("its content does not match its sha256")
        ends = body[: 8 * head["count"]].view(np.int64)
    except Exception as error:  # the bytes may say anything
        rank_zero_warn(f"{place} is damaged ({error}): the files in {root} are listed again")
        return None
    if any(_changed(folder, then) for folder, then in head["folders"].items()):
        return None
    names = body[8 * head["count"] :]
    return ImageList(root, names, ends, head["folders"], head["skipped"], head["counts"])


class CheckedFiles:
    """Which checks the files of a list have passed, as is kept in the user's cache.

    Args:
        paths: The files, as they are now.
    """

    def __init__(self, paths: ImageSource) -> None:
        begin = time.time_ns()
        stamps = paths.stamps()
        # A file that changes while it is looked at, or has just changed, may look the same later.
        self._settled = bool((stamps[:, 1] < begin - SETTLED).all())
        self._files = {
            "format": FORMAT,
            "names": paths.digest(),
            "stamps": hashlib.sha256(stamps.tobytes()).hexdigest(),
        }
        # The lists of two splits may be of one folder.
        name = f"{os.path.abspath(paths.root)} {self._files['names']}"
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
        self._place = cache_folder() / "image-lists" / f"{digest}.checked.json"

    def passed(self, check: str) -> bool:
        """Whether all files have passed a check, and none has changed since."""
        return check in self._passed()

    def keep(self, check: str) -> None:
        """Keep that all files have passed a check; does nothing where that cannot be kept."""
        if not self._settled:
            return
        content = {**self._files, "passed": sorted({*self._passed(), check})}
        with contextlib.suppress(OSError), replacing(self._place) as part:
            part.write_text(json.dumps(sealed(content)))

    def _passed(self) -> list[str]:
        try:
            kept = read_sealed(self._place)
        except DamagedError:  # or there is none
            return []
        passed = kept.pop("passed", [])
        return passed if kept == self._files else []


def times_of(folder: str) -> list[int]:
    """When a folder was modified and when it was changed, in nanoseconds."""
    found = os.stat(folder)
    return [found.st_mtime_ns, found.st_ctime_ns]


def _changed(folder: str, then: list[int]) -> bool:
    try:
        return times_of(folder) != then
    except OSError:
        return True
