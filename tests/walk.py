"""What a package defines: found by walking it, never by a list."""

import importlib
import inspect
import pkgutil
from typing import Any

import ddim_pl


def modules() -> list[Any]:
    """Every module of the package."""
    found = pkgutil.walk_packages(ddim_pl.__path__, "ddim_pl.")
    return [importlib.import_module(each.name) for each in found]


def concrete_classes(base: type[Any]) -> list[type[Any]]:
    """Every class of this kind that a module of the package defines and that can be made."""
    return sorted(
        {
            kind
            for module in modules()
            for _, kind in inspect.getmembers(module, inspect.isclass)
            if issubclass(kind, base)
            and not inspect.isabstract(kind)
            and kind.__module__.startswith("ddim_pl.")
            and not kind.__name__.startswith("_")
        },
        key=lambda kind: kind.__name__,
    )
