"""Mean and covariance of features in NPZ files, as other tools write and read them.

pytorch-fid and EDM write `mu` `(D,)` and `sigma` `(D, D)`; a reference batch of guided-diffusion
has them beside images `arr_0` `(N, H, W, C)`. Such a file does not say of which features, nor of
how many images. Those written here hold more entries that say so, which other tools pass over:
`extractor`, `weights` (a digest), `resize`, `num_images`, `images` (how they were prepared).

No file is unpickled: arrays of objects, and EDM2's `.pkl`, are refused.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim_pl.damage import reason_of
from ddim_pl.files import replacing
from ddim_pl.metrics.inception import InceptionFeatures

MEAN, COVARIANCE, IMAGES = "mu", "sigma", "arr_0"
ASYMMETRY = 1e-3
"""Of a covariance, relative to its largest entry: what float16 would round."""


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of some images' features, and of which.

    Args:
        mean: `(D,)`, float64.
        covariance: `(D, D)`, float64, unbiased.
        num_images: Number of images, if known.
        extractor: Name of the feature extractor, if known, as are the next three.
        weights: Digest of its weights.
        resize: What it does with the pixels first.
        images: How the images were prepared before.
        source: The file, for errors and tables.
    """

    mean: Tensor
    covariance: Tensor
    num_images: int | None = None
    extractor: str | None = None
    weights: str | None = None
    resize: str | None = None
    images: str | None = None
    source: str = "statistics"

    @property
    def known_as(self) -> str:
        """The extractor that these are of, in words."""
        width = len(self.mean)
        return (
            f"{width} features of {self.extractor or 'an extractor that the file does not name'}"
        )

    def check(self, name: str, num_features: int, weights: str) -> None:
        """Check that these are of an extractor's features.

        A file that does not name its extractor is taken by the number of features alone, but for
        2048, which are Inception's.

        Args:
            name: The extractor.
            num_features: Of it.
            weights: Digest of its weights.

        Raises:
            ValueError: If they are of another.
        """
        unnamed = self.extractor is None
        fits = len(self.mean) == num_features and self.extractor in (None, name)
        if unnamed and num_features == InceptionFeatures.num_features:
            fits = fits and name.startswith(InceptionFeatures.name)
        if not fits:
            raise ValueError(
                f"statistics must be of the extractor {name!r} with {num_features} features, got "
                f"{self.source} of {self.known_as}: give the file of this extractor, or the "
                "extractor of this file"
            )
        if self.weights not in (None, weights):
            raise ValueError(
                f"statistics must be of the weights {weights[:12]} of {name!r}, got {self.source} "
                f"of {self.weights[:12] if self.weights else None}: write them anew by main.py "
                "stats, or give the extractor the other weights"
            )

    def write(self, path: Path) -> None:
        """Write an NPZ file, whole or not at all."""
        content: dict[str, Any] = {MEAN: self.mean.numpy(), COVARIANCE: self.covariance.numpy()}
        for name in ("num_images", "extractor", "weights", "resize", "images"):
            if getattr(self, name) is not None:
                content[name] = np.array(getattr(self, name))
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, **content)


