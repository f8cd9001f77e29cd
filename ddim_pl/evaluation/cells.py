"""Cells: ways of sampling a model, measured once and kept; and reports on many of them.

The numbers of a finished cell are kept in files of its own, named by all that they depend on, so
that work that was stopped resumes.
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor, nn

from ddim_pl.checks import check_at_least
from ddim_pl.damage import read_sealed, sealed
from ddim_pl.data.base import ImageDataModule
from ddim_pl.evaluation.cost import network_evaluations
from ddim_pl.evaluation.measure import MeasureSettings, measure, settings_of
from ddim_pl.evaluation.plots import label_rows, plot_distances
from ddim_pl.evaluation.tables import markdown, write_csv, write_text
from ddim_pl.evaluation.worker import Worker, precision_of
from ddim_pl.guidance import Guidance
from ddim_pl.images import read_png, write_png
from ddim_pl.metrics.missing import otherwise
from ddim_pl.rng import NoiseSource
from ddim_pl.samplers import Sampler
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.training import DiffusionModule
from ddim_pl.training.fingerprint import digest_of


@dataclass(frozen=True)
class Cell:
    """One way of sampling."""

    sampler: Sampler
    timesteps: str
    levels: Tensor
    guidance: Guidance | None = None

    @property
    def name(self) -> str:
        """Label in tables and progress bars."""
        return f"{self.series}, {len(self.levels) - 1} steps"

    @property
    def series(self) -> str:
        """Name of its line in a plot."""
        guided = "" if self.guidance is None else f", guidance {self.guidance}"
        return f"{self.sampler}, {self.timesteps}{guided}"

    def row(self, schedule: NoiseSchedule) -> dict[str, Any]:
        """What the cell is, as the first columns of the table."""
        return {
            "sampler": str(self.sampler),
            "timesteps": self.timesteps,
            "steps": len(self.levels) - 1,
            **self.cost(schedule),
        }

    def cost(self, schedule: NoiseSchedule) -> dict[str, Any]:
        """Its guidance, if there is some, and what an image costs, as columns of a table."""
        guided = {} if self.guidance is None else {"guidance": str(self.guidance)}
        count = network_evaluations(self.sampler, self.levels, schedule, self.guidance)
        return {**guided, "network evaluations": count}


@dataclass(frozen=True)
class CellSettings:
    """How all cells of a table are measured.

    Args:
        measure: Extractor, metrics, number of images.
        seeds: Seeds of the images, one or several.
        num_shown: Images of each cell that are kept for a page.
        noise_source: Where their noise comes from.
    """

    measure: MeasureSettings
    seeds: tuple[int, ...]
    num_shown: int
    noise_source: NoiseSource = "generators"

    def key(self, checkpoint: str, data: str, precision: str, cell: Cell, seed: int) -> str:
        """A name for all that a cell's result of one seed depends on."""
        content = {
            "checkpoint": checkpoint,
            "data": data,
            "precision": precision,
            "extractor": self.measure.extractor,
            "metrics": self.measure.metrics,
            "num_samples": self.measure.num_samples,
            "seed": seed,
            "num_shown": self.num_shown,
            "sampler": str(cell.sampler),
            "levels": cell.levels.tolist(),
        }
        if self.noise_source != "generators":  # cells of before have no such entry
            content["noise_source"] = self.noise_source
        if cell.guidance is not None and not cell.guidance.is_plain:
            content["guidance"] = str(cell.guidance)
        reference = self.measure.reference
        if reference is not None:
            moments = {"mean": reference.mean, "covariance": reference.covariance}
            content["statistics"] = digest_of(moments)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def cell_settings(
    trainer: L.Trainer,
    model: DiffusionModule,
    features: Callable[[], nn.Module] | None,
    metrics: Sequence[str] | None,
    num_samples: int | None,
    batch_size: int | None,
    seed: int | None,
    num_shown: int,
    seeds: Sequence[int] | None = None,
    statistics_file: str | None = None,
) -> CellSettings:
    """What is not given is as in the callback of the config, or as that is by default."""
    check_at_least(1, num_shown=num_shown)
    check_at_least(0, seed=seed)
    _check_seeds(seed, seeds)
    own = settings_of(trainer)
    count = own.num_samples if num_samples is None else num_samples
    settings = CellSettings(
        MeasureSettings(
            features or own.make_features,
            tuple(metrics or own.metrics),
            count,
            own.batch_size if batch_size is None else batch_size,
            own.cache,
            statistics_file or own.statistics,
        ),
        tuple(seeds or [model.seed if seed is None else seed]),
        min(num_shown, count),
        model.noise_source,
    )
    with otherwise("give other features, such as --features DigitsFeatures"):
        _ = settings.measure.quality  # loaded before anything is sampled
    return settings


