"""Cells: ways of sampling a model, measured once and kept.

What a finished cell has found lies in files of its own, named by all that it depends on, so that
work which was stopped goes on where it was.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from callbacks.fid import FrechetDistance
from ddim_pl.commands.devices import Device, at_least
from ddim_pl.commands.report import write_text
from ddim_pl.data.base import ImageDataModule
from ddim_pl.images import read_png, to_uint8, write_png
from ddim_pl.metrics.quality import SampleQuality
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


def found_or_measured(
    device: Device,
    measure: Measure,
    cell: Cell,
    folder: Path,
    checkpoint: str,
    data: ImageDataModule,
    text: str,
) -> tuple[str, dict[str, float]]:
    """The name of a cell's files and what it has found, now or in an earlier run; on all devices.

    Args:
        device: Its model is the one to draw with.
        measure: How it is judged.
        cell: What to measure.
        folder: Finished cells are kept in `cells` below it.
        checkpoint: Fingerprint of the model.
        data: The real images.
        text: For the progress bar.
    """
    key = measure.key(checkpoint, identity_of(data), str(device.trainer.precision), cell)
    found = device.agree(_read(folder, key) if device.is_first else None)
    if found is None:
        _measure_cell(device, measure, cell, folder / "cells" / key, text, data)
        found = device.agree(_read(folder, key) if device.is_first else None)
        assert found is not None
    return key, found


def shown_images(folder: Path, key: str, count: int) -> Tensor:
    """The first images of a finished cell, uint8 `(count, C, H, W)`."""
    return torch.stack(read_png(folder / "cells" / f"{key}.png").chunk(count, -1))


def measure_of(
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


def identity_of(data: ImageDataModule) -> str:
    """A name for the real images: how many they are, and what a hundred of them look like."""
    count = data.num_reference
    some = torch.arange(min(count, 100)) * count // min(count, 100)
    return f"{type(data).__name__} {count} {digest_of({'images': data.train_set.images(some)})}"


def _measure_cell(
    device: Device,
    measure: Measure,
    cell: Cell,
    path: Path,
    text: str,
    data: ImageDataModule,
) -> None:
    """Draw, measure, and write `<path>.png` and then `<path>.json`."""
    model = device.model
    # Apple's devices have no float64, which the metrics' sums are kept in.
    home = torch.device("cpu") if model.device.type == "mps" else model.device
    quality = measure.quality.to(home)
    if quality.needs_real and quality.num_real == 0:
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
