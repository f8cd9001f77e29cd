"""Old paths of what was moved or renamed, so that earlier checkpoints and configs still load."""

import importlib
import sys
from types import ModuleType
from typing import Any

RENAMED = {
    "ddim_pl.samplers.DDPM": "ddim_pl.samplers.Ancestral",
    "ddim_pl.samplers.ddpm.DDPM": "ddim_pl.samplers.Ancestral",
}


class _OldModule(ModuleType):
    """A removed module; its attributes are what took the place of its names."""

    def __getattr__(self, name: str) -> Any:
        return successor(self.__name__, name)


def successor(module: str, name: str) -> Any:
    """What took the place of `module.name`.

    Raises:
        AttributeError: If nothing did.
    """
    path = RENAMED.get(f"{module}.{name}")
    if path is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home, _, new_name = path.rpartition(".")
    return getattr(importlib.import_module(home), new_name)


def register_old_modules() -> None:
    """Make removed modules importable, without importing anything now."""
    for path in RENAMED:
        module = path.rpartition(".")[0]
        if module not in ("ddim_pl.samplers",):
            sys.modules.setdefault(module, _OldModule(module))
