"""What guards a fit: nothing is lost when it ends, however it does."""

import copy
import signal
import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from ddim_pl import signals
from ddim_pl.lightning_internals import (
    accumulates,
    callbacks_of,
    ends_with_this_batch,
    finish_batch,
    forwarder,
    save_last,
    unfinish_batch,
    write_whole_files,
)


class RunGuard(Checkpoint):
    """Part of every fit of a `DiffusionModule`, which adds it; no config names it.

    A resumed run first ends the batch within which its checkpoint was saved, with the validation
    that follows it. When a fit ends, by its limits, by an error or by a signal, `last.ckpt` of
    each `ModelCheckpoint` with `save_last` holds the state of the last update. A signal that comes
    in an update ends the fit after it; within a validation, on one device, at once, unless
    gradients are being accumulated. An error
    within an update leaves the files as they are. A kill or a full disk leaves no part of a file
    in the place of a whole one.

    It runs after all other callbacks, because it is a `Checkpoint` and the last of them.
    """

    def __init__(self) -> None:
        self._whole = False  # whether the state is that after an update
        self._failed = False
        self._saved_at = 0
        self._warned = False
        self._before_validation: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let checkpoints appear whole or not at all."""
        if stage == "fit":
            write_whole_files(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the batch within which the checkpoint was saved."""
        finish_batch(trainer)
        signals.defer(forwarder(trainer))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From here on the state is that of no update. Warn, once, if nothing will be learned."""
        self._whole = False
        rates = [group["lr"] for each in trainer.optimizers for group in each.param_groups]
        # A tensor is not looked at: that would wait for the device.
        if not self._warned and rates and all(type(rate) is float and rate == 0 for rate in rates):
            self._warned = True
            rank_zero_warn(
                f"the rate of update {trainer.global_step + 1} is 0, so that nothing is learned: "
                "give an lr_scheduler that ends later, or end the fit here"
            )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save if this was the last update; stop if a signal came."""
        if accumulates(trainer):
            return
        self._whole = True
        stops = signals.received() is not None
        if trainer.world_size > 1:
            stops = trainer.strategy.reduce_boolean_decision(stops, all=False)
        if stops:
            raise signals.Interrupted(signals.received() or signal.SIGTERM)
        if ends_with_this_batch(trainer):
            # Not later: after this Lightning counts the epoch, though it is not over.
            save_last(trainer)
            self._saved_at = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the callbacks' states; let signals break a validation off."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._before_validation = {
                each.state_key: copy.deepcopy(each.state_dict())
                for each in callbacks_of(trainer)
                if not isinstance(each, Checkpoint)
            }
            # Else the processes would wait for each other, or gradients are not applied yet.
            if trainer.world_size == 1 and self._whole:
                signals.undefer()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let signals wait again."""
        if self._before_validation is not None:
            signals.defer(forwarder(trainer))
            self._before_validation = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end, if that is not done."""
        signals.undefer()
        if self._saved_at != trainer.global_step:
            save_last(trainer)
        self._whole = False

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save the last update, unless this broke one off."""
        pl_module.teardown(TrainerFn.FITTING)  # which Lightning leaves out
        interrupted = isinstance(exception, signals.Interrupted)
        if not self._whole or (trainer.world_size > 1 and not interrupted):
            return
        self._failed = True
        try:
            paths = save_last(trainer)
        except (OSError, ValueError) as error:
            rank_zero_warn(f"update {trainer.global_step} could not be saved: {error}")
            return
        if trainer.is_global_zero:
            kept = (
                f"is saved in {', '.join(paths)}"
                if paths
                else ("is not saved: no ModelCheckpoint has save_last")
            )
            print(f"update {trainer.global_step} {kept}", file=sys.stderr)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Where a validation was broken off, save what was before it."""
        if self._failed and self._before_validation is not None:
            known = checkpoint["callbacks"]
            known |= {
                key: self._before_validation[key] for key in known.keys() & self._before_validation
            }
            unfinish_batch(checkpoint)
