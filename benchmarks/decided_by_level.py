"""How much of an image is decided at a level? Digits beside any folder of images.

Takes the images for Gaussian, with their own mean and covariance, whose best estimate of x from a
noisy state is known: a principal direction of variance v is decided at level t but for the share
`sigma_t^2 / (alpha_t^2 v + sigma_t^2)`. Prints, on DDPM's linear schedule, the share of the total
variance that is still open at a level, and the share of the directions that are more open than
decided. It explains why level strategies that skip the middle fare differently on digits and on
CIFAR-10, see docs/results/sampling.md.

    python benchmarks/decided_by_level.py [--folder path/to/images --image_size 32]
"""

import argparse

import torch
from torch import Tensor

from ddim_pl.data.digits import digits_arrays
from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.images import from_uint8
from ddim_pl.schedules import LinearSchedule

LEVELS = (1, 10, 50, 100, 200, 400, 600, 900, 1000)


def variances(images: Tensor) -> Tensor:
    """Variances of the principal directions of uint8 images `(N, C, H, W)`."""
    x = from_uint8(images).flatten(1).double()
    return torch.linalg.eigvalsh(x.T.cov()).clamp(min=0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="a folder of images, such as CIFAR-10's")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--limit", type=int, default=10_000, help="images to read at most")
    args = parser.parse_args()
    sets = {"digits": digits_arrays()[0]}
    if args.folder:
        data = ImageFolderDataModule(args.folder, image_size=args.image_size)
        data.setup("fit")
        chosen = torch.linspace(0, len(data.train_set) - 1, args.limit).long().unique()
        sets["folder"] = data.train_set.images(chosen)
    spectra = {name: variances(images) for name, images in sets.items()}
    print("| level | " + " | ".join(f"{n}: open variance | open directions" for n in spectra))
    for t in LEVELS:
        alpha, sigma = LinearSchedule()(t)
        cells = []
        for v in spectra.values():
            share = sigma**2 / (alpha**2 * v + sigma**2)
            cells += [f"{float((share * v).sum() / v.sum()):.2%}"]
            cells += [f"{float((share > 0.5).double().mean()):.1%} of {len(v)}"]
        print(f"| {t} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
