"""Everything that wants a GPU, in one command: about half an hour, in stages that go on.

    .venv/bin/python benchmarks/gpu.py --out runs/gpu                    # all stages
    .venv/bin/python benchmarks/gpu.py --out runs/gpu --minutes 5        # again, until it is done
    .venv/bin/python benchmarks/gpu.py --out runs/try --device cpu --tiny --no-compile

Data and weights are random, nothing is downloaded. What is done is in OUT/gpu.json and OUT/gpu.md,
with the hardware, the driver and the versions; the same command goes on where one was stopped. The
stages are those of `speed.py` at the sizes of a GPU, the tests marked `gpu`, the features of FID,
and what configs/cifar10/ddpm.yaml would take in hours. The third of the lines above is to try the
script.
"""

import os
import subprocess
import sys

from distillation_speed import distillation
from limits import limits
from measuring import ROOT, Bench, Row, command
from metrics_speed import features
from peak_memory import memory
from sampling_speed import deq, loop, sampling
from subjects import config_of, precisions
from training_speed import training


def tests(bench: Bench) -> None:
    """`pytest -m gpu`."""
    if bench.tiny:
        bench.note("left out with --tiny")
    else:
        bench.case("pytest -m gpu", _pytest)


def _pytest() -> list[Row]:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=480
    )
    lines = done.stdout.strip().splitlines() or [done.stderr[-500:]]
    if done.returncode:
        raise RuntimeError("\n".join(lines[-40:]))
    return [{"outcome": lines[-1]}]


NEEDED = {"training": "cifar10", "sampling": "cifar10", "features": ""}
"""Stages that the hours are made of, and how their cases begin."""


def hours(bench: Bench) -> None:
    """What the config of CIFAR-10 would take, from the rows of the other stages."""
    config = config_of("cifar10")
    bench.results.stage(bench.stage)["cases"].clear()  # others may have grown since
    cells = {name: bench.results.rows(name) for name in ("training", "sampling", "features")}
    missing = [name for name in cells if not bench.results.stage(name)["done"]]
    if missing:
        bench.note(f"stages that have to be finished first: {', '.join(missing)}")
        bench.complete = False
    if not all(any(row["case"].startswith(c) for row in cells[n]) for n, c in NEEDED.items()):
        return
    own = config["trainer"]["precision"]
    bench.note(f"the config's own precision is {own}, which is float32 here")
    bench.case(
        "configs/cifar10/ddpm.yaml",
        lambda: hours_of(config, cells, precisions(bench.device)),
    )


def hours_of(config: Row, cells: dict[str, list[Row]], kinds: tuple[str, ...]) -> list[Row]:
    """Hours of training, of a FID, and of the whole fit with its FIDs.

    Args:
        config: The config, with its numbers of updates, steps and samples.
        cells: Rows of the stages "training", "sampling" and "features".
        kinds: Precisions; features are those of float32 where there are none in bf16.
    """
    trainer = config["trainer"]
    updates = trainer["max_epochs"] * config["data"]["init_args"]["steps_per_epoch"]
    measured = next(c for c in trainer["callbacks+"] if "Frechet" in c["class_path"])["init_args"]
    evaluations = trainer["max_epochs"] // measured["every_n_validations"]
    steps, images = config["model"]["init_args"]["num_steps"], measured["num_samples"]
    rates = {row["contender"].rpartition(", ")[2]: row["images/s"] for row in cells["features"]}
    rows = []
    for kind in kinds:
        fits = {
            row["contender"].removeprefix("Lightning, "): row["ms an update"]
            for row in cells["training"]
            if row["case"].startswith("cifar10")
            and row["case"].endswith(f", {kind}")
            and row["contender"].startswith("Lightning, ours")
        }
        draws = {  # of the last case, with the largest batch
            row["contender"].rpartition(", ")[0]: row["ms for image and step"]
            for row in cells["sampling"]
            if row["case"].startswith("cifar10") and row["contender"].endswith(f", {kind}")
        }
        if not fits or not draws:
            continue
        of_drawing = [each for each in draws if each.startswith("ours ") and "hand" not in each]
        for setting in dict.fromkeys([*fits, *of_drawing]):
            update = fits.get(setting, fits["ours"])
            drawing = draws.get(setting, draws["ours"]) * images * steps / 3.6e6
            extracting = images / rates.get(kind, rates["float32"]) / 3600
            fitting = update * updates / 3.6e6
            rows.append(
                {"contender": f"{setting}, {kind}", "updates": updates}
                | {
                    "training, hours": fitting,
                    f"{images:,} images of {steps} steps, hours": drawing,
                }
                | {"their features, hours": extracting, "FIDs in the fit": evaluations}
                | {"fit, hours": fitting + evaluations * (drawing + extracting)}
            )
    return rows


STAGES = {  # each with the seconds after which it begins nothing new
    "tests": (tests, 60.0),
    "limits": (limits, 90.0),
    "training": (training, 270.0),
    "sampling": (sampling, 240.0),
    "features": (features, 60.0),
    "hours": (hours, 60.0),
    "loop": (loop, 30.0),
    "distillation": (distillation, 90.0),
    "deq": (deq, 200.0),
    "memory": (memory, 200.0),
}

if __name__ == "__main__":
    text = __doc__.splitlines()[0]
    raise SystemExit(command(STAGES, text, name="gpu", device="cuda", threads=8))
