"""Images in the place of photographs."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def smooth_images(count: int) -> torch.Tensor:
    """Smooth random images, like photographs out of focus, uint8 `(count, 3, 32, 32)`."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 6, 6, generator=generator)
    large = torch.nn.functional.interpolate(small, size=32, mode="bicubic", antialias=False)
    return (255 * large).clamp(0, 255).to(torch.uint8)


def folder_of_noise(folder: Path, count: int) -> str:
    """Ten classes of `count` images of noise, 32x32 PNGs."""
    generator = np.random.default_rng(0)
    for number in range(10):
        (folder / str(number)).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(number) / f"{i:02d}.png")
    return str(folder)
