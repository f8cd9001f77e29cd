"""Run folders `<save_dir>/<name>/version_N`, their checkpoints, and which of them is `last`."""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ddim_pl.damage import read_archive
from ddim_pl.loggers import RUNS
from ddim_pl.teachers.diffusers_folder import is_diffusers
from ddim_pl.training.hyperparameters import CONFIG_KEY
from ddim_pl.trust import (
    check_classes,
    check_form,
    is_trusted,
    without_places,
    without_senders,
)

SHARED = ("seed_everything", "trainer", "model", "data")
"""What a checkpoint holds of a config: all but the arguments of one command."""


DEEPEST = 4
"""Folders between `save_dir` and a run at most: a name may hold slashes."""


AT_THE_START = (
    *("events.out.tfevents.*", "hparams.yaml", "metrics.csv", RUNS),
    *("config.yaml", "config-resumed.yaml"),
)
"""Files of a run that stand there before it trains: those of loggers, and the config."""


def newest_checkpoint(root: Path, name: str | None = None, *more: Path) -> Path:
    """The newest run's checkpoint: `last.ckpt`, or before the first one the newest of its files.

    Args:
        root: The `save_dir` of the logger.
        name: The experiment; "" for runs that lie in `root` itself, None for all experiments.
        *more: Folders that hold runs of the same experiment.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a newer run has begun that has no checkpoint yet.
    """
    runs = list(_runs_below(root, DEEPEST) if name is None else _runs_below(root / name, 1))
    runs += [run for folder in more for run in _runs_below(folder, 1) if run not in runs]
    found = {run: file for run in runs if (file := _last_of(run)) is not None}
    if not found:
        wanted = root / (name or "" if name is not None else "*") / "version_*/checkpoints"
        raise FileNotFoundError(
            f"--ckpt_path last must find {wanted / 'last.ckpt'}, got none: run fit first, or give "
            "a file"
        )
    newest = max(found.values(), key=_age)
    begun = [run / "config.yaml" for run in runs if run not in found]
    for config in begun:
        if config.is_file() and _age(config) > _age(newest):
            raise ValueError(
                f"--ckpt_path last must be of the newest run, got {config.parent}, which has no "
                f"checkpoint yet: wait for it, or give a file, such as {newest} of the run before"
            )
    return newest


def experiments_of_mlflow(save_dir: Path, name: str) -> list[Path]:
    """The folders of an experiment's runs among the files of MLflow.

    Args:
        save_dir: The folder of MLflow, which holds a folder for each experiment.
        name: The experiment.
    """
    found = []
    for file in sorted(save_dir.glob("*/meta.yaml")):
        with contextlib.suppress(OSError, yaml.YAMLError, AttributeError):
            if yaml.safe_load(file.read_text()).get("name") == name:
                found.append(file.parent)
    return found


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    """The runs in a folder and so many levels of folders: `version_N`, or with checkpoints."""
    if depth == 0 or not folder.is_dir():
        return
    for child in sorted(folder.iterdir()):
        if re.fullmatch(r"version_\d+", child.name) or (child / "checkpoints").is_dir():
            yield child
        elif depth > 1:
            yield from _runs_below(child, depth - 1)


def _last_of(run: Path) -> Path | None:
    """The checkpoint from which a run goes on; a student is none."""
    last = run / "checkpoints" / "last.ckpt"
    files = [file for file in last.parent.glob("*.ckpt") if not file.name.startswith("student-")]
    return last if last in files else max(files, key=_age, default=None)


def _age(file: Path) -> int:
    return file.stat().st_mtime_ns


