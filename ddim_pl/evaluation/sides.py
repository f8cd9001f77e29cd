"""A side of a distance that no model draws: a folder of images, an NPZ of them, or statistics."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim_pl.data.folders import EXTENSIONS, find_images
from ddim_pl.data.image_folder import decode_whole, header_of
from ddim_pl.data.image_list import NUM_THREADS, ImageList
from ddim_pl.metrics.statistics import (
    COVARIANCE,
    IMAGES,
    MEAN,
    FeatureStatistics,
    check_image_array,
    contents_of,
    image_batches,
    read_statistics,
)


@dataclass(frozen=True)
class Side:
    """What a path holds.

    Args:
        source: The path.
        num_images: Of the images; 0 without.
        size: Height and width of each image; None without images.
        is_gray: Whether all images are gray.
        paths: The files of a folder; None for an NPZ.
        statistics: Of an NPZ that has them; of guided-diffusion's beside images.
    """

    source: str
    num_images: int = 0
    size: tuple[int, int] | None = None
    is_gray: bool = True
    paths: ImageList | None = None
    statistics: FeatureStatistics | None = None

    def batches(self, batch_size: int, channels: int) -> Iterator[Tensor]:
        """Yield the images in order, uint8 `(B, channels, H, W)`; gray is repeated to RGB.

        Raises:
            ValueError: If a file is broken.
        """
        if self.paths is None:
            for images in image_batches(Path(self.source), batch_size):
                yield images.expand(-1, channels, -1, -1) if images.shape[1] == 1 else images
            return
        read = partial(self._read, channels=channels)
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for begin in range(0, self.num_images, batch_size):
                end = min(begin + batch_size, self.num_images)
                files = [self.paths[index] for index in range(begin, end)]
                yield torch.stack(list(pool.map(read, files)))

    def _read(self, path: Path, channels: int) -> Tensor:
        image = decode_whole(path, channels)
        if image.shape[1:] != self.size:
            raise ValueError(
                f"{path} must have {self.size} pixels (height, width) as the others, got "
                f"{tuple(image.shape[1:])} once it is upright: replace it"
            )
        return image

    def record(self) -> dict[str, Any]:
        """What it is, for a JSON file."""
        found: dict[str, Any] = {"source": self.source}
        if self.size is not None:
            found |= {"num_images": self.num_images, "size": list(self.size)}
            found["channels"] = 1 if self.is_gray else 3
        if self.statistics is not None:
            given = self.statistics
            found["statistics"] = {
                "num_images": given.num_images,
                "extractor": given.extractor or "not named in the file",
                "resize": given.resize or "not named in the file",
            }
        return found


def open_side(name: str, source: str) -> Side:
    """Look at what a path holds; of images every header is read, of NPZ images the array's.

    Args:
        name: The argument that gave the path, for the error.
        source: The path.

    Raises:
        ValueError: If it is none of the three, a folder is empty, a file cannot be read, or the
            images have several sizes.
    """
    path = Path(source)
    if path.is_dir():
        paths = find_images(path, name=name, report=False)
        size, is_gray = _size_of_all(paths)
        return Side(source, len(paths), size, is_gray, paths)
    wanted = f"{name} must be a folder of images, or an NPZ file of images or statistics"
    if not path.is_file():
        raise ValueError(f"{wanted}, got {source!r}, which does not exist")
    if path.suffix.lower() in EXTENSIONS:
        raise ValueError(f"{wanted}, got the single image {source!r}: give the folder of images")
    found = contents_of(path)
    if not found:
        raise ValueError(
            f"{wanted}, got {source!r}, an archive without arrays: give another; the images of a "
            "checkpoint are written by main.py sample --npz true"
        )
    statistics = read_statistics(path) if {MEAN, COVARIANCE} & set(found) else None
    if statistics is not None and IMAGES not in found:
        return Side(source, statistics=statistics)
    count, height, width, channels = check_image_array(path)
    return Side(source, count, (height, width), channels == 1, statistics=statistics)


def _size_of_all(paths: ImageList) -> tuple[tuple[int, int], bool]:
    """Height and width of all images, checked before hours of features; and if all are gray."""
    is_gray = True
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        first = header_of(paths[0])
        for path, found in zip(paths, pool.map(header_of, paths), strict=True):
            is_gray = is_gray and found.is_gray
            if found[:2] != first[:2]:
                raise ValueError(
                    f"images must have one size, got {first[0]}x{first[1]} pixels in {paths[0]} "
                    f"and {found[0]}x{found[1]} in {path}: resize them all in one way first"
                )
    return (first.height, first.width), is_gray
