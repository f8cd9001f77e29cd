"""Images as pictures: uint8, grids and PNG files."""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from ddim_pl.files import replacing

COMPRESSION = 1
"""Of PNG files, 0 to 9, without loss: the least takes a third of the time of PIL's 6."""

NUM_WRITERS = min(4, os.cpu_count() or 1)
WAITING = 8
"""Pictures that wait for each thread at most."""


def to_uint8(x: Tensor) -> Tensor:
    """Round images from [-1, 1] to uint8, `(B, C, H, W)`, clamping what lies outside."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(x: Tensor) -> Tensor:
    """Images from uint8 to float32 in [-1, 1], `(B, C, H, W)`."""
    return x.float() / 127.5 - 1


def grid(images: Tensor, *, columns: int | None = None, min_side: int = 512) -> Tensor:
    """Lay uint8 images `(B, C, H, W)` out as one picture `(C, H', W')`.

    Args:
        images: 1 or 3 channels.
        columns: Images in a row; by default as many as make the picture about square.
        min_side: Small images are enlarged by a whole factor, each pixel a square, until the
            picture is about this wide.
    """
    columns = columns or max(1, round(len(images) ** 0.5))
    factor = max(1, min_side // (columns * images.shape[-1]))
    large = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return make_grid(large, nrow=columns, padding=max(2, factor // 4), pad_value=255)


def write_png(image: Tensor, path: Path) -> None:
    """Write a uint8 picture `(C, H, W)` with 1 or 3 channels; folders are made as needed.

    The file appears whole or not at all.
    """
    with replacing(path) as part:
        to_pil_image(image.cpu()).save(part, format="png", compress_level=COMPRESSION)


class PngWriter:
    """Writes pictures as `write_png` does, in threads, while the caller makes the next ones.

    As a context it ends with all pictures on the disk. If the block fails, those that wait are
    left out.

    Args:
        num_threads: How many pictures are written at once.
    """

    def __init__(self, num_threads: int = NUM_WRITERS) -> None:
        self._pool = ThreadPoolExecutor(num_threads)
        self._places = num_threads * (1 + WAITING)
        self._written: deque[Future[None]] = deque()

    def write(self, image: Tensor, path: Path) -> None:
        """Have a picture written; waits while many do.

        Raises:
            OSError: If an earlier one could not be written, as on a full disk.
        """
        while len(self._written) >= self._places or (self._written and self._written[0].done()):
            self._written.popleft().result()
        self._written.append(self._pool.submit(write_png, image, path))

    def close(self) -> None:
        """Wait until all pictures are on the disk; errors as in `write`."""
        try:
            while self._written:
                self._written.popleft().result()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Leave out the pictures that wait, and end the threads."""
        self._pool.shutdown(cancel_futures=True)
        self._written.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def read_png(path: Path) -> Tensor:
    """Read a picture that `write_png` wrote, uint8 `(C, H, W)`."""
    with Image.open(path) as image:
        return pil_to_tensor(image)
