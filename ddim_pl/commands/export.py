"""`main.py export`: a checkpoint to give to others."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from ddim_pl.evaluation.worker import Worker, on_every_worker
from ddim_pl.files import replacing
from ddim_pl.runs import checkpoint_config
from ddim_pl.training import DiffusionModule
from ddim_pl.training.ddpm import averaged_checkpoint
from ddim_pl.training.hyperparameters import CONFIG_KEY


def export(
    trainer: L.Trainer,
    model: DiffusionModule,
    ckpt_path: str | None = None,
    *,
    output: str,
) -> None:
    """Write the averaged weights alone, as a checkpoint of a plain DDPM to give to others.

    It is sampled, tested and distilled like any other, with `--model` as given here. It has no
    optimiser state, so that a fit cannot go on from it, and no absolute path of this machine.

    Args:
        trainer: Gives the devices.
        model: The model.
        ckpt_path: Checkpoint, or "last".
        output: File to write; there must be none of this name.

    Raises:
        ValueError: If the file exists.
    """
    path = Path(output)
    if path.exists():
        raise ValueError(f"output must be a new file, got {output!r}, which exists: give another")

    def work(worker: Worker) -> None:
        if worker.is_first:
            checkpoint = averaged_checkpoint(model, **_own_levels(model))
            config = _config(ckpt_path, checkpoint["hyper_parameters"])
            checkpoint[CONFIG_KEY] = yaml.safe_dump(config)
            with replacing(path) as part:
                torch.save(checkpoint, part)
            print(f"{output}: the averaged weights, {path.stat().st_size / 1e6:.1f} MB")

    on_every_worker(trainer, model, work, ckpt_path=ckpt_path)


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
