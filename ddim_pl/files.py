"""Files that appear whole or not at all."""

import contextlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CACHE = "DDIM_PL_CACHE"
"""Environment variable that names the folder of the cache."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` at the end of the block.

    Folders are made as needed. If the block fails, `path` stays as it was, without a temporary.
    What was written is on the disk before it replaces `path`, so that a machine that fails leaves
    one of the two. Processes that write the same file have each a temporary of their own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path)
    try:
        yield part
        _to_disk(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some systems open no folders
        _to_disk(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which becomes `path` at the end of the block.

    Folders above are made as needed. If the block fails, nothing is left; what a process that was
    killed left of the same folder is removed.

    Raises:
        FileExistsError: If something of this name is there, at the end of the block too.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path)
    for left in path.parent.glob("*.part"):
        # In containers a process may have the number of one that was killed.
        if left == part or _is_left(left, path.name):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    part.mkdir()
    try:
        yield part
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def cache_folder() -> Path:
    """Where to keep what can be made again: `DDIM_PL_CACHE`, or in the user's cache.

    That is `ddim_pl` in `XDG_CACHE_HOME` or, if it is not set, in `~/.cache`. Of a user without a
    home, as in some containers, it is a place where nothing can be kept.
    """
    given = os.environ.get(CACHE)
    try:
        if given:
            return Path(given).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ddim_pl").expanduser()
    except RuntimeError:
        return Path(os.devnull, "ddim_pl")


def write_tensors(value: Any, path: Path) -> None:
    """Write what `torch.save` can write, whole or not at all.

    Raises:
        OSError: If the disk is full, for example.
    """
    try:
        with replacing(path) as part, part.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        # PyTorch puts an error of its own before that of the disk.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def check_writable(name: str, folder: Path) -> None:
    """Make a folder and try to write into it, before work begins whose results go there.

    Args:
        name: The argument that gave the folder, for the error.
        folder: It and its parents are made as needed.

    Raises:
        ValueError: If that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} must be in a folder that can be written to, got {folder} "
            f"({(error.strerror or type(error).__name__).lower()}): give another place"
        ) from None


def _part_of(path: Path) -> Path:
    """A temporary of this process, which says whose it is."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.part")


def remove_parts(folder: Path) -> None:
    """Remove what killed processes of this machine left of `replacing`, in this folder alone."""
    for part in folder.glob("*.part"):
        if part.is_file() and (_is_left(part) or not re.search(r"\.\d+\.part$", part.name)):
            part.unlink(missing_ok=True)


def _is_left(part: Path, name: str | None = None) -> bool:
    """Whether a temporary, of any file or of this one, is of a process that has ended."""
    begin = ".*" if name is None else re.escape(name)
    found = re.fullmatch(rf"{begin}\.{re.escape(platform.node())}\.(\d+)\.part", part.name)
    return found is not None and not _runs(int(found[1]))


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
