"""The configs that a command line names, as they are before anything is parsed.

Later ones win over earlier ones. jsonargparse merges them. This module adds what it cannot do:
merge callbacks of one class, and find the checkpoint whose config is the base.
"""

import importlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from ddim_pl.cli_errors import parser_message

DEFAULTS = Path(__file__).parents[1] / "configs" / "default.yaml"
"""What the experiments share; Lightning's commands read it before any other config."""


class CommandParser(LightningArgumentParser):
    """Reports an error in one line, and prints a config as it will be used."""

    listed_callbacks = 0
    """How many callbacks come from one `callbacks:` list, see `merge_repeated`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with status 2; a nested parser raises, as in jsonargparse."""
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"error: {parser_message(message)}\n")

    def _parse_common(self, cfg: Namespace, *args: Any, **kwargs: Any) -> Namespace:
        """Merge repeated callbacks before jsonargparse fills in their default arguments."""
        # internal: jsonargparse 4 has no public hook before it fills in defaults.
        callbacks = cfg.get("trainer.callbacks")
        if isinstance(callbacks, list):
            cfg["trainer.callbacks"] = merge_repeated(callbacks, self.listed_callbacks)
        return super()._parse_common(cfg, *args, **kwargs)


@dataclass
class Given:
    """What a command line gives.

    Args:
        command: The command, or None if the first argument is none.
        configs: Contents of the configs, in their order; empty for one that cannot be read.
        checkpoint: The last `ckpt_path`, be it an argument or an entry of a config.
        shows_only: Whether the arguments want a help or a config printed.
        named_paths: Dotted paths of what the arguments and configs name.
    """

    command: str | None
    configs: list[dict[str, Any]]
    checkpoint: str | None
    shows_only: bool
    named_paths: set[str]

    @classmethod
    def by(cls, args: Sequence[str], commands: Collection[str]) -> "Given":
        """Read what these arguments give."""
        command = args[0] if args and args[0] in commands else None
        given = cls(command, [], None, any(map(_shows_only, args)), set())
        for name, value in options(args):
            if name != "--ckpt_path":
                given.named_paths |= dotted_paths([value, read_config(value)])
            if name in ("-c", "--config"):
                config = read_config(value)
                given.configs.append(config)
                given.checkpoint = config.get("ckpt_path") or given.checkpoint
            elif name == "--ckpt_path":
                given.checkpoint = value
        return given

    @property
    def names_model(self) -> bool:
        """Whether a config says which model, so that none is taken from a checkpoint."""
        return any(config.get("model") for config in self.configs)


def read_config(source: str | Path) -> dict[str, Any]:
    """The content of a config, a file or YAML; empty if invalid: the parser will say so."""
    try:
        text = Path(source).read_text()
    except (OSError, ValueError):
        text = str(source)
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def dotted_paths(value: Any) -> set[str]:
    """Everything in arguments or in a config that names something to import, and no file."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return set().union(*map(dotted_paths, value))
    parts = value.split(".") if isinstance(value, str) else []
    named = len(parts) > 1 and all(map(str.isidentifier, parts)) and not Path(value).exists()
    return {value} if named else set()


def count_listed(configs: Sequence[dict[str, Any]], args: Sequence[str]) -> int:
    """Length of the last list of callbacks that a config gives as a whole, by `callbacks:`.

    0 if `--trainer.callbacks` is on the command line: then every callback may be merged.
    """
    if any(name == "--trainer.callbacks" for name, _ in options(args)):
        return 0
    for config in reversed(configs):
        trainer = config.get("trainer")
        if isinstance(trainer, dict) and "callbacks" in trainer:
            callbacks = trainer["callbacks"]
            return len(callbacks) if isinstance(callbacks, list) else int(callbacks is not None)
    return 0


def merge_repeated(callbacks: Sequence[Any], listed: int) -> list[Any]:
    """Merge callbacks of one class: a later one overrides arguments of the one before it.

    Args:
        callbacks: Callbacks as given, without their default arguments.
        listed: How many of them, from the first on, come from one list, which may repeat a class.
            The rest were added with `callbacks+`.
    """
    merged: list[Any] = []
    for number, callback in enumerate(callbacks):
        same = [i for i, other in enumerate(merged) if _kind(other) == _kind(callback)]
        if number < listed or not same:
            merged.append(callback)
            continue
        changed = merged[same[-1]].clone()
        for name, value in vars(callback.get("init_args", Namespace())).items():
            changed[f"init_args.{name}"] = value
        merged[same[-1]] = changed
    return merged


def _kind(callback: Any) -> Any:
    """The class of a callback, which may be known by several paths."""
    module, _, name = callback["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def options(args: Sequence[str]) -> list[tuple[str, str]]:
    """Names and values of arguments, `--name=value` and `--name value`."""
    pairs = []
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        pairs.append((name, value if equals else next(iter(args[place + 1 :]), "")))
    return [pair for pair in pairs if pair[0].startswith("-")]


def _shows_only(arg: str) -> bool:
    name = arg.partition("=")[0]
    return name in ("-h", "--help", "--print_config") or name.endswith(".help")
