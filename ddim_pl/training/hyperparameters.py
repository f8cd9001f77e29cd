"""Constructor arguments as plain data, so that a checkpoint says how to build its module.

The form is that of a config file: an object becomes `{"class_path": ..., "init_args": {...}}`.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import nn

from ddim_pl.lightning_internals import allow_instantiator
from ddim_pl.trust import UntrustedError, trusted_class

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""What Lightning alone builds a module with from such data; `build_module` takes its place."""

BUILDER = f"{__name__}.build_module"
allow_instantiator(BUILDER)

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


def arguments_of(kind: type[Any]) -> dict[str, Any]:
    """Declared types of a constructor's arguments, those passed on to its bases included."""
    found: dict[str, Any] = {}
    for each in kind.__mro__[:-1]:
        maker = vars(each).get("__init__")
        if maker is not None:
            parameters = inspect.signature(maker).parameters
            with contextlib.suppress(NameError):  # a type that is imported for checkers only
                hints = get_type_hints(maker)
                found = {name: hints.get(name, Any) for name in parameters} | found
            if "kwargs" not in parameters:
                break
    return {name: hint for name, hint in found.items() if name not in ("self", "args", "kwargs")}


def build(value: Any, hint: Any, source: str) -> Any:
    """Make what plain data describes: the inverse of `describe`.

    Args:
        value: Plain data; objects inside are taken as they are.
        hint: The declared type. An object is made only where the type names its class or a base,
            a factory where the type is a callable that returns one.
        source: What holds the data, for the errors.

    Raises:
        UntrustedError: If a class is of no trusted package, or of another kind than declared.
    """
    if isinstance(value, list | tuple):
        kinds = [each for each in _members(hint) if get_origin(each) in (list, tuple, Sequence)]
        inner = next(iter(get_args(kinds[0])), Any) if kinds else Any
        items = [build(item, inner, source) for item in value]
        return tuple(items) if kinds and get_origin(kinds[0]) is tuple else items
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    kind: Any = trusted_class(value["class_path"], source)
    hints = arguments_of(kind)
    given = {**(value.get("init_args") or {}), **(value.get("dict_kwargs") or {})}
    arguments = {name: build(item, hints.get(name, Any), source) for name, item in given.items()}
    for each in _members(hint):
        if get_origin(each) is Callable:
            if _is_kind(kind, get_args(each)[-1]):
                return partial(kind, **arguments)
        elif _is_kind(kind, each):
            return remember(kind(**arguments), given)
    raise UntrustedError(
        f"{source} names {value['class_path']} where {hint} is declared, which is refused: the "
        "file is damaged, or of another program"
    )


def remember(made: Any, arguments: dict[str, Any]) -> Any:
    """Let a network that does not know its arguments know them, so that `describe` finds them.

    Args:
        made: Any object; returned.
        arguments: What it was made with, as plain data.
    """
    if isinstance(made, nn.Module) and not hasattr(made, "init_args"):
        made.init_args = dict(arguments)  # type: ignore[assignment]
    return made


def build_module(kind: type[Any], data: dict[str, Any]) -> Any:
    """Make a module from its hyperparameters, as Lightning calls it to read a checkpoint.

    Args:
        kind: The class that was asked to read the checkpoint.
        data: Hyperparameters with `_class_path`; objects among them override a checkpoint's.

    Raises:
        UntrustedError: As `build`.
    """
    source, path = "the checkpoint", data.get("_class_path")
    # The class that the caller names needs no trust.
    known = path in (None, f"{kind.__module__}.{kind.__qualname__}")
    found = kind if known else trusted_class(path, source)
    if not issubclass(found, kind):
        raise UntrustedError(f"{source} holds a {found.__name__}, which is no {kind.__name__}")
    hints = arguments_of(found)
    given = {name: value for name, value in data.items() if not name.startswith("_")}
    return found(**{name: build(item, hints.get(name), source) for name, item in given.items()})


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a declared type."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_kind(kind: Any, wanted: Any) -> bool:
    return any(isinstance(each, type) and issubclass(kind, each) for each in _members(wanted))
