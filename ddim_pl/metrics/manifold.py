"""Precision and recall, density and coverage: separate measures of fidelity and diversity.

All four estimate the support of a set of features by balls around its members; a ball's radius is
the distance to the member's k-th nearest neighbour. Distances are computed in float64, in blocks,
so the memory needed is a few matrices of `chunk_size` rows and columns for any number of features.

Squared distances that differ by no more than `ROUNDING` times the squared norms count as equal, so
that ties in exact arithmetic, as between copied images, stay ties. That is the rounding error of
float64 products, far below float32's resolution.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddim_pl.checks import check_at_least

PRECISION_NEIGHBOURS = 3
"""k of [PR]."""

DENSITY_NEIGHBOURS = 5
"""k of [DC]."""

CHUNK_SIZE = 2048
ROUNDING = 1e-12


@torch.no_grad()
def nearest_radii(features: Tensor, k: int, *, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """Return the distance of each feature to its k-th nearest other one, float64 `(N,)`.

    A feature is not its own neighbour, but a copy of it is one, at distance 0.

    Args:
        features: `(N, D)`, floating point.
        k: Number of the neighbour, from 1 to N - 1.
        chunk_size: Features on each side of a block of distances.

    Raises:
        ValueError: If there are at most `k` features, or the arguments are out of range.
    """
    _check_features("features", features)
    if not 1 <= k < len(features):
        raise ValueError(
            f"k must be at least 1 and below the number of features, {len(features)}, got {k}"
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
    """Return improved precision and recall, [PR], eq. 1 and 2, in [0, 1].

    Precision is the share of the generated features within a ball around a real one, recall the
    share of the real features within a ball around a generated one. Balls are closed, as in the
    paper. The numbers depend on N and M: compare them only for equal N and equal M.

    Args:
        real: Features of real images, `(N, D)`, floating point.
        fake: Features of generated images, `(M, D)`.
        k: Number of the neighbour that sets a radius, below N and M.
        real_radii: `nearest_radii(real, k)`, if already computed.
        chunk_size: Features on each side of a block of distances.

    Returns:
        Two float64 scalars.

    Raises:
        ValueError: If a side has at most `k` features, or the two differ in width.
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
    """Return density, at least 0, and coverage, in [0, 1], of [DC].

    Density is the average number of balls around real features that hold a generated one, over k;
    coverage is the share of those balls that hold any. Balls are open, as in the authors' code: a
    set has density 1 against itself, and a real feature with k copies, whose ball is empty, is
    never covered. If both sides have one distribution, density is 1 on average and coverage
    1 - (N - 1) ... (N - k) / ((N + M - 1) ... (N + M - k)).

    Args:
        real: Features of real images, `(N, D)`, floating point.
        fake: Features of generated images, `(M, D)`.
        k: Number of the neighbour that sets a radius, below N.
        real_radii: `nearest_radii(real, k)`, if already computed.
        chunk_size: Features on each side of a block of distances.

    Returns:
        Two float64 scalars.

    Raises:
        ValueError: If there are at most `k` real features, or the two differ in width.
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
    """Yield rows of `a`, columns of `b`, their squared distances, and the bound of the rounding.

    All columns of some rows come before the next rows.
    """
    check_at_least(1, chunk_size=chunk_size)
    # A common offset would cost the differences digits.
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
            f"real and fake must have the same width, got {real.shape[1]} and {fake.shape[1]}: "
            "take both from one extractor"
        )


def _check_features(name: str, features: Tensor) -> None:
    if features.ndim != 2 or not len(features) or not features.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point features (N, D) with N at least 1, got "
            f"{features.dtype} of shape {tuple(features.shape)}"
        )