def _check_seeds(seed: int | None, seeds: Sequence[int] | None) -> None:
    if seeds is None:
        return
    if seed is not None:
        raise ValueError(f"seed must be left out with seeds, got {seed} and {list(seeds)}")
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"seeds must be different numbers of at least 0, got {list(seeds)}: such as [0,1,2]"
        )


@dataclass(frozen=True)
class Entry:
    """A cell of a report, to be measured.

    Args:
        worker: Its model generates the images.
        cell: How.
        checkpoint: Fingerprint of the model.
        title: Label of its row of images, also in progress bars.
        series: Name of its line in the plot.
        columns: What it is, as the first columns of the table.
    """

    worker: Worker
    cell: Cell
    checkpoint: str
    title: str
    series: str
    columns: dict[str, Any]


def report(
    name: str,
    intro: str,
    entries: Iterable[Entry],
    total: int,
    settings: CellSettings,
    folder: Path,
    data: ImageDataModule,
) -> None:
    """Measure the entries that are not kept yet, and write the results after each.

    Args:
        name: The files are `<name>.csv`, `<name>.md` and the plot `<name>.png`, beside a page of
            images `grids.png`.
        intro: First words of the Markdown file; seeds, precision and extractor follow.
        entries: What to measure.
        total: Number of entries.
        settings: How they are measured.
        folder: Where to write; finished cells are kept in `cells` below it.
        data: The real images.

    Raises:
        ValueError: If the images cannot be measured.
    """
    settings.measure.check(data)
    rows: list[dict[str, Any]] = []
    titles: list[str] = []
    series: list[str] = []
    images: list[Tensor] = []
    page = ""
    for number, entry in enumerate(entries, 1):
        text = f"{number}/{total}: {entry.title}"
        path, found = _of_all_seeds(entry, settings, folder, data, text)
        if entry.worker.is_first:
            rows.append({**entry.columns, **found})
            titles.append(entry.title)
            series.append(entry.series)
            images.append(torch.stack(read_png(path).chunk(settings.num_shown, -1)))
            precision = precision_of(entry.worker.trainer, entry.worker.model)
            head = f"{intro}, {_seeds(settings)}, precision {precision}, "
            head += f"{settings.measure.recorded}."
            page = f"{head}\n\n{markdown(rows)}"
            write_csv(folder / f"{name}.csv", rows)
            write_text(folder / f"{name}.md", page)
            distance = settings.measure.quality.keys[0]
            plot_distances(folder / f"{name}.png", rows, distance, series)
            label_rows(folder / "grids.png", titles, images)
    if page:
        print(f"\n{page}\nThe table, a plot and the images are in {folder}")


def _of_all_seeds(
    entry: Entry, settings: CellSettings, folder: Path, data: ImageDataModule, text: str
) -> tuple[Path, dict[str, float]]:
    """The file of a cell's images of the first seed, and the numbers of all seeds."""
    several = len(settings.seeds) > 1
    paths, numbers = list[Path](), list[dict[str, float]]()
    for seed in settings.seeds:
        words = f"{text}, seed {seed}" if several else text
        path, found = _found_or_measured(entry, settings, seed, folder, data, words)
        paths.append(path)
        numbers.append(found)
    return paths[0], summary_of(numbers, settings.measure.quality.keys[0])


