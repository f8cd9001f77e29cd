"""`main.py sweep`: many ways of sampling one checkpoint, measured and shown side by side.

A cell is a sampler with its levels. Finished cells are kept, see `ddim_pl.evaluation.cells`: a
sweep that was stopped resumes, and one that was made larger measures the new cells only.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from ddim_pl.checks import check_at_least
from ddim_pl.commands.levels import check_steps, search_levels
from ddim_pl.damage import DamagedError, read_sealed
from ddim_pl.evaluation.cells import Cell, CellSettings, Entry, cell_settings, report
from ddim_pl.evaluation.worker import (
    Worker,
    check_images,
    check_inside,
    check_noise,
    on_every_worker,
    warn_of_student,
)
from ddim_pl.guidance import Guidance
from ddim_pl.level_search import candidate_levels
from ddim_pl.samplers import Sampler
from ddim_pl.timesteps import has_own_length, load_levels, make_levels, save_levels
from ddim_pl.timesteps import strategies as known_strategies
from ddim_pl.training import DiffusionModule
from ddim_pl.training.fingerprint import digest_of, fingerprint_of_file


class Way(NamedTuple):
    """How images are drawn at any levels."""

    sampler: Sampler
    guidance: Guidance | None


ADAPTIVE = "adaptive"
SEARCH_IMAGES = 256
SEARCH_BATCH_SIZE = 64


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
    guidances: Sequence[float] | None = None,
    features: Callable[[], nn.Module] | None = None,
    metrics: Sequence[str] | None = None,
    num_samples: int | None = None,
    num_shown: int = 10,
    batch_size: int | None = None,
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
    statistics: str | None = None,
    name: str = "sweep",
    output: str | None = None,
) -> None:
    """Measure every combination of samplers, etas, levels, numbers of steps and guidance.

    Writes `sweep.csv`, `sweep.md`, a plot `sweep.png` of the first metric against steps and
    network evaluations, and `grids.png`, in which each row is a cell and each column a latent.
    They grow with each cell; a sweep that was stopped resumes when the command is given again.

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
        guidances: Weights of guidance, 1 for none, in the interval of `--model.guidance_interval`
            if there is one; by default the checkpoint's own guidance, which adaptive levels have.
        features: Feature extractor; by default that of the config's FrechetDistance, as are the
            next three.
        metrics: Metrics of `ddim_pl.metrics.quality.SampleQuality`.
        num_samples: Images in a cell.
        num_shown: Images of a cell in `grids.png`.
        batch_size: Images in a batch, on each worker.
        seed: Seed of the images; by default that of training.
        seeds: Several seeds in place of one: the table then has mean and sample deviation of each
            number, and the minimum of the distance.
        statistics: NPZ file of statistics in place of the real images, see FrechetDistance.
        name: Folder in the checkpoint's run to write to.
        output: Folder to write to, in place of that.

    Raises:
        ValueError: If a strategy or metric is unknown, an eta is given to samplers without one, a
            sampler is made for another noise, or a number does not fit.
    """
    check_inside(name=name)
    settings = cell_settings(
        *(trainer, model, features, metrics, num_samples, batch_size, seed, num_shown),
        *(seeds, statistics),
    )
    check_images(datamodule)
    ways = _ways(model, _with_etas(samplers or [model.sampler], etas), guidances)
    strategies = list(timesteps or [_only_name(model)])
    _check_ways(model, ways, strategies, num_steps)
    checkpoint = fingerprint_of_file(model, ckpt_path)

    def work(worker: Worker) -> None:
        folder = worker.folder(output, name)
        data = worker.images(datamodule)
        adaptive = _adaptive_file(worker, folder, checkpoint, num_steps, strategies)
        cells = _cells(model, ways, strategies, num_steps, adaptive)
        entries = [_entry(worker, cell, checkpoint) for cell in cells]
        report("sweep", _intro(ckpt_path, settings), entries, len(entries), settings, folder, data)

    on_every_worker(trainer, model, work, ckpt_path=ckpt_path)


def _intro(ckpt_path: str | None, settings: CellSettings) -> str:
    head = f"`{ckpt_path}`: " if ckpt_path else ""
    return f"{head}{settings.measure.num_samples} images in each cell"


def _with_etas(samplers: Sequence[Sampler], etas: Sequence[float] | None) -> list[Sampler]:
    if etas is None:
        return list(samplers)
    found: list[Sampler] = []
    for sampler in samplers:
        if "eta" not in {field.name for field in fields(sampler)}:
            raise ValueError(
                f"etas must be left out for {sampler}, which has no eta, got {list(etas)}: list "
                "samplers with the eta of each, such as DDIM with init_args eta"
            )
        found += [replace(sampler, **{"eta": eta}) for eta in etas]  # type: ignore[arg-type]
    return found


def _entry(worker: Worker, cell: Cell, checkpoint: str) -> Entry:
    row = cell.row(worker.model.schedule)
    return Entry(worker, cell, checkpoint, cell.name, cell.series, row)


def _ways(
    model: DiffusionModule, samplers: Sequence[Sampler], weights: Sequence[float] | None
) -> list[Way]:
    """Every sampler with every guidance."""
    guided = [model.sampling_guidance]
    if weights is not None:
        guided = [model.guidance_by(weight) for weight in weights]
    return [Way(sampler, guidance) for sampler in samplers for guidance in guided]


def _check_ways(
    model: DiffusionModule,
    ways: Sequence[Way],
    names: Sequence[str],
    num_steps: Sequence[int],
) -> None:
    """Check the samplers, the names, and that every combination has its levels."""
    check_at_least(1, num_steps=min(num_steps, default=0))
    for way in ways:
        check_noise("samplers", model, way.sampler)
    known = sorted([ADAPTIVE, *known_strategies()])
    for name in names:
        if name not in known and not name.endswith(".json"):
            raise ValueError(
                f"timesteps must be one of {known} or a .json file of adaptive levels, got "
                f"{name!r}"
            )
    if ADAPTIVE in names:
        check_steps(model, num_steps)
    others = [name for name in names if name != ADAPTIVE]
    for cell in _cells(model, ways, others, num_steps, None):
        warn_of_student(model, cell.sampler, cell.levels)


def _only_name(model: DiffusionModule) -> str:
    if not isinstance(model.timesteps, str):
        raise ValueError("timesteps must be given: the model has a list of its own levels")
    return model.timesteps


def _cells(
    model: DiffusionModule,
    ways: Sequence[Way],
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
                levels = make_levels(source, model.schedule, steps, model.last_level)
            for way in ways:
                yield Cell(way.sampler, strategy, levels, way.guidance)


def _adaptive_file(
    worker: Worker,
    folder: Path,
    checkpoint: str,
    num_steps: Sequence[int],
    strategies: Sequence[str],
) -> Path | None:
    """Levels for this checkpoint, if wanted; those of an earlier start of the sweep are kept."""
    if ADAPTIVE not in strategies:
        return None
    guidance = worker.model.sampling_guidance
    of = checkpoint if guidance is None else digest_of({}, f"{checkpoint} guidance {guidance}")
    file = folder / "cells" / f"adaptive-{of[:16]}.json"
    levels: dict[int, Tensor] = {}
    if worker.is_first and file.exists():
        try:
            read_sealed(file)
        except DamagedError as error:
            rank_zero_warn(f"{error}: the levels are searched anew")
    # Of a larger sweep's earlier start, all stay in the file.
    for steps in range(1, len(candidate_levels(worker.model.schedule))):
        try:
            levels[steps] = load_levels(file, worker.model.schedule, steps)
        except ValueError:  # none yet
            continue
    wanted = [steps for steps in sorted(set(num_steps)) if steps not in levels]
    wanted = worker.broadcast(wanted)
    if wanted:
        found = search_levels(worker, wanted, SEARCH_IMAGES, SEARCH_BATCH_SIZE)
        levels |= dict(zip(wanted, found, strict=True))
        if worker.is_first:
            save_levels(file, worker.model.schedule, list(levels.values()))
    worker.barrier()
    return file
