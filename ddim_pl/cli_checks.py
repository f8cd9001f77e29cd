"""Checks of the arguments that belong to Lightning or PyTorch, before anything is written."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ddim_pl.checks import check_at_least
from ddim_pl.cli_environment import variable_of
from ddim_pl.cli_errors import one_line
from ddim_pl.evaluation.worker import check_noise, warn_of_student
from ddim_pl.training import DiffusionModule
from ddim_pl.trust import stays_inside

MOST = 2**32 - 1
"""The largest integer that an argument may be, which is the largest seed of NumPy."""

LARGEST_RATE = 1e3

LEAST = {"check_val_every_n_epoch": 1, "accumulate_grad_batches": 1, "log_every_n_steps": 0}
"""The least values of the trainer's numbers that Lightning does not check itself."""

WITHOUT_DRAWING = ("reconstruct", "invert", "forward")
"""Commands that draw no images of their own: they encode, or use no network."""


class _OfDrawing(NamedTuple):
    """A setting of how images are drawn.

    Attributes:
        usual: Its value where it changes nothing.
        must: What must be done with it where no images are drawn.
        reason: What such a command does.
        label: What a value is called.
    """

    usual: Any
    must: str
    reason: str
    label: str


OF_DRAWING = {
    "sampling_precision": _OfDrawing(
        32, "be 32", "works with the weights as they are", "sampling_precision {}"
    ),
    "guidance": _OfDrawing(None, "be left out", "has no guidance", "{:g}"),
}

IDLE = {
    "trainer": (
        *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "overfit_batches"),
        *(f"limit_{name}_batches" for name in ("train", "val", "test", "predict")),
        *("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"),
        *("log_every_n_steps", "enable_checkpointing", "enable_model_summary", "logger"),
        *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
        *("use_distributed_sampler", "reload_dataloaders_every_n_epochs", "fast_dev_run"),
        *("enable_autolog_hparams", "model_registry", "callbacks"),
    ),
    "model": (
        *("optimizer", "lr_scheduler", "warmup_steps", "ema_decay", "skip_bad_batches"),
        *("loss", "loss_weight", "min_snr_gamma", "level_sampling", "conversion_updates"),
        *("label_dropout", "more_ema_decays", "augment_probability", "level_mean", "level_std"),
        *(
            "clip_teacher",
            "dropout",
            "teacher",
            "pair_batch_size",
            "self_decay",
            "linear_decay",
            "method",
            "q",
        ),
        "guidance_range",
        *("num_stages", "stage_updates", "mean_log_sigma", "std_log_sigma"),
        *(
            f"teacher_{name}"
            for name in ("sampler", "timesteps", "num_steps", "guidance", "precision")
        ),
    ),
}
"""Arguments that have no effect on the commands of `ddim_pl.commands`, which do not train."""

MEASURING = ("sweep", "compare")
"""Commands that take what they measure from a callback of the config."""

HARDWARE = ("accelerator", "devices", "num_nodes", "strategy", "precision", "plugins")


