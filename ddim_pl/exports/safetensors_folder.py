"""Weights as safetensors, with the code of the network and a short loader: a folder without needs.

The code is copied from this package, so that what is written is what was tested.
"""

import dataclasses
import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

import ddim_pl.exports.loader
from ddim_pl.clipping import Clipping
from ddim_pl.networks.diffusers import DiffusersUNet
from ddim_pl.networks.songunet import SongUNet
from ddim_pl.networks.unet import UNet

NETWORKS = (UNet, SongUNet)
"""Networks whose code needs PyTorch alone."""

OWN_IMPORT = re.compile(r"^from (ddim_pl(?:\.\w+)*)\.(\w+) import", re.MULTILINE)
FIRST_LINE = '"""The code of the network and of its clipping, files of ddim_pl, Apache-2.0."""\n'


def check_network(network: nn.Module) -> None:
    """Check that a network's code can be written.

    Raises:
        ValueError: If it cannot.
    """
    if type(network) not in NETWORKS:
        names = " or ".join(kind.__name__ for kind in NETWORKS)
        other = "diffusers" if isinstance(network, DiffusersUNet) else "torch_export or onnx"
        raise ValueError(
            f"network must be a {names} for format safetensors, got {type(network).__name__}, "
            f"whose code needs other packages: use format {other}"
        )


def check_clip(clip: Clipping | None) -> None:
    """Check that the code of a rule of clipping can be written.

    Raises:
        ValueError: If it is not one of ours.
    """
    if clip is not None and type(clip).__module__ != Clipping.__module__:
        raise ValueError(
            f"clip must be true, false, a ClipRange or a DynamicThreshold for format safetensors, "
            f"got {clip}, whose code is not copied: use format torch_export or onnx"
        )


def write_weights(
    folder: Path, network: nn.Module, steps: list[dict[str, Any]], clip: Clipping | None
) -> None:
    """Write `model.safetensors`, `config.json` and what reads them: `loader.py` and `code`.

    Args:
        folder: An empty folder.
        network: The network with its weights.
        steps: As of `step_numbers`.
        clip: The rule of clipping.

    Raises:
        ValueError: As `check_network` and `check_clip`.
    """
    check_network(network)
    check_clip(clip)
    assert isinstance(network, NETWORKS)
    config = {
        "network": _described(network, network.init_args),
        "steps": steps,
        "clip": None if clip is None else _described(clip, _arguments(clip)),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    plain = {name: each.float().cpu().contiguous() for name, each in network.state_dict().items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "loader.py").write_text(inspect.getsource(ddim_pl.exports.loader))
    code = {"__init__": FIRST_LINE} | _sources(type(network).__module__)
    if clip is not None:
        code |= _sources(type(clip).__module__)
    (folder / "code").mkdir()
    for name, text in code.items():
        (folder / "code" / f"{name}.py").write_text(text)


def _described(thing: object, arguments: dict[str, Any]) -> dict[str, Any]:
    module, name = type(thing).__module__.rpartition(".")[2], type(thing).__name__
    return {"module": module, "class": name, "init_args": arguments}


def _arguments(clip: Any) -> dict[str, Any]:
    """Those that are not the default, which may be infinite."""
    fields = {field.name: field.default for field in dataclasses.fields(clip)}
    given = {name: getattr(clip, name) for name in fields}
    return {name: value for name, value in given.items() if value != fields[name]}


def _sources(module: str) -> dict[str, str]:
    """Sources, by name, of a module and of what it imports of this package, side by side."""
    text = inspect.getsource(importlib.import_module(module))
    found = {module.rpartition(".")[2]: OWN_IMPORT.sub(r"from .\2 import", text)}
    for package, name in OWN_IMPORT.findall(text):
        found |= _sources(f"{package}.{name}")
    return found
