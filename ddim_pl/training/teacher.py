"""Reading a teacher: any checkpoint of this package, by its averaged weights."""

import copy
import pickle
import sys
from pathlib import Path

import torch
from torch import nn

from ddim_pl.training.base import DiffusionModule


def load_teacher(path: str) -> DiffusionModule:
    """Read the module that a checkpoint holds, on the CPU.

    Raises:
        ValueError: If the file cannot be read, or is no checkpoint of this package.
    """
    if not Path(path).is_file():
        raise ValueError(f"teacher {path!r} is not a file: give a checkpoint of this package")
    try:
        # Mapped, not read: only the name of the class is wanted here.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        kind = _module_class(checkpoint["hyper_parameters"]["_class_path"])
        return kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError) as error:
        raise ValueError(
            f"teacher {path!r} cannot be read as a checkpoint of this package "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): give another file"
        ) from error


def _module_class(path: str) -> type[DiffusionModule]:
    """The class of this name, if it is a DiffusionModule and imported already."""
    module, _, name = path.rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, DiffusionModule)):
        raise TypeError(f"{path} is no DiffusionModule that is imported")
    return kind


def student_network(teacher: DiffusionModule, dropout: float) -> nn.Module:
    """A copy of the teacher's averaged network, with gradients and this much dropout."""
    network = copy.deepcopy(teacher.average.module)
    set_dropout(network, dropout)
    return network.requires_grad_(True).train()


def set_dropout(network: nn.Module, dropout: float) -> None:
    """Set the rate of every dropout layer, also in what the network says of its arguments."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    arguments = getattr(network, "init_args", None)
    if isinstance(arguments, dict) and "dropout" in arguments:
        arguments["dropout"] = dropout


def check_same_kind(teacher: DiffusionModule, student: DiffusionModule, path: str) -> None:
    """See that a student can begin from a teacher's weights.

    Raises:
        ValueError: If image size, schedule, noise, time input or network differ.
    """
    pairs = {
        "image_shape": (teacher.image_shape, student.image_shape),
        "schedule": (teacher.schedule, student.schedule),
        "noise": (teacher.noise, student.noise),
        "time_input": (teacher.time_input, student.time_input),
    }
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ValueError(
                f"teacher {path!r} has {name} {theirs}, but the student is given {ours}: leave "
                f"{name if name != 'image_shape' else 'network'} out to take the teacher's"
            )
    theirs_state = {k: v.shape for k, v in teacher.average.module.state_dict().items()}
    ours_state = {k: v.shape for k, v in student.network.state_dict().items()}
    if theirs_state != ours_state:
        different = sorted(set(theirs_state.items()) ^ set(ours_state.items()))
        raise ValueError(
            f"teacher {path!r} has another network than the student ({different[0][0]} differs): "
            "leave network out to take the teacher's"
        )


def check_steps(teacher: DiffusionModule, steps: int, path: str) -> None:
    """See that a teacher that was distilled itself is asked for the steps it knows.

    Raises:
        ValueError: If it was distilled to another number.
    """
    if teacher.distilled_steps not in (None, steps):
        raise ValueError(
            f"teacher {path!r} was distilled to {teacher.distilled_steps} steps and knows no "
            f"other levels, but is asked for {steps}"
        )


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers of one network into another of the same kind."""
    for name, value in target.state_dict().items():
        value.copy_(source.state_dict()[name])
