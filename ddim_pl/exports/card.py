"""The model card: what an export is, how it is used and what was measured."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

import ddim_pl
from ddim_pl.damage import SEAL, reason_of
from ddim_pl.evaluation.manifest import GUIDANCE, LONG, WEIGHTS, kind_of_weights, sampling_of
from ddim_pl.evaluation.tables import markdown
from ddim_pl.evaluation.worker import knows_steps
from ddim_pl.exports.formats import Export
from ddim_pl.runs import run_of
from ddim_pl.teachers.reading import HUB_NAME
from ddim_pl.training import DiffusionModule

RESULTS = "test-results.json"
"""What `main.py test` writes into a run."""

PATHS = ("checkpoint", "source")
"""Entries of results that are paths."""

KINDS = {"checkpoint", "extractor"}
"""Entries of which results have at least one: those of `test`, and those of `measure`."""

SHOWN = 12
"""Levels that a card lists at most."""


def card(
    export: Export,
    model: DiffusionModule,
    *,
    name: str,
    metrics: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> str:
    """The text of a `README.md`, with the metadata that the Hugging Face Hub reads.

    Args:
        export: What is written beside it.
        model: The model.
        name: Title, and what the code calls the folder.
        metrics: What was measured, as of `read_metrics`.
        config: The model's config and its data, without paths of this machine.
        license: Identifier of the licence, such as "apache-2.0".
    """
    config = dict(config or {})
    parts = {
        "Use": _use(export, name),
        "Sampling": markdown([{"": key, " ": value} for key, value in _sampling(model).items()]),
        "Metrics": _metrics(metrics, export.label),
        "Data": _code("yaml", yaml.safe_dump(config["data"]))
        if "data" in config
        else "Not stated.",
        "Origin": _code("yaml", yaml.safe_dump([*model.origin], sort_keys=False))
        if model.origin
        else "Not stated.",
        "Licence": license or "Not stated: ask whoever made it before you use it.",
        "Config": _code("yaml", yaml.safe_dump({"model": config.get("model")})),
    }
    return "\n".join(
        [
            _metadata(export, model, license),
            f"# {name.rpartition('/')[2]}\n",
            f"{_kind(model, export.label)}, exported by ddim_pl {ddim_pl.__version__}.\n",
            *(f"## {title}\n\n{text.strip()}\n" for title, text in parts.items()),
        ]
    )


def read_metrics(path: Path, model: DiffusionModule) -> dict[str, Any]:
    """What `main.py test` or `main.py measure` has written, flat, without paths.

    Args:
        path: The file.
        model: The model. What a file says of its sampling must be the model's.

    Raises:
        ValueError: If it cannot be read, or is of another sampling.
    """
    try:
        content = json.loads(path.read_text())
        flat = _flat(content)
        if not content.keys() & KINDS:
            raise ValueError(f"it has none of {', '.join(sorted(KINDS))}")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"metrics must be a JSON file of main.py test or measure, got {str(path)!r}, which "
            f"cannot be read as one ({reason_of(error)}): give another"
        ) from None
    # Results of images without guidance have no such entry.
    theirs = ({GUIDANCE: None} if "sampler" in content else {}) | content
    for key, ours in ({GUIDANCE: None} | sampling_of(model)).items():
        if key in theirs and theirs[key] != ours:
            raise ValueError(
                f"metrics must be of the sampling that is exported, got {str(path)!r} with {key} "
                f"{theirs[key]} in place of {ours}: test with the same --model settings"
            )
    return flat


def metrics_of_run(checkpoint: Path, model: DiffusionModule) -> dict[str, Any] | None:
    """The results of `main.py test` of this very file and sampling, if there are some."""
    path = run_of(checkpoint) / RESULTS
    try:
        tested = Path(json.loads(path.read_text())["checkpoint"])
        is_newer = path.stat().st_mtime_ns > checkpoint.stat().st_mtime_ns
        same = tested.is_file() and tested.samefile(checkpoint) and is_newer
        found = read_metrics(path, model) if same else {}
        return found if WEIGHTS in found else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries of nested objects by their paths; of a file's path its name alone."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key == SEAL:
            continue
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key} ")
        elif isinstance(value, list):
            found[prefix + key] = ", ".join(str(_without_folders(key, item)) for item in value)
        else:
            found[prefix + key] = _without_folders(key, value)
    return found


def _without_folders(key: str, value: Any) -> Any:
    is_path = isinstance(value, str) and (key in PATHS or Path(value).is_absolute())
    return Path(value).name if is_path else value


def _metadata(export: Export, model: DiffusionModule, license: str | None) -> str:
    imports = [each for each in model.origin if each["by"] == "import" and each.get("on_hub")]
    bases = [each["source"] for each in imports if re.fullmatch(HUB_NAME, str(each["source"]))]
    content = {
        "license": license or "unknown",
        **({"library_name": export.library} if export.library else {}),
        **({"base_model": bases} if bases else {}),
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "ddim", *export.tags],
    }
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---\n"


def _kind(model: DiffusionModule, label: int | None) -> str:
    count = sum(each.numel() for each in model.average.module.parameters())
    shape = "x".join(map(str, model.image_shape))
    steps = model.distilled_steps
    what = (
        "A diffusion model" if steps is None else f"A diffusion model distilled to {steps} steps"
    )
    classes = "" if model.num_classes is None else f", of {model.num_classes} classes"
    if label is not None:
        classes += f", of which this is class {label} alone"
    return f"{what}; images are {shape} (channels, height, width){classes}. {count:,} parameters"


def _use(export: Export, name: str) -> str:
    lines, folder = [f"Needs {export.needs}."], name
    if export.library != "diffusers" and "/" in name:  # only diffusers reads from the Hub itself
        folder = name.rpartition("/")[2]
        lines.append(f"`hf download {name} --local-dir {folder}` brings the folder.")
    lines += ["", _code("python", export.usage.format(folder=folder))]
    return "\n".join([*lines, *(f"* {note}" for note in export.notes)])


def _sampling(model: DiffusionModule) -> dict[str, Any]:
    levels = [f"{level:g}" for level in model.levels.tolist()]
    if len(levels) > SHOWN:
        levels = [*levels[:3], "...", *levels[-3:]]
    return {
        "sampler": model.sampler,
        "steps": _steps(model),
        "levels": ", ".join(levels),
        "schedule": model.schedule,
        "prediction": model.prediction,
        "clip": model.sampling_clip,
        "time input": model.time_input,
        "weights": f"{kind_of_weights(model)}, float32",
        "PyTorch": torch.__version__,
    }


def _steps(model: DiffusionModule) -> str:
    steps, own = len(model.levels) - 1, model.distilled_steps
    return str(steps) if knows_steps(model, steps) else f"{steps}, but it was distilled to {own}"


def _metrics(metrics: Mapping[str, Any] | None, label: int | None) -> str:
    if not metrics:
        return "None are given."
    lines = ["The name of a distance is that of its extractor."]
    if WEIGHTS in metrics:
        lines.append("Measured on these weights with the sampling stated, in the precision given.")
    else:
        lines.append("As given by whoever exported it, not compared with this model.")
    if label is not None:
        lines.append(f"They are not of class {label} alone, unless the file says so.")
    shown = {name: value for name, value in metrics.items() if name not in LONG}
    table = markdown([{"": name, " ": value} for name, value in shown.items()])
    return f"{table}\n{' '.join(lines)}"


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```\n"
