"""Float32 that is float32, whatever the global switches say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_BACKENDS: Any = torch.backends  # whose types leave most of them out
SWITCHES = (
    _BACKENDS.cuda.matmul,
    _BACKENDS.cudnn.conv,
    _BACKENDS.cudnn.rnn,
    _BACKENDS.mkldnn.matmul,
    _BACKENDS.mkldnn.conv,
    _BACKENDS.mkldnn.rnn,
)


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute products and convolutions of float32 in float32, not in TF32 or bfloat16.

    PyTorch allows TF32 in convolutions on CUDA by default; `set_float32_matmul_precision` allows
    more. The switches are as before afterwards. PyTorch's older ones (`allow_tf32`) cannot be read
    within the block.
    """
    before = [switch.fp32_precision for switch in SWITCHES]
    try:
        for switch in SWITCHES:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(SWITCHES, before, strict=True):
            switch.fp32_precision = value
