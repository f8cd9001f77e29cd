"""A network, and one step of its sampler, as programs: ONNX, and those of `torch.export`.

Both take any number of images. The network maps `z` `(B, C, H, W)`, `t` `(B,)` and, if it has
classes, `label` `(B,)` to its output; the step maps `z`, its number `k` `()`, standard normal
noise where the sampler is stochastic, and `label` to the next state.
"""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim_pl.clipping import Clipping
from ddim_pl.damage import reason_of
from ddim_pl.exports.loader import Step
from ddim_pl.networks.diffusers import DiffusersUNet

ONNX = ("onnx", "onnxscript")
"""Packages that write ONNX."""

MOST_IN_ONE = 1.9e9
"""Bytes of weights that a file of ONNX holds; more lie beside it."""


def check_onnx() -> None:
    """Check that what writes ONNX is installed.

    Raises:
        ValueError: If it is not.
    """
    missing = [name for name in ONNX if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"format onnx needs {' and '.join(missing)}, which are not installed: pip install "
            "'ddim_pl[onnx]', or use format torch_export"
        )


class _Deterministic(nn.Module):
    """A step without noise, whose inputs have no gap."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, z: Tensor, k: Tensor, label: Tensor | None = None) -> Tensor:
        """The next state."""
        state: Tensor = self.step(z, k, None, label)
        return state


def write_graphs(
    folder: Path,
    network: nn.Module,
    image_shape: tuple[int, int, int],
    steps: list[dict[str, Any]],
    clip: Clipping | None,
    *,
    onnx: bool,
) -> None:
    """Write `network` and `step`, as `.onnx` or, for `torch.export.load`, `.pt2`.

    Args:
        folder: An empty folder.
        network: The network with its weights.
        image_shape: `(C, H, W)`.
        steps: As of `step_numbers`.
        clip: The rule of clipping.
        onnx: The format.

    Raises:
        ValueError: If PyTorch cannot trace the network for any number of images.
    """
    network = copy.deepcopy(network).float().cpu().eval().requires_grad_(False)
    network.to(memory_format=torch.contiguous_format)
    if isinstance(network, DiffusersUNet):
        network.take_any_batch()
    stochastic = any(step["noise_weight"] for step in steps)
    labels = {"label": torch.zeros(2, dtype=torch.long)}
    more = labels if getattr(network, "num_classes", None) else {}
    z, whole = torch.zeros(2, *image_shape), Step(network, steps, clip)
    noise = {"noise": torch.zeros_like(z)} if stochastic else {}
    first = {"z": z, "k": torch.tensor(0)}
    programs: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {
        "network": (network, {"z": z, "t": torch.zeros(2), **more}),
        "step": (whole if stochastic else _Deterministic(whole), {**first, **noise, **more}),
    }
    write: Callable[..., None] = _write_onnx if onnx else _write_program
    for name, (module, inputs) in programs.items():
        try:
            write(folder / name, module, inputs)
        except Exception as error:  # of whatever a network does
            raise ValueError(
                f"network must be one that torch.export can trace for any number of images, got "
                f"{type(network).__name__} ({reason_of(error)}): {_remedy(network, error)}"
            ) from error


def _remedy(network: nn.Module, error: Exception) -> str:
    """What could be done, by what PyTorch says."""
    other = "diffusers" if isinstance(network, DiffusersUNet) else "checkpoint"
    if "Constraints violated" in str(error):
        return f"its forward branches on that number; change it, or use format {other}"
    if "data-dependent" in str(error):
        return f"its forward branches on values of tensors; change it, or use format {other}"
    return f"use format {other}"


def _exported(module: nn.Module, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    # In the order of the arguments: positional ones keep it in ONNX too.
    shapes = tuple({0: batch} if each.ndim else None for each in inputs.values())
    names = [*inputs]
    return torch.export.export(module, tuple(inputs[n] for n in names), dynamic_shapes=shapes)


def _write_program(path: Path, module: nn.Module, inputs: dict[str, Tensor]) -> None:
    torch.export.save(_exported(module, inputs), path.with_suffix(".pt2"))


def _write_onnx(path: Path, module: nn.Module, inputs: dict[str, Tensor]) -> None:
    size = sum(each.numel() * each.element_size() for each in module.state_dict().values())
    torch.onnx.export(
        _exported(module, inputs),
        f=path.with_suffix(".onnx"),
        input_names=[*inputs],
        output_names=["output"],
        dynamo=True,
        external_data=size > MOST_IN_ONE,
        verbose=False,
    )
