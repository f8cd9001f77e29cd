"""The command line: Lightning's, with the commands of this package.

A checkpoint alone is enough to run it, and an error is one line.
"""

import atexit
import glob
import importlib
import inspect
import json
import logging
import math
import os
import pkgutil
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

import ddim_pl.data
import ddim_pl.metrics
import ddim_pl.networks
from ddim_pl import signals
from ddim_pl.cli_checks import (
    check_config,
    check_drawing,
    check_effects,
    check_module,
    has_effect,
    naming_trainer,
)
from ddim_pl.cli_commands import DESCRIPTIONS, exit_without_command
from ddim_pl.cli_configs import (
    DEFAULTS,
    AloneParser,
    CommandParser,
    Given,
    callback_lists,
    classes_first,
    dotted_paths,
    log_into_run,
    logger_name,
    loggers_of,
    options,
    read_config,
    with_folder,
    with_homes,
    writes_folder,
)
from ddim_pl.cli_environment import options_by, variable_of, with_environment
from ddim_pl.cli_errors import plain_warnings, run_message
from ddim_pl.cli_resuming import tell_of_idleness, tell_of_resuming
from ddim_pl.commands import ALONE, COMMANDS
from ddim_pl.commands import Trainer as TrainerWithCommands
from ddim_pl.data.base import ImageDataModule
from ddim_pl.evaluation.manifest import LONG, sampling_of
from ddim_pl.evaluation.measure import ChecksBeforeRun, records_of
from ddim_pl.evaluation.tables import write_text
from ddim_pl.evaluation.worker import precision_of
from ddim_pl.files import check_writable
from ddim_pl.lightning_internals import (
    FILE_LOGGERS,
    callbacks_of,
    keep_table,
    set_version,
    slow_down_progress_bar,
    trains_elsewhere,
    version_given,
)
from ddim_pl.locks import alone_in
from ddim_pl.loggers import (
    KEPT_ELSEWHERE,
    check_installed,
    flat_settings,
    log_settings,
    remember_runs,
    remembered_runs,
)
from ddim_pl.runs import (
    SHARED,
    checkpoint_config,
    claim_version,
    experiments_of_mlflow,
    newest_checkpoint,
    read_checkpoint,
    removed_if_in_vain,
    run_of,
)
from ddim_pl.shipped import with_shipped_configs
from ddim_pl.training import DiffusionModule
from ddim_pl.training.hyperparameters import CONFIG_KEY, INSTANTIATOR, filled, remember
from ddim_pl.trust import set_import_policy, trusting

# An argument of any type gets a class path as plain data: nothing is built from it.
set_parsing_settings(instantiate_subclass_spec_in_any=False)

for _package in (ddim_pl.data, ddim_pl.metrics, ddim_pl.networks):
    for _module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        importlib.import_module(_module.name)  # so that their classes are known by name


