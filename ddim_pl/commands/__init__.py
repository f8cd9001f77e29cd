"""What the command line does beside Lightning's four commands: one function per file.

Each is called with a trainer, a model and its own arguments, and works on every device that the
trainer has.
"""

from ddim_pl.commands.trainer import COMMANDS, Trainer

__all__ = ["COMMANDS", "Trainer"]
