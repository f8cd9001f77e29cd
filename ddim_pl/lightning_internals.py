"""Every place where the project reaches into Lightning, of version 2.6, and why.

Lightning has no public way to do these things. A new version of Lightning is checked here.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.core import saving
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loops import evaluation_loop, training_epoch_loop
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.parsing import collect_init_args

from ddim_pl.damage import check_archive
from ddim_pl.files import remove_parts, write_tensors


def constructor_arguments(base: type[Any]) -> dict[str, Any]:
    """Arguments given to the constructor of an object, for a call in the constructor of `base`.

    Only those of the object's own class, which passes the others to its bases again. Lightning's
    `save_hyperparameters` reads the same frames, but also stores what is not plain data.
    """
    frame = cast(FrameType, cast(FrameType, inspect.currentframe()).f_back)
    return collect_init_args(frame, [], classes=(base,))[-1]


def allow_instantiator(path: str) -> None:
    """Let `load_from_checkpoint` call this function to make a module.

    Lightning knows a fixed set of such functions, since version 2.6.6.
    """
    allowed: set[str] = getattr(saving, "_ALLOWED_INSTANTIATORS", set())
    allowed.add(path)


FILE_LOGGERS = (TensorBoardLogger, CSVLogger)
"""The loggers that write into `<save_dir>/<name>/version_N`."""


def version_given(logger: TensorBoardLogger | CSVLogger) -> int | str | None:
    """The version that a logger was given, without making it find one."""
    return logger._version


def set_version(logger: TensorBoardLogger | CSVLogger, version: int) -> None:
    """Set the version of a logger that has not written yet, and would find one itself."""
    logger._version = version


def keep_table(logger: CSVLogger) -> None:
    """Let a logger go on with its file of metrics, which it would delete before it writes."""
    file = Path(logger.log_dir) / "metrics.csv"
    if not file.is_file():
        return
    aside = file.replace(file.with_name("metrics-before.csv"))
    try:
        logger.experiment.metrics_keys = aside.read_text().partition("\n")[0].split(",")
    finally:
        aside.replace(file)


def stop_after(trainer: L.Trainer, num_updates: int) -> None:
    """End a fit after this many updates, which only the module knows.

    `max_steps` is an argument of the Trainer, made before the module is.
    """
    trainer.fit_loop.epoch_loop.max_steps = num_updates


def batches_consumed(trainer: L.Trainer) -> int:
    """Batches that the run has trained on since it began, also before it was resumed.

    Lightning restores its progress before it asks for a loader. `processed` counts the batches
    that were trained on; `ready` would also count one that an exception broke off.
    """
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]


def indices_of_batch(trainer: L.Trainer, number: int) -> Any:
    """Which items of the training set batch `number` of the run holds, if its order can say."""
    order: Any = getattr(trainer.train_dataloader, "sampler", None)
    return order.batch(number).indices if hasattr(order, "batch") else None


REFRESH_RATE = 20
"""Batches between two looks of the progress bar at the loss, for which the host waits."""


def slow_down_progress_bar(trainer: L.Trainer) -> None:
    """Replace the bar that Lightning chose by one that looks at every twentieth batch.

    It chooses one that takes milliseconds for each batch, where rich is installed. For a trainer
    that was given no bar.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for place, each in enumerate(callbacks):
        if isinstance(each, TQDMProgressBar | RichProgressBar):
            callbacks[place] = TQDMProgressBar(refresh_rate=REFRESH_RATE)


def logs_this_update(trainer: L.Trainer) -> bool:
    """Whether values are logged at the end of this batch."""
    due: bool = trainer._logger_connector.should_update_logs
    return due and not trainer.fit_loop._should_accumulate()


def scales_gradients(trainer: L.Trainer) -> bool:
    """Whether losses are scaled, so that gradients may overflow and be skipped."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def finish_batch(trainer: L.Trainer) -> None:
    """End the batch within which the checkpoint of a resumed run was saved.

    Lightning saves by `every_n_train_steps` before it counts the batch as completed and before the
    validation that may follow. Resumed, its loop leaves that validation out; and where the batch
    was the last of an epoch it begins the next one without counting it, so that a second resumed
    run trains too long. Here the validation is made up for, and the epoch is counted.

    For a call in `on_train_start`, when the loops have read their progress.
    """
    fit = trainer.fit_loop
    loop = fit.epoch_loop
    batches = loop.batch_progress
    if fit.restarted_on_epoch_start:
        # `on_train_epoch_start` broke off an epoch: it begins once more, with batches of its own.
        fit.epoch_progress.total.ready -= 1
        fit.reset_restart_stage()
        loop.restarting = False
    if batches.total.ready > batches.total.processed:  # type: ignore[attr-defined]
        # One that was only begun: `on_train_batch_start` broke it off.
        batches.total.ready -= 1
        batches.current.ready -= 1
        batches.is_last_batch = False
        loop._restart_stage = training_epoch_loop.RestartStage.RESTARTED_ON_LAST
        # Lightning will skip a validation that was made, and count the update once more.
        loop._batches_that_stepped -= loop._should_check_val_fx(cast(Any, fit._data_fetcher))
    if not loop.restarted_on_train_batch_end:
        return
    ends_epoch = fit.restarted_mid_epoch and batches.is_last_batch
    epochs = (fit.epoch_progress.total, fit.epoch_progress.current)
    if ends_epoch:  # by now Lightning has counted it; which validation follows depends on that
        for count in epochs:
            count.processed -= 1  # type: ignore[attr-defined]
            count.completed -= 1
    if loop._should_check_val_fx(cast(Any, fit._data_fetcher)):
        batches.increment_completed()
        loop._restart_stage = training_epoch_loop.RestartStage.RESTARTED_ON_LAST
        loop.val_loop._restart_stage = evaluation_loop.RestartStage.RESTARTED_MID_EVALUATION
        loop.val_loop.restarting = False  # it begins with its first batch
    elif ends_epoch:
        for count in epochs:
            count.processed += 1  # type: ignore[attr-defined]
            count.completed += 1
        fit.reset_restart_stage()


def unfinish_batch(checkpoint: dict[str, Any]) -> None:
    """Make of a checkpoint that was saved within a validation one of before it.

    It says that its batch is not completed, so that a resumed run validates.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for count in (progress["total"], progress["current"]):
        count["completed"] -= 1


