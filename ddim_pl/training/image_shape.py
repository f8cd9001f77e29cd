"""The shape of a model's images."""

from collections.abc import Iterable
from typing import cast

from torch import nn


def image_shape_of(network: nn.Module, shape: Iterable[int] | None = None) -> tuple[int, int, int]:
    """Shape `(C, H, W)` of a model's images: as given, or else as the network says.

    Raises:
        ValueError: If neither says it, or it is none.
    """
    if shape is None:
        if not (hasattr(network, "in_channels") and hasattr(network, "image_size")):
            raise ValueError(
                f"image_shape must be given: {type(network).__name__} has no attributes "
                "in_channels and image_size to read it from"
            )
        channels, side = cast(int, network.in_channels), cast(int, network.image_size)
        shape = (channels, side, side)
    shape = tuple(shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"image_shape must be (channels, height, width), got {shape}")
    return shape
