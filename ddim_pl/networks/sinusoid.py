"""The sinusoidal embedding of times of [DDPM]."""

import math

import torch
from torch import Tensor


def sinusoidal_embedding(t: Tensor, width: int) -> Tensor:
    """Embed times as `width / 2` sines, then as many cosines ([DDPM], their code).

    The frequencies decrease from 1 to 1/10000. Computed in float32 at least: 999 and 1000 are
    equal in bfloat16.

    Args:
        t: Times, (B,).
        width: Even, at least 4.

    Returns:
        (B, width), float32 or, for float64 times, float64.

    Example:
        >>> sinusoidal_embedding(torch.tensor([0.0]), 4)
        tensor([[0., 0., 1., 1.]])
    """
    half = width // 2
    dtype = torch.promote_types(t.dtype, torch.float32)
    exponents = torch.arange(half, dtype=dtype, device=t.device) / (half - 1)
    angles = t.to(dtype)[:, None] * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
