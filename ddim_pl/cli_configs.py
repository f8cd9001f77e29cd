"""The configs that a command line names, as they are before anything is parsed.

Later ones win over earlier ones. jsonargparse merges them. This module adds what it cannot do:
merge callbacks of one class, and find the checkpoint whose config is the base.
"""

import argparse
import importlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from ddim_pl.cli_errors import parser_message
from ddim_pl.lightning_internals import FILE_LOGGERS
from ddim_pl.runs import run_of, version_of
from ddim_pl.shipped import CONFIGS

DEFAULTS = CONFIGS / "default.yaml"
"""What the experiments share; Lightning's commands read it before any other config."""

TABLE = "lightning.pytorch.loggers.CSVLogger"


class _Strict(ArgumentParser):
    """Takes whole names of options alone, and reports an error in one line."""

    variables: Sequence[str] = ()
    """Environment variables that set options of this command, for the errors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make a parser that takes no beginning of a name for the name, as argparse would."""
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    not_in_help: Sequence[argparse.Action] = ()
    """Arguments that the help leaves out, though the parser knows them."""

    def format_help(self, *args: Any) -> str:
        """The help, without what it leaves out."""
        texts = [action.help for action in self.not_in_help]
        for action in self.not_in_help:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help(*args)
        finally:
            for action, text in zip(self.not_in_help, texts, strict=True):
                action.help = text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with status 2; a nested parser raises, as in jsonargparse."""
        if not self.exit_on_error:
            super().error(message, ex)
        # internal: jsonargparse 4 has no public place for the annotations of arguments.
        types = {each.dest: getattr(each, "_typehint", None) for each in self._actions}
        hidden = {id(action) for action in self.not_in_help}
        shown = [each for each in self._actions if id(each) not in hidden]
        known = [name for each in shown for name in each.option_strings]
        line = parser_message(message, types, known)
        named = [each for each in self.variables if each.lower().rpartition("__")[2] in line]
        source = f" (set by {', '.join(named)})" if named else ""
        self.exit(2, f"error: {line}{source}\n")


class CommandParser(_Strict, LightningArgumentParser):
    """Parses the arguments of a command, and prints a config as it will be used."""

    callback_lists: Sequence[int] = ()
    """Lengths of the lists that the callbacks come from, see `merge_repeated`."""

    def _parse_common(self, cfg: Namespace, *args: Any, **kwargs: Any) -> Namespace:
        """Merge repeated callbacks before jsonargparse fills in their default arguments."""
        # internal: jsonargparse 4 has no public hook before it fills in defaults.
        callbacks = cfg.get("trainer.callbacks")
        if callbacks is not None and not isinstance(callbacks, list):
            # The Trainer takes a single one; whoever reads a config finds a list.
            cfg["trainer.callbacks"] = callbacks = [callbacks]
        # A part of them, or what is merged already, has another length.
        if isinstance(callbacks, list) and len(callbacks) == sum(self.callback_lists):
            cfg["trainer.callbacks"] = merge_repeated(callbacks, self.callback_lists)
            self.callback_lists = ()
        return super()._parse_common(cfg, *args, **kwargs)


class AloneParser(_Strict):
    """Parses the arguments of a function alone."""


@dataclass
class Given:
    """What a command line gives.

    Args:
        command: The command, or None if the first argument is none.
        configs: Contents of the configs, in their order; empty for one that cannot be read.
        checkpoint: The last `ckpt_path`, be it an argument or an entry of a config.
        shows_only: Whether the arguments want a help or a config printed.
        named_paths: Dotted paths of what the arguments and configs name.
        of_model: Names of the arguments of the model that they give.
        named: Names of the options on the command line, without its configs'.
    """

    command: str | None
    configs: list[dict[str, Any]]
    checkpoint: str | None
    shows_only: bool
    named_paths: set[str]
    of_model: set[str] = field(default_factory=set)
    named: list[str] = field(default_factory=list)

    @classmethod
    def by(cls, args: Sequence[str], commands: Collection[str]) -> "Given":
        """Read what these arguments give."""
        command = args[0] if args and args[0] in commands else None
        given = cls(command, [], None, any(map(_shows_only, args)), set())
        for name, value in options(args):
            given.of_model |= _arguments_of_model(name, value)
            given.named += _named(name, value)
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
    return with_homes(config) if isinstance(config, dict) else {}


def with_homes(value: Any) -> Any:
    """A value of a config, or an argument, in which `~/` at the beginning of a path is the home.

    A shell leaves it as it is behind an equals sign, and YAML everywhere.

    >>> with_homes({"a": ["b~/", 1]})
    {'a': ['b~/', 1]}
    """
    if isinstance(value, str):
        option = re.match(r"(-[\w.+-]+=)?", value)
        begin = option.end() if option else 0
        path = value[begin:]
        return value[:begin] + str(Path(path).expanduser()) if path.startswith("~/") else value
    if isinstance(value, dict):
        return {key: with_homes(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_homes(item) for item in value]
    if isinstance(value, Namespace):
        return Namespace(**{key: with_homes(item) for key, item in vars(value).items()})
    return value


def dotted_paths(value: Any) -> set[str]:
    """Everything in arguments or in a config that names something to import, and no file."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return set().union(*map(dotted_paths, value))
    parts = value.split(".") if isinstance(value, str) else []
    named = len(parts) > 1 and all(map(str.isidentifier, parts)) and not Path(value).exists()
    return {value} if named else set()


