"""Measuring a model's images against the real ones: the one loop that generates and measures."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import lightning as L
import torch
from torch import Tensor, nn

from ddim_pl.checks import check_at_least
from ddim_pl.data.base import ImageDataModule
from ddim_pl.evaluation.real_statistics import RealStatistics
from ddim_pl.evaluation.worker import Worker
from ddim_pl.guidance import Guidance
from ddim_pl.images import to_uint8
from ddim_pl.lightning_internals import callbacks_of
from ddim_pl.metrics.inception import InceptionFeatures
from ddim_pl.metrics.quality import OF_FEATURES, FeatureExtractor, SampleQuality, check_metrics
from ddim_pl.metrics.statistics import FeatureStatistics, read_statistics
from ddim_pl.samplers import Sampler
from ddim_pl.training.fingerprint import digest_of


@dataclass(frozen=True)
class MeasureSettings:
    """How images are measured.

    Args:
        make_features: Makes the feature extractor, see `ddim_pl.metrics.quality.FeatureExtractor`.
        metrics: Names of metrics, see `SampleQuality`.
        num_samples: Images to generate; published FIDs take 50,000.
        batch_size: Images in a batch, on each device.
        cache: Whether the real images' statistics are kept for later runs, see `RealStatistics`.
        statistics: NPZ file of statistics in place of the real images, see
            `ddim_pl.metrics.statistics`; for "fd" alone, or beside "inception_score".

    Raises:
        ValueError: If a number is too small, a metric unknown, or statistics are not enough for
            it.
    """

    make_features: Callable[[], nn.Module] = InceptionFeatures
    metrics: tuple[str, ...] = ("fd",)
    num_samples: int = 50_000
    batch_size: int = 250
    cache: bool = True
    statistics: str | None = None

    def __post_init__(self) -> None:
        check_at_least(2, num_samples=self.num_samples)
        check_at_least(1, batch_size=self.batch_size)
        check_metrics(self.metrics)
        if self.statistics is not None:
            check_metrics_of_statistics(self.metrics, self.statistics)

    @cached_property
    def quality(self) -> SampleQuality:
        """The metrics, with the extractor loaded; once a process."""
        extractor = self.make_features()
        if not isinstance(getattr(extractor, "num_features", None), int):
            raise ValueError(
                f"features must make an extractor with num_features, got "
                f"{type(extractor).__name__}: give DigitsFeatures, InceptionFeatures or your own, "
                "see CONTRIBUTING.md"
            )
        quality = SampleQuality(extractor, self.metrics)
        quality.check_num_samples(self.num_samples)
        if self.reference is not None:
            self.reference.check(
                quality.extractor.name, quality.extractor.num_features, weights_of(extractor)
            )
            quality.set_moments(self.reference.mean, self.reference.covariance, real=True)
        return quality

    @cached_property
    def reference(self) -> FeatureStatistics | None:
        """What the file of statistics holds."""
        return None if self.statistics is None else read_statistics(Path(self.statistics))

    def check(self, data: ImageDataModule) -> None:
        """Check that the images of a data module, which is set up, can be measured.

        Warns of few images, see `SampleQuality.warn_of_few`.

        Raises:
            ValueError: If not; see `SampleQuality`.
        """
        num_real = None if self.reference is not None else data.num_reference
        if num_real is not None:
            self.quality.check_num_real(num_real)
        self.quality.check_shape(data.shape)
        self.quality.warn_of_few(self.num_samples, num_real)

    @cached_property
    def extractor(self) -> str:
        """A name for the feature extractor and its weights."""
        extractor = self.quality.extractor
        return f"{extractor.name} {weights_of(cast(nn.Module, extractor))}"

    @property
    def recorded(self) -> str:
        """The extractor, what it does with pixels first, and the real side, for tables."""
        extractor = self.quality.extractor
        text = f"extractor {extractor.name}"
        resize = resize_of(extractor)
        text += f" ({resize})" if resize else ""
        if self.reference is not None:
            count = self.reference.num_images or "an unknown number of"
            text += f", real side {self.reference.source} of {count} images"
        return text

    def record(self, data: ImageDataModule) -> dict[str, Any]:
        """What a measured distance is of, by its name and words, for results of a test.

        Args:
            data: The real images, set up.

        Returns:
            "<name> extractor", "<name> num_samples" and, where real images are used,
            "<name> num_real", a number or "unknown", the file of "<name> statistics", and the
            "<name> kid_subsets" of what was measured last.
        """
        extractor = self.quality.extractor
        resize = resize_of(extractor)
        found: dict[str, Any] = {
            "extractor": extractor.name + (f" ({resize})" if resize else ""),
            "num_samples": self.num_samples,
        }
        if self.reference is not None:
            found["num_real"] = self.reference.num_images or "unknown"
            found["statistics"] = Path(self.reference.source).name
        elif self.quality.needs_real:
            found["num_real"] = data.num_reference
        if self.quality.kid_subsets is not None:
            found["kid_subsets"] = "{} of {} images".format(*self.quality.kid_subsets)
        return {f"{self.quality.keys[0]} {name}": value for name, value in found.items()}


def weights_of(extractor: nn.Module) -> str:
    """A digest of an extractor's weights."""
    return digest_of(extractor.state_dict())