class _SaveConfig(SaveConfigCallback):
    """Puts the resolved config beside a fit's checkpoints, and into each of them."""

    begun = False
    """Whether training has begun in this process."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember that there is something to keep."""
        self.begun = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml` in fit; a resumed run keeps its own, and gets a second file."""
        if stage != "fit" or not trainer.loggers:
            return
        if self.config.get("ckpt_path"):
            self.config_filename, self.overwrite = "config-resumed.yaml", True
        super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the config, so that the checkpoint alone is enough."""
        text = self.parser.dump(self.config, skip_none=False, skip_validation=True)
        config = yaml.safe_load(text)
        config["model"]["init_args"] = filled(config["model"]["init_args"], pl_module.hparams)
        # Another run, begun from this file, gets a version of its own.
        for logger in _as_list(config["trainer"].get("logger")):
            for name in ("version", *KEPT_ELSEWHERE.values()):
                logger.get("init_args", {}).pop(name, None)
        checkpoint[CONFIG_KEY] = yaml.safe_dump({key: config[key] for key in SHARED})


class DiffusionCLI(LightningCLI):
    """Lightning's commands and those of this package, from a config or from a checkpoint alone.

    `fit`, `validate`, `test` and `predict` read `configs/default.yaml`, then each `--config`.
    If none of these names a model, the checkpoint's config is used in place of `default.yaml`.
    The commands of `ddim_pl.commands` always use the checkpoint's config. `ckpt_path` is an
    argument or an entry of a config. `last` means the newest `last.ckpt` of the experiment, or of
    all runs if no config names a model.
    """

    def __init__(self, args: Sequence[str] | None = None) -> None:
        """Run the command that the arguments (by default those of the process) name."""
        args = with_shipped_configs(sys.argv[1:] if args is None else args)
        # Parsers take a while to build. Behind an option that stands first any command may follow.
        known = [name for name in DESCRIPTIONS if name not in ALONE]
        self._built = args[:1] if args and args[0] in known else known
        super().__init__(
            DiffusionModule,
            LightningDataModule,
            save_config_callback=_SaveConfig,
            trainer_class=TrainerWithCommands,
            seed_everything_default=0,
            parser_kwargs={command: _parser_settings(command) for command in self._built},
            parser_class=CommandParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    # ---- arguments ----------------------------------------------------------------------------

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The commands that get a parser, each with the arguments that are made for it."""
        ours = {command: {"model", "datamodule"} for command in COMMANDS}
        made = LightningCLI.subcommands() | ours
        return {command: made[command] for command in self._built}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for weights, data and noise."""
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; the checkpoint's config is the base unless another config names a model."""
        args = classes_first(args)
        given = Given.by(args, self.subcommands())
        self._read: str | None = None
        if given.command in COMMANDS and given.checkpoint is None and not given.shows_only:
            raise ValueError(_needs_checkpoint(given.command))
        alone = given.command in COMMANDS or not given.names_model
        base: dict[str, Any] = {}
        if given.command and given.checkpoint and alone:
            args = self._lay_on_checkpoint(given, args)
        elif given.command not in COMMANDS:
            base = read_config(DEFAULTS)
        set_import_policy(given.named_paths, strict=self._read is not None)
        for command in self.subcommands():
            parser_of = self._command_parser(command)
            parser_of.callback_lists = callback_lists(base, args)
            set_by = options_by(os.environ, command=command)
            parser_of.variables = [variable_of(name[2:], command) for name in set_by]
        self.config = parser.parse_args(args)
        command = self.config.subcommand
        self.config[command] = config = with_homes(self.config[command])
        check_config(config)
        if command in COMMANDS:
            check_effects(command, given.named, takes_data=_takes_data(command))
        self._prepare_loggers(config)
        check_drawing(command, config, given.of_model)
        self._resolve_checkpoint(config)

    def _command_parser(self, command: str) -> CommandParser:
        # internal: Lightning 2.6 keeps the commands' parsers private.
        return cast(CommandParser, self._parser(command))

    def _lay_on_checkpoint(self, given: Given, args: list[str]) -> list[str]:
        """Put the config of the given checkpoint below all others, in place of `default.yaml`."""
        assert given.command is not None
        assert given.checkpoint is not None
        last = given.checkpoint == "last"
        path = newest_checkpoint(Path("runs")) if last else Path(given.checkpoint)
        self._read = str(path)
        config = checkpoint_config(path, given.command)
        self._command_parser(given.command).default_config_files = []
        below = ["--config", yaml.safe_dump(config)]
        return [given.command, *below, *args[1:], "--ckpt_path", str(path)]

    def _prepare_loggers(self, config: Namespace) -> None:
        """See that loggers are installed, and that the first one has a folder for the run."""
        loggers = loggers_of(config)
        if self.config.subcommand in COMMANDS:  # they log nothing, and write into the run
            loggers = [each for each in loggers if writes_folder(each)]
        for each in loggers:
            check_installed(logger_name(each))
        if loggers:
            config.trainer.logger = with_folder(loggers)

    def _resolve_checkpoint(self, config: Namespace) -> None:
        """Turn `last` into a file, check that it exists, and write into that file's run."""
        command, checkpoint = self.config.subcommand, config.get("ckpt_path")
        loggers = loggers_of(config)
        if checkpoint == "last":
            checkpoint = str(_last_of(config, loggers))
        if checkpoint is None:
            if command != "fit":
                raise ValueError(_needs_checkpoint(command))
            return
        if checkpoint != self._read:
            read_checkpoint(Path(checkpoint), keep=True)
        config.ckpt_path = checkpoint
        files = [each.init_args for each in loggers if writes_folder(each)]
        for each in files:
            log_into_run(each, Path(checkpoint), fits=command == "fit")
        if files and (command != "fit" or files[0].get("version") is not None):
            _go_on_elsewhere(loggers, run_of(Path(checkpoint)))

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Leave out of the help of our commands what has no effect on them."""
        # internal: Lightning 2.6 has no public place for a command's parser.
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in COMMANDS:
            takes_data = _takes_data(subcommand)
            cast(CommandParser, parser).not_in_help = [
                action
                for action in parser._actions
                if not has_effect(subcommand, action.dest, takes_data=takes_data)
            ]
        return parser

    def _parse_ckpt_path(self) -> None:
        """Do not let the checkpoint's arguments override the command line, as Lightning would."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Leave the data module out of commands that take none."""
        # internal: Lightning 2.6 has no public place for a command's arguments.
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in COMMANDS:
            wanted = inspect.signature(getattr(TrainerWithCommands, subcommand)).parameters
            kwargs = {name: value for name, value in kwargs.items() if name in wanted}
        return kwargs

    # ---- before a run -------------------------------------------------------------------------

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; an error names its arguments."""
        with naming_trainer(self.config[self.subcommand].trainer):
            if self.config[self.subcommand].trainer.get("fast_dev_run"):
                # Such a run has no logger, and hence no folder: it leaves nothing.
                kwargs["default_root_dir"] = tempfile.mkdtemp()
                atexit.register(shutil.rmtree, kwargs["default_root_dir"], ignore_errors=True)
            given = [*(self.config_init[self.subcommand].trainer.get("callbacks") or [])]
            trainer = super().instantiate_trainer(**kwargs)
        if not any(isinstance(each, ProgressBar) for each in given):
            slow_down_progress_bar(trainer)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Record the model's arguments, and find what is wrong before anything is written."""
        model = self._dumped()["model"]
        arguments = filled(model["init_args"], self.model.hparams)
        self.model.save_hyperparameters(
            {"_class_path": model["class_path"], "_instantiator": INSTANTIATOR, **arguments},
            logger=False,
        )
        module = cast(DiffusionModule, self.model)
        if model["init_args"].get("network"):
            remember(module.network, model["init_args"]["network"].get("init_args") or {})
        check_module(module)
        if self.subcommand in ("predict", *COMMANDS) or getattr(rank_zero_only, "rank", 0) != 0:
            return  # Lightning lets the other ranks wait for the first one's download
        if self.subcommand == "fit" and not self.config["fit"].get("ckpt_path"):
            # As fit will do: the checks need the trainer's precision and devices.
            self.datamodule.trainer = self.trainer
            module.check_data(self.datamodule)
        stage = cast(str, self.subcommand)
        checks = [each for each in callbacks_of(self.trainer) if isinstance(each, ChecksBeforeRun)]
        for callback in checks:
            callback.check_settings(stage)  # decoding the images may take hours
        self.datamodule.prepare_data()
        self.datamodule.setup(self.subcommand)
        if isinstance(self.datamodule, ImageDataModule):
            _check_fit(module, self.datamodule, trains=self.subcommand == "fit")
        for callback in checks:
            callback.check(self.datamodule, stage)

    # ---- the commands -------------------------------------------------------------------------

    def fit(self, **kwargs: Any) -> None:
        """Train, in a run of this process alone."""
        checkpoint = kwargs.get("ckpt_path")
        before = None if checkpoint is None else tell_of_resuming(checkpoint, self._settings())
        self._fit_alone(**kwargs)
        if before is not None:
            tell_of_idleness(self.trainer, before, vars(self.config["fit"].trainer))

    def _fit_alone(self, **kwargs: Any) -> None:
        """Train, in a run that no other process trains in."""
        loggers = [each for each in self.trainer.loggers if isinstance(each, FILE_LOGGERS)]
        if not loggers or getattr(rank_zero_only, "rank", 0) != 0:
            self.trainer.fit(**kwargs)
            return
        experiment = Path(loggers[0].root_dir)
        made = [each for each in (experiment, *experiment.parents) if not each.exists()]
        if all(version_given(each) is None for each in loggers):
            number = claim_version(experiment)
            for each in loggers:
                set_version(each, number)
        run = Path(loggers[0].log_dir)
        if not kwargs.get("ckpt_path") and (run / "config.yaml").exists():
            raise ValueError(
                f"trainer.logger.version must be that of a new run, got {run}: leave it out, or "
                "go on with that run by --ckpt_path"
            )
        with removed_if_in_vain(run, made, self._has_begun), alone_in(run, ".fit-lock"):
            self._prepare_logs()
            remember_runs(run, self.trainer.loggers)
            log_settings(self.trainer.loggers, flat_settings(self._settings()))
            self.trainer.fit(**kwargs)

    def _has_begun(self) -> bool:
        """Whether training has begun, or may have begun in processes that this one started."""
        found = (each for each in callbacks_of(self.trainer) if isinstance(each, _SaveConfig))
        return trains_elsewhere(self.trainer) or any(each.begun for each in found)

    def _settings(self) -> dict[str, Any]:
        """What was given and what the model found for itself, as plain data."""
        config = self._dumped()
        config["model"]["init_args"] = filled(config["model"]["init_args"], self.model.hparams)
        return {name: config[name] for name in SHARED}

    def _dumped(self) -> dict[str, Any]:
        """The command's config as plain data; it was checked when it was parsed."""
        text = self.parser.dump(
            self.config, skip_link_targets=False, skip_none=False, skip_validation=True
        )
        return cast(dict[str, Any], yaml.safe_load(text)[self.subcommand])

    def test(self, **kwargs: Any) -> None:
        """Test, print a table and write it as `test-results.json` into the run."""
        self._prepare_logs()
        self.trainer.test(**{**kwargs, "verbose": False})
        self._report()

    def validate(self, **kwargs: Any) -> None:
        """Validate and print a table."""
        self._prepare_logs()
        self.trainer.validate(**{**kwargs, "verbose": False})
        self._report()

    def predict(self, **kwargs: Any) -> None:
        """Sample images; callbacks write them, so they are not kept in memory."""
        self._prepare_logs()
        self.trainer.predict(**{**kwargs, "return_predictions": False})

    def _prepare_logs(self) -> None:
        """See that logs can be written, and let tables go on."""
        if getattr(rank_zero_only, "rank", 0) != 0:
            return
        for logger in self.trainer.loggers:
            if isinstance(logger, FILE_LOGGERS):
                check_writable("trainer.logger", Path(logger.log_dir))
            if isinstance(logger, CSVLogger):
                keep_table(logger)

    def _report(self) -> None:
        folder = self.trainer.log_dir  # on every rank: it broadcasts
        if not self.trainer.is_global_zero:
            return
        module = cast(DiffusionModule, self.model)
        rows: dict[str, Any] = {
            "checkpoint": self.config[self.subcommand]["ckpt_path"],
            **sampling_of(module),
            "precision": precision_of(self.trainer, module),
        }
        rows |= {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        stage = "val" if self.subcommand == "validate" else "test"
        if isinstance(self.datamodule, ImageDataModule):
            rows |= records_of(self.trainer, self.datamodule, stage)
        width = max(map(len, rows))
        shown = {name: value for name, value in rows.items() if name not in LONG}
        lines = [f"{name:<{width}}  {_format(value)}" for name, value in shown.items()]
        print("\n" + "\n".join(lines))
        if folder:
            rows = {name: _json_number(value) for name, value in rows.items()}
            write_text(
                Path(folder) / f"{self.subcommand}-results.json", json.dumps(rows, indent=2)
            )


def _check_fit(module: DiffusionModule, data: ImageDataModule, *, trains: bool) -> None:
    """Check that network and data are made for the same images."""
    if tuple(data.shape) != module.image_shape:
        raise ValueError(
            f"the data has images of shape {tuple(data.shape)} (channels, height, width) but the "
            f"network expects {module.image_shape}: set the network's in_channels and image_size, "
            "or image_size and channels of the data"
        )
    if module.num_classes is not None and module.num_classes < data.num_classes:
        raise ValueError(
            f"the data has {data.num_classes} classes but the network num_classes="
            f"{module.num_classes}: set it to {data.num_classes}, or to null for no classes"
        )
    if trains and module.num_classes is None and data.labels_given:
        rank_zero_warn(
            f"data.{data.labels_given} has no effect: the network has num_classes=null and takes "
            f"no labels; set it to {data.num_classes} to train on them, or leave the labels out"
        )
    if trains and data.num_classes == 1 and (module.num_classes or 1) > 1:
        raise ValueError(
            "the data has no classes, or one, but the network num_classes="
            f"{module.num_classes}, of which it would learn the first alone: set it to null, or "
            "give the data labels (a subfolder for each class, or a file of labels)"
        )


def _takes_data(command: str) -> bool:
    """Whether a command of ours gets the data module."""
    return "datamodule" in inspect.signature(getattr(TrainerWithCommands, command)).parameters


def _parser_settings(command: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"description": DESCRIPTIONS[command]}
    if command not in COMMANDS:
        # jsonargparse takes the path for a pattern, and a folder's name may hold brackets.
        settings["default_config_files"] = [glob.escape(str(DEFAULTS))]
    return settings


def _needs_checkpoint(command: str) -> str:
    return f"{command} needs --ckpt_path: give a file or 'last'"


def _last_of(config: Namespace, loggers: list[Namespace]) -> Path:
    """The newest checkpoint of the experiment that the loggers of a config name."""
    if not loggers:
        raise ValueError(
            "--ckpt_path last needs a logger that names the experiment's folder, got "
            f"trainer.logger={config.trainer.get('logger')}: give a logger, or the file"
        )
    settings, more = loggers[0].init_args, list[Path]()
    for each in loggers:
        place = each.get("init_args") or Namespace()
        # Where Lightning has the checkpoints of a run whose only logger is this one.
        if logger_name(each) == "WandbLogger" and place.get("project"):
            more.append(Path(place.get("save_dir") or ".", place.project))
        if logger_name(each) == "MLFlowLogger":
            experiment = place.get("experiment_name", "lightning_logs")
            more += experiments_of_mlflow(Path(place.get("save_dir") or "mlruns"), experiment)
    name = settings["name"] or "" if "name" in settings else None
    return newest_checkpoint(Path(settings.get("save_dir", "runs")), name, *more)


def _go_on_elsewhere(loggers: list[Namespace], run: Path) -> None:
    """Let loggers go on with the runs that they keep elsewhere, unless the user names others."""
    kept = remembered_runs(run)
    for each in loggers:
        argument = KEPT_ELSEWHERE.get(logger_name(each))
        ids = kept.get(logger_name(each))
        if argument and ids:
            found, settings = ids.pop(0), each.init_args
            if not (settings.get(argument) or settings.get("version")):
                settings[argument] = found


def _as_list(loggers: Any) -> list[dict[str, Any]]:
    """The loggers of a dumped config; `true` and `false` have no settings and are left out."""
    loggers = loggers if isinstance(loggers, list) else [loggers]
    return [logger for logger in loggers if isinstance(logger, dict)]


def _json_number(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def alone_parser(command: str) -> AloneParser:
    """The parser of a command that needs neither trainer nor model."""
    parser = AloneParser(description=DESCRIPTIONS[command])
    parser.prog = f"{parser.prog} {command}"
    parser.add_function_arguments(ALONE[command], as_positional=True)
    return parser


def run_alone(command: str, *args: str) -> None:
    """Run a command that needs neither trainer nor model."""
    set_import_policy(dotted_paths([value for _, value in options(args)]), strict=False)
    parser = alone_parser(command)
    set_by = options_by(os.environ, command=command)
    parser.variables = [variable_of(name[2:], command) for name in set_by]
    arguments = parser.instantiate(parser.parse_args(classes_first(args)))
    ALONE[command](**vars(arguments))


IGNORED = (
    ".*does not have many workers.*",  # data in memory: there is nothing for workers to do
    "Checkpoint directory .* exists and is not empty",  # a run that goes on
    "Experiment logs directory .* exists and is not empty",  # the same of a CSVLogger
    "The dirpath has changed",  # the same folder by another path, or a run begun from a file
    "network is not stored in checkpoints",  # it is: the config says how it is built
    "Found .* in eval mode at the start",  # the averaged network, on purpose
    "When using the `ThroughputMonitor`, you need to define",  # counts images, not operations
    ".*LeafSpec.* is deprecated",  # Lightning 2.6 with the newest PyTorch
)
"""Warnings of Lightning that say nothing to a user."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; an error is one line, with exit status 1.

    A signal that ends it gives the exit status 128 + its number, see `ddim_pl.signals`. Set the
    environment variable DDIM_PL_TRACEBACK=1 to see where an error was raised. Other variables set
    options, see `ddim_pl.cli_environment`.
    """
    # Lightning advertises a logger in a log message.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    # Lightning calls what the newest jsonargparse has deprecated.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    args = list(sys.argv[1:] if args is None else args)
    exit_without_command(args)
    for warning in IGNORED:
        warnings.filterwarnings("ignore", warning)
    if args and args[0] in ("levels", "reconstruct", "sweep"):  # they use levels of their own
        warnings.filterwarnings("ignore", ".*distinct levels")
    if getattr(rank_zero_only, "rank", 0) != 0:
        signals.end_with_parent()
    trusted = ["*"] if "--trust" in args else []
    before, threading.excepthook = threading.excepthook, _report_of_thread
    try:
        args = with_environment([arg for arg in args if arg != "--trust"], os.environ)
        args = with_homes(args)
        with plain_warnings(), trusting(*trusted), signals.handled():
            if args[0] in ALONE:
                run_alone(*args)
            else:
                DiffusionCLI(args)
    except Exception as error:
        if os.environ.get("DDIM_PL_TRACEBACK"):
            raise
        sys.exit(f"error: {run_message(error, options(args))}")
    finally:
        threading.excepthook = before


def _report_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Report an error of a thread, unless the main thread will.

    TensorBoard writes in a thread, whose error is raised in the main one at the next write.
    """
    writes = type(failed.thread).__module__.startswith("tensorboard.")
    if not (writes and issubclass(failed.exc_type, OSError)):
        threading.__excepthook__(failed)