def callback_lists(base: dict[str, Any], args: Sequence[str]) -> list[int]:
    """Lengths of the lists of callbacks that a command line joins, in their order.

    `callbacks:` begins anew, `callbacks+:` adds a list; the same of arguments.

    Args:
        base: The config below those of the command line; empty if there is none.
        args: The arguments.
    """
    found: list[int] = []
    given = [base]
    for name, value in options(args):
        if name in ("-c", "--config"):
            given.append(read_config(value))
        elif name in ("--trainer.callbacks", "--trainer.callbacks+"):
            key = name.removeprefix("--trainer.")
            given.append(read_config(f"trainer: {{{key}: {value}}}"))
    for config in given:
        trainer = config.get("trainer")
        for key, value in (trainer if isinstance(trainer, dict) else {}).items():
            if key in ("callbacks", "callbacks+") and value is not None:
                length = len(value) if isinstance(value, list) else 1
                found = [*(found if key.endswith("+") else ()), length]
    return found


def merge_repeated(callbacks: Sequence[Any], lists: Sequence[int]) -> list[Any]:
    """Merge callbacks of one class: a later list overrides arguments of what stands before it.

    Callbacks of one list are not merged with each other: a class may stand in it twice.

    Args:
        callbacks: Callbacks as given, without their default arguments.
        lists: Lengths of the lists that they come from, one after the other.
    """
    rest, merged = list(callbacks), list[Any]()
    for length in lists:
        added, rest = rest[:length], rest[length:]
        free = list(range(len(merged)))
        for callback in added:
            same = [i for i in free if _kind(merged[i]) == _kind(callback)]
            if not same:
                merged.append(callback)
                continue
            free.remove(same[0])
            merged[same[0]] = _changed(merged[same[0]], callback)
    return merged


def _changed(callback: Any, by: Any) -> Any:
    """A callback with the arguments that another one has."""
    changed = callback.clone()
    for place in ("init_args", "dict_kwargs"):
        for name, value in vars(by.get(place) or Namespace()).items():
            changed[f"{place}.{name}"] = value
    return changed


