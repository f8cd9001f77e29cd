"""Lightning's trainer with the commands as methods, which is where its command line looks."""

import lightning as L

from ddim_pl.commands.compare import compare
from ddim_pl.commands.export import export
from ddim_pl.commands.forward import forward
from ddim_pl.commands.inpaint import inpaint
from ddim_pl.commands.interpolate import interpolate
from ddim_pl.commands.invert import invert
from ddim_pl.commands.levels import levels
from ddim_pl.commands.pairs import pairs
from ddim_pl.commands.reconstruct import reconstruct
from ddim_pl.commands.sample import sample
from ddim_pl.commands.sweep import sweep


class Trainer(L.Trainer):
    """Lightning's trainer with the commands of this package."""

    sample = sample
    interpolate = interpolate
    reconstruct = reconstruct
    invert = invert
    inpaint = inpaint
    forward = forward
    levels = levels
    pairs = pairs
    sweep = sweep
    compare = compare
    export = export


COMMANDS = tuple(name for name in vars(Trainer) if not name.startswith("_"))
"""Names of the commands."""
