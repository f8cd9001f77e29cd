"""The averaged copy of a network, which is the one to evaluate, export and promote to teacher."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def exponential_average(network: nn.Module, decay: float) -> AveragedModel:
    """Averaged copy of `network`, buffers included, without gradients and in evaluation mode.

    Update number n keeps `min(decay, (1 + n) / (10 + n))` of the average, as TensorFlow's averages
    of [DDPM] do when given the number of updates, so that a short run forgets its random
    start.

    Args:
        network: Network to copy.
        decay: Share of the average that an update keeps, in [0, 1); 0 copies the network.

    Raises:
        ValueError: If `decay` lies outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(
            f"ema_decay must lie in [0, 1), got {decay}: 0.9999 suits 800k updates, 0.999 some 10k"
        )
    average = AveragedModel(network, multi_avg_fn=partial(_update, decay), use_buffers=True)
    # Frozen, so that neither DDP nor the optimiser takes the copy for something to train.
    return average.requires_grad_(False).eval()


@torch.no_grad()
def _update(decay: float, average: list[Tensor], current: list[Tensor], count: Tensor) -> None:
    """Move the average towards the current values; tensors of one device and dtype."""
    n = int(count)
    keep = min(decay, (1 + n) / (10 + n))
    if average[0].is_floating_point():
        torch._foreach_lerp_(average, current, 1 - keep)
    else:
        torch._foreach_copy_(average, current)
