"""The five rows of Figure 1 of the report: inversion by DDIM and by DEQ-DDIM on four data sets.

    .venv/bin/python benchmarks/figure1.py --cifar10 CHECKPOINT --celeba CHECKPOINT
        --bedroom CHECKPOINT --church CHECKPOINT
        [--images 100] [--batch_size 1] [--starts noise] [--seed 0] [--device cuda]
        [--output runs/figure1]

The checkpoints are those of `configs/{cifar10,celeba,lsun_bedroom,lsun_church}/ddpm.yaml`, which
also say where the held-out images are; one without a checkpoint is left out. `--digits` adds
a row for the teacher of `configs/digits/ddpm.yaml`, with which the script can be tried.

Levels, solver, updates and rates are those of Pokle et al. 2022 and of their code: Anderson
iteration with m = 3, at most 15 sweeps, tolerance 1e-2, mixing 0.9, and the 1-step gradient. They
invert one image at a time, from noise in the paper, from the DDIM encoding in the code
(`--starts encoding`), and stop at a loss of 0.5. The loss is `||x - x_hat||^2` of an image in
[-1, 1] as sequential DDIM draws it from the latents that were kept; times are those of a batch,
which is an image here unless `--batch_size` says otherwise. Mean and sample deviation over the
images.

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
    """A row of the figure: data set, levels, updates, and Adam's rate for each method."""

    data: str
    config: str
    steps: int
    timesteps: str
    updates: int
    rate: float
    sequential_rate: float
    published: str


ROWS = [
    Row("cifar10", "cifar10", 100, "quadratic", 1000, 5e-3, 1e-2, "15.74 ± 8.7 / 0.76 ± 0.35"),
    Row("cifar10", "cifar10", 10, "quadratic", 1000, 5e-3, 1e-2, "2.59 ± 3.67 / 0.68 ± 0.32"),
    Row("celeba", "celeba", 20, "leading", 500, 1e-3, 1e-2, "14.13 ± 5.04 / 1.03 ± 0.37"),
    Row("bedroom", "lsun_bedroom", 10, "leading", 2000, 5e-3, 5e-3, "1114 ± 796 / 36.4 ± 22.9"),
    Row("church", "lsun_church", 10, "leading", 500, 5e-3, 5e-3, "1675 ± 1433 / 47.9 ± 24.8"),
    Row("digits", "digits", 10, "linear", 1000, 5e-3, 1e-2, "none"),
]


def methods(row: Row) -> dict[str, tuple[Method, float]]:
    """The two columns of the figure, with their rates."""
    solver = Anderson(memory=3, damping=0.9, tolerance=1e-2, max_sweeps=15)
    return {
        "DDIM": (Sequential(), row.sequential_rate),
        "DEQ-DDIM": (Implicit(DEQ(solver)), row.rate),
    }


def main() -> None:
    """Run what is missing, then print and write the table."""
    options = arguments()
    warnings.filterwarnings("ignore", message=".*did not converge.*")
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".json")
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for row in ROWS:
        checkpoint = getattr(options, row.data)
        if checkpoint is None:
            print(f"{row.data}, {row.steps} steps: left out, no --{row.data}")
            continue
        run_row(row, checkpoint, options, done, file)
    table = markdown(table_of(done))
    write_text(output.with_suffix(".md"), table)
    print(f"\n{table}\nin {output.with_suffix('.md')}")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--cifar10", "--celeba", "--bedroom", "--church", "--digits"):
        parser.add_argument(option, metavar="CHECKPOINT")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--starts", nargs="+", default=["noise"], choices=["noise", "encoding"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="runs/figure1")
    options = parser.parse_args()
    if all(getattr(options, row.data) is None for row in ROWS):
        parser.error("no checkpoint given: name at least one, such as --cifar10 CHECKPOINT")
    return options


def run_row(
    row: Row, checkpoint: str, options: argparse.Namespace, done: dict[str, Any], file: Path
) -> None:
    """Invert the images of a row by both methods, batch by batch."""
    model = load(checkpoint).to(options.device).eval()
    x, label = held_out(f"configs/{row.config}/ddpm.yaml", options.images)
    levels = make_levels(row.timesteps, model.schedule, row.steps)
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
            for name, (method, rate) in methods(row).items():
                settings = asdict(row) | {"start": start, "method": name, "device": options.device}
                settings |= {"images": [*indices], "seed": options.seed, "checkpoint": checkpoint}
                key = json.dumps(settings)
                if key not in done:
                    done[key] = one(denoiser, images, levels, z, method, rate, row.updates)
                    with replacing(file) as temporary:
                        temporary.write_text(json.dumps(done, indent=0))
                print(row.data, row.steps, start, name, [*indices], done[key], flush=True)


def one(
    denoiser: NetworkDenoiser,
    x: Tensor,
    levels: Tensor,
    z: Tensor,
    method: Method,
    rate: float,
    updates: int,
) -> dict[str, Any]:
    """Invert a batch."""
    begin = time.perf_counter()
    found = invert(
        *(denoiser, x, levels, z),
        **{"method": method, "lr": rate, "num_updates": updates, "stop_below": STOP_BELOW},
    )
    return {
        "losses": [round(value, 4) for value in found.losses.tolist()],
        "updates": found.curve[-1].update,
        "evaluations": round(found.curve[-1].evaluations, 1),
        "minutes": round((time.perf_counter() - begin) / 60, 4),
    }


def table_of(done: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each data set, number of steps, first latents and method."""
    cells: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, result in done.items():
        settings = json.loads(key)
        names = ("data", "steps", "start", "method", "device", "published")
        cells.setdefault(tuple(str(settings[name]) for name in names), []).append(result)
    rows = []
    for (data, steps, start, method, device, published), results in cells.items():
        losses = [loss for each in results for loss in each["losses"]]
        rows.append(
            {
                "data": data,
                "T": steps,
                "start": start,
                "method": method,
                "images": str(len(losses)),
                "loss": scattered(losses),
                "published loss": published.split(" / ")[method == "DEQ-DDIM"]
                if "/" in published
                else published,
                "minutes of a batch": scattered([each["minutes"] for each in results]),
                "updates": f"{mean(each['updates'] for each in results):.0f}",
                "evaluations": f"{mean(each['evaluations'] for each in results):.0f}",
                "device": device,
            }
        )
    return rows


def scattered(values: list[float]) -> str:
    """Mean and sample deviation."""
    return f"{mean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
