"""The five rows of Figure 1 of the report: inversion by DDIM and by DEQ-DDIM on four data sets.

    .venv/bin/python benchmarks/figure1.py --cifar10 CHECKPOINT --celeba CHECKPOINT
        --bedroom CHECKPOINT --church CHECKPOINT
        [--images 100] [--batch_size 1] [--starts noise] [--seed 0] [--device cuda]
        [--output runs/figure1]

The checkpoints are those of `configs/{cifar10,celeba,lsun_bedroom,lsun_church}/ddpm.yaml`, which
also say where the validation images are; one without a checkpoint is left out. `--digits` adds a
row for the teacher of `configs/digits/ddpm.yaml`, with which the script can be tried; digits are
inverted that it was trained on.

Levels, updates and rates are those of the code of Pokle et al. 2022, and so are the solver
(Anderson iteration with weights for each level, m = 3, at most 15 sweeps, tolerance 1e-2, mixing
0.9), the 1-step gradient, and a baseline that keeps the activations of the whole chain. They
invert one image at a time, from noise in the paper, from the DDIM encoding in the code (`--starts
encoding`), and stop at a loss of 0.5. Ours are: the penalty of the solver's weights, its first
guess (the solution for the latents before, moved), and the loss, which is that of sequential DDIM
from the latents that were kept; for DEQ-DDIM it is looked at after every tenth update. Times are
those of a batch, which is an image unless `--batch_size` says otherwise. Mean and sample deviation
over the images.

Each finished batch is kept in OUTPUT.json and not repeated when the script is called again.
"""

import argparse
import json
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from deq_inversion import held_out
from measuring import device_of
from torch import Tensor

from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.evaluation.tables import markdown, write_text
from ddim_pl.files import replacing
from ddim_pl.fixed_point import Anderson
from ddim_pl.inversion import Implicit, Method, Sequential, encode, invert
from ddim_pl.noise import latents
from ddim_pl.samplers import DEQ
from ddim_pl.timesteps import make_levels
from ddim_pl.training.loading import load

STOP_BELOW = 0.5


@dataclass(frozen=True)
class Row:
    """A row of the figure; updates, rates and published values are pairs (DDIM, DEQ-DDIM)."""

    data: str
    config: str
    steps: int
    timesteps: str
    updates: tuple[int, int]
    rates: tuple[float, float]
    loss: tuple[str, str] = ("", "")
    minutes: tuple[str, str] = ("", "")


ROWS = [
    Row(
        *("cifar10", "cifar10", 100, "quadratic", (1000, 1000), (1e-2, 5e-3)),
        loss=("15.74 ± 8.7", "0.76 ± 0.35"),
        minutes=("49.07", "12.99"),
    ),
    Row(
        *("cifar10", "cifar10", 10, "quadratic", (1000, 1000), (1e-2, 5e-3)),
        loss=("2.59 ± 3.67", "0.68 ± 0.32"),
        minutes=("14.36", "2.54"),
    ),
    Row(
        *("celeba", "celeba", 20, "leading", (2500, 500), (1e-2, 1e-3)),
        loss=("14.13 ± 5.04", "1.03 ± 0.37"),
        minutes=("30.09", "28.09"),
    ),
    Row(
        *("bedroom", "lsun_bedroom", 10, "leading", (2000, 2000), (5e-3, 5e-3)),
        loss=("1114.49 ± 795.86", "36.37 ± 22.86"),
        minutes=("26.41", "33.7"),
    ),
    Row(
        *("church", "lsun_church", 10, "leading", (2000, 500), (5e-3, 5e-3)),
        loss=("1674.68 ± 1432.54", "47.94 ± 24.78"),
        minutes=("29.7", "33.54"),
    ),
    Row("digits", "digits", 10, "quadratic", (1000, 1000), (1e-2, 5e-3)),
]
SOLVER = Anderson(memory=3, mixing="block", damping=0.9, tolerance=1e-2, max_sweeps=15)
METHODS: dict[str, Method] = {
    "DDIM": Sequential(checkpointing=False),
    "DEQ-DDIM": Implicit(DEQ(SOLVER)),
}


