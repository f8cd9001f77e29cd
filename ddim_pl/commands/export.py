"""`main.py export`: a model to give to others, as a checkpoint or for other programs."""

import os
import re
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
import yaml

from ddim_pl.checks import check_one_of
from ddim_pl.commands.import_ import IMAGES
from ddim_pl.evaluation.tables import write_text
from ddim_pl.evaluation.worker import Worker, on_every_worker, warn_of_student
from ddim_pl.exports.card import card, metrics_of_run, read_metrics
from ddim_pl.exports.formats import Export, make_export
from ddim_pl.exports.hub import check_hub, push
from ddim_pl.files import check_writable, new_folder, replacing
from ddim_pl.runs import checkpoint_config
from ddim_pl.training import DiffusionModule
from ddim_pl.training.ddpm import averaged_checkpoint
from ddim_pl.training.hyperparameters import CONFIG_KEY

ExportFormat = Literal["checkpoint", "diffusers", "safetensors", "onnx", "torch_export"]


def export(
    trainer: L.Trainer,
    model: DiffusionModule,
    ckpt_path: str | None = None,
    *,
    output: str,
    format: ExportFormat = "checkpoint",
    label: int | None = None,
    metrics: str | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
) -> None:
    """Write the averaged weights for others: as a checkpoint, for diffusers, or for no program.

    The sampler and its levels are written too, as `--model` gives them here. All formats but
    "checkpoint" are folders with a model card; a model that a format cannot hold is refused.

    "checkpoint" is a file of a plain DDPM without optimiser state, so that a fit cannot go on from
    it, and without absolute paths of this machine. "diffusers" is a folder that `DDIMPipeline`
    reads. "safetensors" is weights, the network's code and a short loader that need PyTorch alone.
    "onnx" and "torch_export" are the network and one step of its sampler as programs.

    Args:
        trainer: Gives the devices.
        model: The model.
        ckpt_path: Checkpoint, or "last".
        output: File or folder to write; there must be none of this name.
        format: What to write.
        label: Class that a folder of diffusers draws, of a model with classes: its pipeline knows
            none.
        metrics: JSON file of `main.py test` or `measure` for the card; by default the results of
            `test` in the run, where they are of this checkpoint and sampling.
        license: Identifier of the licence for the card, such as "apache-2.0"; by default it says
            that none is stated.
        push_to_hub: Repository `owner/name` on the Hugging Face Hub that gets the folder too.

    Raises:
        ValueError: If the output exists, the format cannot hold the model, or the Hub cannot be
            used.
    """
    path = Path(output)
    check_one_of(ExportFormat, format=format)
    _check_output(path, format)
    _check_license(license)
    extras = {"label": label, "metrics": metrics, "license": license, "push_to_hub": push_to_hub}
    if format == "checkpoint":
        _check_unused(extras)

    if push_to_hub is not None:
        make_export(model, cast(Any, format), label)  # says what it cannot hold, before a wait
        check_hub(push_to_hub)

    def work(worker: Worker) -> None:
        if format == "checkpoint":
            if worker.is_first:
                _write_checkpoint(path, model, ckpt_path)
            return
        warn_of_student(model, model.sampler, model.levels)
        made = make_export(model, format, label)  # all workers stop, or none
        # A run's results are of all classes.
        numbers = _numbers(metrics, ckpt_path if label is None else None, model)
        if worker.is_first:
            name = push_to_hub or path.name  # no path of this machine
            config = _exported_config(model, ckpt_path)
            text = card(made, model, name=name, metrics=numbers, config=config, license=license)
            _write_folder(path, made, text)
            print(f"{path}: format {format}, {len(model.levels) - 1} steps, {_size(path):.1f} MB")
            if push_to_hub is not None:
                print(f"{push(path, push_to_hub)}: the same")

    on_every_worker(trainer, model, work, ckpt_path=ckpt_path)