def claim_version(experiment: Path) -> int:
    """Make the next free folder `version_N` of an experiment; no other process gets the same."""
    experiment.mkdir(parents=True, exist_ok=True)
    numbers = [re.fullmatch(r"version_(\d+)", run.name) for run in _runs_below(experiment, 1)]
    taken = [int(number[1]) for number in numbers if number]
    number = max(taken, default=-1) + 1
    while True:
        try:
            (experiment / f"version_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return number


@contextlib.contextmanager
def removed_if_in_vain(
    run: Path, made: Iterable[Path], has_begun: Callable[[], bool]
) -> Iterator[None]:
    """Make a run's folder; remove it if what is done there fails before it has begun.

    The next one gets its number then. What held anything before stays, and so does a folder with
    anything but the files of loggers and the config.

    Args:
        run: The folder.
        made: Folders that were made for it, the lowest first, and are removed if they are empty.
        has_begun: Whether there is something to keep.
    """
    run.mkdir(parents=True, exist_ok=True)
    is_new = next(run.iterdir(), None) is None
    try:
        yield
    except BaseException:  # a signal too
        if is_new and not has_begun() and _holds_nothing(run):
            shutil.rmtree(run, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in made:
                    folder.rmdir()
        raise


def _holds_nothing(run: Path) -> bool:
    """Whether a folder holds only what is written before a training."""
    files = [path for path in run.rglob("*") if not path.is_dir() or path.is_symlink()]
    return all(any(path.match(pattern) for pattern in AT_THE_START) for path in files)


def run_of(checkpoint: Path) -> Path:
    """The run of a checkpoint; of a file that lies in none, a folder of its name beside it.

    The folder is the same every time, so that a sweep of a moved file finds its cells again.
    """
    run = checkpoint.absolute().parent.parent
    if checkpoint.absolute().parent.name == "checkpoints" and run.name.startswith("version_"):
        return run
    return checkpoint.absolute().with_name(f"{checkpoint.stem}-run")


def version_of(checkpoint: Path) -> tuple[Path, int] | None:
    """The experiment's folder and the number N of the run `version_N` that holds a checkpoint.

    None if the file lies in no folder of such a run.
    """
    run = checkpoint.absolute().parent.parent
    number = re.fullmatch(r"version_(\d+)", run.name)
    return (run.parent, int(number[1])) if number else None


def read_checkpoint(
    path: Path, name: str = "--ckpt_path", *, keep: bool = False
) -> dict[str, Any]:
    """Read a Lightning checkpoint; tensors stay on the disk until they are used.

    Args:
        path: The file.
        name: The argument that gave the path, for the errors.
        keep: Whether the next reading may return the same object, see `read_archive`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint, or does not match its checksums.
    """
    if not path.is_file():
        problem = "which is a folder" if path.is_dir() else "which is not a file"
        remedy = "give a file or 'last'"
        if is_diffusers(path):
            problem = "which is a folder of diffusers"
            remedy = f"make one of it by main.py import {path} --output FILE"
        raise FileNotFoundError(f"{name} must be a checkpoint, got {path}, {problem}: {remedy}")
    checkpoint = read_archive(path, name, keep=keep)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(
            f"{name} must be a Lightning checkpoint, got {path}, which holds no state_dict: give "
            "another file"
        )
    return checkpoint


def checkpoint_config(path: Path, command: str) -> dict[str, Any]:
    """The config that a checkpoint holds, as far as a stranger's may be used.

    The command that follows reads the same file again, so its content is kept for it.

    Args:
        path: The file.
        command: The command that will use it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, holds no config, or names what it may not name.
    """
    text = read_checkpoint(path, keep=True).get(CONFIG_KEY)
    config = yaml.safe_load(text) if isinstance(text, str) else None
    if not isinstance(config, dict):
        raise ValueError(
            f"--ckpt_path must be a checkpoint with a config, got {path}, which holds none: give "
            "--config as well"
        )
    config = {key: config[key] for key in SHARED if key in config}
    config = without_senders(config, str(path), command)
    if not is_trusted("*"):
        check_form(config, str(path))
    check_classes(config, str(path))
    config = without_places(config, str(path), command)
    if command != "fit":  # this may be another machine than the one that trained
        for name in ("accelerator", "strategy", "devices", "num_nodes"):
            config.get("trainer", {}).pop(name, None)
        # A minute of compilation is worth it for many images only.
        config.get("model", {}).get("init_args", {}).pop("compile", None)
    return config
