"""What a fit that goes on from a checkpoint says before it begins, and at its end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info

from ddim_pl.loggers import flat_settings
from ddim_pl.runs import read_checkpoint
from ddim_pl.training.hyperparameters import CONFIG_KEY
from ddim_pl.training.resuming import SETTINGS

LONGEST = 60
"""Characters of a value in a note."""

SAID_ELSEWHERE = ("trainer.max_", "trainer.min_", *(f"model.{name}" for name in SETTINGS))
"""Beginnings of the names of settings that are meant to change, or that `apply_settings` names."""


def tell_of_resuming(path: str | Path, settings: Mapping[str, Any]) -> int:
    """Say which settings differ from the checkpoint's.

    Args:
        path: The checkpoint.
        settings: What the run is given, by the names of a config.

    Returns:
        The updates that the checkpoint has had.
    """
    checkpoint = read_checkpoint(Path(path), keep=True)
    text = checkpoint.get(CONFIG_KEY)
    recorded = yaml.safe_load(text) if isinstance(text, str) else {}
    changes = changed_settings(flat_settings(recorded), flat_settings(settings))
    if changes:
        rank_zero_info(f"goes on with other settings than before: {'; '.join(changes)}")
    return int(checkpoint.get("global_step", 0))


def tell_of_idleness(trainer: Trainer, updates: int) -> None:
    """Say so, at the end of a fit, if the checkpoint that it went on from was at its end already.

    Args:
        trainer: The trainer.
        updates: Those of the checkpoint.
    """
    if trainer.global_step > updates:
        return
    limits = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
    given = [
        f"trainer.{name}={value}" for name, value in limits.items() if value not in (None, -1)
    ]
    rank_zero_info(
        f"nothing was left to train: the checkpoint is at update {updates}, the end by "
        f"{' and '.join(given) or 'the settings of the trainer'}; give a larger one to go on"
    )


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that were other ones, as `name: before -> now`.

    One that the checkpoint does not know, as one of an older version, is left out.

    >>> changed_settings({"data.root": "a", "data.pad": 2}, {"data.root": "b", "data.new": 1})
    ['data.root: a -> b', 'data.pad: 2 -> none']
    """
    return [
        f"{name}: {_short(value)} -> {_short(now.get(name, 'none'))}"
        for name, value in before.items()
        if now.get(name, "none") != value and not name.startswith(SAID_ELSEWHERE)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