def contents_of(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array in an NPZ file, of which only headers are read.

    Raises:
        ValueError: If the file cannot be read, or holds Python objects.
    """
    if path.suffix == ".pkl":
        raise ValueError(
            f"{path} must be an NPZ file: a pickle can run code, so none is read. Write its "
            "arrays mu and sigma into an NPZ where you trust it, see docs/fid.md"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            found = {}
            for name in names:
                with archive.open(name) as file:
                    found[name.removesuffix(".npy")] = _header(file)[:2]
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read as an NPZ file ({reason_of(error)}): replace it"
        ) from error
    for name, (_, dtype) in found.items():
        if dtype.hasobject:
            raise ValueError(
                f"{path} must hold numbers, got Python objects as {name!r}: reading them could "
                "run code; write it anew without them"
            )
    return found


def read_statistics(path: Path) -> FeatureStatistics:
    """Read the mean and covariance of a file.

    Raises:
        ValueError: If the file cannot be read, has no `mu` and `sigma`, or these are no mean and
            covariance.
    """
    found = contents_of(path)
    missing = [name for name in (MEAN, COVARIANCE) if name not in found]
    if missing:
        raise ValueError(
            f"{path} must hold mu and sigma, got {_names(found)}: {' and '.join(missing)} "
            "missing; main.py stats writes such files"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in found if name != IMAGES and _small(name)}
    except (OSError, zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({reason_of(error)}): replace it") from error
    mean, covariance = arrays[MEAN], arrays[COVARIANCE]
    _check_moments(path, mean, covariance)
    texts = {name: str(arrays[name]) for name in TEXTS if name in arrays}
    count = arrays.get("num_images")
    return FeatureStatistics(
        torch.from_numpy(mean.astype(np.float64)),
        torch.from_numpy(covariance.astype(np.float64)),
        int(count) if count is not None and count.shape == () else None,
        **texts,
        source=str(path),
    )


TEXTS = ("extractor", "weights", "resize", "images")


def _small(name: str) -> bool:
    """Whether an entry is one of ours or of all: spatial statistics of others are not read."""
    return name in (MEAN, COVARIANCE, "num_images", *TEXTS)


def check_image_array(path: Path) -> tuple[int, int, int, int]:
    """Return `(N, H, W, C)` of the images `arr_0` in a file, of which only the header is read.

    Raises:
        ValueError: If there are none.
    """
    found = contents_of(path)
    shape, dtype = found.get(IMAGES, ((), np.dtype("V")))
    if len(shape) != 4 or dtype != np.uint8 or shape[3] not in (1, 3) or shape[0] < 1:
        other = f"only {_names(found)}" if found else _names(found)
        got = f"{dtype} {shape}" if IMAGES in found else other
        raise ValueError(
            f"{path} must hold images arr_0, uint8 (N, H, W, 3) or (N, H, W, 1), or statistics mu "
            f"and sigma, got {got}: main.py sample --npz true writes images"
        )
    return shape[0], shape[1], shape[2], shape[3]


def image_batches(path: Path, batch_size: int) -> Iterator[Tensor]:
    """Yield the images of a file in order, uint8 `(B, C, H, W)`, without reading it whole.

    Raises:
        ValueError: If there are none, or the file is damaged.
    """
    count, *rest = check_image_array(path)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as file:
            _, _, in_columns = _header(file)
            if in_columns:  # rarely, and not to be read in parts
                whole = np.frombuffer(file.read(), np.uint8).reshape([*rest[::-1], count]).T
                yield from torch.from_numpy(whole.copy()).permute(0, 3, 1, 2).split(batch_size)
                return
            for begin in range(0, count, batch_size):
                shape = (min(batch_size, count - begin), *rest)
                pixels = np.frombuffer(file.read(int(np.prod(shape))), np.uint8).reshape(shape)
                yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)
    except (OSError, zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({reason_of(error)}): replace it") from error


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Shape, dtype and whether columns come first, of an array in a file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, in_columns, dtype = read(file)
    return shape, dtype, in_columns


def _check_moments(path: Path, mean: np.ndarray, covariance: np.ndarray) -> None:
    fits = mean.ndim == 1 and covariance.shape == 2 * mean.shape
    if not (fits and all(each.dtype.kind == "f" for each in (mean, covariance))):
        raise ValueError(
            f"{path} must hold mu (D,) and sigma (D, D) in floating point, got {mean.dtype} "
            f"{mean.shape} and {covariance.dtype} {covariance.shape}: write it anew"
        )
    largest = np.abs(covariance).max(initial=0.0)
    wrong = (
        "not symmetric" if np.abs(covariance - covariance.T).max() > ASYMMETRY * largest else ""
    )
    wrong = wrong or ("negative on its diagonal" if covariance.diagonal().min() < 0 else "")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        wrong = "not finite"
    if wrong:
        raise ValueError(
            f"{path} must hold a mean mu and a covariance sigma, got one that is {wrong}: write "
            "it anew"
        )


def _names(found: dict[str, Any]) -> str:
    return ", ".join(sorted(found)) or "no arrays"
