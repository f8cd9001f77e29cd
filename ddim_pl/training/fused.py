"""Optimisers that update all weights in one kernel."""

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer


def use_fused_kernels(optimizer: Optimizer) -> None:
    """Let Adam and AdamW update weights on a CUDA device by PyTorch's fused kernels.

    They take a tenth of the time of the host, and can leave out an update that the device finds
    bad. Other optimisers, other devices, and an optimiser that was told how to update stay as they
    are. A run that goes on from a checkpoint keeps what that run had.
    """
    if type(optimizer) not in (Adam, AdamW):
        return
    groups = optimizer.param_groups
    told = any(g.get(name) for g in groups for name in ("foreach", "capturable", "differentiable"))
    told = told or any(group.get("fused") is not None for group in groups)
    on_cuda = all(p.is_cuda and p.is_floating_point() for g in groups for p in g["params"])
    if told or not on_cuda:
        return
    for group in groups:
        # Not by the constructor's argument: with it Lightning refuses to clip gradients in mixed
        # precision, because a fused step can divide them by a scale, which is not used here.
        group["fused"] = True
    optimizer.defaults["fused"] = True


def keep_layout(optimizer: Optimizer) -> None:
    """Let states that are read from a checkpoint have the layout in memory of their weights.

    Where the weights have their channels last, as on a GPU, and those of the run that wrote it had
    not, or the other way round, a fused kernel would refuse them.
    """

    def relay(optimizer: Optimizer) -> None:
        for weight, state in optimizer.state.items():
            for name, value in state.items():
                # A number has no layout; Adam's own, of updates, may have to stay on the host.
                if isinstance(value, Tensor) and value.ndim and value.shape == weight.shape:
                    state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)

    optimizer.register_load_state_dict_post_hook(relay)
