"""The pair (alpha, sigma) of a level, and its broadcast to a batch of images."""

from typing import NamedTuple

import torch
from torch import Tensor


class Scales(NamedTuple):
    """Signal and noise scales `alpha`, `sigma`: float64 tensors of one shape, `()` or `(B,)`."""

    alpha: Tensor
    sigma: Tensor

    @property
    def log_snr(self) -> Tensor:
        """Log signal-to-noise ratio `lambda = 2 log(alpha / sigma)`; infinite where sigma is 0."""
        return 2 * (self.alpha.log() - self.sigma.log())

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio `alpha^2 / sigma^2`."""
        return (self.alpha / self.sigma) ** 2


def combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """`a x + b y` of batches `(B, ...)`, for float64 coefficients as `expand_like` takes them."""
    return add_scaled(expand_like(a, x) * x, b, y)


def add_scaled(x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """`x + b y` of batches `(B, ...)`; a scalar b on the CPU goes into the kernel of the sum."""
    if b.ndim or b.device.type != "cpu" or torch.compiler.is_compiling():
        return x + expand_like(b, y) * y
    return torch.add(x, y, alpha=b.item())


def expand_like(coefficient: Tensor, like: Tensor) -> Tensor:
    """Broadcast a float64 coefficient of shape `()`, `(B,)` or `(B, S)` to a batch `(B, ...)`.

    A scalar is returned unchanged: in PyTorch it multiplies a tensor of any dtype and device.
    Other values are cast to the batch's dtype and device, see `unsqueeze_like`.
    """
    return unsqueeze_like(coefficient.to(like.dtype), like) if coefficient.ndim else coefficient


def unsqueeze_like(values: Tensor, like: Tensor) -> Tensor:
    """Move values to the device of `like` and add trailing axes of length 1, as many as it has."""
    return to_device(values, like).reshape(*values.shape, *(1,) * (like.ndim - values.ndim))


def to_device(values: Tensor, like: Tensor) -> Tensor:
    """Move values to the device of `like` without waiting for the work queued there."""
    return values.to(like.device, non_blocking=like.is_cuda)


def float64(values: Tensor) -> Tensor:
    """Cast to float64 on the same device, or on the CPU if the device (MPS) has no float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()
