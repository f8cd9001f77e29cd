"""How many images a fit trains on in a second."""

import time
from typing import Any

import lightning as L
import torch

from ddim_pl.data.base import count_images
from ddim_pl.lightning_internals import logs_this_update


class Throughput(L.Callback):
    """Log "train/images_per_second" and "train/updates_per_second" wherever the loss is logged.

    Both are means since the last time, of all devices together, without validation and what else
    comes between epochs. Lightning's `ThroughputMonitor` waits for the device after every batch;
    this does so where values are logged, for which the host waits in any case.
    """

    def __init__(self) -> None:
        self._restart(0)

    def _restart(self, update: int) -> None:
        self._images, self._update, self._seconds = 0, update, 0.0
        self._since: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._restart(trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock, if it was stopped."""
        if self._since is None:
            self._since = _now(pl_module.device)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count, and log where it is time."""
        self._images += count_images(batch) * trainer.world_size
        if not logs_this_update(trainer):
            return
        self._stop(pl_module.device)
        if self._seconds > 0:
            updates = trainer.global_step - self._update
            pl_module.log("train/images_per_second", self._images / self._seconds)
            pl_module.log("train/updates_per_second", updates / self._seconds)
        self._restart(trainer.global_step)
        self._since = _now(pl_module.device)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._stop(pl_module.device)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._stop(pl_module.device)

    def _stop(self, device: torch.device) -> None:
        if self._since is not None:
            self._seconds += _now(device) - self._since
            self._since = None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
