"""What the command line does beside Lightning's four commands: one function per file.

Each of `COMMANDS` is called with a trainer, a model and its own arguments, and works on every
device that the trainer has; each of `ALONE` with its own arguments only.
"""

from collections.abc import Callable

from ddim_pl.commands.import_ import import_teacher
from ddim_pl.commands.measure import measure
from ddim_pl.commands.stats import stats
from ddim_pl.commands.trainer import COMMANDS, Trainer

ALONE: dict[str, Callable[..., None]] = {
    "measure": measure,
    "stats": stats,
    "import": import_teacher,
}
"""Commands without a trainer and a model, by name."""

__all__ = ["ALONE", "COMMANDS", "Trainer"]
