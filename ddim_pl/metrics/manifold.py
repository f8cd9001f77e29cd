"""Precision and recall, density and coverage: fidelity and variety of samples, told apart.

All four take a set of features to reach as far as the balls around its members, each as wide as
the distance to the member's k-th nearest neighbour. Distances are computed in float64, block by
block, so that the memory needed beside the features is a few matrices of `chunk_size` rows and
columns, however many features there are.

Distances and radii that are equal in exact arithmetic, as those of copied images are, count as
equal: two squared distances are told apart only if they differ by more than `ROUNDING` times the
squared norms, which is what float64 products leave uncertain and far below float32's resolution.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PRECISION_NEIGHBOURS = 3
"""Neighbours that Kynkäänniemi et al. 2019 take."""

DENSITY_NEIGHBOURS = 5
"""Neighbours that Naeem et al. 2020 take."""

CHUNK_SIZE = 2048
ROUNDING = 1e-12


@torch.no_grad()
def nearest_radii(features: Tensor, k: int, *, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """Return the distance of each feature to its k-th nearest other one, float64 `(N,)`.

    A feature is no neighbour of its own, but a copy of it is one, at distance 0.

    Args:
        features: `(N, D)`, floating point.
        k: Which neighbour, from 1 to N - 1.
        chunk_size: Features on each side of a block of distances.

    Raises:
        ValueError: If there are not more than `k` features, or the arguments are out of range.
    """
    _check_features("features", features)
    if not 1 <= k < len(features):
        raise ValueError(
            f"k is {k}, for {len(features)} features; it must be at least 1 and below their number"
        )
    radii = []
    for rows, columns, squared, _ in _blocks(features, features, chunk_size):
        if columns.start == 0:
            nearest = squared.new_full((len(squared), k), torch.inf)
        if rows == columns:
            squared.fill_diagonal_(torch.inf)
        nearest = torch.cat([nearest, squared], dim=1).topk(k, dim=1, largest=False).values
        if columns.stop == len(features):
            radii.append(nearest.amax(dim=1).sqrt())
    return torch.cat(radii)


@torch.no_grad()
def precision_recall(
    real: Tensor,
    fake: Tensor,
    k: int = PRECISION_NEIGHBOURS,
    *,
    real_radii: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Return improved precision and recall, Kynkäänniemi et al. 2019, eq. 1 and 2, in [0, 1].

    Precision is the share of the drawn features within a ball around a real one, recall the share
    of the real features within a ball around a drawn one. Balls are closed, as in the paper.
    Compare only numbers from as many features on each side.

    Args:
        real: Features of real images, `(N, D)`, floating point.
        fake: Features of drawn images, `(M, D)`.
        k: The neighbour that a ball reaches to, below N and M.
        real_radii: `nearest_radii(real, k)`, where it is known already.
        chunk_size: Features on each side of a block of distances.

    Returns:
        Two float64 scalars.

    Raises:
        ValueError: If a side has not more than `k` features, or the two do not fit together.
    """
    _check_pair(real, fake)
    if real_radii is None:
        real_radii = nearest_radii(real, k, chunk_size=chunk_size)
    fake_radii = nearest_radii(fake, k, chunk_size=chunk_size)
    precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, columns, squared, rounding in _blocks(real, fake, chunk_size):
        least = squared - rounding
        precise[columns] |= (least <= real_radii[rows, None].square()).any(dim=0)
        recalled[rows] |= (least <= fake_radii[None, columns].square()).any(dim=1)
    return precise.double().mean(), recalled.double().mean()


@torch.no_grad()
def density_coverage(
    real: Tensor,
    fake: Tensor,
    k: int = DENSITY_NEIGHBOURS,
    *,
    real_radii: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Return density, at least 0, and coverage, in [0, 1], of Naeem et al. 2020.

    Density is how many balls around real features hold a drawn one, over k, on average over the
    drawn ones; coverage the share of those balls that hold any. Balls are open, as in the authors'
    code, so that a set has density 1 to itself, and that a real feature with k copies, whose ball
    is empty, is never covered. Of one distribution, density is 1 on average and coverage
    1 - (N - 1) ... (N - k) / ((N + M - 1) ... (N + M - k)).

    Args:
        real: Features of real images, `(N, D)`, floating point.
        fake: Features of drawn images, `(M, D)`.
        k: The neighbour that a ball reaches to, below N.
        real_radii: `nearest_radii(real, k)`, where it is known already.
        chunk_size: Features on each side of a block of distances.

    Returns:
        Two float64 scalars.

    Raises:
        ValueError: If there are not more than `k` real features, or the two sides do not fit
            together.
    """
    _check_pair(real, fake)
    if real_radii is None:
        real_radii = nearest_radii(real, k, chunk_size=chunk_size)
    inside = torch.zeros(len(real), dtype=torch.int64, device=real.device)
    for rows, _, squared, rounding in _blocks(real, fake, chunk_size):
        inside[rows] += (squared + rounding < real_radii[rows, None].square()).sum(dim=1)
    return inside.sum().double() / (k * len(fake)), (inside > 0).double().mean()


def _blocks(
    a: Tensor, b: Tensor, chunk_size: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield rows of `a`, columns of `b`, their squared distances, and what rounding may add.

    All columns of some rows come before the next rows.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    # A common offset would cost the differences their digits.
    centre = a.mean(dim=0, dtype=torch.float64)
    for top in range(0, len(a), chunk_size):
        rows = slice(top, min(top + chunk_size, len(a)))
        x = a[rows].double() - centre
        for left in range(0, len(b), chunk_size):
            columns = slice(left, min(left + chunk_size, len(b)))
            y = b[columns].double() - centre
            norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
            squared = norms - 2 * x @ y.T
            rounding = ROUNDING * norms
            yield rows, columns, squared.where(squared > rounding, 0), rounding


def _check_pair(real: Tensor, fake: Tensor) -> None:
    _check_features("real", real)
    _check_features("fake", fake)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"real has {real.shape[1]} features of an image and fake {fake.shape[1]}; take both "
            "from one extractor"
        )


def _check_features(name: str, features: Tensor) -> None:
    if features.ndim != 2 or not len(features) or not features.is_floating_point():
        raise ValueError(
            f"{name} is {features.dtype} of shape {tuple(features.shape)}; give floating-point "
            "features (N, D), N at least 1"
        )
