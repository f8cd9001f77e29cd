"""Cells: ways of sampling a model, measured once and kept.

What a finished cell has found lies in files of its own, named by all that it depends on, so that
work that was stopped resumes.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from ddim_pl.checks import check_at_least
from ddim_pl.data.base import ImageDataModule
from ddim_pl.evaluation.measure import MeasureSettings, measure, settings_of
from ddim_pl.evaluation.tables import write_text
from ddim_pl.evaluation.worker import Worker
from ddim_pl.images import read_png, write_png
from ddim_pl.samplers import Sampler
from ddim_pl.training import DiffusionModule
from ddim_pl.training.fingerprint import digest_of


@dataclass(frozen=True)
class Cell:
    """One way of sampling."""

    sampler: Sampler
    timesteps: str
    levels: Tensor

    @property
    def name(self) -> str:
        """Label in tables and progress bars."""
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
class CellSettings:
    """How all cells of a table are measured.

    Args:
        measure: Extractor, metrics, number of images.
        seed: Seed of the images.
        num_shown: Images of each cell that are kept for a page.
    """

    measure: MeasureSettings
    seed: int
    num_shown: int

    def key(self, checkpoint: str, data: str, precision: str, cell: Cell) -> str:
        """A name for all that a cell's result depends on."""
        content = {
            "checkpoint": checkpoint,
            "data": data,
            "precision": precision,
            "extractor": self.measure.extractor,
            "metrics": self.measure.metrics,
            "num_samples": self.measure.num_samples,
            "seed": self.seed,
            "num_shown": self.num_shown,
            "sampler": str(cell.sampler),
            "levels": cell.levels.tolist(),
        }
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
) -> CellSettings:
    """What is not given is as in the callback of the config, or as that is by default."""
    check_at_least(1, num_shown=num_shown)
    own = settings_of(trainer)
    count = own.num_samples if num_samples is None else num_samples
    settings = CellSettings(
        MeasureSettings(
            features or own.make_features,
            tuple(metrics or own.metrics),
            count,
            own.batch_size if batch_size is None else batch_size,
        ),
        model.seed if seed is None else seed,
        min(num_shown, count),
    )
    check_at_least(0, seed=settings.seed)
    _ = settings.measure.quality  # loaded before anything is sampled
    return settings


def found_or_measured(
    worker: Worker,
    settings: CellSettings,
    cell: Cell,
    folder: Path,
    checkpoint: str,
    data: ImageDataModule,
    text: str,
) -> tuple[str, dict[str, float]]:
    """The name of a cell's files and what it found, now or in an earlier run; on all workers.

    Args:
        worker: Its model generates the images.
        settings: How they are measured.
        cell: What to measure.
        folder: Finished cells are kept in `cells` below it.
        checkpoint: Fingerprint of the model.
        data: The real images.
        text: For the progress bar.
    """
    key = settings.key(checkpoint, identity_of(data), str(worker.trainer.precision), cell)
    found = worker.broadcast(_read(folder, key) if worker.is_first else None)
    if found is None:
        _measure_cell(worker, settings, cell, folder / "cells" / key, text, data)
        found = worker.broadcast(_read(folder, key) if worker.is_first else None)
        assert found is not None
    return key, found


def shown_images(folder: Path, key: str, count: int) -> Tensor:
    """The first images of a finished cell, uint8 `(count, C, H, W)`."""
    return torch.stack(read_png(folder / "cells" / f"{key}.png").chunk(count, -1))


def identity_of(data: ImageDataModule) -> str:
    """A name for the real images: how many they are, and what a hundred of them look like."""
    count = data.num_reference
    some = torch.arange(min(count, 100)) * count // min(count, 100)
    return f"{type(data).__name__} {count} {digest_of({'images': data.train_set.images(some)})}"


def _measure_cell(
    worker: Worker,
    settings: CellSettings,
    cell: Cell,
    path: Path,
    text: str,
    data: ImageDataModule,
) -> None:
    """Measure, and write `<path>.png` and then `<path>.json`."""
    found = measure(
        worker,
        settings.measure,
        data,
        text,
        sampler=cell.sampler,
        levels=cell.levels,
        seed=settings.seed,
        num_shown=settings.num_shown,
    )
    if worker.is_first:
        write_png(torch.cat(list(found.first), -1), path.with_suffix(".png"))
        values = {name: float(value) for name, value in found.values.items()}
        content = {**cell.row(), "levels": cell.levels.tolist(), "values": values}
        content["images per second"] = found.images_per_second
        write_text(path.with_suffix(".json"), json.dumps(content, indent=1))
    worker.barrier()


def _read(folder: Path, key: str) -> dict[str, float] | None:
    """What a finished cell has found."""
    path = folder / "cells" / f"{key}.json"
    if not (path.is_file() and path.with_suffix(".png").is_file()):
        return None
    try:
        values: dict[str, float] = json.loads(path.read_text())["values"]
    except (json.JSONDecodeError, KeyError):
        rank_zero_warn(f"{path} is damaged: the cell is measured again")
        return None
    return values
