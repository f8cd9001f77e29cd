"""What `reproduce.py` measures and no command of `main.py` does, one measurement a call.

    .venv/bin/python benchmarks/claim_measures.py latents CHECKPOINT --output FOLDER
        [--images 200] [--steps 10 20 50 100] [--full 1000] [--features CLASS]

`latents`: how far images of one latent by different levels are from one another, in features.
`between`: how far images of interpolated latents are from the nearest real ones.
`diversity`: recall and coverage for several etas, with their scatter over the images.
`cost`: network evaluations and time of an image, the methods in turn.

Each writes `OUTPUT/NAME.json`, and `latents` a page of images beside it.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from deq_inversion import data_of
from measuring import Bench, Results, quieten
from torch import Tensor, nn

from ddim_pl.evaluation.plots import label_rows
from ddim_pl.evaluation.tables import write_text
from ddim_pl.fixed_point import Anderson
from ddim_pl.images import from_uint8, to_uint8
from ddim_pl.inversion import slerp
from ddim_pl.metrics.manifold import density_coverage, precision_recall
from ddim_pl.runs import checkpoint_config
from ddim_pl.samplers import DDIM, DEQ, Ancestral, DPMSolverPP, ParaDiGMS, Sampler
from ddim_pl.samplers.gamma import default_sampler
from ddim_pl.timesteps import linear, make_levels, trailing
from ddim_pl.training import DiffusionModule
from ddim_pl.training.loading import load

WEIGHTS = (0.25, 0.5, 0.75)
SHOWN = 12
LEAST_SECONDS = 0.2
Extractor = Callable[[Tensor], Tensor]


def latents(options: argparse.Namespace) -> dict[str, Any]:
    """Distances in features of images of one latent, over those of two images of a class.

    Returns:
        For each way but the last, all levels in turn, "same": the mean distance from the image of
        all levels; and "other", the mean distance of two such images of one class.
    """
    model, extract = load(options.checkpoint).eval(), extractor(options.features)
    ways: dict[str, tuple[str, int]] = {f"quadratic, {s}": ("quadratic", s) for s in options.steps}
    ways[f"linear, {options.steps[0]}"] = ("trailing", options.steps[0])
    ways["exponential"] = ("exponential", 1)
    ways[f"all {options.full}"] = ("trailing", options.full)
    features, shown = {}, []
    for name, (strategy, steps) in ways.items():
        levels = make_levels(strategy, model.schedule, steps)
        images = draw(model, options.images, options.batch_size, DDIM(clip=False), levels)
        features[name] = extract(images)
        shown.append(images[:SHOWN])
    label_rows(Path(options.output, "latents.png"), list(ways), shown)
    last = features.pop(next(reversed(ways)))
    other = distance(last, last.roll(model.num_classes or 1, 0))
    return {"same": {n: distance(f, last) for n, f in features.items()}, "other": other}


def between(options: argparse.Namespace) -> dict[str, Any]:
    """Mean distance from the nearest real image, in features.

    Returns:
        That of "samples", of "interpolated" latents and of "mixed" pixels for each weight of the
        second end, and of "real" images from the others.
    """
    model, extract = load(options.checkpoint).eval(), extractor(options.features)
    real = extract(real_images(options.data or options.checkpoint))
    pairs, level = options.images, model.levels[0]
    z = model.latents(range(2 * pairs), level)[0]
    label = model.label_of(range(pairs))

    def of(states: Tensor) -> Tensor:
        return torch.cat(
            [
                to_uint8(
                    model.sampler(
                        model.conditioned(label_of(label, part), sampling=True),
                        states[part],
                        model.levels,
                    )
                )
                for part in batches(len(states), options.batch_size)
            ]
        )

    first, second = of(z[:pairs]), of(z[pairs:])
    a, b = from_uint8(first), from_uint8(second)
    found: dict[str, Any] = {"samples": nearest(extract(torch.cat([first, second])), real)}
    found["interpolated"] = {
        str(w): nearest(extract(of(slerp(z[:pairs], z[pairs:], w))), real) for w in WEIGHTS
    }
    found["mixed"] = {
        str(w): nearest(extract(to_uint8((1 - w) * a + w * b)), real) for w in WEIGHTS
    }
    distances = torch.cdist(real, real).fill_diagonal_(torch.inf)
    return {**found, "real": float(distances.min(1).values.mean())}


def diversity(options: argparse.Namespace) -> dict[str, Any]:
    """Precision, recall, density and coverage for each eta, and their scatter over the images."""
    model, extract = load(options.checkpoint).eval(), extractor(options.features)
    real = extract(real_images(options.data or options.checkpoint))
    levels = make_levels("quadratic", model.schedule, options.steps[0])
    found = {}
    for eta in options.etas:
        images = draw(model, options.images, options.batch_size, DDIM(eta, clip=False), levels)
        fake = extract(images)
        found[f"{eta:g}"] = {**support(real, fake), **scatter(real, fake, options.halves)}
    return found


def scatter(real: Tensor, fake: Tensor, count: int) -> dict[str, float]:
    """Deviations of `support` over the generated images, from so many half samples.

    The deviation among halves, drawn without replacement, is that among whole samples of new
    images. The bootstrap is of no use here: an image that is there twice has a ball of radius 0.
    """
    chance = torch.Generator().manual_seed(0)
    halves = [
        support(real, fake[torch.randperm(len(fake), generator=chance)[: len(fake) // 2]])
        for _ in range(count)
    ]
    return {
        f"{name} scatter": float(torch.tensor([half[name] for half in halves]).std())
        for name in halves[0]
    }


def support(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Precision, recall, density and coverage of features `(N, D)` and `(M, D)`."""
    names = ("precision", "recall", "density", "coverage")
    values = (*precision_recall(real, fake), *density_coverage(real, fake))
    return {name: float(value) for name, value in zip(names, values, strict=True)}


