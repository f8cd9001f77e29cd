"""FID and more, in training and in `test`; computed in `ddim_pl/evaluation/measure.py`."""

from collections.abc import Callable, Sequence

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from ddim_pl.checks import check_at_least
from ddim_pl.evaluation.measure import MeasureSettings, measure
from ddim_pl.evaluation.worker import Worker, check_images
from ddim_pl.lightning_internals import datamodule_of
from ddim_pl.metrics.inception import InceptionFeatures
from ddim_pl.metrics.missing import otherwise
from ddim_pl.training import DiffusionModule

WITHOUT_WEIGHTS = (
    "give its path as weights_path of the features of FrechetDistance, or "
    "leave FrechetDistance out of the callbacks"
)
"""What a run can do without the weights of Inception."""


class FrechetDistance(L.Callback):
    """Generate images with the averaged weights and measure how far they are from the real ones.

    Logs "fid" for Inception features, "<name>_fd" for any other extractor, and the numbers of the
    other `metrics`, see `SampleQuality`. The ranks share the work. Exactly `num_samples` images
    are generated, the same ones every time. The features of the real images, all training images
    of the data module, are computed once per run.

    Args:
        features: Makes the feature extractor, see `ddim_pl.metrics.quality.FeatureExtractor`; by
            default Inception-v3.
        metrics: Any of "fd", "kid", "inception_score", "precision_recall" and "density_coverage".
            A progress bar shows the first.
        num_samples: Images to generate; published FIDs take 50,000.
        batch_size: Images in a batch, on each device.
        cache: Whether the statistics of the real images are kept for other runs on the same data,
            in `DDIM_PL_CACHE` or the user's cache. With a metric of single features ("kid",
            "precision_recall", "density_coverage") nothing is kept.
        statistics: NPZ file of statistics in place of the real images, as pytorch-fid, EDM,
            guided-diffusion and `main.py stats` write them; for "fd" alone, or beside
            "inception_score".
        every_n_validations: Measure at each n-th validation of `fit`, or at none if 0; `test` and
            `validate` always do.

    Raises:
        ValueError: If a number is too small, a metric unknown, or statistics are not enough for
            it.
    """

    def __init__(
        self,
        features: Callable[[], nn.Module] | None = None,
        *,
        metrics: Sequence[str] = ("fd",),
        num_samples: int = 50_000,
        batch_size: int = 250,
        cache: bool = True,
        statistics: str | None = None,
        every_n_validations: int = 1,
    ) -> None:
        check_at_least(0, every_n_validations=every_n_validations)
        self.settings = MeasureSettings(
            features or InceptionFeatures,
            tuple(metrics),
            num_samples,
            batch_size,
            cache,
            statistics,
        )
        self.every_n_validations = every_n_validations
        self.images_per_second = 0.0
        self._validations = 0

    def check_settings(self, stage: str) -> None:
        """Load the extractor, before the data are prepared.

        Nothing is loaded for a stage ("fit", "validate", "test" or "predict") that does not
        measure.

        Raises:
            ValueError: If the extractor's weights are missing, or it does not fit the metrics or
                the statistics.
        """
        if self._measures_in(stage):
            with otherwise(WITHOUT_WEIGHTS):
                _ = self.settings.quality

    def check(self, datamodule: L.LightningDataModule | None, stage: str) -> None:
        """Check that this data can be measured, before a run begins; also `check_settings`.

        Raises:
            ValueError: As `check_settings`; or if the extractor does not fit the images, or the
                data module, which must be set up, has no images or too few.
        """
        if self._measures_in(stage):
            with otherwise(WITHOUT_WEIGHTS):
                self.settings.check(check_images(datamodule))

    def _measures_in(self, stage: str) -> bool:
        return stage != "predict" and (stage != "fit" or self.every_n_validations > 0)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the extractor where it will be used."""
        self.check(datamodule_of(trainer), stage)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, unless this is the check before training or not this validation's turn."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            self._validations += 1
            if not self.every_n_validations or self._validations % self.every_n_validations:
                return
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure."""
        self._log(trainer, pl_module, "test")

    def state_dict(self) -> dict[str, int]:
        """The count of validations, so that a resumed run measures at the same ones."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the count."""
        self._validations = state_dict["validations"]

    def measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        """Generate and measure now, on every rank; return the numbers by their names."""
        assert isinstance(pl_module, DiffusionModule)
        worker = Worker(trainer, pl_module)
        text = f"sampling for {self.settings.quality.keys[0]}"
        found = measure(worker, self.settings, check_images(datamodule_of(trainer)), text)
        self.settings.quality.to("cpu")  # the device's memory is for training
        self.images_per_second = found.images_per_second
        return found.values

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for key, value in self.measure(trainer, pl_module).items():
            bar = stage == "val" and key == self.settings.quality.keys[0]
            pl_module.log(f"{stage}/{key}", value, rank_zero_only=False, prog_bar=bar)
        pl_module.log(f"{stage}/images_per_second", self.images_per_second)
