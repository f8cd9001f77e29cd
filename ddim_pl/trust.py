"""What a checkpoint may name: a file from a stranger must not run code.

Tensors are read with `weights_only=True`. But a checkpoint also says of which classes its model,
data and trainer are built. Only classes of the packages below are, and only as arguments that are
declared as such; everything else in a checkpoint is plain data.
"""

import copy
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import _common, set_parsing_settings
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

PACKAGES = (
    "ddim_pl",
    "callbacks",
    "torch.nn",
    "torch.optim",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.loggers.tensorboard",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.csv_logs",
    "lightning.pytorch.strategies",
)
"""Packages, modules and classes that a checkpoint may name.

Not torchmetrics, whose networks read files of weights as pickles and download them; nor loggers
that send what they log to others.
"""

ENVIRONMENT = "DDIM_PL_TRUSTED_MODULES"
"""Environment variable with more of them, separated by commas; `*` trusts everything."""


LOGGER = "lightning.pytorch.loggers.TensorBoardLogger"

SENDERS = tuple(
    f"lightning.pytorch.loggers.{name}"
    for name in ("WandbLogger", "wandb.WandbLogger", "MLFlowLogger", "mlflow.MLFlowLogger")
)
"""Loggers that send what they log to others, to where a checkpoint says."""

FILE_NAME = r"[\w=.-]*(\{[A-Za-z_]\w*(/\w+)*(:[\d.]*[dfg]?)?\}[\w=.-]*)*"
"""Names of checkpoint files: of letters and numbers, which format to no path that leads out."""


DEEPEST_TEXT = 4
"""Texts within texts that are looked into; what lies deeper is refused."""


class UntrustedError(ValueError):
    """A checkpoint names something that it may not name."""


def trusted_packages() -> tuple[str, ...]:
    """Packages whose classes may be named: `PACKAGES`, and those that the user trusts."""
    named = os.environ.get(ENVIRONMENT, "").split(",")
    return (*PACKAGES, *filter(None, (name.strip() for name in named)))


@contextmanager
def trusting(*packages: str) -> Iterator[None]:
    """Trust these packages too, `*` for everything, here and in child processes."""
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = ",".join([*packages, before or ""])
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT)
        if before is not None:
            os.environ[ENVIRONMENT] = before


def is_trusted(path: str) -> bool:
    """Whether a dotted path lies in a trusted package."""
    return any(
        package == "*" or f"{path}.".startswith(f"{package}.") for package in trusted_packages()
    )


def trusted_class(path: Any, source: str) -> type[Any]:
    """The class of this name.

    Args:
        path: Its dotted path, as a checkpoint says it.
        source: What names it, for the error.

    Raises:
        UntrustedError: If it is no class of a trusted package; nothing is imported then.
    """
    module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    if not module or not is_trusted(path):
        raise UntrustedError(_refusal(source, path))
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UntrustedError(f"{source} names {path}, which cannot be imported: {error}") from None
    # A trusted module may import others, and has their names too.
    if not isinstance(kind, type) or not is_trusted(f"{kind.__module__}.{kind.__qualname__}"):
        raise UntrustedError(_refusal(source, path))
    return kind


def check_classes(value: Any, source: str) -> None:
    """Check every class that plain data names.

    Args:
        value: A config or hyperparameters, as a checkpoint holds them.
        source: What holds them, for the error.

    Raises:
        UntrustedError: If one is of no trusted package, or is hidden in a text.
    """
    if isinstance(value, dict):
        if "class_path" in value:
            trusted_class(value["class_path"], source)
        for item in value.values():
            check_classes(item, source)
    elif isinstance(value, list | tuple):
        for item in value:
            check_classes(item, source)
    elif isinstance(value, str) and "class_path" in value:
        raise UntrustedError(f"{source} names classes inside a text, which is refused: {value!r}")


