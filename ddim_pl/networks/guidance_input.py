"""The weight of guidance as an input of a network, for distilled guidance ([Distilled])."""

import math
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


def read_guidance_range(given: Any) -> list[float]:
    """The lowest and the highest weight of guidance that are given as a network's input.

    Raises:
        ValueError: If they are not two numbers, or 1, which is no guidance, is not among them.
    """
    try:
        low, high = map(float, given)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not 0 <= low <= 1 < high < math.inf:
        raise ValueError(
            "guidance_range must be the lowest and the highest weight of guidance, with 1, which "
            f"is none, among them, got {given}: such as [1.0, 4.0]"
        )
    return [low, high]


def check_guidance_range(weights: Sequence[float] | None, num_classes: int | None) -> None:
    """Check that only a network with classes takes the weight of guidance.

    Raises:
        ValueError: If another does.
    """
    if weights is not None and num_classes is None:
        raise ValueError(
            f"guidance_range must be left out for a network without classes, got {[*weights]}"
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
