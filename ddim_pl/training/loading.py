"""Reading a model from a checkpoint of this package."""

import pickle
import sys
from pathlib import Path

import torch

from ddim_pl.training.base import DiffusionModule


def load(path: str | Path, *, name: str = "path") -> DiffusionModule:
    """Read the model that a checkpoint holds, in evaluation mode on the CPU, ready to sample.

    Args:
        path: Checkpoint of a training run or of a student.
        name: What an error calls it.

    Raises:
        ValueError: If the file cannot be read, or is no checkpoint of this package.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"{name} must be a checkpoint of this package, got {str(path)!r}, which is no file"
        )
    try:
        # Mapped, not read: only the name of the class is wanted here.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        class_path = checkpoint["hyper_parameters"]["_class_path"]
        home, _, class_name = class_path.rpartition(".")
        kind = getattr(sys.modules.get(home), class_name, None)
        if not (isinstance(kind, type) and issubclass(kind, DiffusionModule)):
            raise TypeError(f"{class_path} is no DiffusionModule that is imported")
        module = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"{name} must be a checkpoint of this package, got {str(path)!r}, which cannot be "
            f"read as one ({reason}): give another file"
        ) from error
    return module.eval()