Way = tuple[DiffusionModule, Sampler, Tensor]


def ways(options: argparse.Namespace) -> dict[str, Way]:
    """Every method: the first is what the others are compared with."""
    model = {name: load(file).eval() for name, file in options.models}
    eps, teacher, gamma = model["eps"], model["teacher"], model["gamma"]
    top = eps.schedule.num_levels
    every = trailing(top, options.full)
    found: dict[str, Way] = {f"DDPM, {options.full}": (eps, Ancestral("large"), every)}
    for steps in reversed(options.steps):
        found[f"DDIM, {steps}"] = (eps, DDIM(clip=False), trailing(top, steps))
    found[f"DPM-Solver++, {options.pair_steps}"] = (
        teacher,
        DPMSolverPP(),
        linear(top, options.pair_steps),
    )
    most = options.steps[-1]
    solver = Anderson(tolerance=1e-3, max_sweeps=50)
    found[f"DEQ-DDIM, {most}"] = (teacher, DEQ(solver), linear(top, most))
    found[f"ParaDiGMS, {options.full}"] = (teacher, ParaDiGMS(50), linear(top, options.full))
    found[f"Gamma, {most}"] = (gamma, default_sampler(gamma.noise), linear(top, most))
    for name, student in model.items():
        if name not in ("eps", "teacher", "gamma"):
            found[name] = (student, student.sampler, student.levels)
    return found


def cost(options: argparse.Namespace) -> dict[str, Any]:
    """Network evaluations and seconds of an image, and how many times faster than the first.

    Methods take turns, round after round; the ratio is the median over the rounds.
    """
    bench = Bench(Results(Path(options.output), "cost", {}), rounds=options.rounds)
    bench.case_seconds = float("inf")
    every = ways(options)
    calls = {name: evaluations(*way, options.images) for name, way in every.items()}
    contenders = {name: partial(timed, bench, way, options.images) for name, way in every.items()}
    rows = bench.in_turn(contenders, work=options.images, unit="images")
    return {
        row["contender"]: {
            "calls": calls[row["contender"]],
            "seconds": row["seconds"] / options.images,
            "speed": row["speed"],
        }
        for row in rows
    }


def timed(bench: Bench, way: Way, images: int) -> float:
    """Seconds of drawing these images, on average over calls of a fifth of a second together."""
    model, sampler, levels = way
    begin, count = bench.now(), 0
    while count == 0 or bench.now() - begin < LEAST_SECONDS:
        model.sample(range(images), sampler=sampler, levels=levels)
        count += 1
    return (bench.now() - begin) / count


@torch.no_grad()
def evaluations(model: DiffusionModule, sampler: Sampler, levels: Tensor, images: int) -> float:
    """Network evaluations of an image, on average."""
    if not isinstance(sampler, DEQ | ParaDiGMS):
        return sampler.num_evaluations(levels)
    z = model.latents(range(images), levels[0])[0]
    denoiser = model.conditioned(model.label_of(range(images)), sampling=True)
    found = sampler.solve(denoiser, z, levels)
    count = found.evaluations if isinstance(sampler, DEQ) else found[2]
    return float(count.double().mean())


def draw(
    model: DiffusionModule, count: int, batch_size: int, sampler: Sampler, levels: Tensor
) -> Tensor:
    """The first images of the model's seed, uint8."""
    parts = batches(count, batch_size)
    return torch.cat(
        [
            to_uint8(model.sample(range(count)[part], sampler=sampler, levels=levels))
            for part in parts
        ]
    )


def batches(count: int, size: int) -> list[slice]:
    """Parts of a range."""
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]


def label_of(label: Tensor | None, part: slice) -> Tensor | None:
    """Classes of a part, if there are classes."""
    return None if label is None else label[part]


def extractor(name: str) -> Extractor:
    """A function from uint8 images to the features of a class, in batches."""
    module, _, kind = name.rpartition(".")
    features: nn.Module = getattr(import_module(module), kind)()

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        return torch.cat([features(part) for part in images.split(1000)])

    return extract


def real_images(checkpoint: str) -> Tensor:
    """All training images of a checkpoint's data, uint8."""
    source = data_of(checkpoint_config(Path(checkpoint), "sweep")).train_set
    return source.images(torch.arange(len(source)))


def distance(a: Tensor, b: Tensor) -> float:
    """Mean distance of features, row by row."""
    return float((a - b).norm(dim=1).mean())


def nearest(features: Tensor, real: Tensor) -> float:
    """Mean distance from the nearest real features."""
    return float(torch.cdist(features, real).min(1).values.mean())


def main() -> None:
    """Measure one thing and write it."""
    every = {"latents": latents, "between": between, "diversity": diversity, "cost": cost}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measure", choices=every)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--models", nargs="+", type=_named, default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument("--data", help="checkpoint that names the real images, if another")
    parser.add_argument("--features", default="ddim_pl.metrics.digits.DigitsFeatures")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=600)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 100])
    parser.add_argument("--full", type=int, default=1000)
    parser.add_argument("--etas", type=float, nargs="+", default=[0, 0.2, 0.5, 1])
    parser.add_argument("--halves", type=int, default=20)
    parser.add_argument("--pair_steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", required=True, help="folder")
    options = parser.parse_args()
    quieten()
    torch.set_num_threads(1)
    found = every[options.measure](options)
    write_text(Path(options.output, f"{options.measure}.json"), json.dumps(found, indent=1))


def _named(text: str) -> tuple[str, str]:
    name, _, file = text.rpartition("=")
    return name, file


if __name__ == "__main__":
    main()
