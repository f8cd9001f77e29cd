"""Fréchet distance, and more, between drawn and real images, in training and in `test`."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from tqdm.auto import tqdm

from ddim_pl.data.base import ImageDataModule
from ddim_pl.images import to_uint8
from ddim_pl.metrics.inception import InceptionFeatures
from ddim_pl.metrics.quality import SampleQuality, check_metrics
from ddim_pl.training import DiffusionModule

T = TypeVar("T")


class FrechetDistance(L.Callback):
    """Draw images with the averaged weights and measure how far they are from the real ones.

    Logs "fid" for Inception features and "<name>_fd" for any other extractor, since the numbers of
    two extractors cannot be compared; of the same pass over the images also the numbers of other
    `metrics`, see `SampleQuality`. The work is shared over ranks; exactly `num_samples` images are
    drawn, the same ones every time; the real side, all training images of the data module, is
    computed once per run. All metrics but "fd" keep features: 8 kB an image for Inception.

    Args:
        features: Makes the feature extractor, see `ddim_pl.metrics.quality.FeatureExtractor`; by
            default Inception-v3.
        metrics: Any of "fd", "kid", "inception_score", "precision_recall" and "density_coverage".
            A progress bar shows the first.
        num_samples: Images to draw; published FIDs take 50,000.
        batch_size: Images in a batch, on each device.
        every_n_validations: Measure at each n-th validation of `fit`, or at none if 0; `test` and
            `validate` always do.

    Raises:
        ValueError: If a number is too small or a metric unknown.
    """

    def __init__(
        self,
        features: Callable[[], nn.Module] | None = None,
        *,
        metrics: Sequence[str] = ("fd",),
        num_samples: int = 50_000,
        batch_size: int = 250,
        every_n_validations: int = 1,
    ) -> None:
        smallest = {"num_samples": 2, "batch_size": 1, "every_n_validations": 0}
        values = {
            "num_samples": num_samples,
            "batch_size": batch_size,
            "every_n_validations": every_n_validations,
        }
        for name, least in smallest.items():
            if values[name] < least:
                raise ValueError(f"{name} must be at least {least}, got {values[name]}")
        check_metrics(metrics)
        self.features = features or InceptionFeatures
        self.metrics = list(metrics)
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.every_n_validations = every_n_validations
        self.quality: SampleQuality | None = None
        self.images_per_second = 0.0
        self._validations = 0

    @property
    def key(self) -> str:
        """Name of the first number, without the stage."""
        assert self.quality is not None
        return self.quality.keys[0]

    def check(self, datamodule: L.LightningDataModule | None, stage: str) -> None:
        """Load the extractor and see that this data can be measured, before a run begins.

        Nothing is loaded for a stage ("fit", "validate", "test" or "predict") that does not
        measure.

        Raises:
            ValueError: If the extractor's weights are missing, it does not fit the metrics, or the
                data module has no images.
        """
        if stage == "predict" or (stage == "fit" and not self.every_n_validations):
            return
        if not isinstance(datamodule, ImageDataModule):
            raise ValueError(
                "FrechetDistance needs a data module with the real images (a subclass of "
                f"ddim_pl.data.base.ImageDataModule), got {type(datamodule).__name__}"
            )
        if self.quality is None:
            quality = SampleQuality(self.features(), self.metrics)
            quality.check_num_samples(self.num_samples)
            self.quality = quality

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the extractor where it will be used."""
        self.check(trainer.datamodule, stage)  # type: ignore[attr-defined]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, unless this is the check before training or not this validation's turn."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            self._validations += 1
            if not self.every_n_validations or self._validations % self.every_n_validations:
                return
        self._measure(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure."""
        self._measure(trainer, pl_module, "test")

    def state_dict(self) -> dict[str, int]:
        """The count of validations, so that a resumed run measures at the same ones."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on with the count."""
        self._validations = state_dict["validations"]

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        values = self.measure(trainer, pl_module)
        for key, value in values.items():
            bar = stage == "val" and key == self.key
            pl_module.log(f"{stage}/{key}", value, rank_zero_only=False, prog_bar=bar)
        pl_module.log(f"{stage}/images_per_second", self.images_per_second)

    @torch.no_grad()
    def measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        """Draw and measure now, on every rank; return the numbers by their names."""
        assert self.quality is not None
        assert isinstance(pl_module, DiffusionModule)
        # Apple's devices have no float64, which the metrics' sums are kept in.
        device = torch.device("cpu") if pl_module.device.type == "mps" else pl_module.device
        quality = self.quality.to(device)
        rank, world = trainer.global_rank, trainer.world_size
        datamodule = cast(ImageDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        if quality.needs_real and not quality.num_real:
            for images in self._progress(
                trainer,
                datamodule.reference_images(rank, world, self.batch_size),
                -(-datamodule.num_reference // (self.batch_size * world)),
                "real features",
            ):
                quality.update(images, real=True)

        begin = time.perf_counter()
        mine = range(rank, self.num_samples, world)
        starts = range(0, len(mine), self.batch_size)
        for start in self._progress(trainer, starts, len(starts), f"drawing for {self.key}"):
            # Sampling runs in the trainer's precision, the extractor always in its own.
            with trainer.precision_plugin.forward_context():
                images = pl_module.sample(mine[start : start + self.batch_size])
            quality.update(to_uint8(images), real=False)
        self.images_per_second = self.num_samples / (time.perf_counter() - begin)
        values = quality.compute()
        quality.reset_samples()
        quality.to("cpu")
        return values

    def _progress(
        self, trainer: L.Trainer, items: Iterable[T], total: int, text: str
    ) -> Iterable[T]:
        hidden = not trainer.is_global_zero or trainer.progress_bar_callback is None
        return tqdm(items, total=total, desc=text, leave=False, disable=hidden)