def ends_with_this_batch(trainer: L.Trainer) -> bool:
    """Whether a fit ends with the present batch though its epochs do not."""
    loop = trainer.fit_loop
    ended = 0 <= loop.max_steps <= trainer.global_step
    return ended or (trainer.should_stop and loop._can_stop_early)


def accumulates(trainer: L.Trainer) -> bool:
    """Whether the present batch belongs to an update that is not made yet."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def save_last(trainer: L.Trainer) -> list[str]:
    """Write `last.ckpt` of each `ModelCheckpoint` that keeps one; return their paths.

    One that has written at this update is left as it is.
    """
    paths = []
    for files in trainer.checkpoint_callbacks:
        if not isinstance(files, ModelCheckpoint) or not files.save_last:
            continue
        before = files._last_global_step_saved
        if before != trainer.global_step:
            files._save_last_checkpoint(trainer, files._monitor_candidates(trainer))
            # It may still save by its own settings at this update.
            files._last_global_step_saved = before
        paths.append(files.last_model_path)
    return paths


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, in any folder, and are read whole.

    Lightning writes to the folder of temporary files and moves the file from there, which is a
    copy where that lies on another disk: a kill or a full disk leaves a part of it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write beside the file, then replace it; other than local files as Lightning does."""
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        write_tensors(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Compare a local file's checksums before it is read."""
        if _is_local_file_protocol(path) and Path(path).is_file():
            check_archive(path)
        return super().load_checkpoint(path, *arguments, **options)


def write_whole_files(trainer: L.Trainer) -> None:
    """Let the trainer write its checkpoints by `WholeFiles`, and remove what a kill left of some.

    A `CheckpointIO` that the user gave is left as it is.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFiles()
    for files in trainer.checkpoint_callbacks if trainer.is_global_zero else []:
        folder = getattr(files, "dirpath", None)
        if folder is not None and _is_local_file_protocol(folder):
            remove_parts(Path(folder))


def forget_foreign_files(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Forget files that a `ModelCheckpoint`'s state names outside of the folders of this run.

    It removes the files before, once it has written a new one; a checkpoint from elsewhere does
    not say what is removed.
    """
    found = [getattr(each, "dirpath", None) for each in trainer.checkpoint_callbacks]
    folders = [Path(each).resolve() for each in found if each and _is_local_file_protocol(each)]

    def ours(path: Any) -> bool:
        if not isinstance(path, str) or not _is_local_file_protocol(path):
            return False
        return any(folder in Path(path).resolve().parents for folder in folders)

    for state in checkpoint.get("callbacks", {}).values():
        if not isinstance(state, dict):
            continue
        for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
            if name in state and not ours(state[name]):
                state[name] = ""
        best = state.get("best_k_models")
        if isinstance(best, dict):
            state["best_k_models"] = {path: value for path, value in best.items() if ours(path)}


def forwarder(trainer: L.Trainer) -> Callable[[int], Any] | None:
    """What sends a signal to the other processes that the trainer started, if it did."""
    return getattr(trainer.strategy.launcher, "kill", None)


def trains_elsewhere(trainer: L.Trainer) -> bool:
    """Whether a fit is made by processes that the trainer starts while this one waits."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def add_callback_states(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Let the callbacks write into a checkpoint that the trainer does not save itself."""
    call._call_callbacks_on_save_checkpoint(trainer, checkpoint)


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The trainer's callbacks, an attribute that is set where type checkers do not see it."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def datamodule_of(trainer: L.Trainer) -> L.LightningDataModule | None:
    """The trainer's data module, an attribute that is set where type checkers do not see it."""
    return trainer.datamodule  # type: ignore[attr-defined]


@contextmanager
def without_callbacks_and_loggers(trainer: L.Trainer) -> Iterator[None]:
    """Run a command without what belongs to fit and test.

    The trainer has no argument for this, and another trainer would start its processes anew.
    """
    callbacks, loggers = callbacks_of(trainer), trainer.loggers
    trainer.callbacks, trainer.loggers = [], []  # type: ignore[attr-defined]
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
