"""Drawing a chain at once against drawing it step by step: error, sweeps, evaluations, time.

    .venv/bin/python benchmarks/deq_sampling.py CHECKPOINT [--steps 10 50 100 1000] [--batch 16]
        [--device cuda] [--tolerance 1e-3] [--output docs/results/deq-sampling]

For each number of steps the same latents are drawn by sequential DDIM and by the solvers of
`ddim_pl.samplers.DEQ` and `ParaDiGMS`. The error is the largest relative one of an image, over the
batch; sweeps are mean and most over the batch; evaluations of the network are those of a sample,
on average; time is in units of the sequential chain's, drawn just before. Writes a table as CSV
and Markdown, and all residuals as a plot.
"""

import argparse
import csv
import time
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from measuring import device_of

from ddim_pl.fixed_point import Anderson, Picard
from ddim_pl.noise import latents
from ddim_pl.samplers import DDIM, DEQ, ParaDiGMS
from ddim_pl.timesteps import linear
from ddim_pl.training.loading import load as load_teacher


def methods(
    tolerance: float, max_sweeps: int, max_batch: int | None
) -> dict[str, DEQ | ParaDiGMS]:
    """What is compared, by name."""
    common = {"tolerance": tolerance, "max_sweeps": max_sweeps}
    deq = {
        "Picard": DEQ(Picard(**common), max_batch=max_batch),
        **{
            f"Anderson, {mixing}": DEQ(Anderson(mixing=mixing, **common), max_batch=max_batch)
            for mixing in ("sample", "block", "triangular")
        },
        "Anderson, triangular, first guess 10": DEQ(
            Anderson(**common), first_guess=10, max_batch=max_batch
        ),
    }
    windows = {
        f"ParaDiGMS, window {window}": ParaDiGMS(window, tolerance, max_batch=max_batch)
        for window in (10, 50)
    }
    return {**deq, **windows}


def now(device: torch.device) -> float:
    """Seconds, with all work done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50, 100, 1000])
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--max-sweeps", type=int, default=50)
    parser.add_argument("--max-batch", type=int)
    parser.add_argument("--methods", nargs="+", help="by default all")
    parser.add_argument("--device", type=device_of, default="cpu")
    parser.add_argument("--output", default="runs/deq-sampling")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device(options.device)
    model = load_teacher(options.checkpoint).to(device).eval()
    rows, residuals = [], {}
    for batch in options.batch:
        z, _ = latents(model.seed, range(batch), model.image_shape)
        z = z.to(device)
        denoiser = model.conditioned(model.label_of(range(batch)))
        for steps in options.steps:
            levels = linear(model.schedule.num_levels, steps)
            for name, sampler in methods(
                options.tolerance, options.max_sweeps, options.max_batch
            ).items():
                if options.methods and name not in options.methods:
                    continue
                begin = now(device)
                exact = DDIM()(denoiser, z, levels)
                middle = now(device)
                if isinstance(sampler, DEQ):
                    chain = sampler.solve(denoiser, z, levels)
                    images, sweeps, evaluations = (
                        chain.states[:, -1],
                        chain.sweeps,
                        chain.evaluations,
                    )
                    residuals[name, steps, batch] = chain.residuals
                    converged = int(chain.converged.sum())
                else:
                    states, sweeps, evaluations = sampler.solve(denoiser, z, levels)
                    images, converged = states[:, -1], batch
                end = now(device)
                error = (images - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
                rows.append(
                    {
                        "batch": batch,
                        "steps": steps,
                        "method": name,
                        "error": f"{error.max():.1e}",
                        "sweeps": f"{sweeps.double().mean():.1f} ({sweeps.max()})",
                        "converged": f"{converged}/{batch}",
                        "evaluations": f"{evaluations.double().mean():.0f}",
                        "time": f"{(end - middle) / (middle - begin):.2f}",
                    }
                )
                print(" | ".join(str(value) for value in rows[-1].values()), flush=True)
    write(Path(options.output), rows, residuals)


def write(stem: Path, rows: list[dict], residuals: dict) -> None:
    """Write the table and the plot."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    places = sorted({(steps, batch) for _, steps, batch in residuals})
    figure = Figure(figsize=(4.5 * len(places), 4), layout="constrained")
    every = figure.subplots(1, len(places), squeeze=False)[0]
    for axes, (steps, batch) in zip(every, places, strict=True):
        for (name, s, b), values in residuals.items():
            if (s, b) == (steps, batch):
                axes.plot(range(1, len(values) + 1), values.nanmean(1), marker=".", label=name)
        axes.set(yscale="log", xlabel="sweep", title=f"{steps} steps, batch {batch}")
        axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
    figure.savefig(stem.with_suffix(".png"), dpi=80)


if __name__ == "__main__":
    main()
