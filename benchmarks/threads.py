"""Does a second thread pay, and does it beside a busy process?

A stage of `speed.py`, on a CPU. Forward and backward passes of the digits network, with one thread
and with two in turn, by the wall clock: once as the machine is, and once beside a process of this
script that is always busy. How many processors all other programs had meanwhile is measured, too:
without that number nothing here can be read.
"""

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from measuring import Bench, Row
from subjects import make_model
from training_speed import RandomImages, ours_loss

BUSY = "while True: pass"


def threads(bench: Bench) -> None:
    """One thread against two."""
    batch, passes = (4, 1) if bench.tiny else (64, 5)
    for name, number in (("as the machine is", 0), ("beside a busy process", 1)):
        text = f"digits, batch {batch}, forward and backward, {name}"
        bench.case(text, partial(_threads, bench, batch, passes, number))


def _threads(bench: Bench, batch: int, passes: int, number: int) -> list[Row]:
    model = make_model("digits", tiny=bench.tiny).train()
    data = RandomImages(model, batch, 1).images
    x = data.images(torch.arange(batch)).float() / 127.5 - 1
    label = data.labels(torch.arange(batch))
    loss = ours_loss(model)

    def call(count: int) -> float:
        torch.set_num_threads(count)
        begin = time.perf_counter()
        for _ in range(passes):
            model.network.zero_grad()
            loss(model.network, x, label).backward()
        return time.perf_counter() - begin

    with _busy(number):
        others = Others()
        try:
            rows = bench.in_turn(
                {"one thread": partial(call, 1), "two threads": partial(call, 2)},
                work=passes,
                unit="passes",
            )
        finally:
            torch.set_num_threads(bench.threads)
        used = others.processors()
    of = f"of {os.cpu_count()} processors others had"
    return [row | ({of: used} if used is not None else {}) for row in rows]


@contextlib.contextmanager
def _busy(number: int) -> Iterator[None]:
    """So many processes that do nothing but keep a processor busy."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Others:
    """What other programs take of the processors from now on, by Linux' own count."""

    def __init__(self) -> None:
        self._begin = self._now()

    def processors(self) -> float | None:
        """How many processors they had on average; None where nobody counts."""
        if self._begin is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._begin, self._now(), strict=True))
        return max(0.0, busy - own) / wall

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds of the wall, of all processors at work, and of this process."""
        file = Path("/proc/stat")
        if not file.is_file():
            return None
        user, nice, system, _, _, *rest = map(int, file.read_text().split("\n")[0].split()[1:9])
        usage = resource.getrusage(resource.RUSAGE_SELF)
        busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, usage.ru_utime + usage.ru_stime
