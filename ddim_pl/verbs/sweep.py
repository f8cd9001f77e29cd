"""`main.py sweep`: many ways of sampling one checkpoint, measured and drawn side by side.

A cell is a sampler with its levels. What a finished cell has found is kept in a file of its own,
named by all that it depends on, so that a sweep which was stopped goes on where it was, and one
that was made larger measures the new cells only.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from callbacks.fid import FrechetDistance
from ddim_pl.adaptive import candidate_levels
from ddim_pl.data.base import ImageDataModule
from ddim_pl.images import read_png, to_uint8, write_png
from ddim_pl.metrics.quality import SampleQuality
from ddim_pl.samplers import Sampler
from ddim_pl.timesteps import has_own_length, load_levels, make_levels, save_levels
from ddim_pl.timesteps import strategies as known_strategies
from ddim_pl.training import DiffusionModule
from ddim_pl.training.fingerprint import digest_of, fingerprint
from ddim_pl.verbs.devices import Device, at_least, check_images, on_every_device
from ddim_pl.verbs.levels import check_steps, search_levels
from ddim_pl.verbs.report import label_rows, markdown, plot_distances, write_csv, write_text

ADAPTIVE = "adaptive"
SEARCH_IMAGES = 256
SEARCH_BATCH_SIZE = 64


@dataclass(frozen=True)
class Cell:
    """One way of sampling."""

    sampler: Sampler
    timesteps: str
    levels: Tensor

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.sampler}, {self.timesteps}, {len(self.levels) - 1} steps"

    def row(self) -> dict[str, Any]:
        """What the cell is, as the first columns of the table."""
        return {
            "sampler": str(self.sampler),
            "timesteps": self.timesteps,
            "steps": len(self.levels) - 1,
            "network evaluations": self.sampler.num_evaluations(self.levels),
        }


@dataclass(frozen=True)
class Measure:
    """How the cells are judged, alike for all of them."""

    make_features: Callable[[], nn.Module]
    metrics: tuple[str, ...]
    num_samples: int
    batch_size: int
    seed: int
    num_shown: int

    @cached_property
    def extractor(self) -> str:
        """A name for the feature extractor and its weights."""
        extractor = self.quality.extractor
        weights = cast(nn.Module, extractor).state_dict()
        return f"{extractor.name} {digest_of(weights)}"

    @cached_property
    def quality(self) -> SampleQuality:
        """The metrics; loaded once a process."""
        quality = SampleQuality(self.make_features(), self.metrics)
        quality.check_num_samples(self.num_samples)
        return quality

    def key(self, checkpoint: str, data: str, precision: str, cell: Cell) -> str:
        """A name for all that a cell's result depends on."""
        content = {
            "checkpoint": checkpoint,
            "data": data,
            "precision": precision,
            "extractor": self.extractor,
            "metrics": self.metrics,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "num_shown": self.num_shown,
            "sampler": str(cell.sampler),
            "levels": cell.levels.tolist(),
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def sweep(
    trainer: L.Trainer,
    model: DiffusionModule,
    datamodule: L.LightningDataModule | None = None,
    ckpt_path: str | None = None,
    *,
    samplers: Sequence[Sampler] | None = None,
    etas: Sequence[float] | None = None,
    timesteps: Sequence[str] | None = None,
    num_steps: Sequence[int] = (10, 20, 50),
    features: Callable[[], nn.Module] | None = None,
    metrics: Sequence[str] | None = None,
    num_samples: int | None = None,
    num_shown: int = 10,
    batch_size: int | None = None,
    seed: int | None = None,
    name: str = "sweep",
    output: str | None = None,
) -> None:
    """Measure every combination of samplers, etas, strategies of levels and numbers of steps.

    Writes `sweep.csv`, `sweep.md`, a plot `sweep.png` of the first metric against steps and
    network evaluations, and `grids.png`, in which each row is a cell and each column a latent.
    They grow with each cell; a sweep that was stopped goes on when the command is given again.

    Args:
        trainer: Gives the devices.
        model: The model.
        datamodule: Gives the real images.
        ckpt_path: Checkpoint, or "last".
        samplers: Samplers; by default the checkpoint's own.
        etas: Noise of the samplers that have an `eta`, in place of their own.
        timesteps: Strategies of levels, files of `main.py levels`, or "adaptive", which searches
            such levels for this checkpoint; by default the checkpoint's own.
        num_steps: Numbers of steps; a strategy with a length of its own is taken once.
        features: Feature extractor; by default that of the config's FrechetDistance, as are the
            next three.
        metrics: Metrics of `ddim_pl.metrics.quality.SampleQuality`.
        num_samples: Images in a cell.
        num_shown: Images of a cell in `grids.png`.
        batch_size: Images in a batch, on each device.
        seed: Seed of the images; by default that of training.
        name: Folder in the checkpoint's run to write to.
        output: Folder to write to, in place of that.

    Raises:
        ValueError: If a strategy or metric is unknown, an eta is given to samplers without one, or
            a number does not fit.
    """
    at_least(1, num_shown=num_shown, **{"num_steps": min(num_steps, default=0)})
    measure = _measure(trainer, model, features, metrics, num_samples, batch_size, seed, num_shown)
    check_images(datamodule)
    ways = _with_etas(samplers or [model.sampler], etas)
    strategies = list(timesteps or [_only_name(model)])
    if ADAPTIVE in strategies:
        check_steps(model, num_steps)
    _check_strategies(strategies)
    # What else is wrong shows now: too many steps, a file that does not fit.
    _ = list(_cells(model, ways, [s for s in strategies if s != ADAPTIVE], num_steps, None))
    file: dict[str, Any] = {}
    if ckpt_path is not None:
        file = torch.load(ckpt_path, map_location="cpu", weights_only=True, mmap=True)
    checkpoint = fingerprint(model, file.get("state_dict"))

    def work(device: Device) -> None:
        folder = device.folder(output, name)
        data = device.images(datamodule)
        adaptive = None
        if ADAPTIVE in strategies:
            adaptive = _adaptive_file(device, folder, checkpoint, num_steps)
        cells = list(_cells(model, ways, strategies, num_steps, adaptive))
        about, precision = _identity(data), str(trainer.precision)
        done: list[tuple[Cell, str, dict[str, float]]] = []
        for i, cell in enumerate(cells):
            key = measure.key(checkpoint, about, precision, cell)
            found = device.agree(_read(folder, key) if device.is_first else None)
            if found is None:
                text = f"{i + 1}/{len(cells)}: {cell.name}"
                _measure_cell(device, measure, cell, folder / "cells" / key, text, datamodule)
                found = device.agree(_read(folder, key) if device.is_first else None)
                assert found is not None
            done.append((cell, key, found))
            if device.is_first:
                _write_report(folder, done, measure, ckpt_path)
        if device.is_first:
            print("\n" + (folder / "sweep.md").read_text())
            print(f"The table, a plot and the images are in {folder}")

    on_every_device(trainer, model, work, ckpt_path=ckpt_path)


def _measure(
    trainer: L.Trainer,
    model: DiffusionModule,
    features: Callable[[], nn.Module] | None,
    metrics: Sequence[str] | None,
    num_samples: int | None,
    batch_size: int | None,
    seed: int | None,
    num_shown: int,
) -> Measure:
    """What is not given is as in the callback of the config, or as that is by default."""
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    own = next((c for c in callbacks if isinstance(c, FrechetDistance)), FrechetDistance())
    count = own.num_samples if num_samples is None else num_samples
    measure = Measure(
        features or own.features,
        tuple(metrics or own.metrics),
        count,
        own.batch_size if batch_size is None else batch_size,
        model.seed if seed is None else seed,
        min(num_shown, count),
    )
    at_least(2, num_samples=measure.num_samples)
    at_least(1, batch_size=measure.batch_size)
    at_least(0, seed=measure.seed)
    _ = measure.quality  # loaded before anything is drawn
    return measure


def _with_etas(samplers: Sequence[Sampler], etas: Sequence[float] | None) -> list[Sampler]:
    if etas is None:
        return list(samplers)
    found: list[Sampler] = []
    for sampler in samplers:
        if "eta" not in {field.name for field in fields(sampler)}:  # type: ignore[arg-type]
            raise ValueError(
                f"etas are {list(etas)}, but {sampler} has no eta: leave etas out and list "
                "samplers with the eta of each, such as DDIM with init_args eta"
            )
        found += [replace(sampler, eta=eta) for eta in etas]  # type: ignore[type-var]
    return found


def _check_strategies(names: Sequence[str]) -> None:
    known = sorted([ADAPTIVE, *known_strategies()])
    for name in names:
        if name not in known and not name.endswith(".json"):
            raise ValueError(
                f"timesteps must be one of {known} or a .json file of adaptive levels, got "
                f"{name!r}"
            )


def _only_name(model: DiffusionModule) -> str:
    if not isinstance(model.timesteps, str):
        raise ValueError("timesteps must be given: the model has a list of its own levels")
    return model.timesteps


def _cells(
    model: DiffusionModule,
    samplers: Sequence[Sampler],
    strategies: Sequence[str],
    num_steps: Sequence[int],
    adaptive: Path | None,
) -> Iterator[Cell]:
    """Every combination once."""
    for strategy in strategies:
        source = str(adaptive) if strategy == ADAPTIVE else strategy
        for steps in num_steps[:1] if has_own_length(strategy) else num_steps:
            with warnings.catch_warnings():
                # The table says how many steps are left of a strategy with duplicates.
                warnings.filterwarnings("ignore", ".*distinct levels")
                levels = make_levels(source, model.schedule, steps)
            for sampler in samplers:
                yield Cell(sampler, strategy, levels)


def _identity(data: ImageDataModule) -> str:
    """A name for the real images: how many they are, and what a hundred of them look like."""
    count = data.num_reference
    some = torch.arange(min(count, 100)) * count // min(count, 100)
    return f"{type(data).__name__} {count} {digest_of({'images': data.train_set.images(some)})}"


def _adaptive_file(
    device: Device, folder: Path, checkpoint: str, num_steps: Sequence[int]
) -> Path:
    """Levels for this checkpoint; those of an earlier start of the same sweep are kept."""
    file = folder / "cells" / f"adaptive-{checkpoint[:16]}.json"
    levels: dict[int, Tensor] = {}
    # Of a larger sweep's earlier start, all stay in the file.
    for steps in range(1, len(candidate_levels(device.model.schedule))):
        try:
            levels[steps] = load_levels(file, device.model.schedule, steps)
        except ValueError:  # none yet
            continue
    wanted = [steps for steps in sorted(set(num_steps)) if steps not in levels]
    wanted = device.agree(wanted)
    if wanted:
        found = search_levels(device, wanted, SEARCH_IMAGES, SEARCH_BATCH_SIZE)
        levels |= dict(zip(wanted, found, strict=True))
        if device.is_first:
            save_levels(file, device.model.schedule, list(levels.values()))
    device.wait()
    return file


def _measure_cell(
    device: Device,
    measure: Measure,
    cell: Cell,
    path: Path,
    text: str,
    datamodule: L.LightningDataModule | None,
) -> None:
    """Draw, measure, and write `<path>.png` and then `<path>.json`."""
    model = device.model
    # Apple's devices have no float64, which the metrics' sums are kept in.
    home = torch.device("cpu") if model.device.type == "mps" else model.device
    quality = measure.quality.to(home)
    if quality.needs_real and quality.num_real == 0:
        data = check_images(datamodule)
        batches = data.reference_images(device.rank, device.world_size, measure.batch_size)
        total = -(-data.num_reference // (measure.batch_size * device.world_size))
        for images in device.progress(batches, total, "real features"):
            quality.update(images, real=True)
    quality.reset_samples()
    shown = torch.zeros(measure.num_shown, *model.image_shape, dtype=torch.int32)
    begin = time.perf_counter()
    for batch, images in device.draw(
        range(measure.num_samples),
        measure.batch_size,
        text,
        sampler=cell.sampler,
        levels=cell.levels,
        seed=measure.seed,
    ):
        pixels = to_uint8(images)
        quality.update(pixels, real=False)
        for index, image in zip(batch, pixels, strict=True):
            if index < len(shown):
                shown[index] = image.cpu()
    seconds = time.perf_counter() - begin
    values = {name: float(value) for name, value in quality.compute().items()}
    shown = device.sum(shown).to(torch.uint8)
    if device.is_first:
        row = torch.cat(list(shown), -1)
        write_png(row, path.with_suffix(".png"))
        content = {**cell.row(), "levels": cell.levels.tolist(), "values": values}
        content["images per second"] = measure.num_samples / seconds
        write_text(path.with_suffix(".json"), json.dumps(content, indent=1))
    device.wait()


def _read(folder: Path, key: str) -> dict[str, float] | None:
    """What a finished cell has found."""
    path = folder / "cells" / f"{key}.json"
    if not (path.is_file() and path.with_suffix(".png").is_file()):
        return None
    try:
        values: dict[str, float] = json.loads(path.read_text())["values"]
    except (json.JSONDecodeError, KeyError):
        rank_zero_warn(f"{path} is damaged: the cell is measured anew")
        return None
    return values


def _write_report(
    folder: Path,
    done: Sequence[tuple[Cell, str, dict[str, float]]],
    measure: Measure,
    ckpt_path: str | None,
) -> None:
    """Write all that people look at, of the cells so far."""
    rows = [{**cell.row(), **found} for cell, _, found in done]
    write_csv(folder / "sweep.csv", rows)
    write_text(
        folder / "sweep.md",
        f"{f'`{ckpt_path}`: ' if ckpt_path else ''}{measure.num_samples} images in each cell, "
        f"seed {measure.seed}.\n\n{markdown(rows)}",
    )
    plot_distances(folder / "sweep.png", rows, measure.quality.keys[0])
    images = []
    for _, key, _ in done:
        row = read_png(folder / "cells" / f"{key}.png")
        images.append(torch.stack(row.chunk(measure.num_shown, -1)))
    label_rows(folder / "grids.png", [cell.name for cell, _, _ in done], images)
