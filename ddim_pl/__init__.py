"""Train diffusion teachers, sample them, and distil them into few-step students.

The public names are those of `__init__.pyi`. Each is imported when it is first used, so that
`import ddim_pl` takes no time.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

from ddim_pl.renamed import register_old_modules

__version__ = "0.1.0"

_HOMES = {
    name.name: statement.module
    for statement in ast.parse(Path(__file__).with_suffix(".pyi").read_text()).body
    if isinstance(statement, ast.ImportFrom)
    for name in statement.names
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ddim_pl' has no attribute {name!r}: see dir(ddim_pl)")
    value = getattr(importlib.import_module(str(_HOMES[name])), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_old_modules()