def _kind(callback: Any) -> Any:
    """The class of a callback, which may be known by several paths."""
    module, _, name = callback["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def loggers_of(config: Namespace) -> list[Namespace]:
    """The loggers of a command's arguments; `true` and `false` name none."""
    given = config.trainer.get("logger")
    loggers = given if isinstance(given, list) else [given]
    return [each for each in loggers if isinstance(each, Namespace) and "class_path" in each]


def logger_name(logger: Namespace) -> str:
    """The class of a logger, without its module."""
    return str(logger.class_path).rpartition(".")[2]


def writes_folder(logger: Namespace) -> bool:
    """Whether a logger writes into a run's folder `<save_dir>/<name>/version_N`."""
    return logger_name(logger) in {kind.__name__ for kind in FILE_LOGGERS}


def with_folder(loggers: Sequence[Namespace]) -> list[Namespace]:
    """Loggers, the first of which has a folder for the run: Lightning asks that one.

    Where none has, a CSVLogger is put first, whose experiment is named as that of the next one.
    """
    ordered = sorted(loggers, key=lambda each: not writes_folder(each))
    if not ordered or writes_folder(ordered[0]):
        return ordered
    settings = ordered[0].get("init_args") or Namespace()
    names = (settings.get(key) for key in ("project", "experiment_name", "name"))
    arguments = Namespace(save_dir="runs", name=next(filter(None, names), "lightning_logs"))
    return [Namespace(class_path=TABLE, init_args=arguments), *ordered]


def log_into_run(logger: Namespace, checkpoint: Path, *, fits: bool) -> None:
    """Let a logger write into a checkpoint's run; a fit from another's begins a new one.

    Args:
        logger: Its arguments, which are changed.
        checkpoint: The checkpoint.
        fits: Whether the command is fit.
    """
    found = version_of(checkpoint)
    if fits:
        root = Path(logger.get("save_dir", "runs"), logger.get("name") or "")
        if found is not None and root.absolute() == found[0]:
            logger["version"] = found[1]
        return
    run = run_of(checkpoint)
    folder, version = found or (run, "")
    logger["save_dir"], logger["name"] = str(folder.parent), folder.name
    logger["version"] = version


def options(args: Sequence[str]) -> list[tuple[str, str]]:
    """Names and values of arguments, `--name=value` and `--name value`."""
    pairs = []
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        pairs.append((name, value if equals else next(iter(args[place + 1 :]), "")))
    return [pair for pair in pairs if pair[0].startswith("-")]


def classes_first(args: Sequence[str]) -> list[str]:
    """Name each class in front of the options below it that stand before it.

    jsonargparse applies arguments in their order, and drops without a word those of a class that
    a later one replaces: of `--model.sampler.eta 0.5 --model.sampler DPMSolverPP` nothing would
    say that the sampler has no `eta`. A mapping stays where it is, and its class is named in front
    too, so that a later value still wins. Nothing passes a config, which may change the class. A
    list that grows, `--trainer.callbacks+=`, stays in its place: what stands before it belongs to
    the entry before.

    Args:
        args: The arguments.
    """
    ordered, begin = list[tuple[str, list[str]]](), 0
    for group in _groups(args):
        name, equals, value = group[0].partition("=")
        key = name.replace(".init_args", "").removesuffix(".class_path")
        below = (i for i in range(begin, len(ordered)) if ordered[i][0].startswith(f"{key}."))
        place = next(below, len(ordered))
        value = value if equals else "".join(group[1:2])
        mapping = read_config(value) if place < len(ordered) else {}
        if mapping:
            ordered.append((key, group))
            group = [f"{name}={mapping['class_path']}"] if "class_path" in mapping else []
        ordered.insert(place, (key, group))
        if name in ("-c", "--config"):
            begin = len(ordered)
    return [arg for _, group in ordered for arg in group]


def _groups(args: Sequence[str]) -> list[list[str]]:
    """Each option with its values; a negative number is a value."""
    groups: list[list[str]] = []
    for arg in args:
        if not groups or re.match(r"--?[A-Za-z]", arg):
            groups.append([])
        groups[-1].append(arg)
    return groups


def _named(option: str, value: str) -> list[str]:
    """What an option names: itself, or each entry of the mapping that it gives."""
    name = option.removeprefix("--").replace(".init_args", "")
    is_mapping = name in ("trainer", "model") and (value.startswith("{") or ": " in value)
    entries = read_config(value) if is_mapping else {}
    arguments = entries.pop("init_args", None)
    entries |= arguments if isinstance(arguments, dict) else {}
    return [f"{name}.{entry}" for entry in entries if entry != "class_path"] or [name]


def _arguments_of_model(option: str, value: str) -> set[str]:
    """Names of the arguments of the model that an option, or the config it names, gives."""
    if option.startswith("--model."):
        return {option.removeprefix("--model.").removeprefix("init_args.").partition(".")[0]}
    if option not in ("-c", "--config", "--model"):
        return set()
    config = read_config(value)
    model = config if option == "--model" else config.get("model")
    arguments = model.get("init_args") if isinstance(model, dict) else None
    return {*(model if isinstance(model, dict) else ()), *(arguments or ())}


def _shows_only(arg: str) -> bool:
    name = arg.partition("=")[0]
    return name in ("-h", "--help", "--print_config") or name.endswith(".help")
