"""Clipping: what keeps estimates of the clean image in the range of images.

It belongs to how one samples: DDIM's published figures are those of estimates that are not clipped
([DDIM], the authors' `generalized_steps`), but for the row "sigma-hat", which is clipped as DDPM
is (`ddpm_steps`). A sampler's `clip` says so for itself; without one it clips as the model does.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim_pl.scales import expand_like


class Clipping(ABC):
    """A bounded version of an estimate; subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Bounded estimates of the clean image, `(B, ...)`."""


@dataclass(frozen=True)
class ClipRange(Clipping):
    """Clip to a range; by default that of images, [-1, 1] ([DDPM], the authors' code).

    Args:
        low: Least value.
        high: Largest value, above `low`.

    Raises:
        ValueError: If `high` is not above `low`.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(
                f"high must be above low, got {self.low} and {self.high}: images lie in [-1, 1]"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """Clip every value."""
        return x.clamp(self.low, self.high)


@dataclass(frozen=True)
class DynamicThreshold(Clipping):
    """Clip each image to [-s, s] and divide it by s ([Imagen], section 2.3).

    `s` is a quantile of the image's absolute values, at least 1, so that an image within [-1, 1]
    stays as it is.

    Args:
        quantile: In (0, 1]; diffusers' `dynamic_thresholding_ratio`, 0.995 as there.
        most: Largest `s`, at least 1; diffusers' `sample_max_value`. 1 clips to [-1, 1].

    Raises:
        ValueError: If an argument is out of range.
    """

    quantile: float = 0.995
    most: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile must lie in (0, 1], got {self.quantile}: 0.995 is usual")
        if not self.most >= 1:
            raise ValueError(f"most must be at least 1, got {self.most}: 1 clips to [-1, 1]")

    def __call__(self, x: Tensor) -> Tensor:
        """Clip every image to its own range."""
        size = _quantile(x.detach().abs().flatten(1).float(), self.quantile)
        most = None if math.isinf(self.most) else self.most  # ONNX has no infinite bound
        size = expand_like(size.clamp(1, most), x)
        return x.clamp(-size, size) / size


def clipping_of(clip: bool | Clipping) -> Clipping | None:
    """The rule of a setting: True is [-1, 1], False none."""
    if isinstance(clip, bool):
        return ClipRange() if clip else None
    return clip


def _quantile(values: Tensor, share: float) -> Tensor:
    """Quantile of each row, `(B,)`, linear between values; torch's is limited to 2^24 values."""
    values = values.sort(1).values
    place = share * (values.shape[1] - 1)
    lower = math.floor(place)
    upper = min(lower + 1, values.shape[1] - 1)
    return torch.lerp(values[:, lower], values[:, upper], place - lower)
