"""Pickles of `torch_utils.persistence`, as in the code of [EDM], read as data.

Such a pickle holds, for each object, the source text of its class, which their reader executes.
Here the text is not looked at: an object becomes a record of its class's name and its state. Of
the names in a pickle only `ALLOWED` are known, each with a stand-in that can do nothing but hold
data.
"""

import io
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim_pl.damage import reason_of
from ddim_pl.teachers.base import FORBIDDEN

MARK = b"torch_utils.persistence"
"""Text near the beginning of each such pickle."""

HEAD = 4096
"""Bytes of a file in which the mark is looked for."""

NUMBERS = ("f8", "f4", "f2", "i8", "i4", "u1", "b1")
"""NumPy's types of numbers that may stand alone."""


class RefusedError(pickle.UnpicklingError):
    """A pickle names what it may not name."""


@dataclass
class Record:
    """An object of a pickle: the name of its class and its attributes."""

    class_name: str = ""
    state: dict[str, Any] = field(default_factory=dict)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a state that is no dict")
        self.class_name, self.state = type(self).__name__, state

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield parameters and buffers, also of the modules inside, as `state_dict` names them."""
        for kind in ("_parameters", "_buffers"):
            for name, value in _items(self.state.get(kind)):
                if isinstance(value, Tensor):
                    yield f"{prefix}{name}", value.detach()
        for name, module in _items(self.state.get("_modules")):
            if isinstance(module, Record):
                yield from module.tensors(f"{prefix}{name}.")

    def module(self, name: str) -> "Record | None":
        """The module of this name inside."""
        found = dict(_items(self.state.get("_modules"))).get(name)
        return found if isinstance(found, Record) else None


class ModuleDict(Record):
    """Stand-in for PyTorch's."""


class _Type:
    """Stand-in for a NumPy dtype of numbers."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in NUMBERS:
            raise RefusedError(f"numpy.dtype({code!r})")
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"


def is_persistence(path: Path) -> bool:
    """Whether a file begins as such a pickle does."""
    with path.open("rb") as file:
        return MARK in file.read(HEAD)


def read_persistence(path: Path) -> Any:
    """What such a pickle holds; no code in it is run.

    Args:
        path: The file.

    Raises:
        ValueError: If it names what is not in `ALLOWED`, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file).load()
    except RefusedError as error:
        raise ValueError(
            f"source {str(path)!r} names {error}, which is refused: a pickle of EDM may hold "
            "tensors, plain data and records of its networks"
        ) from None
    except Exception as error:  # the bytes may say anything
        raise ValueError(
            f"source must be a pickle of EDM, got {str(path)!r}, which cannot be read as one "
            f"({reason_of(error)}): it is damaged, or of another program"
        ) from None


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BufferedReader) -> None:
        super().__init__(file)
        # Made anew for each file: what a pickle does to a stand-in is gone with it.
        self._known = {name: make() for name, make in ALLOWED.items()}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name."""
        path = f"{module}.{name}"
        if path not in self._known:
            raise RefusedError(path)
        return self._known[path]


def _items(values: Any) -> list[tuple[str, Any]]:
    return [*values.items()] if isinstance(values, dict) else []


def _record(meta: Any) -> Record:
    """An object of a persistent class."""
    if not (isinstance(meta, dict) and isinstance(meta.get("state"), dict)):
        raise pickle.UnpicklingError("an object without a state")
    return Record(str(meta.get("class_name")), meta["state"])


def _storage(content: Any) -> Any:
    """The numbers of a tensor, which are a file of `torch.save` within the pickle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their form is of before
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(FORBIDDEN, str(error))
            raise RefusedError(found[1]) if found else error from None


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    # PyTorch would make the storage larger, and what is in memory there would be weights.
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    there = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= there):
        raise pickle.UnpicklingError("a tensor beyond its numbers")
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _number(kind: Any, content: Any) -> Any:
    """A number of NumPy's as Python's."""
    if not (isinstance(kind, _Type) and isinstance(content, bytes)):
        raise pickle.UnpicklingError("a number without its bytes")
    return np.frombuffer(content, np.dtype(kind.order + kind.code)).item()


def _stand_in(kind: type[Any]) -> Callable[[], Any]:
    """A new class each time, of this kind and name."""
    return lambda: type(kind.__name__, (kind,), {})


def _function(function: Callable[..., Any]) -> Callable[[], Any]:
    """A new function each time."""
    return lambda: lambda *arguments: function(*arguments)


ALLOWED: dict[str, Callable[[], Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _function(_record),
    "dnnlib.util.EasyDict": lambda: dict,
    "collections.OrderedDict": lambda: OrderedDict,
    "builtins.set": lambda: set,
    "torch.nn.modules.container.ModuleDict": _stand_in(ModuleDict),
    "torch._utils._rebuild_parameter": _function(lambda data, *_: data),
    "torch._utils._rebuild_tensor_v2": _function(_tensor),
    "torch.storage._load_from_bytes": _function(_storage),
    "numpy.dtype": _stand_in(_Type),
    "numpy.core.multiarray.scalar": _function(_number),
    "numpy._core.multiarray.scalar": _function(_number),
}
"""What a pickle may name, and what makes the stand-in for it."""
