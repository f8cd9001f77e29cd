"""CPU seconds of images' noise: a generator for each image beside Philox, in turn.

    .venv/bin/python benchmarks/noise_speed.py [--repeats 7] [--compile] [--device cuda]

"noise" is Gaussian noise of a batch, made anew from its seed; "gamma" as many numbers from
Gamma(2.5, 1), which are never compiled; "pairs" is a batch of Luhman's training, from the loader
to the device: images of a shard, labels and latents. User and system time of the process in
milliseconds, median and range of the repeats; a warm-up, and with `--compile` the time of
compiling, are not in them. On a GPU it is the host's time that is given, without a wait.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import device_of
from torch import Tensor

from ddim_pl.data.base import BatchIndices
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.data.teacher_pairs import IndexedPairs, TeacherPairsDataModule
from ddim_pl.rng import gaussian_latents, image_noise, standard_gamma

SIZES = {"digits": ((1, 8, 8), 128), "cifar10": ((3, 32, 32), 512), "lsun": ((3, 256, 256), 32)}


def cpu_seconds(function: Callable[[], Any], times: int) -> float:
    """User and system time of a call, the mean of several."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(times):
        function()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) / times


def latents_of(source: str, compiled: bool, device: torch.device) -> Callable[..., Any]:
    """The latents of a source; those of generators come from the host."""
    if source == "generators":
        return gaussian_latents
    return partial(gaussian_latents, noise_source=source, compile=compiled, device=device)


def gammas(source: str, shape: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    """Gamma numbers of a batch."""
    generators = image_noise(source, 0, torch.arange(batch), device=device)
    return standard_gamma(torch.full((batch, *shape), 2.5, dtype=torch.float64), generators)


def pairs_of(
    source: str, shape: tuple[int, ...], batch: int, folder: Path, compiled: bool
) -> Callable[[torch.device], Tensor]:
    """What makes a batch of pairs on a device."""
    data = TeacherPairsDataModule(
        DigitsDataModule(), str(folder), num_pairs=batch, num_validation=1, shard_size=batch
    )
    extra = {} if source == "generators" else {"noise_source": source}
    make = partial(gaussian_latents, compile=compiled)
    store = data.open({"shape": list(shape), "num_classes": None, **extra}, make)
    store.begin()
    store.write(0, torch.zeros(batch, *shape))
    pairs = IndexedPairs(store, 0, batch, make)
    index = BatchIndices(torch.arange(batch), torch.zeros(batch, dtype=torch.bool))

    def batch_on(device: torch.device) -> Tensor:
        found = pairs[index]
        moved = type(found)(*(each.to(device, non_blocking=True) for each in found))
        return data.on_after_batch_transfer(moved, 0).latents

    return batch_on


def main() -> None:
    """Print a row for each size and kind of work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", type=device_of, default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    kinds = {"generators": ("generators", False), "Philox": ("philox", False)}
    if options.compile:
        kinds["Philox, compiled"] = ("philox", True)
    print("| work | batch |", " | ".join(kinds), "|\n|---|---|" + "---|" * len(kinds))
    for name, (shape, batch) in SIZES.items():
        with tempfile.TemporaryDirectory() as place:
            noise, gamma, pairs = {}, {}, {}
            for kind, (source, compiled) in kinds.items():
                draw = latents_of(source, compiled, device)
                noise[kind] = partial(draw, 0, torch.arange(batch), shape)
                gamma[kind] = partial(gammas, source, shape, batch, device)
                made = pairs_of(source, shape, batch, Path(place, kind), compiled)
                pairs[kind] = partial(made, device)
            for work, calls in (("noise", noise), ("gamma", gamma), ("pairs", pairs)):
                print(f"| {work}, {name} | {batch} | {row(calls, options.repeats)} |")


def row(calls: dict[str, Callable[[], Any]], repeats: int) -> str:
    """The cells of a row: the calls in turn, in each repeat for a tenth of a second each."""
    found: dict[str, list[float]] = {kind: [] for kind in calls}
    times = {}
    for kind, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        times[kind] = max(1, round(0.1 / (time.perf_counter() - start)))
    for _ in range(repeats):
        for kind, call in calls.items():
            found[kind].append(1e3 * cpu_seconds(call, times[kind]))
    cells = [
        f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"
        for each in found.values()
    ]
    return " | ".join(cells)


if __name__ == "__main__":
    main()
