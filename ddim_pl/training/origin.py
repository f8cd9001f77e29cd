"""Where the weights of a checkpoint come from, as plain data that the checkpoint holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Origin = tuple[dict[str, Any], ...]
"""The oldest first: an import, and each distillation. "by" says which."""

KEY = "ddim_pl_origin"
"""Where a checkpoint holds it."""

MOST, LONGEST = 20, 200


def read_origin(checkpoint: Mapping[str, Any]) -> Origin:
    """The origin that a checkpoint holds, as far as it has the form of one.

    The checkpoint may be a stranger's: texts are cut, of paths the names stay, and all else but
    numbers, texts and short lists of them is left out.
    """
    found = checkpoint.get(KEY)
    entries = found[:MOST] if isinstance(found, list) else []
    plain = [_entry(each) for each in entries if isinstance(each, dict)]
    return tuple(each for each in plain if isinstance(each.get("by"), str))


def _entry(given: dict[Any, Any]) -> dict[str, Any]:
    items = [(name, _plain(value)) for name, value in [*given.items()][:MOST]]
    return {name: value for name, value in items if isinstance(name, str) and name.isidentifier()}


def _plain(value: Any, depth: int = 2) -> Any:
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        text = " ".join(value.split())[:LONGEST]
        is_place = text.startswith("~") or Path(text).is_absolute()
        return Path(text).name if is_place else text
    if isinstance(value, list) and depth:
        return [_plain(each, depth - 1) for each in value[:MOST]]
    return None
