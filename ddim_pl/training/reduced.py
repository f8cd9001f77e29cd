"""A copy of a network in bfloat16, with which images are drawn in a fraction of the time."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

NetworkPrecision = Literal[32, "bf16"]
"""Precision of the weights and activations of a network that is only evaluated: 32 as they are."""


class ReducedCopy:
    """A bfloat16 copy of a network, with its channels last, that follows its weights.

    States, schedules and the arithmetic of the steps stay in float32 around it. It pays where the
    device multiplies matrices of bfloat16 faster: GPUs, and CPUs with AMX.
    """

    def __init__(self) -> None:
        self._copy: nn.Module | None = None
        self._kind: Any = None
        self._state: Any = None

    def of(self, network: nn.Module) -> nn.Module:
        """Return the copy, with the network's present values; compiled, if the network is."""
        values = _values(network)
        is_compiled = network._compiled_call_impl is not None
        kind = is_compiled, [(each.shape, each.device, each.dtype) for each in values]
        # Tensors of inference mode count no changes: they are copied each time.
        counted = not any(each.is_inference() for each in values)
        state = [(id(each), each._version, each.data_ptr()) for each in values if counted]
        # Also for gradients with respect to its input, whatever mode it is first asked for in.
        with torch.inference_mode(False), torch.no_grad():
            if self._copy is None or kind != self._kind:
                made = copy.deepcopy(network).to(torch.bfloat16)
                made = made.to(memory_format=torch.channels_last)
                if is_compiled:
                    made.compile()
                self._copy, self._kind = made.requires_grad_(False).eval(), kind
            elif state != self._state or not counted:
                for mine, value in zip(_values(self._copy), values, strict=True):
                    mine.copy_(value)
        self._state = state
        return self._copy

    def __deepcopy__(self, memo: dict[int, Any]) -> "ReducedCopy":
        """A copy of the module that holds this one makes its own."""
        return ReducedCopy()

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing of it goes into files or to other processes."""
        return ReducedCopy, ()


def _values(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
