"""What the command line does beside Lightning's four verbs: one function per file.

Each is called with a trainer, a model and its own arguments, and works on every device that the
trainer has.
"""

from ddim_pl.verbs.trainer import VERBS, Trainer

__all__ = ["VERBS", "Trainer"]
