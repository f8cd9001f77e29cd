"""From images to latents: by encoding, or by gradient descent."""

from ddim_pl.inversion.encode import encode, forward_trajectory, reconstruct, slerp
from ddim_pl.inversion.optimise import (
    Carry,
    Generated,
    Implicit,
    InverseJacobian,
    Inversion,
    Method,
    Progress,
    Sequential,
    check_stop_below,
    invert,
)

__all__ = [
    "Carry",
    "Generated",
    "Implicit",
    "InverseJacobian",
    "Inversion",
    "Method",
    "Progress",
    "Sequential",
    "check_stop_below",
    "encode",
    "forward_trajectory",
    "invert",
    "reconstruct",
    "slerp",
]
