"""Signals that end a command: the first one lets it save what it made, the second ends it.

A command ends with the exit status that shells give a signal, 128 + its number: 130 for Ctrl-C
and 143 for SIGTERM, so that a cluster does not take it for a success.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

HANDLED = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
SAME = 0.3
"""Seconds within which a second signal is the first one: GNU `timeout` sends each twice."""

GRACE = 10.0
"""Seconds that a process may take to end by itself when the one that started it has ended."""


class Interrupted(SystemExit):
    """A signal ended the command; unless caught, the exit status says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class _State:
    """What happened so far; handlers of signals belong to the process, so there is one."""

    process: int | None = None
    received: int | None = None
    at = 0.0
    deferred = False
    forward: Callable[[int], Any] | None = None


def received() -> int | None:
    """The signal that came, if one did."""
    return _State.received


def defer(forward: Callable[[int], Any] | None = None) -> None:
    """From now on only note a signal: what follows must not be broken off.

    Args:
        forward: Called with the signal's number, to send it to other processes.
    """
    _State.deferred, _State.forward = True, forward
    if _State.process is not None:
        _install()  # over those that Lightning has installed since


def undefer() -> None:
    """From now on a signal raises `Interrupted`; one that came does so here."""
    _State.deferred = False
    if _State.received is not None:
        raise Interrupted(_State.received)


@contextmanager
def handled() -> Iterator[None]:
    """End the block by `Interrupted` when a signal comes; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    before = {each: signal.getsignal(each) for each in HANDLED}
    _State.process, _State.received = os.getpid(), None
    _State.deferred, _State.forward = False, None
    _install()
    try:
        yield
    finally:
        signum, _State.received = _State.received, None
        _State.process, _State.deferred = None, False
        for each, handler in before.items():
            signal.signal(each, handler)
        if signum is not None:
            raise Interrupted(signum)


def end_with_parent() -> None:
    """Let this process end soon after the one that started it, however that ends.

    For the processes that share a run with the first one. If that is killed, they would wait for
    it in a collective operation, which NCCL gives up after half an hour.
    """
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(GRACE)
    os.write(2, b"error: the process that started this one has died: this one ends too\n")
    os._exit(1)


def _install() -> None:
    for each in HANDLED:
        if signal.getsignal(each) is not signal.SIG_IGN:  # as by nohup
            signal.signal(each, _handle)


def _handle(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != _State.process:
        return  # a process that loads data, which ends with the one that started it
    now = time.monotonic()
    if _State.received is not None:
        if now - _State.at > SAME:
            os._exit(128 + signum)
        return
    _State.received, _State.at = signum, now
    when = "after this update" if _State.deferred else "now"
    name = signal.Signals(signum).name
    # Not print: a signal may come while it prints.
    os.write(2, f"\n{name}: stopping {when}; once more stops at once\n".encode())
    if _State.forward is not None:
        _State.forward(signum)
    if not _State.deferred:
        raise Interrupted(signum)
