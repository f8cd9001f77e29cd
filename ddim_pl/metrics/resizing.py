"""Resizing by PIL, as published metrics do it: bicubic with antialiasing."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pil_bicubic(images: Tensor, side: int) -> Tensor:
    """Resize images as clean-fid does ([CleanFID], section 4).

    Each channel is resized in float32 and limited to [0, 255]; nothing is rounded to integers.

    Args:
        images: uint8 `(B, C, H, W)`, on any device.
        side: Height and width of the result.

    Returns:
        float32 `(B, C, side, side)` in [0, 255], on the same device.
    """
    pixels = images.cpu().float().numpy()
    resized = np.empty((*pixels.shape[:2], side, side), dtype=np.float32)
    for index in np.ndindex(*pixels.shape[:2]):
        channel = Image.fromarray(np.ascontiguousarray(pixels[index]))
        resized[index] = channel.resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(resized.clip(0, 255)).to(images.device)


def pil_bicubic_rounded(images: Tensor, side: int) -> Tensor:
    """Resize RGB images `(B, 3, H, W)` as PIL does uint8 pictures, bicubic; uint8, as dgm-eval."""
    resized = []
    for image in images.cpu().permute(0, 2, 3, 1).numpy():
        picture = Image.fromarray(np.ascontiguousarray(image))
        resized.append(np.array(picture.resize((side, side), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device)
