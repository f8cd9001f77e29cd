"""Inversion as in Figure 1 of the report: loss, time and evaluations, sequential against DEQ.

    .venv/bin/python benchmarks/deq_inversion.py --config configs/digits/teacher.yaml CHECKPOINT
        [--steps 10 100] [--seconds 60 300] [--images 32] [--lr 0.02] [--device cuda]
        [--output docs/results/deq-inversion] [--gradients]

The latents of validation images are sought by each method from the same first latents, noise and
the DDIM encoding, for the same time. Losses are `||x - x_hat||^2` of an image in [-1, 1], as
sequential DDIM draws it from the latents that were kept, and given as mean and standard error over
the images. Each finished run is kept in OUTPUT.json, and not repeated when the script is called
again. `--gradients` prints instead how near the gradient of each method is to the exact one.
"""

import argparse
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from measuring import device_of
from torch import Tensor

from ddim_pl.data.base import ImageDataModule
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.fixed_point import Anderson, Picard
from ddim_pl.images import from_uint8
from ddim_pl.inversion import Implicit, InverseJacobian, Method, Sequential, encode, invert
from ddim_pl.noise import latents
from ddim_pl.samplers import DEQ
from ddim_pl.timesteps import linear
from ddim_pl.training.loading import load as load_teacher


def methods() -> dict[str, Method]:
    """What is compared, by name."""
    paper = Anderson(memory=3, damping=0.9, tolerance=1e-2, max_sweeps=15)
    loose = Anderson(memory=3, tolerance=3e-2, max_sweeps=15)
    return {
        "sequential": Sequential(),
        "DEQ, the paper's solver": Implicit(DEQ(paper)),
        "DEQ, one sweep": Implicit(DEQ(Picard(tolerance=0, max_sweeps=1), first_guess=10)),
        "DEQ, tolerance 3e-2": Implicit(DEQ(loose)),
        "DEQ, inverse Jacobian": InverseJacobian(DEQ(paper)),
    }


def gradients(denoiser: NetworkDenoiser, x: Tensor, levels: Tensor, z: Tensor) -> None:
    """Print the cosine with the exact gradient and the relative error, mean over the images.

    And the cosine of the 1-step gradient with that of [DEQ]'s code, `latent_space_opt_anderson.py`
    with `--pg_steps 1`: there the estimates are those of states without a gradient, all of them,
    so that what is left is the error of the image times a number.
    """
    tight = DEQ(Picard(tolerance=0, max_sweeps=len(levels) - 1))
    kinds: dict[str, Method] = {"1-step": Implicit(tight)}
    kinds |= {f"phantom, 3, damping {d}": Implicit(tight, 3, d) for d in (0.1, 1.0)}
    kinds |= {f"phantom, 5, damping {d}": Implicit(tight, 5, d) for d in (0.1, 1.0)}
    kinds |= {f"inverse Jacobian, {n}": InverseJacobian(tight, n) for n in (1, 3, 5, 8, 12)}

    def of(method: Method) -> Tensor:
        latents = z.clone().requires_grad_(True)
        images = method.generate(denoiser, latents, levels, None).images
        return torch.autograd.grad((images - x).square().sum(), latents)[0].flatten(1).double()

    exact = of(Sequential())
    images = tight(denoiser, z, levels)
    theirs = (images - x).flatten(1).double()
    cosine = torch.cosine_similarity(of(kinds["1-step"]), theirs).mean()
    print(f"{len(levels) - 1} steps: the 1-step gradient's cosine with [DEQ]'s code: {cosine:.6f}")
    for name, method in kinds.items():
        found = of(method)
        cosine = torch.cosine_similarity(found, exact).mean()
        error = ((found - exact).norm(dim=1) / exact.norm(dim=1)).mean()
        print(f"| {len(levels) - 1} | {name} | {cosine:.4f} | {error:.3g} |", flush=True)


def data_of(settings: dict[str, Any]) -> ImageDataModule:
    """The data module of a config, given as plain data, with its images loaded."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(ImageDataModule, "data")
    data = parser.instantiate(parser.parse_object({"data": settings["data"]})).data
    data.prepare_data()
    data.setup("test")
    return data


def held_out(config: str, count: int) -> tuple[Tensor, Tensor]:
    """Images and labels of the config's validation set, with which digits train too."""
    data = data_of(yaml.safe_load(Path(config).read_text()))
    if count > len(data.val_set):
        raise ValueError(f"images must be at most {len(data.val_set)}, got {count}: {config}")
    indices = torch.arange(count)
    return from_uint8(data.val_set.images(indices)), data.val_set.labels(indices)


