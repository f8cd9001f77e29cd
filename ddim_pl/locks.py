"""Work that one process does at a time."""

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lightning.pytorch.utilities import rank_zero_info

_held: set[IO[str]] = set()
"""Files of the locks that this process holds."""


def _leave_locks() -> None:
    for file in _held:
        file.close()
    _held.clear()


# A process that loads data may outlive the one that started it, and would keep its locks.
os.register_at_fork(after_in_child=_leave_locks)


@contextlib.contextmanager
def alone_in(folder: Path, lock: str = ".lock", *, wait: bool = False) -> Iterator[None]:
    """Let no other process work in a folder; the lock of one that has died counts for nothing.

    Args:
        folder: It must exist.
        lock: Name of the lock's file, which is there as long as the lock is held.
        wait: Whether to wait until another process has finished, and say so.

    Raises:
        ValueError: If another process works there, unless this one waits.
    """
    path = folder / lock
    # Opened anew if the process that held it has removed the file meanwhile.
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not wait:
                file.close()
                raise ValueError(
                    f"{folder} must be a folder in which no other process works, got one with "
                    f"{holder}: wait until it has finished, or give another folder"
                ) from None
            rank_zero_info(f"{holder} works in {folder}: waiting until it has finished")
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except BaseException:  # a signal
                file.close()
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
        file.close()
    _held.add(file)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        _held.discard(file)
        file.close()
