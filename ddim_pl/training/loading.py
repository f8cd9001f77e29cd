"""Reading a model from a checkpoint of this package."""

from pathlib import Path
from typing import Any

from ddim_pl.damage import read_archive, reason_of
from ddim_pl.training.base import DiffusionModule
from ddim_pl.training.finite import NotFiniteError
from ddim_pl.trust import UntrustedError, trusted_class, trusting


def load(
    path: str | Path, *, trust: bool = False, name: str = "path", **changes: Any
) -> DiffusionModule:
    """Read the model that a checkpoint holds, in evaluation mode on the CPU, ready to sample.

    Args:
        path: Checkpoint of a training run or of a student.
        trust: Build whatever classes the file names; by default those of `ddim_pl.trust` only.
        name: What an error calls it.
        **changes: Arguments of the model in place of the checkpoint's, such as
            `sampling_precision="bf16"`.

    Raises:
        UntrustedError: If the file names a class that is not trusted.
        ValueError: If the file cannot be read, is no checkpoint of this package, or holds weights
            that are not finite.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"{name} must be a checkpoint of this package, got {str(path)!r}, which is no file"
        )
    try:
        with trusting(*(["*"] if trust else [])):
            checkpoint = read_archive(path, name)
            kind = trusted_class(checkpoint["hyper_parameters"]["_class_path"], "the checkpoint")
            if not issubclass(kind, DiffusionModule):
                raise TypeError(f"{kind.__name__} is no DiffusionModule")
            module = kind.load_from_checkpoint(path, map_location="cpu", **changes)
    except UntrustedError as error:
        raise UntrustedError(f"{name} {str(path)!r}: {error}") from None
    except NotFiniteError as error:
        raise NotFiniteError(f"{name} {str(path)!r}: {error}") from None
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name} must be a checkpoint of this package, got {str(path)!r}, which cannot be "
            f"read as one ({reason_of(error)}): give another file"
        ) from error
    return module.eval()