def resize_of(extractor: FeatureExtractor) -> str:
    """What an extractor does with pixels before its network, if it says so; else ""."""
    return str(getattr(extractor, "preparation", ""))


def check_metrics_of_statistics(metrics: Sequence[str], file: str) -> None:
    """Check that metrics can do with statistics in place of images.

    Raises:
        ValueError: If one cannot, or none uses them.
    """
    single = [name for name in metrics if name in OF_FEATURES]
    if single:
        raise ValueError(
            f"metrics must be fd or inception_score with statistics, got {', '.join(single)}, "
            f"which compare single features, and {file}: leave them out, or give images"
        )
    if "fd" not in metrics:
        raise ValueError(
            f"metrics must have fd with statistics, got {', '.join(metrics)} and {file}: leave "
            "the statistics out"
        )


@runtime_checkable
class ChecksBeforeRun(Protocol):
    """A callback that can tell, before a run writes anything, that it will not be able to work."""

    def check_settings(self, stage: str) -> None:
        """Raise what is wrong whatever the data, before they are prepared; stages as below."""

    def check(self, datamodule: L.LightningDataModule | None, stage: str) -> None:
        """Raise what is wrong with this data for "fit", "validate", "test" or "predict"."""


def settings_of(trainer: L.Trainer) -> MeasureSettings:
    """The settings of the config's callback that measures, or the default ones."""
    found = (getattr(callback, "settings", None) for callback in callbacks_of(trainer))
    return next((each for each in found if isinstance(each, MeasureSettings)), MeasureSettings())


def records_of(trainer: L.Trainer, data: ImageDataModule, stage: str) -> dict[str, Any]:
    """The records of the callbacks that have measured in "val" or "test"."""
    found: dict[str, Any] = {}
    for callback in callbacks_of(trainer):
        settings = getattr(callback, "settings", None)
        if not isinstance(settings, MeasureSettings):
            continue
        if f"{stage}/{settings.quality.keys[0]}" in trainer.callback_metrics:
            found |= settings.record(data)
    return found


class Measured(NamedTuple):
    """What a measurement found.

    Attributes:
        values: The numbers, float32 scalars, by their names.
        images_per_second: Images generated and measured in a second.
        first: The first images, uint8 `(num_shown, C, H, W)` on the CPU.
    """

    values: dict[str, Tensor]
    images_per_second: float
    first: Tensor


@torch.no_grad()
def measure(
    worker: Worker,
    settings: MeasureSettings,
    data: ImageDataModule,
    text: str,
    *,
    sampler: Sampler | None = None,
    levels: Tensor | None = None,
    guidance: Guidance | None = None,
    seed: int | None = None,
    num_shown: int = 0,
) -> Measured:
    """Generate images and measure them, on every worker.

    The workers share the work. Exactly `num_samples` images are generated, the same ones every
    time. The features of the real images, all training images, are computed once; with a file of
    statistics, none are.

    Args:
        worker: Its model generates the images, with the averaged weights.
        settings: How they are measured.
        data: The real images.
        text: For the progress bar.
        sampler: By default the model's, as are the next three.
        levels: Levels to visit, `(S + 1,)`.
        guidance: How images are guided.
        seed: Seed of the images.
        num_shown: How many of the first images to return.
    """
    quality = settings.quality.to(worker.device)
    _measure_real(worker, settings, data)
    quality.reset_samples()
    first = torch.zeros(num_shown, *worker.model.image_shape, dtype=torch.int32)
    begin = time.perf_counter()
    for batch, images in worker.sample_batches(
        range(settings.num_samples),
        settings.batch_size,
        text,
        sampler=sampler,
        levels=levels,
        guidance=guidance,
        seed=seed,
    ):
        pixels = to_uint8(images)
        quality.update(pixels, real=False)
        for index, image in zip(batch, pixels, strict=True):
            if index < num_shown:
                first[index] = image.cpu()
    speed = settings.num_samples / (time.perf_counter() - begin)
    values = quality.compute()
    quality.reset_samples()
    return Measured(values, speed, worker.all_reduce(first).to(torch.uint8))


def _measure_real(worker: Worker, settings: MeasureSettings, data: ImageDataModule) -> None:
    """Add the real images, once, or what was kept of them."""
    quality = settings.quality
    if not quality.needs_real or settings.reference is not None:
        return
    # The first has an image if any has; others may have none, and all must go on alike.
    if worker.broadcast(quality.num_real > 0):
        return
    kept = RealStatistics(worker, settings, data)
    if kept.load():
        return
    batches = data.reference_images(worker.rank, worker.world_size, settings.batch_size)
    total = -(-data.num_reference // (settings.batch_size * worker.world_size))
    for images in worker.progress(batches, total, "real features"):
        quality.update(images, real=True)
    kept.save()
