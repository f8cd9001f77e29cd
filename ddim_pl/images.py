"""Images as pictures: uint8, grids and PNG files."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from ddim_pl.files import replacing


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
        to_pil_image(image.cpu()).save(part, format="png")


def read_png(path: Path) -> Tensor:
    """Read a picture that `write_png` wrote, uint8 `(C, H, W)`."""
    with Image.open(path) as image:
        return pil_to_tensor(image)
