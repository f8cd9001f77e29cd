"""How far the fits of a study are: images, operations, losses and distances, from their own logs.

Nothing is measured here: the numbers are those that each fit wrote while it trained, so that the
page shows a fit that is stopped as far as it has come.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from claim_rules import Panel, Row, spread
from limits import count_flops
from measuring import ROOT
from studies import Fit, Study
from subjects import build
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

LOSS = "val/loss"


@dataclass(frozen=True)
class Progress:
    """What a fit has written so far.

    Args:
        images: That its updates have seen.
        losses: Of the averaged weights on validation images, by images seen.
        distances: Of its samples, by images seen; empty if the config measures none.
        of: How these distances were measured, in words.
    """

    images: int
    losses: Mapping[int, float]
    distances: Mapping[int, float]
    of: str = ""


def progress(run: Path, extractor: str) -> Progress | None:
    """Read the logs of a run, such as `runs/NAME/version_0`; None if it has validated nothing."""
    config = run / "config.yaml"
    if not config.is_file():
        return None
    events = EventAccumulator(str(run), size_guidance={SCALARS: 0})
    events.Reload()
    known = events.Tags()["scalars"]
    settings = yaml.safe_load(config.read_text())
    batch = settings["data"]["init_args"]["batch_size"]

    def by_images(tag: str) -> dict[int, float]:
        # Steps are counted from 0; one that is written again after a kill holds.
        points = events.Scalars(tag) if tag in known else []
        return {(point.step + 1) * batch: point.value for point in points}

    losses = by_images(LOSS)
    if not losses:
        return None
    return Progress(max(losses), losses, by_images(f"val/{extractor}_fd"), _measured(settings))


def _measured(settings: Mapping[str, Any]) -> str:
    """How the distances of a run were measured."""
    for callback in settings["trainer"]["callbacks"]:
        if callback["class_path"].endswith("FrechetDistance"):
            count = callback["init_args"]["num_samples"]
            steps = settings["model"]["init_args"].get("num_steps")
            return f"{count:,} images" + (f", {steps} steps" if steps else "")
    return ""


def trained(
    study: Study, runs: Mapping[str, Mapping[int, Path]]
) -> tuple[list[Row], Panel | None]:
    """A table of all fits that have begun, and distances against the images they saw.

    Args:
        study: Whose fits they are.
        runs: Folders of the fits, by their names and seeds.
    """
    rows: list[Row] = []
    lines: dict[str, dict[int, list[float]]] = {}
    for name, folders in runs.items():
        read = (progress(run, study.extractor) for run in folders.values())
        found = [each for each in read if each]
        if not found:
            continue
        fit = study.fits[name]
        work = [each.images * fit.passes * _flops(_network_file(study, fit)) for each in found]
        row: dict[str, Any] = {"model": name, "seeds": len(found)}
        row["images seen"] = " / ".join(f"{n:,}" for n in sorted({each.images for each in found}))
        row["PFLOP"] = spread([each / 1e15 for each in work])
        row["validation loss"] = spread([[*each.losses.values()][-1] for each in found])
        rows.append(row)
        for each in found:
            for images, distance in each.distances.items():
                label = f"{name}: {each.of}"
                lines.setdefault(label, {}).setdefault(images, []).append(distance)
    return rows, Panel("images seen in training", "FD", lines, log="y") if lines else None


def _network_file(study: Study, fit: Fit) -> str:
    """The config that describes the network of a fit, which a student has from its teacher."""
    return _network_file(study, study.fits[fit.teacher]) if fit.teacher else fit.config


@cache
def _flops(config: str) -> int:
    """Operations of the network of a config for one image."""
    network = yaml.safe_load((ROOT / config).read_text())["model"]["init_args"]["network"]
    arguments = network["init_args"]
    size, channels = arguments["image_size"], arguments["in_channels"]
    inputs: Sequence[torch.Tensor] = (torch.zeros(1, channels, size, size), torch.zeros(1))
    if arguments.get("num_classes"):
        inputs = (*inputs, torch.zeros(1, dtype=torch.long))
    return count_flops(build(network).eval(), *inputs)
