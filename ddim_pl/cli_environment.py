"""Options of the command line that environment variables set.

`DDIM_PL_FIT__TRAINER__MAX_STEPS=10` is `--trainer.max_steps=10` of `fit`: the command, then the
option, with two underscores where it has a dot, all in capitals. An option of any depth may be
set, such as `DDIM_PL_FIT__MODEL__NETWORK__CHANNELS`. These variables win over configs, and the
command line wins over them. The variables of jsonargparse (`default_env`) would be below the
configs, where most options are set, and know no arguments of classes.
"""

import difflib
from collections.abc import Mapping, Sequence

from ddim_pl.cli_commands import DESCRIPTIONS

PREFIX = "DDIM_PL_"

OTHERS = (
    "DDIM_PL_CACHE",
    "DDIM_PL_CIFAR10_FOLDER",
    "DDIM_PL_FAULT_EVENTS",
    "DDIM_PL_FUZZ",
    "DDIM_PL_TRACEBACK",
    "DDIM_PL_TRUSTED_MODULES",
)
"""Variables of this project that set no option; those of tests and benchmarks too."""


def with_environment(args: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Arguments with the options that variables of their command set.

    They stand behind the last config, and one that the arguments give themselves is left out.

    Args:
        args: The arguments.
        environment: Variables by name; those of other commands are left alone.

    Raises:
        ValueError: If one of our prefix sets nothing.
    """
    place = next((i for i, arg in enumerate(args) if arg in DESCRIPTIONS), None)
    found = options_by(environment, command=None if place is None else args[place])
    if place is None:
        return list(args)
    given = {arg.partition("=")[0].replace(".init_args", "") for arg in args[place + 1 :]}
    configs = [f"{name}={value}" for name, value in found.items() if name == "--config"]
    added = [
        f"{name}={value}"
        for name, value in found.items()
        if name != "--config" and name.replace(".init_args", "") not in given
    ]
    behind = place + 1
    for i, arg in enumerate(args[place + 1 :], start=place + 1):
        name, equals, _ = arg.partition("=")
        if name in ("-c", "--config"):
            behind = i + (1 if equals else 2)
    return [*args[: place + 1], *configs, *args[place + 1 : behind], *added, *args[behind:]]


def options_by(environment: Mapping[str, str], *, command: str | None) -> dict[str, str]:
    """The options of a command that variables set, by name.

    Raises:
        ValueError: If one of our prefix sets nothing.
    """
    found = {}
    for name, value in sorted(environment.items()):
        if not name.startswith(PREFIX) or name in OTHERS:
            continue
        owner, _, option = name.removeprefix(PREFIX).partition("__")
        if owner.lower() not in DESCRIPTIONS or not option or name != name.upper():
            raise ValueError(_sets_nothing(name, command))
        if owner.lower() == command:
            found[f"--{option.lower().replace('__', '.')}"] = value
    return found


def variable_of(option: str, command: str) -> str:
    """The variable that sets an option, such as "trainer.max_steps", of a command."""
    return f"{PREFIX}{command}__{option.replace('.', '__')}".upper()


def _sets_nothing(name: str, command: str | None) -> str:
    command = command or "fit"
    head, _, option = name.removeprefix(PREFIX).partition("__")
    owner = difflib.get_close_matches(head.lower(), DESCRIPTIONS, n=1, cutoff=0.75)
    other = difflib.get_close_matches(name, OTHERS, n=1)
    if option:  # the command is wrong, or left out
        known = (
            variable_of(option, owner[0]) if owner else variable_of(f"{head}.{option}", command)
        )
        hint = f"did you mean {known}?"
    elif other and "__" not in name:
        hint = f"did you mean {other[0]}?"
    else:
        hint = f"an option is spelled as in {variable_of('trainer.max_steps', command)}"
    return f"the environment variable {name} must set an option, but sets none: {hint}"