def check_form(config: Any, source: str) -> None:
    """Check that a config is in the one form in which everything in it is seen.

    That is the form that a fit stores: sections and arguments under plain names, and no objects
    inside texts, which jsonargparse would read as YAML.

    Args:
        config: `trainer`, `model`, `data` and the seed.
        source: What holds them, for the error.

    Raises:
        UntrustedError: If it is in another form.
    """
    for name in ("trainer", "model", "data"):
        if not isinstance(config.get(name, {}), dict):
            raise UntrustedError(
                f"{source} holds a config whose {name} is no mapping, got {config[name]!r}: the "
                "file is damaged, or of another program"
            )
    _check_names(config, source)


def _check_names(value: Any, source: str) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            if not (isinstance(name, str) and name.isidentifier()):
                raise UntrustedError(
                    f"{source} names an argument {name!r} in its config, which is refused: the "
                    "file is damaged, or of another program"
                )
            _check_names(item, source)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_names(item, source)
    elif isinstance(value, str) and _names_class(value):
        raise UntrustedError(f"{source} names classes inside a text, which is refused: {value!r}")


def _names_class(value: Any, depth: int = 0) -> bool:
    """Whether plain data, or YAML inside a text of it, describes an object."""
    if isinstance(value, dict):
        names = {str(name).partition(".")[0] for name in value}
        return bool(names & {"class_path", "init_args"}) or _names_class([*value.values()], depth)
    if isinstance(value, list | tuple):
        return any(_names_class(item, depth) for item in value)
    if not isinstance(value, str) or depth > DEEPEST_TEXT:
        return isinstance(value, str)
    try:
        inner = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return "class_path" in value
    return inner != value and _names_class(inner, depth + 1)


def without_senders(config: dict[str, Any], checkpoint: str, command: str) -> dict[str, Any]:
    """A checkpoint's config without loggers that send, but those that the user trusts.

    Args:
        config: With its `trainer`, as plain data.
        checkpoint: Its file, for the message.
        command: The command that reads it; `fit`, `validate` and `test` log.
    """
    trainer = config.get("trainer")
    given = trainer.get("logger") if isinstance(trainer, dict) else None
    loggers = given if isinstance(given, list) else [given]
    senders = [
        each["class_path"]
        for each in loggers
        if isinstance(each, dict)
        and each.get("class_path") in SENDERS
        and not is_trusted(each["class_path"])
    ]
    if not senders:
        return config
    assert isinstance(trainer, dict)
    kept = [e for e in loggers if not (isinstance(e, dict) and e.get("class_path") in senders)]
    if command in ("fit", "validate", "test"):
        names = ", ".join(each.rpartition(".")[2] for each in senders)
        rank_zero_info(
            f"{checkpoint} names {names}, which is left out, as it sends what it logs: give the "
            "config of the run, as --config FILE, or trust the checkpoint with --trust"
        )
    return {**config, "trainer": {**trainer, "logger": kept}}


def without_places(config: dict[str, Any], checkpoint: str, command: str) -> dict[str, Any]:
    """A checkpoint's config without what would decide where files are written.

    Loggers write below `runs`, unless the checkpoint lies in a run; checkpoints go into the run;
    nothing is downloaded into a folder that only the checkpoint names; pairs are made, and images
    kept decoded, below `runs` alone.

    Args:
        config: Its `trainer`, `model` and `data`, as plain data.
        checkpoint: Its file, for the errors.
        command: The command that reads it; only `fit` makes pairs.

    Raises:
        UntrustedError: If the name of an experiment leads out of its folder, or a fit would make
            pairs elsewhere than below `runs`.
    """
    if is_trusted("*"):
        return config
    config = copy.deepcopy(config)
    trainer, data = config.setdefault("trainer", {}), config.get("data") or {}
    for name in ("default_root_dir", "model_registry"):
        trainer.pop(name, None)
    if not _each(trainer.get("logger")):  # none, or Lightning's own choice
        trainer["logger"] = {"class_path": LOGGER, "init_args": {"save_dir": "runs"}}
    for logger in _each(trainer.get("logger")):
        arguments = logger.get("init_args") or {}
        for key in ("name", "sub_dir", "version"):
            if not stays_inside(arguments.get(key)):
                raise UntrustedError(
                    f"{checkpoint} names the {key} {arguments[key]!r}, which leads out of the "
                    "folder of runs: give --trainer.logger, or trust the file with --trust"
                )
        arguments.pop("filename_suffix", None)
        logger["init_args"] = arguments | {"save_dir": "runs"}
    for callback in _each(trainer.get("callbacks")):
        arguments = callback.get("init_args") or {}
        for key in ("dirpath", "folder"):
            arguments.pop(key, None)
        if not re.fullmatch(FILE_NAME, str(arguments.get("filename", ""))):
            arguments.pop("filename")
    while data:
        arguments = data["init_args"] = data.get("init_args") or {}
        if _takes(data.get("class_path"), "download", checkpoint):  # true where it is left out
            arguments["download"] = False
        _leave_out_cache(arguments, checkpoint, command)
        folder = arguments.get("folder")
        if command == "fit" and folder and not _may_hold_pairs(folder):
            raise UntrustedError(
                f"{checkpoint} names the folder {folder!r}, which holds no pairs yet: say where "
                "they are to be made with --data.folder, or trust the file with --trust"
            )
        data = arguments.get("images") or {}
    return config


