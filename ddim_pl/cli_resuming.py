"""What a fit that goes on from a checkpoint says before it begins, and at its end."""

import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info

from ddim_pl.cli_configs import with_homes
from ddim_pl.runs import read_checkpoint
from ddim_pl.training.hyperparameters import CONFIG_KEY
from ddim_pl.training.resuming import SETTINGS

MOST = 8
"""Settings that a note names at most."""

NOT_SAID = (
    *("trainer.max_", "trainer.min_", "trainer.callbacks", "trainer.logger"),
    # What is dropped from a checkpoint's config, see `ddim_pl.trust`.
    *("trainer.default_root_dir", "data.cache", "data.download"),
    *(f"model.{name}" for name in SETTINGS),
)
"""Beginnings of the names of settings that are meant to change, or that another note names."""

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring = 2, 4, 4, 60


def tell_of_resuming(path: str | Path, settings: Mapping[str, Any]) -> int:
    """Say which settings differ from the checkpoint's.

    Args:
        path: The checkpoint.
        settings: What the run is given, by the names of a config.

    Returns:
        The updates that the checkpoint has had.
    """
    checkpoint = read_checkpoint(Path(path), keep=True)
    changes = [*changed_settings(_recorded(checkpoint), settings)]
    if changes:
        more = [f"and {len(changes) - MOST} more"] if len(changes) > MOST else []
        text = "; ".join([*changes[:MOST], *more])
        rank_zero_info(f"goes on with other settings than before: {text}")
    return int(checkpoint.get("global_step", 0))


def _recorded(checkpoint: Mapping[str, Any]) -> Any:
    """The config of a checkpoint, which may hold anything."""
    text = checkpoint.get(CONFIG_KEY)
    try:
        return yaml.safe_load(text) if isinstance(text, str) else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def changed_settings(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Settings that were other ones, as `name: before -> now`.

    One that the checkpoint does not know, as one of an older version, is left out. The checkpoint
    may be a stranger's: of what it holds only a short text is shown.

    >>> [*changed_settings({"data": {"root": "a"}}, {"data": {"root": "b", "new": 1}})]
    ["data.root: 'a' -> 'b'"]
    """
    if isinstance(now, Mapping):
        known = before if isinstance(before, Mapping) else {}
        for key, value in now.items():
            below = name if key == "init_args" else f"{name}.{key}".removeprefix(".")
            if key in known and not below.startswith(NOT_SAID):
                yield from changed_settings(known[key], value, below)
    elif now != (with_homes(before) if isinstance(before, str) else before):
        label = name.removesuffix(".class_path")
        yield f"{label}: {_short.repr(before)} -> {_short.repr(now)}"


def tell_of_idleness(trainer: Trainer, updates: int, limits: Mapping[str, Any]) -> None:
    """Say so, at the end of a fit, if the checkpoint that it went on from was at its end already.

    Args:
        trainer: The trainer.
        updates: Those of the checkpoint.
        limits: The trainer's `max_steps` and `max_epochs` as they were given.
    """
    if trainer.global_step > updates or getattr(trainer, "fast_dev_run", False):
        return
    reached = {"max_steps": trainer.global_step, "max_epochs": trainer.current_epoch}
    for name, place in reached.items():
        most = limits.get(name)
        if most is not None and 0 <= most <= place:
            rank_zero_info(
                f"nothing was left to train: the checkpoint is at update {updates}, the end by "
                f"trainer.{name}={most}; give a larger one to go on"
            )
            return
    if hasattr(trainer.lightning_module, "rounds") and updates >= trainer.max_steps > 0:
        rank_zero_info(
            f"nothing was left to train: the checkpoint is at update {updates}, the end of its "
            "rounds"
        )
