"""What loggers get besides scalars: images, hyperparameters; and their runs that go on.

How each logger takes a thing stands here alone. One that does not take it is left as it is: the
file lies in the run's folder.
"""

import json
import os
from collections.abc import Iterable, Mapping
from functools import singledispatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from PIL import Image

from ddim_pl.files import replacing
from ddim_pl.images import read_png
from ddim_pl.lightning_internals import FILE_LOGGERS

RUNS = "loggers.json"
"""File in a run's folder: the runs that loggers keep elsewhere, by class, in their order."""

KEPT_ELSEWHERE = {"WandbLogger": "id", "MLFlowLogger": "run_id"}
"""Loggers with runs of their own, and the argument that names one to go on with."""

EXTRAS = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}
"""Packages that loggers need, each an extra of the same name."""

LONGEST_PARAMETER = 250
"""Letters of a value that Lightning gives to MLflow."""


def run_folder(trainer: L.Trainer) -> Path:
    """The run's folder, in which `checkpoints` lies. To be asked on every rank: it broadcasts.

    `Trainer.log_dir` is that of TensorBoard and CSV files; of other loggers it is the same for all
    runs.
    """
    logger = trainer.logger
    if logger is None or isinstance(logger, FILE_LOGGERS):
        return Path(trainer.log_dir or trainer.default_root_dir)
    _ = cast(Any, logger).experiment  # it has an id from then on
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    place = Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    return trainer.strategy.broadcast(place)


# ---- images -----------------------------------------------------------------------------------


def log_image(loggers: Iterable[Logger], tag: str, file: Path, step: int) -> None:
    """Hand an image to every logger. For the first rank alone.

    Args:
        loggers: Those of the trainer.
        tag: Its name, the same at every step.
        file: A PNG, written already.
        step: Updates of the network.
    """
    for logger in loggers:
        _add_image(logger, tag, file, step)


@singledispatch
def _add_image(logger: Logger, tag: str, file: Path, step: int) -> None:
    """A logger that takes no images has the file in the run's folder."""


@_add_image.register
def _(logger: TensorBoardLogger, tag: str, file: Path, step: int) -> None:
    logger.experiment.add_image(tag, read_png(file), step)


@_add_image.register
def _(logger: CSVLogger, tag: str, file: Path, step: int) -> None:
    """A column of paths from the table to the files."""
    path: Any = Path(os.path.relpath(file, logger.log_dir)).as_posix()
    logger.log_metrics({tag: path}, step)


@_add_image.register
def _(logger: WandbLogger, tag: str, file: Path, step: int) -> None:
    logger.log_image(tag, [str(file)], step)


@_add_image.register
def _(logger: MLFlowLogger, tag: str, file: Path, step: int) -> None:
    with Image.open(file) as image:
        logger.experiment.log_image(str(logger.run_id), image, key=tag, step=step)


# ---- hyperparameters --------------------------------------------------------------------------


def flat_settings(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Settings of a config under flat names, as loggers compare runs by.

    A class stands under its argument's name, its arguments below that; a list is a text; what is
    null is left out, and so are callbacks and loggers, which are no settings of a training.

    >>> flat_settings({"model": {"class_path": "a.DDPM", "init_args": {"clip": True}}})
    {'model': 'DDPM', 'model.clip': True}
    """
    trainer = dict(config.get("trainer") or {})
    for name in ("callbacks", "logger"):
        trainer.pop(name, None)
    return _flat("", {**config, "trainer": trainer})


def _flat(name: str, value: Any) -> dict[str, bool | int | float | str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return {name: value if isinstance(value, bool | int | float | str) else str(value)}
    found: dict[str, bool | int | float | str] = {}
    below = value
    if "class_path" in value:
        found[name] = str(value["class_path"]).rpartition(".")[2]
        below = {**(value.get("init_args") or {}), **(value.get("dict_kwargs") or {})}
    for key, item in below.items():
        found |= _flat(f"{name}.{key}" if name else str(key), item)
    return found


def log_settings(loggers: Iterable[Logger], settings: Mapping[str, Any]) -> None:
    """Hand hyperparameters to every logger, when a fit begins. For the first rank alone.

    Args:
        loggers: Those of the trainer.
        settings: By flat names, see `flat_settings`.
    """
    for logger in loggers:
        _add_settings(logger, dict(settings))


@singledispatch
def _add_settings(logger: Logger, settings: dict[str, Any]) -> None:
    logger.log_hyperparams(settings)


@_add_settings.register
def _(logger: TensorBoardLogger, settings: dict[str, Any]) -> None:
    """Settings without a list of metrics: TensorBoard takes every scalar of the run as one.

    A list, once written, is that of all runs, so that those of a later `test` would not be shown.
    """
    from torch.utils.tensorboard.summary import hparams

    logger.log_hyperparams(settings, {})  # hparams.yaml
    _, begin, _ = hparams(settings, {})
    logger.experiment._get_file_writer().add_summary(begin)


@_add_settings.register
def _(logger: MLFlowLogger, settings: dict[str, Any]) -> None:
    """What MLflow has not got: it refuses to change a parameter, as a resumed run may have to."""
    there = logger.experiment.get_run(logger.run_id).data.params
    new = {name: value for name, value in settings.items() if name not in there}
    logger.log_hyperparams(new)
    for name in settings.keys() & there.keys():
        if there[name] != str(settings[name])[:LONGEST_PARAMETER]:
            logger.experiment.set_tag(str(logger.run_id), f"resumed.{name}", settings[name])


# ---- runs that loggers keep elsewhere ---------------------------------------------------------


def check_installed(name: str) -> None:
    """Check that the package of a logger is installed.

    Args:
        name: The class of the logger.

    Raises:
        ValueError: If it is not; the error names the command that installs it.
    """
    package = EXTRAS.get(name)
    if package is not None and find_spec(package) is None:
        raise ValueError(
            f"trainer.logger cannot be {name} without the package {package}: install it by "
            f"pip install 'ddim_pl[{package}]'"
        )


def remember_runs(folder: Path, loggers: Iterable[Logger]) -> None:
    """Begin the runs that loggers keep elsewhere, and write which they are.

    Args:
        folder: The run's folder.
        loggers: Those of the trainer.
    """
    found: dict[str, list[str]] = {}
    for logger in loggers:
        name = type(logger).__name__
        if name in KEPT_ELSEWHERE:
            _ = cast(Any, logger).experiment
            found.setdefault(name, []).append(str(logger.version))
    if found:
        with replacing(folder / RUNS) as part:
            part.write_text(json.dumps(found, indent=2) + "\n")


def remembered_runs(folder: Path) -> dict[str, list[str]]:
    """What `remember_runs` wrote, by the class of the loggers; empty if there is nothing."""
    try:
        found = json.loads((folder / RUNS).read_text())
    except (OSError, ValueError):
        return {}
    kept = found.items() if isinstance(found, dict) else ()
    return {name: [str(each) for each in ids] for name, ids in kept if isinstance(ids, list)}
