"""The Fréchet distance between two Gaussians, by eigenvalues of symmetric matrices alone.

|m - n|^2 + tr A + tr B - 2 tr (A B)^(1/2). With A = S S^T the product A B has the eigenvalues of
the symmetric S^T B S. These take a seventh of the time of those of a matrix without symmetry, and
S can be kept for further B: the real images' covariance is the same in all measurements of a run.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance


def covariance_root(covariance: Tensor) -> Tensor:
    """Return a matrix S with S S^T the covariance, `(D, D)` float64; it may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()  # rounding makes zeros negative


def frechet_distance(mean: Tensor, root: Tensor, other_mean: Tensor, other: Tensor) -> Tensor:
    """Return the squared Fréchet distance between two Gaussians, [FID], eq. 6.

    Args:
        mean: `(D,)`, float64.
        root: `covariance_root` of the covariance, `(D, D)`.
        other_mean: The other mean.
        other: The other covariance.
    """
    products = torch.linalg.eigvalsh(root.T @ other @ root)
    cross = products.clamp(min=0).sqrt().sum()
    return (mean - other_mean).square().sum() + root.square().sum() + other.trace() - 2 * cross


class FrechetDistanceSums(FrechetInceptionDistance):
    """torchmetrics' running sums on all ranks, with the algebra of this module.

    The root of the real side's covariance is kept until that changes.
    """

    _root: Tensor | None = None
    _given: Mapping[bool, tuple[Tensor, Tensor]] = MappingProxyType({})

    def give(self, mean: Tensor, covariance: Tensor, *, real: bool) -> None:
        """Take the mean `(D,)` and covariance `(D, D)` of a side, float64, in place of its sums.

        They stay: neither `reset` nor another process changes them.
        """
        self._given = {**self._given, real: (mean, covariance)}
        self._computed = None  # torchmetrics keeps the last result
        if real:
            self.forget_root()

    def forget_root(self) -> None:
        """Say that the real side has changed."""
        self._root = None

    def compute(self) -> Tensor:
        """Return the distance, in the dtype of the features.

        Raises:
            RuntimeError: If a side has fewer than two images.
        """
        mean, covariance = self._side(real=True)
        if self._root is None or self._root.device != mean.device:
            self._root = covariance_root(covariance)
        distance = frechet_distance(mean, self._root, *self._side(real=False))
        return distance.to(getattr(self, "orig_dtype", torch.float32))

    def _side(self, *, real: bool) -> tuple[Tensor, Tensor]:
        """Mean and covariance of a side."""
        given = self._given.get(real)
        if given is not None:
            mean, covariance = given
            device = self.real_features_sum.device
            return mean.to(device), covariance.to(device)
        name = "real" if real else "fake"
        total, outer = (getattr(self, f"{name}_features_{part}") for part in ("sum", "cov_sum"))
        count = getattr(self, f"{name}_features_num_samples")
        if count < 2:
            raise RuntimeError(
                "More than one sample is required for both the real and fake distributed to "
                "compute FID"
            )
        return moments(total, outer, count)


def moments(total: Tensor, outer: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean `(D,)` and the unbiased covariance `(D, D)` of features.

    Args:
        total: Sum of the features, `(D,)`, float64.
        outer: Sum of their outer products, `(D, D)`.
        count: Their number, at least 2.
    """
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)
