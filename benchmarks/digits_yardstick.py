"""How far apart are digits that are all real? The scale of the digits Fréchet distance.

.venv/bin/python benchmarks/digits_yardstick.py
"""

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from ddim_pl.data.digits import digits_arrays, digits_split
from ddim_pl.metrics.digits import DigitsFeatures


def distance(a: Tensor, b: Tensor) -> float:
    """Digits Fréchet distance of two sets of uint8 images `(B, 1, 8, 8)`."""
    metric = FrechetInceptionDistance(feature=DigitsFeatures())
    metric.update(a, real=True)
    metric.update(b, real=False)
    return metric.compute().item()


@torch.no_grad()
def main() -> None:
    """Print a line for each comparison."""
    images, labels = digits_arrays()
    train, heldout = digits_split()
    generator = torch.Generator().manual_seed(0)
    print(f"training digits and held-out digits  {distance(images[train], images[heldout]):.3f}")
    for sigma in (2, 5, 10, 20):
        noise = sigma * torch.randn(images.shape, generator=generator)
        noisy = (images + noise).round().clamp(0, 255).to(torch.uint8)
        print(f"noise of {sigma:2d} of 255                   {distance(images, noisy):.3f}")
    print(f"mirrored                             {distance(images, images.flip(-1)):.1f}")
    for _ in range(3):
        draw = torch.randint(len(images), (len(images),), generator=generator)
        print(f"drawn again with replacement         {distance(images, images[draw]):.3f}")
    for _ in range(3):
        places = [(labels == c).nonzero()[:, 0] for c in range(10)]
        draw = torch.cat([p[torch.randint(len(p), (180,), generator=generator)] for p in places])
        print(f"the same, 180 of each class          {distance(images, images[draw]):.3f}")


if __name__ == "__main__":
    main()
