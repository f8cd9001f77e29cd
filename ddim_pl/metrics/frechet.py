"""The Fréchet distance between two Gaussians, by eigenvalues of symmetric matrices alone.

|m - n|^2 + tr A + tr B - 2 tr (A B)^(1/2). With A = S S^T the product A B has the eigenvalues of
the symmetric S^T B S. These take a seventh of the time of those of a matrix without symmetry, and
S can be kept for further B: the real images' covariance is the same in all measurements of a run.
"""

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

    def forget_root(self) -> None:
        """Say that the real side has changed."""
        self._root = None

    def compute(self) -> Tensor:
        """Return the distance, in the dtype of the features.

        Raises:
            RuntimeError: If a side has fewer than two images.
        """
        if min(self.real_features_num_samples, self.fake_features_num_samples) < 2:
            raise RuntimeError(
                "More than one sample is required for both the real and fake distributed to "
                "compute FID"
            )
        sums = self.real_features_sum, self.real_features_cov_sum, self.real_features_num_samples
        mean, covariance = _moments(*sums)
        if self._root is None or self._root.device != mean.device:
            self._root = covariance_root(covariance)
        sums = self.fake_features_sum, self.fake_features_cov_sum, self.fake_features_num_samples
        return frechet_distance(mean, self._root, *_moments(*sums)).to(self.orig_dtype)


def _moments(total: Tensor, outer: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and unbiased covariance `(D, D)` of sums."""
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)