def main() -> None:
    """Run what is missing, then print and write the table."""
    options = arguments()
    warnings.filterwarnings("ignore", message=".*did not converge.*")
    output = Path(options.output)
    file = output.with_suffix(".json")
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    cells: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    try:
        for row in ROWS:
            checkpoint = getattr(options, row.data)
            if checkpoint is None:
                print(f"{row.data}, {row.steps} steps: left out, no --{row.data}")
                continue
            run_row(row, checkpoint, options, done, file, cells)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    table = markdown([line(*key, results) for key, results in cells.items()])
    write_text(output.with_suffix(".md"), table)
    print(f"\n{table}\nin {output.with_suffix('.md')}")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--cifar10", "--celeba", "--bedroom", "--church", "--digits"):
        parser.add_argument(option, metavar="CHECKPOINT")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--updates", type=int, help="at most so many, in place of the paper's")
    parser.add_argument("--starts", nargs="+", default=["noise"], choices=["noise", "encoding"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", type=device_of, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--output", default="runs/figure1")
    options = parser.parse_args()
    if all(getattr(options, row.data) is None for row in ROWS):
        parser.error("no checkpoint given: name at least one, such as --cifar10 CHECKPOINT")
    for name in ("images", "batch_size", "updates"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def run_row(
    row: Row,
    checkpoint: str,
    options: argparse.Namespace,
    done: dict[str, Any],
    file: Path,
    cells: dict[tuple[str, ...], list[dict[str, Any]]],
) -> None:
    """Invert the images of a row by both methods, batch by batch, and collect the results."""
    model = load(checkpoint, name=f"--{row.data}").to(options.device).eval()
    x, label = held_out(f"configs/{row.config}/ddpm.yaml", options.images)
    levels = make_levels(row.timesteps, model.schedule, row.steps)
    if options.updates is not None:
        row = replace(row, updates=tuple(min(options.updates, each) for each in row.updates))
    for start in options.starts:
        for begin in range(0, len(x), options.batch_size):
            indices = range(begin, min(begin + options.batch_size, len(x)))
            part = slice(indices.start, indices.stop)
            classes = label[part] if model.num_classes is not None else None
            denoiser = replace(model.conditioned(classes), clip=False)
            images = x[part].to(options.device)
            z = (
                encode(denoiser, images, levels)
                if start == "encoding"
                else latents(options.seed, indices, model.image_shape)[0].to(options.device)
            )
            for column, (name, method) in enumerate(METHODS.items()):
                limits = {"lr": row.rates[column], "num_updates": row.updates[column]}
                limits |= {"stop_below": STOP_BELOW}
                settings = {"row": asdict(row), "start": start, "method": str(method), **limits}
                settings |= {"device": options.device, "images": [*indices]}
                settings |= {"seed": options.seed, "checkpoint": checkpoint}
                key = json.dumps(settings)
                if key not in done:
                    done[key] = one(denoiser, images, levels, z, method, limits)
                    with replacing(file) as temporary:
                        temporary.write_text(json.dumps(done, indent=0))
                print(row.data, row.steps, start, name, [*indices], done[key], flush=True)
                published = (row.loss[column], row.minutes[column])
                place = (row.data, str(row.steps), start, name, *published, options.device)
                cells.setdefault(place, []).append(done[key])


def one(
    denoiser: NetworkDenoiser,
    x: Tensor,
    levels: Tensor,
    z: Tensor,
    method: Method,
    limits: dict[str, Any],
) -> dict[str, Any]:
    """Invert a batch."""
    begin = time.perf_counter()
    found = invert(denoiser, x, levels, z, method=method, **limits)
    return {
        "losses": [round(value, 4) for value in found.losses.tolist()],
        "updates": found.curve[-1].update,
        "evaluations": round(found.curve[-1].evaluations, 1),
        "minutes": round((time.perf_counter() - begin) / 60, 4),
    }


def line(
    data: str,
    steps: str,
    start: str,
    method: str,
    loss: str,
    minutes: str,
    device: str,
    results: list[dict[str, Any]],
) -> dict[str, str]:
    """A line of the table, of all batches of a row, first latents and method."""
    losses = [value for each in results for value in each["losses"]]
    return {
        "data": data,
        "T": steps,
        "start": start,
        "method": method,
        "images": str(len(losses)),
        "loss": scattered(losses),
        "the report's": loss,
        "minutes of a batch": scattered([each["minutes"] for each in results]),
        "the report's minutes": minutes,
        "updates": f"{mean(each['updates'] for each in results):.0f}",
        "evaluations": f"{mean(each['evaluations'] for each in results):.0f}",
        "device": device,
    }


def scattered(values: list[float]) -> str:
    """Mean and sample deviation."""
    return f"{mean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