def check_config(config: Namespace) -> None:
    """Check what a parsed config says.

    Args:
        config: The arguments of one command.

    Raises:
        ValueError: If a number is out of range, or a name leads out of the folder of runs.
    """
    for name, value in vars(config).items():
        _check_integers(name, value)
        if isinstance(value, list) and not value:
            raise ValueError(f"{name} must have at least one entry, got []: or leave it out")
    seed = config.get("seed_everything")
    if seed is not None and not isinstance(seed, bool):
        check_at_least(0, seed_everything=seed)
    trainer = config.trainer
    for name, least in LEAST.items():
        check_at_least(least, **{f"trainer.{name}": trainer.get(name)})
    check_at_least(0, **{"trainer.gradient_clip_val": trainer.get("gradient_clip_val")})
    if trainer.get("val_check_interval") == 0:
        raise ValueError("trainer.val_check_interval must be positive, got 0")
    loggers = trainer.get("logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        settings = logger.get("init_args", {}) if hasattr(logger, "get") else {}
        for name in ("name", "version", "sub_dir"):
            if not stays_inside(settings.get(name)):
                raise ValueError(
                    f"trainer.logger.{name} must lie below the folder of runs, got "
                    f"{settings[name]!r}: give another folder as --trainer.logger.save_dir"
                )


def check_drawing(command: str, config: Namespace, given: Collection[str]) -> None:
    """Check that what says how images are drawn has an effect on a command whose user gives it.

    Says so where a checkpoint's has none.

    Args:
        command: The command.
        config: Its arguments.
        given: Names of the model's arguments that the user gives, so that they are not the
            checkpoint's.

    Raises:
        ValueError: If one is given and has no effect.
    """
    encodes = command == "interpolate" and bool(config.from_data or config.images)
    writes_graph = command == "export" and config.format != "checkpoint"
    what = f"{command} between images" if encodes else command
    what += f" to {config.format}" if writes_graph else ""
    draws = not (encodes or command in WITHOUT_DRAWING)
    arguments = config.model.get("init_args", Namespace())
    for name, setting in OF_DRAWING.items():
        value = arguments.get(name, setting.usual)
        refused_later = writes_graph and name == "guidance"  # by the format, with what to do
        if value == setting.usual or refused_later or (draws and not writes_graph):
            continue
        if name in given:
            raise ValueError(
                f"{name} must {setting.must} for {what}, which {setting.reason}, got {value!r}: "
                "leave it out"
            )
        rank_zero_info(
            f"{what} {setting.reason}: {setting.label.format(value)} of the checkpoint has no "
            "effect on it"
        )


def has_effect(command: str, name: str, *, takes_data: bool) -> bool:
    """Whether an option has an effect on a command of ours.

    Args:
        command: The command.
        name: Of the option, such as "trainer.max_steps".
        takes_data: Whether the command reads real images.
    """
    owner, _, option = name.partition(".")
    option = option.partition(".")[0].removesuffix("+")
    if owner.removesuffix("+") == "data":
        return takes_data
    if command == "export" and name in ("trainer.precision", "model.compile"):
        return False
    if option == "callbacks" and command in MEASURING:
        return True
    # A checkpoint that is exported holds the weight of its loss.
    return option not in IDLE.get(owner, ()) or (command, option) == ("export", "loss_weight")


def check_effects(command: str, named: Iterable[str], *, takes_data: bool) -> None:
    """Check that the options that a command of ours is given have an effect on it.

    What stands in a config may be meant for other commands, and is let be.

    Args:
        command: The command.
        named: Names of the options on the command line, such as "trainer.precision".
        takes_data: Whether the command reads real images.

    Raises:
        ValueError: If one has none.
    """
    for name in named:
        if not has_effect(command, name, takes_data=takes_data):
            variable = variable_of(name, command)
            source = f" (set by {variable})" if variable in os.environ else ""
            raise ValueError(
                f"{name} must be left out for {command}, on which it has no effect{source}"
            )


def check_module(module: DiffusionModule) -> None:
    """Check a module's optimiser with one update of one number, and its sampler.

    Warns of steps that a distilled model was not made for.

    Raises:
        ValueError: If the optimiser cannot train a network, or the sampler is made for another
            law of noise.
    """
    check_noise("sampler", module, module.sampler)
    warn_of_student(module, module.sampler, module.levels)
    number = nn.Parameter(torch.zeros(1, 1))
    number.grad = torch.zeros(1, 1)
    make = module.optimizer or torch.optim.Adam
    with _naming("optimizer", _call_of(make)):
        make(module.network.parameters())
        optimizer = make([number])
        optimizer.step(lambda: 0.0)
    for group in optimizer.param_groups:
        if not 0 <= float(group["lr"]) <= LARGEST_RATE:
            raise ValueError(
                f"optimizer.lr must lie in [0, {LARGEST_RATE:g}], got {group['lr']}: 2e-4 is usual"
            )
    if module.lr_scheduler is not None:
        with _naming("lr_scheduler", _call_of(module.lr_scheduler)):
            schedule = module.lr_scheduler(optimizer)
        if isinstance(schedule, ReduceLROnPlateau):
            raise ValueError(
                "lr_scheduler must be a function of the step alone, got ReduceLROnPlateau, which "
                "needs a metric: give CosineAnnealingLR or another"
            )


@contextlib.contextmanager
def naming_trainer(config: Namespace) -> Iterator[None]:
    """Name the trainer's arguments in an error that its constructor raises.

    Args:
        config: The arguments of the trainer.

    Raises:
        ValueError: In place of any other error.
    """
    try:
        yield
    except Exception as error:
        reason = one_line(str(error)).rstrip(".") or type(error).__name__
        words = set(re.findall(r"\w+", reason))
        words |= {"max_time"} if "Timer" in words else set()
        named = [name for name in vars(config) if name in words] or list(HARDWARE)
        given = {name: config.get(name) for name in named if config.get(name) is not None}
        text = ", ".join(f"trainer.{name}={_shown(value)}" for name, value in given.items())
        raise ValueError(f"{text} must be changed: {reason}") from error


def _shown(value: Any) -> str:
    """A value in a message: of an object the name of its class."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, Namespace) and "class_path" in value:
        return str(value.class_path).rpartition(".")[2]
    return str(value)


@contextlib.contextmanager
def _naming(name: str, given: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = one_line(str(error)).rstrip(".") or type(error).__name__
        raise ValueError(
            f"{name} must be one that works, got {given}, which fails ({reason}): give another"
        ) from error


def _call_of(maker: Callable[..., Any]) -> str:
    return getattr(getattr(maker, "func", maker), "__name__", type(maker).__name__)


def _check_integers(name: str, value: Any) -> None:
    """Check every number below a name: one that is absurd is a hang, or an overflow somewhere."""
    if isinstance(value, int) and abs(value) > MOST:
        raise ValueError(f"{name} must lie in [-{MOST}, {MOST}], got {value}")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value}")
    if isinstance(value, Namespace | dict):
        items = vars(value) if isinstance(value, Namespace) else value
        for key, item in items.items():
            _check_integers(name if key == "init_args" else f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_integers(name, item)