def summary_of(numbers: Sequence[Mapping[str, float]], distance: str) -> dict[str, float]:
    """Mean and sample deviation of each number over seeds, and the least distance.

    Of a single seed the numbers themselves. The least of several is what [EDM] reports; it is
    named "minimum of N" since it falls with N.

    Args:
        numbers: Of each seed, by the same names.
        distance: Name of the number whose minimum is given too.

    >>> summary_of([{"fid": 3.0}, {"fid": 5.0}], "fid")
    {'fid': 4.0, 'fid deviation': 1.4142135623730951, 'fid minimum of 2': 3.0}
    """
    if len(numbers) == 1:
        return dict(numbers[0])
    found: dict[str, float] = {}
    for name in numbers[0]:
        values = [each[name] for each in numbers]
        found[name] = statistics.fmean(values)
        found[f"{name} deviation"] = statistics.stdev(values)
        if name == distance:
            found[f"{name} minimum of {len(values)}"] = min(values)
    return found


def _seeds(settings: CellSettings) -> str:
    """The seeds in words."""
    if len(settings.seeds) == 1:
        return f"seed {settings.seeds[0]}"
    seeds = ", ".join(map(str, settings.seeds))
    return f"mean and sample deviation of {len(settings.seeds)} sampling seeds ({seeds})"


def _found_or_measured(
    entry: Entry,
    settings: CellSettings,
    seed: int,
    folder: Path,
    data: ImageDataModule,
    text: str,
) -> tuple[Path, dict[str, float]]:
    """The file of a cell's images and its numbers, of now or an earlier run; on all workers."""
    worker, cell = entry.worker, entry.cell
    precision = str(worker.trainer.precision)
    key = settings.key(entry.checkpoint, identity_of(data), precision, cell, seed)
    path = folder / "cells" / f"{key}.png"
    found = worker.broadcast(read_cell(path.with_suffix(".json")) if worker.is_first else None)
    if found is None:
        measured = measure(
            worker,
            settings.measure,
            data,
            text,
            sampler=cell.sampler,
            levels=cell.levels,
            guidance=cell.guidance,
            seed=seed,
            num_shown=settings.num_shown,
        )
        found = {name: float(value) for name, value in measured.values.items()}
        if worker.is_first:
            write_png(torch.cat(list(measured.first), -1), path)
            row = cell.row(worker.model.schedule)
            content = {**row, "levels": cell.levels.tolist(), "values": found}
            content["images per second"] = measured.images_per_second
            write_text(path.with_suffix(".json"), json.dumps(sealed(content), indent=1))
        worker.barrier()
    return path, found


def identity_of(data: ImageDataModule) -> str:
    """A name for the real images: how many, how prepared, and what a hundred of them look like."""
    count = data.num_reference
    some = torch.arange(min(count, 100)) * count // min(count, 100)
    images = {"images": data.train_set.images(some)}
    return f"{type(data).__name__} {count} {digest_of(images, data.preparation)}"


def read_cell(path: Path) -> dict[str, float] | None:
    """The numbers of a finished cell, of its JSON file beside its PNG, or None if it is none.

    Warns if one of the two is damaged.
    """
    if not (path.is_file() and path.with_suffix(".png").is_file()):
        return None
    try:
        with Image.open(path.with_suffix(".png"), formats=["PNG"]) as picture:
            picture.verify()  # its checksums
        return {name: float(value) for name, value in read_sealed(path)["values"].items()}
    except Exception as error:  # Pillow raises a dozen kinds
        rank_zero_warn(f"{path} or its PNG is damaged ({error}): the cell is measured again")
        return None
