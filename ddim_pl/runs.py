"""Run folders `<save_dir>/<name>/version_N`, their checkpoints, and which of them is `last`."""

import glob
import re
from pathlib import Path
from typing import Any

import yaml

from ddim_pl.damage import read_archive
from ddim_pl.training.hyperparameters import CONFIG_KEY
from ddim_pl.trust import check_classes, without_places

SHARED = ("seed_everything", "trainer", "model", "data")
"""What a checkpoint holds of a config: all but the arguments of one command."""


def newest_checkpoint(root: Path, name: str | None = None) -> Path:
    """The `last.ckpt` below `root` that was written last.

    Args:
        root: The `save_dir` of the logger.
        name: The experiment; "" for runs that lie in `root` itself, None for all experiments.

    Raises:
        FileNotFoundError: If there is none.
    """
    # A name is a name, also one with brackets.
    experiment = "*" if name is None else glob.escape(name) or "."
    pattern = f"{experiment}/version_*/checkpoints/last.ckpt"
    files = sorted(root.glob(pattern), key=lambda file: file.stat().st_mtime)
    if not files:
        wanted = root / (name or "" if name is not None else "*") / "version_*/checkpoints"
        raise FileNotFoundError(
            f"--ckpt_path last must find {wanted / 'last.ckpt'}, got none: run fit first, or give "
            "a file"
        )
    return files[-1]


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


def read_checkpoint(path: Path, name: str = "--ckpt_path") -> dict[str, Any]:
    """Read a Lightning checkpoint; tensors stay on the disk until they are used.

    Args:
        path: The file.
        name: The argument that gave the path, for the errors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint, or does not match its checksums.
    """
    if not path.is_file():
        problem = "which is a folder" if path.is_dir() else "which is not a file"
        raise FileNotFoundError(
            f"{name} must be a checkpoint, got {path}, {problem}: give a file or 'last'"
        )
    checkpoint = read_archive(path, name)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(
            f"{name} must be a Lightning checkpoint, got {path}, which holds no state_dict: give "
            "another file"
        )
    return checkpoint


def checkpoint_config(path: Path, command: str) -> dict[str, Any]:
    """The config that a checkpoint holds, as far as a stranger's may be used.

    Args:
        path: The file.
        command: The command that will use it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, holds no config, or names what it may not name.
    """
    text = read_checkpoint(path).get(CONFIG_KEY)
    config = yaml.safe_load(text) if isinstance(text, str) else None
    if not isinstance(config, dict):
        raise ValueError(
            f"--ckpt_path must be a checkpoint with a config, got {path}, which holds none: give "
            "--config as well"
        )
    config = {key: config[key] for key in SHARED if key in config}
    check_classes(config, str(path))
    config = without_places(config, str(path), command)
    if command != "fit":  # this may be another machine than the one that trained
        for name in ("accelerator", "strategy", "devices", "num_nodes"):
            config.get("trainer", {}).pop(name, None)
    return config
