"""What is read of a teacher, and how files of others are read."""

import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ddim_pl.damage import reason_of

FORBIDDEN = r"GLOBAL ([\w.]+)"
"""How PyTorch names what a file of weights would run."""


@dataclass(frozen=True)
class Teacher:
    """A network with its weights, and how to sample it.

    Args:
        network: The network.
        settings: Arguments of `DDPM` beside the network.
        notes: What the user should know of how the source was read, a line each.
    """

    network: nn.Module
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def read_tensors_of(path: Path) -> Any:
    """What a file of weights holds, safetensors or of `torch.save`; no code of it is run.

    Args:
        path: The file.

    Raises:
        ValueError: If it cannot be read, or names what it may not name.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles of other forms
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes may say anything
        found = re.search(FORBIDDEN, str(error))
        if found:
            raise ValueError(
                f"source {str(path)!r} names {found[1]}, which is refused: a file of weights may "
                "hold tensors and plain data; save its state_dict alone, or as safetensors"
            ) from None
        raise ValueError(
            f"source must be a file of weights, got {str(path)!r}, which cannot be read as one "
            f"({reason_of(error)}): it is damaged, or of another program"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Content of a config.

    Raises:
        ValueError: If it cannot be read, or holds no object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must be a config of diffusers, got a file that cannot be read "
            f"({reason_of(error)}): give another"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {type(content).__name__}")
    return content
