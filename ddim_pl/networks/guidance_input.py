"""The weight of guidance as an input of a network, for distilled guidance ([Distilled])."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddim_pl.networks.sinusoid import sinusoidal_embedding

MOST = 1000.0
"""What the highest weight is embedded as, as if it were a time."""


class GuidanceInput(nn.Module):
    """Embed weights of guidance as times are, by sines and cosines and then a linear map.

    The map begins as zero, so that a network that is given this input does at first what it did
    without.

    Args:
        weights: The lowest and the highest weight that the network learns, see
            `check_guidance_range`.
        width: Of the sinusoidal embedding.
        out_width: Of what is added to the network's embedding.
    """

    def __init__(self, weights: Sequence[float], width: int, out_width: int) -> None:
        super().__init__()
        self.low, self.high = float(weights[0]), float(weights[1])
        self.linear = nn.Linear(width, out_width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, guidance: Tensor) -> Tensor:
        """Map weights (B,) to (B, out_width)."""
        place = (guidance.float() - self.low) * (MOST / (self.high - self.low))
        sines = sinusoidal_embedding(place, self.linear.in_features)
        found: Tensor = self.linear(sines.to(self.linear.weight.dtype))
        return found


def guidance_input(args: dict[str, Any], width: int, out_width: int) -> GuidanceInput | None:
    """That of a network with these arguments, if its `guidance_range` says that it has one.

    Where the network's other weights come from is not changed by it: it draws no random numbers.
    """
    weights = args["guidance_range"]
    if weights is None:
        return None
    with torch.random.fork_rng(devices=[]):
        return GuidanceInput(weights, width, out_width)


def check_guidance_range(weights: Sequence[float] | None, num_classes: int | None) -> None:
    """Check that weights of guidance can be a network's input.

    Args:
        weights: The lowest and the highest; None for a network without such an input.
        num_classes: The network's number of classes.

    Raises:
        ValueError: If they cannot.
    """
    if weights is None:
        return
    if num_classes is None:
        raise ValueError(
            f"guidance_range must be left out for a network without classes, got {[*weights]}"
        )
    if len(weights) != 2 or not 0 <= weights[0] <= 1 < weights[1] < float("inf"):
        raise ValueError(
            "guidance_range must be the lowest and the highest weight of guidance, with 1, which "
            f"is none, among them, got {[*weights]}: such as [1.0, 4.0]"
        )


def check_guidance(
    guidance: Tensor | None, network_range: Sequence[float] | None, z: Tensor
) -> None:
    """Check that a network is fed weights of guidance if it has an input for them.

    Raises:
        ValueError: If it is not, or their shape is wrong.
    """
    if (guidance is None) != (network_range is None):
        raise ValueError(
            "guidance must be given if and only if the network has a guidance_range, got "
            f"{'none' if guidance is None else 'weights'} and guidance_range={network_range}"
        )
    if guidance is not None and guidance.shape != z.shape[:1]:
        raise ValueError(
            f"guidance must have shape ({z.shape[0]},), got {tuple(guidance.shape)}: give one "
            "weight per image"
        )
