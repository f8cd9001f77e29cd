"""Weights as safetensors, with the code of the network and a short loader: a folder without needs.

The code is copied from this package, so that what is written is what was tested.
"""

import inspect
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import save_file
from torch import nn

import ddim_pl.checks
import ddim_pl.exports.loader
import ddim_pl.networks.unet
from ddim_pl.networks.unet import UNet

CODE: tuple[ModuleType, ...] = (
    ddim_pl.exports.loader,
    ddim_pl.networks.unet,
    ddim_pl.checks,
)
"""Modules that are written beside the weights."""


def check_network(network: nn.Module) -> None:
    """Check that a network's code can be written.

    Raises:
        ValueError: If it cannot.
    """
    if not isinstance(network, UNet):
        raise ValueError(
            f"network must be a UNet for format safetensors, got {type(network).__name__}, whose "
            "code needs other packages: use format torch_export or onnx, or diffusers for a "
            "DiffusersUNet"
        )


def write_weights(
    folder: Path, network: nn.Module, steps: list[dict[str, Any]], clip: list[float] | None
) -> None:
    """Write `model.safetensors`, `config.json` and the code that reads them, `loader.py`.

    Args:
        folder: An empty folder.
        network: The network with its weights.
        steps: As of `step_numbers`.
        clip: As of `clip_range`.

    Raises:
        ValueError: As `check_network`.
    """
    check_network(network)
    assert isinstance(network, UNet)
    config = {"network": network.init_args, "steps": steps, "clip": clip}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    plain = {name: each.float().cpu().contiguous() for name, each in network.state_dict().items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    for module in CODE:
        name = module.__name__.rpartition(".")[2]
        (folder / f"{name}.py").write_text(_alone(inspect.getsource(module)))


def _alone(source: str) -> str:
    """The source of a module whose needs lie beside it."""
    return re.sub(r"^from ddim_pl(?:\.\w+)*\.(\w+) import", r"from \1 import", source, flags=re.M)
