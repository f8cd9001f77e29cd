"""The commands, and what `main.py` says without one of them: it takes no import of PyTorch."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

import ddim_pl
from ddim_pl.cli_errors import parser_message

DESCRIPTIONS = {
    "fit": "Train a model, or go on with a run.",
    "validate": "Measure a checkpoint on the validation set.",
    "test": "Measure a checkpoint on the test set, and write the figures into its run.",
    "predict": "Sample images by the callbacks of a config.",
    "sample": "Draw images with a checkpoint's averaged weights: a grid, single PNGs, an NPZ.",
    "interpolate": "Sample from latents between two others, on the sphere: a row for each pair.",
    "reconstruct": "Encode images and sample them again, with more and more steps: table 2 of the "
    "DDIM paper.",
    "invert": "Find the latents from which deterministic DDIM generates given images.",
    "inpaint": "Fill the masked part of images by RePaint, several times each.",
    "forward": "Draw the noisy states of images along DDIM's forward processes, one for each eta.",
    "levels": "Search the levels at which a checkpoint's DDIM errs least, and write them as a "
    "small JSON.",
    "pairs": "Draw pairs (latent, image) with a teacher, for students that train on them.",
    "sweep": "Measure every combination of samplers, etas, levels, numbers of steps and guidance.",
    "compare": "Measure students with their own steps, and their teacher with DDIM at as many and "
    "more.",
    "export": "Write the averaged weights for others: as a checkpoint, for diffusers, or for no "
    "program.",
    "measure": "Measure the distance of two sets of images or of their statistics, without a "
    "model.",
    "stats": "Write the statistics of images' features as an NPZ file, to be measured against.",
    "import": "Turn a teacher of diffusers, of DDIM's code or of EDM's into a checkpoint for "
    "every command.",
}
"""What each command does. The parser of a command says the same, see `ddim_pl.cli`."""

ANSWERED = ("-h", "--help", "--version")


class _Overview(argparse.ArgumentParser):
    """A parser of the command's name alone; its error is one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"error: {parser_message(message)}\n")


def exit_without_command(args: Sequence[str]) -> None:
    """Exit with the list of commands, the version or an error, unless there may be a command.

    Args:
        args: The arguments. An option before the command is left to the parser of all commands.
    """
    first = next((arg for arg in args if arg != "--trust"), None)
    if first is None:
        names = ",".join(list(DESCRIPTIONS)[:5])
        reason = f'expected "subcommand" to be one of {{{names}, ...}}, but it was not provided'
        _overview().error(reason)
    if first not in DESCRIPTIONS and (first in ANSWERED or not first.startswith("-")):
        _overview().parse_args([first])


def _overview() -> argparse.ArgumentParser:
    overview = _Overview(
        description=(ddim_pl.__doc__ or "").partition("\n")[0],
        epilog="COMMAND --help lists the arguments of a command.",
    )
    overview.add_argument("--version", action="version", version=f"ddim_pl {ddim_pl.__version__}")
    commands = overview.add_subparsers(title="commands", dest="subcommand")
    for name, text in DESCRIPTIONS.items():
        commands.add_parser(name, help=text)
    return overview