def main() -> None:
    """Run what is missing, print and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--config", required=True, help="where the data module is read from")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--seconds", type=float, nargs="+", default=[60, 300])
    parser.add_argument("--starts", nargs="+", default=["noise", "encoding"])
    parser.add_argument("--methods", nargs="+", default=list(methods()))
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.02])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=device_of, default="cpu")
    parser.add_argument("--output", default="runs/deq-inversion")
    parser.add_argument("--gradients", action="store_true", help="compare gradients instead")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device(options.device)
    model = load_teacher(options.checkpoint).to(device).eval()
    x, label = held_out(options.config, options.images)
    x = x.to(device)
    denoiser = replace(
        model.conditioned(label if model.num_classes is not None else None), clip=False
    )
    stem = Path(options.output)
    stem.parent.mkdir(parents=True, exist_ok=True)
    file = stem.with_suffix(".json")
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for steps, seconds in zip(options.steps, options.seconds, strict=True):
        levels = linear(model.schedule.num_levels, steps)
        for start in options.starts:
            z = (
                encode(denoiser, x, levels)
                if start == "encoding"
                else latents(options.seed, range(len(x)), model.image_shape)[0].to(device)
            )
            if options.gradients:
                print(start)
                gradients(denoiser, x, levels, z)
                continue
            for name in options.methods:
                for lr in options.lr:
                    key = f"{steps} | {start} | {name} | {lr:g} | {seconds:g} s"
                    if key not in done:
                        done[key] = run(denoiser, x, levels, z, methods()[name], lr, seconds)
                        file.write_text(json.dumps(done, indent=0))
                    print(key, row(done[key]), flush=True)
    if not options.gradients:
        write(stem, done)


def run(
    denoiser: NetworkDenoiser,
    x: Tensor,
    levels: Tensor,
    z: Tensor,
    method: Method,
    lr: float,
    seconds: float,
) -> dict[str, Any]:
    """One inversion: its losses and a curve of a hundred points."""
    begin = time.perf_counter()
    found = invert(
        denoiser, x, levels, z, method=method, lr=lr, num_updates=10**9, max_seconds=seconds
    )
    curve = found.curve[:: max(1, len(found.curve) // 100)] + found.curve[-1:]
    return {
        "losses": [round(value, 4) for value in found.losses.tolist()],
        "updates": found.curve[-1].update,
        "evaluations": found.curve[-1].evaluations,
        "seconds": time.perf_counter() - begin,
        "curve": [[round(p.seconds, 2), round(p.best, 4)] for p in curve],
    }


def row(result: dict[str, Any]) -> dict[str, str]:
    """What the table says of a run."""
    losses = torch.tensor(result["losses"])
    return {
        "loss": f"{losses.mean():.3g} ± {losses.std() / len(losses) ** 0.5:.2g}",
        "median": f"{losses.median():.3g}",
        "updates": str(result["updates"]),
        "evaluations": f"{result['evaluations']:.0f}",
        "seconds": f"{result['seconds']:.0f}",
    }


def write(stem: Path, done: dict[str, Any]) -> None:
    """Write the table and a plot of the best loss against time."""
    names = ["steps", "start", "method", "lr", "time"]
    rows = [
        dict(zip(names, key.split(" | "), strict=True)) | row(result)
        for key, result in done.items()
    ]
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(each.values()) + " |" for each in rows]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(stem.with_suffix(".md").read_text())
    places = list(dict.fromkeys((each["steps"], each["start"]) for each in rows))
    figure = Figure(figsize=(4.2 * len(places), 3.6), layout="constrained")
    every = figure.subplots(1, len(places), squeeze=False)[0]
    for axes, place in zip(every, places, strict=True):
        for each, result in zip(rows, done.values(), strict=True):
            if (each["steps"], each["start"]) == place:
                seconds, best = zip(*result["curve"], strict=True)
                axes.plot(seconds, best, label=f"{each['method']}, lr {each['lr']}")
        axes.set(yscale="log", xlabel="seconds", title=f"T = {place[0]}, from {place[1]}")
        axes.grid(alpha=0.25, which="both")
    every[0].set_ylabel("loss")
    for axes in every:
        axes.legend(fontsize=5)
    figure.savefig(stem.with_suffix(".png"), dpi=80)


if __name__ == "__main__":
    main()
