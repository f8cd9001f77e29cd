"""Constructor arguments as plain data, so that a checkpoint says how to build its module.

The form is that of a config file: an object becomes `{"class_path": ..., "init_args": {...}}`.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""What `load_from_checkpoint` builds a module with from such data."""

CONFIG_KEY = "ddim_pl_config"
"""Key under which a checkpoint holds the resolved config of its run, as YAML."""


def filled(arguments: dict[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as they were given, and where none was, what a module has found for itself."""
    return {name: found.get(name) if value is None else value for name, value in arguments.items()}


class NotPlainError(TypeError):
    """An argument that cannot be written as plain data."""


def import_path(thing: Any) -> str:
    """Dotted path of a class or function."""
    if "<" in thing.__qualname__:
        raise NotPlainError(f"{thing.__qualname__} is not at the top level of a module")
    return f"{thing.__module__}.{thing.__qualname__}"


def describe(value: Any) -> Any:
    """Write a constructor argument as plain data.

    Dataclasses are described by their fields, other objects by their attribute `init_args` (a dict
    of the constructor's arguments, as our networks have), partials of a class by their keywords.

    Raises:
        NotPlainError: If the value is none of these.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, partial):
        if value.args:
            raise NotPlainError("a partial may hold keyword arguments only")
        return {"class_path": import_path(value.func), "init_args": describe(value.keywords)}
    if isinstance(value, type):
        return {"class_path": import_path(value)}
    if dataclasses.is_dataclass(value):
        arguments = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(getattr(value, "init_args", None), dict):
        arguments = value.init_args
    else:
        raise NotPlainError(f"{type(value).__name__} has no attribute `init_args`")
    return {"class_path": import_path(type(value)), "init_args": describe(arguments)}
