"""Peak memory of sampling, DEQ, a sweep and the metrics, each in a process of its own.

    .venv/bin/python benchmarks/peak_memory.py "DDIM, 10 steps"   # one case, as JSON

A stage of `speed.py` and `gpu.py`. On a CPU it is the largest resident set (VmHWM of Linux) with
what Python and PyTorch take themselves, which the first row shows; on a GPU there is the peak of
what PyTorch had allocated, too. Sampling should not grow with the number of steps, "fd" not with
the number of images.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from distillation_speed import Updates
from measuring import MIB, ROOT, Bench, Results, Row, device_of
from subjects import CONFIGS, make_model

from ddim_pl.fixed_point import Anderson
from ddim_pl.images import to_uint8
from ddim_pl.metrics.digits import DigitsFeatures
from ddim_pl.metrics.quality import SampleQuality
from ddim_pl.samplers import DDIM, DEQ, Ancestral, ParaDiGMS, Sampler
from ddim_pl.timesteps import linear

Case = Callable[[str, bool], None]


def memory(bench: Bench) -> None:
    """Peak memory of every case."""
    names = [*CASES, *(ON_A_GPU if bench.device == "cuda" else {})]
    for name in TINY if bench.tiny else names:
        bench.case(name, partial(_in_a_process, bench, name))


def _in_a_process(bench: Bench, name: str) -> list[Row]:
    command = [sys.executable, __file__, name, "--device", bench.device]
    command += ["--threads", str(bench.threads)] + ["--tiny"] * bench.tiny
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    row = json.loads(done.stdout.splitlines()[-1])
    base = bench.results.rows(bench.stage)
    if base:
        row["more than the first, MiB"] = row["resident MiB"] - base[0]["resident MiB"]
    return [row]


# ---- cases ------------------------------------------------------------------------------------


def _sampling(
    device: str, tiny: bool, *, steps: int, sampler: Sampler, name: str = "digits", batch: int = 16
) -> None:
    model = make_model(name, tiny=tiny).eval().to(device)
    levels = linear(model.schedule.num_levels, min(steps, 3) if tiny else steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing converges to a tolerance of 0
        model.sample(range(2 if tiny else batch), sampler=sampler, levels=levels)


def _update(device: str, tiny: bool, *, name: str, batch: int) -> None:
    """Two updates in a bare loop: the first makes the optimiser's state."""
    bench = Bench(Results(Path(), "nothing", {}), device)
    module = make_model(name, tiny=tiny)
    Updates(bench, module, 2 if tiny else batch, "float32")(2)


def _metrics(device: str, tiny: bool, *, metric: str, count: int) -> None:
    quality = SampleQuality(DigitsFeatures(), (metric,)).to(device)
    generator = torch.Generator().manual_seed(0)
    total, size = (40, 20) if tiny else (count, 500)
    for real in (True, False):
        for _ in range(total // size):
            images = torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1
            quality.update(to_uint8(images), real=real)
    quality.compute()


def _sweep(device: str, tiny: bool, *, count: int) -> None:
    """A run of one update, and a sweep over it."""
    from ddim_pl.cli import main

    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
    config = str(ROOT / CONFIGS["digits"])
    count = 40 if tiny else count
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("configs").symlink_to(ROOT / "configs")
        small = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
        small += ["--trainer.enable_progress_bar=false"]
        small += [f"--trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}"]
        main(["fit", "--config", config, *small])
        cells = ["--timesteps=[linear]", "--num_steps=[2,5]", f"--num_samples={count}"]
        main(["sweep", "--ckpt_path", "last", *cells, "--num_shown=4"])


def _deq(max_batch: int | None) -> DEQ:
    return DEQ(Anderson(tolerance=0.0, max_sweeps=5), max_batch=max_batch)


CASES: dict[str, Case] = {
    "nothing": lambda device, tiny: None,
    **{
        f"{kind}, {steps} steps": partial(_sampling, steps=steps, sampler=sampler)
        for kind, sampler, numbers in (
            ("DDIM", DDIM(), (10, 100, 1000)),
            ("DDPM", Ancestral(), (10, 1000)),
        )
        for steps in numbers
    },
    "DEQ, 10 steps": partial(_sampling, steps=10, sampler=_deq(None)),
    "DEQ, 100 steps": partial(_sampling, steps=100, sampler=_deq(None)),
    "DEQ, 100 steps, max_batch 256": partial(_sampling, steps=100, sampler=_deq(256)),
    "ParaDiGMS, 100 steps, window 10": partial(_sampling, steps=100, sampler=ParaDiGMS(10, 1e-1)),
    **{
        f"{metric}, {count} images": partial(_metrics, metric=metric, count=count)
        for metric in ("fd", "kid", "precision_recall")
        for count in (1000, 10_000)
    },
    "sweep of 2 cells, 200 images": partial(_sweep, count=200),
    "sweep of 2 cells, 1000 images": partial(_sweep, count=1000),
    "updates, digits, batch 48": partial(_update, name="digits", batch=48),
    "updates, cifar10, batch 8": partial(_update, name="cifar10", batch=8),
}
TINY = ("DDIM, 10 steps",)
_CIFAR = {"name": "cifar10", "batch": 256, "sampler": DDIM()}
ON_A_GPU: dict[str, Case] = {
    "DDIM, cifar10, batch 256, 10 steps": partial(_sampling, steps=10, **_CIFAR),
    "DDIM, cifar10, batch 256, 100 steps": partial(_sampling, steps=100, **_CIFAR),
    "updates, cifar10, batch 128": partial(_update, name="cifar10", batch=128),
}


def largest_resident_set() -> float:
    """Peak of this process's resident memory, in MiB."""
    status = Path("/proc/self/status")  # getrusage counts what the parent had before exec, too
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run one case and print its peak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=[*CASES, *ON_A_GPU])
    parser.add_argument("--device", type=device_of, choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with contextlib.redirect_stdout(io.StringIO()):
        (CASES | ON_A_GPU)[options.case](options.device, options.tiny)
    row: Row = {"resident MiB": largest_resident_set()}
    if options.device == "cuda":
        row["allocated on the GPU, MiB"] = torch.cuda.max_memory_allocated() / MIB
    print(json.dumps(row))


if __name__ == "__main__":
    main()
