"""How far apart are images that are all real? The scale of the Fréchet distances shown here.

    .venv/bin/python benchmarks/yardstick.py digits
    .venv/bin/python benchmarks/yardstick.py cifar10 ROOT

ROOT is a folder of CIFAR-10's training images with a subfolder for each class. For CIFAR-10 the
changed images are 10,000, every fifth: some minutes on a core.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from ddim_pl.data.digits import digits_arrays, digits_split
from ddim_pl.metrics.cifar import CIFARFeatures
from ddim_pl.metrics.digits import DigitsFeatures
from ddim_pl.metrics.frechet import covariance_root, frechet_distance
from ddim_pl.metrics.train_cifar import cifar_split, read_images

Row = tuple[str, float]
NUM_DRAWS = 3


def distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features `(N, D)`."""
    (mean, covariance), (other_mean, other) = ((x.mean(0), torch.cov(x.T)) for x in (a, b))
    return frechet_distance(mean, covariance_root(covariance), other_mean, other).item()


def features_of(extractor: nn.Module, images: Tensor) -> Tensor:
    """Features of uint8 images, float64."""
    return torch.cat([extractor(part).double() for part in images.split(500)])


def noisy(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """The images with Gaussian noise of so many of 255, rounded and cut."""
    noise = sigma * torch.randn(images.shape, generator=generator)
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def changed(
    images: Tensor, real: Tensor, of: Callable[[Tensor], Tensor], generator: torch.Generator
) -> Iterator[Row]:
    """Distances of changed images to the real ones, whose features are `real`."""
    for sigma in (2, 5, 10, 20):
        name = f"with Gaussian noise of {sigma} of 255 added"
        yield name, distance(of(noisy(images, sigma, generator)), real)
    yield "mirrored", distance(of(images.flip(-1)), real)


def digits() -> Iterator[Row]:
    """Of the 1,797 digits."""
    images, labels = digits_arrays()
    train, heldout = digits_split()
    extractor = DigitsFeatures()
    real = features_of(extractor, images)
    generator = torch.Generator().manual_seed(0)
    yield "1,437 training digits, 360 held out", distance(real[train], real[heldout])
    yield from changed(images, real, lambda x: features_of(extractor, x), generator)
    for _ in range(NUM_DRAWS):
        draw = torch.randint(len(real), (len(real),), generator=generator)
        yield "as many drawn from them with replacement", distance(real[draw], real)
    for _ in range(NUM_DRAWS):
        places = [(labels == c).nonzero()[:, 0] for c in range(10)]
        draw = torch.cat([p[torch.randint(len(p), (180,), generator=generator)] for p in places])
        yield "the same, 180 of each class", distance(real[draw], real)


def cifar10(root: str) -> Iterator[Row]:
    """Of the 50,000 training images of CIFAR-10."""
    images, labels = read_images(root)
    train, heldout = cifar_split(labels)
    extractor = CIFARFeatures()
    real = features_of(extractor, images)
    generator = torch.Generator().manual_seed(0)
    yield "45,000 training images, 5,000 held out", distance(real[train], real[heldout])
    some = images[::5]
    yield "every fifth", distance(real[::5], real)
    yield from changed(some, real, lambda x: features_of(extractor, x), generator)
    for sigma in (0.5, 1.0):
        blurred = gaussian_blur(some, [7, 7], [sigma, sigma])
        yield f"blurred, {sigma:g} pixels", distance(features_of(extractor, blurred), real)
    mixed = ((some.int() + some.roll(1, 0).int()) / 2).to(torch.uint8)
    yield "means of two images", distance(features_of(extractor, mixed), real)
    for count in (1000, 2000, 5000, 10_000, 50_000):
        for _ in range(NUM_DRAWS):
            draw = torch.randint(len(real), (count,), generator=generator)
            yield f"{count:,} drawn with replacement", distance(real[draw], real)


@torch.no_grad()
def main() -> None:
    """Print a row of a Markdown table for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=("digits", "cifar10"))
    parser.add_argument("root", nargs="?", help="folder of images, for cifar10")
    options = parser.parse_args()
    if (options.data == "cifar10") != (options.root is not None):
        parser.error("root must be given for cifar10 and for nothing else: a folder of images")
    print("| compared with all real images | Fréchet distance |\n|---|---|")
    for name, value in cifar10(options.root) if options.root else digits():
        print(f"| {name} | {value:.3f} |", flush=True)


if __name__ == "__main__":
    main()
