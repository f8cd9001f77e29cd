"""What guards a fit: a run that was stopped goes on as if it had not been."""

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from ddim_pl.lightning_internals import finish_batch


class RunGuard(Checkpoint):
    """Part of every fit of a `DiffusionModule`, which adds it; no config names it.

    A resumed run first ends the batch within which its checkpoint was saved, with the validation
    that follows it.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the batch within which the checkpoint was saved."""
        finish_batch(trainer)
