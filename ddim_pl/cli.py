"""The command line: Lightning's, plus what makes a checkpoint enough and an error readable."""

import inspect
import json
import logging
import os
import pickle
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ddim_pl.commands import COMMANDS
from ddim_pl.commands import Trainer as TrainerWithVerbs
from ddim_pl.data.base import ImageDataModule
from ddim_pl.evaluation.measure import ChecksBeforeRun
from ddim_pl.inversion import Method
from ddim_pl.samplers import Sampler
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.training import DiffusionModule
from ddim_pl.training.hyperparameters import CONFIG_KEY, INSTANTIATOR, filled


class OneLineErrors(LightningArgumentParser):
    """Says what is wrong with the arguments in one line, without the usage text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with status 2."""
        hint = "--help and --print_config list what there is"
        self.exit(2, f"error: {_one_line(message)} ({hint})\n")


class SaveConfig(SaveConfigCallback):
    """Puts the resolved config beside a fit's checkpoints, and into each of them."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml` in fit, beside that of the run if this one goes on with a run."""
        if stage != "fit" or not trainer.loggers:
            return
        if self.config.get("ckpt_path"):
            self.config_filename, self.overwrite = "config-resumed.yaml", True
        super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the config, so that the checkpoint alone is enough."""
        text = self.parser.dump(self.config, skip_none=False)
        config = yaml.safe_load(text)
        config["model"]["init_args"] = filled(config["model"]["init_args"], pl_module.hparams)
        shared = ("seed_everything", "trainer", "model", "data")
        # Which run this was says nothing about where another, begun from this file, belongs.
        for logger in _as_list(config["trainer"].get("logger")):
            logger.get("init_args", {}).pop("version", None)
        checkpoint[CONFIG_KEY] = yaml.safe_dump({key: config[key] for key in shared})


class DiffusionCLI(LightningCLI):
    """Lightning's verbs from a config file or from a checkpoint alone, and those of this package.

    Without `--config`, the config is read from `--ckpt_path`; arguments given beside it override
    it. `--ckpt_path last` is the newest `last.ckpt` of the experiment, or, without a config, of
    all runs. The verbs of `ddim_pl.commands` always begin from the checkpoint's config, on which a
    `--config` of theirs is laid.
    """

    def __init__(self, args: Sequence[str] | None = None) -> None:
        """Run the verb that the arguments (by default those of the process) ask for."""
        super().__init__(
            DiffusionModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            trainer_class=TrainerWithVerbs,
            seed_everything_default=0,
            parser_class=OneLineErrors,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=list(sys.argv[1:] if args is None else args),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    # ---- arguments ----------------------------------------------------------------------------

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, each with what is made for it and so is no argument."""
        made = {"model", "datamodule"}
        return LightningCLI.subcommands() | {verb: made for verb in COMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for weights, data and noise."""
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with the checkpoint's own config underneath where none is given."""
        args = list(args)
        given, checkpoint = _read_options(args)
        if args and args[0] in COMMANDS:
            asks = {"-h", "--help", "--print_config"} & {arg.partition("=")[0] for arg in args}
            if checkpoint is None and not asks:
                raise ValueError(f"{args[0]} needs --ckpt_path: give a file or 'last'")
            given = False
        if checkpoint == "last" and not given:
            checkpoint = str(_newest(Path("runs"), "*"))
            args += ["--ckpt_path", checkpoint]
        if checkpoint and checkpoint != "last" and not given:
            config = yaml.safe_load(_config_of(Path(checkpoint)))
            if args[0] != "fit":  # the machine that trained need not be the one that draws
                for name in ("accelerator", "strategy", "devices", "num_nodes"):
                    config["trainer"].pop(name, None)
            args[1:1] = ["--config", yaml.safe_dump(config)]
        self.config = parser.parse_args(args)
        self._resolve_checkpoint(self.config[self.config.subcommand].get("ckpt_path"))

    def _resolve_checkpoint(self, checkpoint: str | None) -> None:
        """Turn `last` into a file, see that it exists, and write into the run it belongs to."""
        config = self.config[self.config.subcommand]
        logger = config.trainer.get("logger")
        logger_args = logger.get("init_args", {}) if hasattr(logger, "get") else {}
        if checkpoint == "last":
            root, name = logger_args.get("save_dir", "runs"), logger_args.get("name", "*")
            checkpoint = str(_newest(Path(root), name or "."))
        if checkpoint is None:
            if self.config.subcommand != "fit":
                raise ValueError(
                    f"{self.config.subcommand} needs --ckpt_path: give a file or 'last'"
                )
            return
        path = Path(checkpoint)
        _read_checkpoint(path)
        config.ckpt_path = checkpoint
        run = path.absolute().parent.parent
        if not (logger_args and run.name.removeprefix("version_").isdecimal()):
            return
        root = Path(logger_args.get("save_dir", "runs"), logger_args.get("name") or "")
        if self.config.subcommand != "fit":
            logger_args["save_dir"], logger_args["name"] = str(run.parent.parent), run.parent.name
        elif root.absolute() != run.parent:
            return  # another experiment, which starts from this checkpoint
        logger_args["version"] = int(run.name.removeprefix("version_"))

    def _parse_ckpt_path(self) -> None:
        """Do not let the checkpoint's arguments override the command line, as Lightning would."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Leave the data module out of verbs that take none."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in COMMANDS:
            wanted = inspect.signature(getattr(TrainerWithVerbs, subcommand)).parameters
            kwargs = {name: value for name, value in kwargs.items() if name in wanted}
        return kwargs

    # ---- before a run -------------------------------------------------------------------------

    def after_instantiate_classes(self) -> None:
        """Record the model's arguments, and find what is wrong before anything is written."""
        text = self.parser.dump(self.config, skip_link_targets=False, skip_none=False)
        model = yaml.safe_load(text)[self.subcommand]["model"]
        arguments = filled(model["init_args"], self.model.hparams)
        self.model.save_hyperparameters(
            {"_class_path": model["class_path"], "_instantiator": INSTANTIATOR, **arguments},
            logger=False,
        )
        if self.subcommand in ("predict", *COMMANDS) or getattr(rank_zero_only, "rank", 0) != 0:
            return  # other ranks wait for the first one's download, which Lightning sees to
        module = cast(DiffusionModule, self.model)
        if self.subcommand == "fit" and not self.config["fit"].get("ckpt_path"):
            # As fit itself will: the data asks for its precision and its devices.
            self.datamodule.trainer = self.trainer
            module.check_data(self.datamodule)
        self.datamodule.prepare_data()
        self.datamodule.setup(self.subcommand)
        if isinstance(self.datamodule, ImageDataModule):
            _check_fit(module, self.datamodule)
        for callback in cast(list[Any], self.trainer.callbacks):  # type: ignore[attr-defined]
            if isinstance(callback, ChecksBeforeRun):
                callback.check(self.datamodule, cast(str, self.subcommand))

    # ---- the verbs ----------------------------------------------------------------------------

    def test(self, **kwargs: Any) -> None:
        """Test, print a table and write it as `test-results.json` into the run."""
        self.trainer.test(**{**kwargs, "verbose": False})
        self._report()

    def validate(self, **kwargs: Any) -> None:
        """Validate and print a table."""
        self.trainer.validate(**{**kwargs, "verbose": False})
        self._report()

    def predict(self, **kwargs: Any) -> None:
        """Draw images; callbacks write them, so they are not kept in memory."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})

    def _report(self) -> None:
        folder = self.trainer.log_dir  # asked on every rank: it broadcasts
        if not self.trainer.is_global_zero:
            return
        module = cast(DiffusionModule, self.model)
        levels = module.levels
        rows: dict[str, Any] = {
            "checkpoint": self.config[self.subcommand]["ckpt_path"],
            "sampler": str(module.sampler),
            "timesteps": module.timesteps
            if isinstance(module.timesteps, str)
            else levels.tolist(),
            "network evaluations": len(levels) - 1,
        }
        rows |= {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        width = max(map(len, rows))
        print(
            "\n" + "\n".join(f"{name:<{width}}  {_format(value)}" for name, value in rows.items())
        )
        if folder:
            file = Path(folder) / f"{self.subcommand}-results.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows, indent=2) + "\n")


def _check_fit(module: DiffusionModule, data: ImageDataModule) -> None:
    """See that the network and the data speak of the same images."""
    if tuple(data.shape) != module.image_shape:
        raise ValueError(
            f"the data has images of shape {tuple(data.shape)} (channels, height, width) but the "
            f"network expects {module.image_shape}: set the network's in_channels and image_size, "
            "or the data module"
        )
    if module.num_classes is not None and module.num_classes < data.num_classes:
        raise ValueError(
            f"the data has {data.num_classes} classes but the network num_classes="
            f"{module.num_classes}: set it to {data.num_classes}, or to null for no classes"
        )


def _one_line(message: str) -> str:
    """The message in one line; of jsonargparse's nested reports only the reason at their core."""
    unknown = re.match(
        r'Parser key "(samplers?|schedule|method)":.*Given value: (.*)', message, re.DOTALL
    )
    if unknown:
        bases: dict[str, type[Any]] = {"schedule": NoiseSchedule, "method": Method}
        base = bases.get(unknown[1], Sampler)
        value = re.sub(r"NestedArg\(key='class_path', val=(.*)\)", r"\1", unknown[2]).strip()
        known = ", ".join(sorted(kind.__name__ for kind in _concrete(base)))
        return f"{unknown[1]} cannot be {value}: known are {known}, or any class by its full path"
    option = re.match(r"Option '(\w+)' is not accepted", message)
    if option:
        return f"the class that was chosen has no argument {option[1]!r}: leave it out"
    pattern = r'Parser key "(\w+)":.*(?:Sequence|list).*(?:Given value: |Got value: )(.*)'
    single = re.match(pattern, message, re.DOTALL)
    if single and not single[2].startswith("["):
        value = single[2].strip()
        return f"--{single[1]} takes a list, got {value}: write it as '[{value}]'"
    if "Does not validate against any" in message:
        lines = [line.strip() for line in message.splitlines()]
        noise = ("- Does not validate", "- Expected a <class 'NoneType'>")
        reasons = [line for line in lines if line.startswith("- ") and not line.startswith(noise)]
        message = reasons[0].removeprefix("- ") if reasons else message
    return " ".join(message.split())


def _concrete(base: type[Any]) -> list[type[Any]]:
    """All classes below this one that can be made."""
    below: list[type[Any]] = []
    for child in base.__subclasses__():
        below += _concrete(child)
    return below if inspect.isabstract(base) else [base, *below]


def _as_list(loggers: Any) -> list[dict[str, Any]]:
    """The loggers of a dumped config; true and false stand for a default one and none."""
    loggers = loggers if isinstance(loggers, list) else [loggers]
    return [logger for logger in loggers if isinstance(logger, dict)]


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _read_options(args: Sequence[str]) -> tuple[bool, str | None]:
    """Whether a config is given, and the value of `--ckpt_path`, before anything is parsed."""
    checkpoint = None
    for i, arg in enumerate(args):
        if arg == "--ckpt_path" and i + 1 < len(args):
            checkpoint = args[i + 1]
        elif arg.startswith("--ckpt_path="):
            checkpoint = arg.partition("=")[2]
    given = any(arg in ("-c", "--config") or arg.startswith("--config=") for arg in args)
    return given, checkpoint


def _newest(root: Path, name: str) -> Path:
    pattern = f"{name}/version_*/checkpoints/last.ckpt"
    files = sorted(root.glob(pattern), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(
            f"--ckpt_path last found no {root / pattern}: run fit first, or give a file"
        )
    return files[-1]


def _config_of(path: Path) -> str:
    """The config that a checkpoint holds, as YAML."""
    checkpoint = _read_checkpoint(path)
    if CONFIG_KEY not in checkpoint:
        raise ValueError(f"--ckpt_path {path} holds no config: give --config as well")
    return cast(str, checkpoint[CONFIG_KEY])


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"--ckpt_path {path} is not a file: give a file or 'last'")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"--ckpt_path {path} is damaged or no checkpoint of this program: give another file"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"--ckpt_path {path} holds no state_dict: give a Lightning checkpoint")
    return checkpoint


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; what a user can mend is told in one line, with exit status 1.

    Set the environment variable DDIM_PL_TRACEBACK=1 to see where an error was raised.
    """
    # An advertisement.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    # Lightning calls what the newest jsonargparse has deprecated.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    args = list(sys.argv[1:] if args is None else args)
    for message in (
        # Of the checkpoint's own levels, which these verbs do not use.
        *([".*distinct levels"] if args and args[0] in ("levels", "reconstruct", "sweep") else []),
        ".*does not have many workers.*",  # data in memory: there is nothing for workers to do
        "Checkpoint directory .* exists and is not empty",  # a run that goes on
        "The dirpath has changed",  # the same folder by another path, or a run begun from a file
        "Found .* in eval mode at the start",  # the averaged network, on purpose
        "When using the `ThroughputMonitor`, you need to define",  # counts images, not operations
        ".*LeafSpec.* is deprecated",  # Lightning 2.6 with the newest PyTorch
    ):
        warnings.filterwarnings("ignore", message)
    try:
        DiffusionCLI(args)
    except (ValueError, OSError, MisconfigurationException, RuntimeError) as error:
        message = _one_line(str(error))
        misfit = re.match(r"Error\(s\) in loading state_dict for \w+: ([^.:]*)", message)
        if isinstance(error, RuntimeError) and misfit:
            message = (
                f"the checkpoint does not fit the configured network ({misfit[1].strip()}): give "
                "the config it was trained with, or none to use the checkpoint's own"
            )
        elif isinstance(error, RuntimeError) or os.environ.get("DDIM_PL_TRACEBACK"):
            raise
        sys.exit(f"error: {message}")