def _check_output(path: Path, format: ExportFormat) -> None:
    if os.path.lexists(path):
        raise ValueError(
            f"output must be a new {_thing(format)}, got {str(path)!r}, which exists: give another"
        )
    if format != "checkpoint" and re.search(r'["\\\n]', path.name):
        raise ValueError(
            f"output must have a name without quotes and backslashes, got {path.name!r}, which "
            "stands in the code of the card: give another"
        )


def _check_license(license: str | None) -> None:
    if license is not None and not re.fullmatch(r"[A-Za-z0-9.+-]+", license):
        raise ValueError(
            f"license must be an identifier as the Hub knows, such as apache-2.0, got {license!r}"
        )


def _thing(format: ExportFormat) -> str:
    return "file" if format == "checkpoint" else "folder"


def _check_unused(extras: dict[str, Any]) -> None:
    for name, value in extras.items():
        if value is not None:
            raise ValueError(
                f"{name} must be left out for format checkpoint, got {value!r}: it has no card "
                "and is not put on the Hub; give --format diffusers or another"
            )


def _write_checkpoint(path: Path, model: DiffusionModule, ckpt_path: str | None) -> None:
    checkpoint = averaged_checkpoint(model, **_own_levels(model))
    checkpoint[CONFIG_KEY] = yaml.safe_dump(_config(ckpt_path, checkpoint["hyper_parameters"]))
    check_writable("output", path.absolute().parent)
    with replacing(path) as part:
        torch.save(checkpoint, part)
    print(f"{path}: the averaged weights, {_size(path):.1f} MB")


def _numbers(
    metrics: str | None, ckpt_path: str | None, model: DiffusionModule
) -> dict[str, Any] | None:
    """What was measured: by the file given, or by the run's own."""
    if metrics is not None:
        return read_metrics(Path(metrics), model)
    return None if ckpt_path is None else metrics_of_run(Path(ckpt_path), model)


def _write_folder(path: Path, made: Export, text: str) -> None:
    check_writable("output", path.absolute().parent)
    with new_folder(path) as folder:
        made.write(folder)
        write_text(folder / "README.md", text)


def _size(path: Path) -> float:
    """Megabytes of a file, or of all in a folder."""
    files = [path, *path.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def _exported_config(model: DiffusionModule, ckpt_path: str | None) -> dict[str, Any]:
    """The config for a card. An imported teacher's data are no more than a place for some."""
    checkpoint = averaged_checkpoint(model, **_own_levels(model))
    config = _config(ckpt_path, checkpoint["hyper_parameters"])
    data = config.get("data") or {}
    if (data.get("init_args") or {}).get("root") == IMAGES:
        del config["data"]
    return config


def without_paths(value: Any) -> Any:
    """Plain data without the entries that hold an absolute path or one of a home folder."""
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if not _is_place(item)}
        return {name: without_paths(item) for name, item in kept.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value if not _is_place(item)]
    return value


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())


def _own_levels(model: DiffusionModule) -> dict[str, Any]:
    """The levels themselves, where the model has them from a file."""
    named = isinstance(model.timesteps, str) and model.timesteps.endswith(".json")
    return {"timesteps": model.levels.tolist()} if named else {}


def _config(ckpt_path: str | None, hyper: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's config with the model that is exported."""
    config = checkpoint_config(Path(ckpt_path), "export") if ckpt_path else {}
    arguments = {name: value for name, value in hyper.items() if not name.startswith("_")}
    config["model"] = {"class_path": hyper["_class_path"], "init_args": arguments}
    config["trainer"] = {
        name: config.get("trainer", {}).get(name)
        for name in ("precision", "logger", "callbacks")
        if name in config.get("trainer", {})
    }
    callbacks = config["trainer"].get("callbacks") or []
    kept = [each for each in callbacks if each["class_path"] != "callbacks.Students"]
    config["trainer"]["callbacks"] = kept
    return without_paths(config)