def _takes(path: Any, name: str, checkpoint: str) -> bool:
    """Whether the constructor of a class has an argument."""
    if path is None:
        return False
    inits = [vars(kind).get("__init__") for kind in trusted_class(path, checkpoint).__mro__]
    return any(name in inspect.signature(init).parameters for init in inits if init is not None)


def _leave_out_cache(arguments: dict[str, Any], checkpoint: str, command: str) -> None:
    cache = arguments.get("cache")
    if cache is None or _below_runs(cache):
        return
    del arguments["cache"]
    if command == "fit":
        rank_zero_warn(
            f"{checkpoint} names the cache {cache!r} of its data, which is left out, as it does "
            "not lie below runs: give --data.cache, or trust the file with --trust"
        )


def set_import_policy(named_by_user: Iterable[str], *, strict: bool) -> None:
    """Tell jsonargparse what it may import for a value.

    Args:
        named_by_user: Dotted paths that the user's own arguments and configs name. Their packages
            are allowed, because a class may be defined elsewhere than where it is named.
        strict: Whether nothing else is but the trusted packages: a checkpoint's config is read.
    """
    allowed = {*PACKAGES} | {package for package in trusted_packages() if package != "*"}
    for path in named_by_user:
        top = path.partition(".")[0]
        wide = top not in ("torch", "lightning", "jsonargparse", *sys.stdlib_module_names)
        allowed |= {
            path,
            top if wide else path.rpartition(".")[0] if path.count(".") > 1 else path,
        }
    allowed = {path for path in allowed if path.partition(".")[0] != "jsonargparse"}
    # internal: jsonargparse 4.53 cannot take an entry back, and this is not the first command.
    verdicts = dict.fromkeys(_common.default_import_path_denylist, False)
    _common.parsing_settings["import_path_verdicts"] = verdicts
    denied = ["*"] if strict and not is_trusted("*") else []
    set_parsing_settings(import_path_denylist=denied, import_path_allowlist=sorted(allowed))


def _each(value: Any) -> list[dict[str, Any]]:
    return [each for each in (value if isinstance(value, list) else [value]) if _is_object(each)]


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("init_args") or {}, dict)


def stays_inside(path: Any) -> bool:
    """Whether a path lies below the folder that it is joined to."""
    return path is None or not (Path(str(path)).is_absolute() or ".." in Path(str(path)).parts)


def _may_hold_pairs(folder: Any) -> bool:
    """Whether pairs are there already, or the folder lies below `runs`."""
    return _below_runs(folder) or (Path(str(folder)) / "manifest.json").is_file()


def _below_runs(folder: Any) -> bool:
    path = Path(str(folder))
    return stays_inside(path) and path.parts[:1] == ("runs",)


def _refusal(source: str, path: Any) -> str:
    return (
        f"{source} names {path!r}, which is refused: a checkpoint may name classes of "
        f"{', '.join(PACKAGES)}. If you wrote the file or trust its author, set "
        f"{ENVIRONMENT}={str(path).partition('.')[0]}, or trust all of it with --trust"
    )
