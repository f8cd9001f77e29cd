"""Every place where the project reaches into Lightning, of version 2.6, and why.

Lightning has no public way to do these things. A new version of Lightning is checked here.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning as L
from lightning.pytorch.core import saving
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.parsing import collect_init_args


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
