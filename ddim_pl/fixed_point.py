"""Solvers of fixed-point equations `z = f(z)` for a batch of independent samples.

`Picard` repeats `z <- z + beta (f(z) - z)`. `Anderson` ([Anderson], [Walker]) mixes the last
iterates and their images by weights that sum to one and minimise the mixed residual `sum_i w_i
(f(z_i) - z_i)`. A solver is a frozen dataclass of hyperparameters, called with `(f, z)`. Samples
do not affect each other: each has its own weights and stops when it has converged. The linear
systems are solved in float64.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from ddim_pl.checks import check_at_least, check_one_of
from ddim_pl.scales import expand_like, float64, unsqueeze_like

Map = Callable[[Tensor], Tensor]
Mixing = Literal["sample", "block", "triangular"]


class FixedPoint(NamedTuple):
    """Result of a solver.

    Attributes:
        z: The image `f(z)` of least residual of each sample, `(B, ...)`.
        residuals: Relative residuals `||f(z) - z|| / ||f(z)||` of every sweep, `(sweeps, B)`
            float64; NaN where a sample had converged before.
        sweeps: Applications of the map for each sample, `(B,)` int64.
        converged: Whether a sample's residual reached the tolerance, `(B,)` bool.
    """

    z: Tensor
    residuals: Tensor
    sweeps: Tensor
    converged: Tensor


@dataclass(frozen=True)
class Solver(ABC):
    """Base class of the solvers.

    Args:
        tolerance: Relative residual at which a sample has converged.
        max_sweeps: Maximum number of applications of the map.
        damping: The fraction `beta` of a full step, in (0, 1].

    Raises:
        ValueError: If an argument is out of range.
    """

    tolerance: float = 1e-3
    max_sweeps: int = 50
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(0, tolerance=self.tolerance)
        check_at_least(1, max_sweeps=self.max_sweeps)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}: 1 is a full step")

    @abstractmethod
    def _begin(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function from an iterate and its image, `(B, ...)`, to the next iterate."""

    @final
    @torch.no_grad()
    def __call__(self, f: Map, z: Tensor) -> FixedPoint:
        """Solve `z = f(z)` for each sample of a batch.

        Args:
            f: The map. It keeps the shape of its argument and must not mix samples.
            z: Initial guess, `(B, N, ...)`.
        """
        if not len(z):
            empty = torch.zeros(0)
            return FixedPoint(z, empty.double()[None], empty.long(), empty.bool())
        propose = self._begin()
        best = torch.full((len(z),), torch.inf, dtype=torch.float64)
        done = torch.zeros(len(z), dtype=torch.bool)
        sweeps = torch.zeros(len(z), dtype=torch.int64)
        found = z.clone()
        residuals: list[Tensor] = []
        while not done.all() and len(residuals) < self.max_sweeps:
            image = f(z)
            residual = _relative_residual(z, image)
            better = ~done & ((residual < best) | (sweeps == 0))
            found = torch.where(unsqueeze_like(better, z), image, found)
            best = torch.where(better, residual, best)
            residuals.append(residual.masked_fill(done, torch.nan))
            sweeps += ~done
            done = done | (residual <= self.tolerance)
            if not done.all() and len(residuals) < self.max_sweeps:
                z = torch.where(unsqueeze_like(done, z), found, propose(z, image))
        return FixedPoint(found, torch.stack(residuals), sweeps, best <= self.tolerance)


@dataclass(frozen=True)
class Picard(Solver):
    """Repeat the map. S full sweeps solve a strictly triangular map of S rows exactly."""

    def _begin(self) -> Callable[[Tensor, Tensor], Tensor]:
        if self.damping == 1:  # the old iterate may not be finite
            return lambda z, image: image
        return lambda z, image: torch.lerp(z, image, self.damping)


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration: mix the last iterates.

    Args:
        memory: Number of iterates that are mixed; 1 is `Picard`.
        mixing: Part of a sample that has its own weights. "sample": the whole sample. "block":
            each entry of dimension 1, a row. "triangular": each row, by the residuals of the rows
            before it, for maps whose rows depend only on these. ([TAA] includes the row itself;
            but its image does not depend on it, and without it a row that follows exact rows is
            exact, as in `Picard`.)
        regularisation: Penalty `lambda` on the squared weights, in units of the least squared
            residual norm; raised tenfold while the system is singular.

    Raises:
        ValueError: If an argument is out of range.
    """

    memory: int = 5
    mixing: Mixing = "triangular"
    regularisation: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, memory=self.memory)
        check_one_of(Mixing, mixing=self.mixing)
        check_at_least(0, regularisation=self.regularisation)

    def _begin(self) -> Callable[[Tensor, Tensor], Tensor]:
        iterates: list[Tensor] = []
        images: list[Tensor] = []
        products = torch.empty(0)  # (B, N, m, m), of the residuals

        def propose(z: Tensor, image: Tensor) -> Tensor:
            nonlocal products
            iterates.append(z)
            images.append(image)
            if len(iterates) > self.memory:
                del iterates[0], images[0]
            products = _with_newest(products, iterates, images, blocks=self.mixing != "sample")
            sums = products
            if self.mixing == "triangular":  # over all rows before each row
                before = products.cumsum(1)[:, :-1]
                sums = torch.cat([torch.zeros_like(products[:, :1]), before], dim=1)
            weights = mixing_weights(sums, self.regularisation)
            return _mixed(weights, iterates, images, self.damping)

        return propose


def mixing_weights(products: Tensor, regularisation: float) -> Tensor:
    """Weights that sum to one and minimise `w' (K + lambda min_i K_ii I) w`.

    Args:
        products: Inner products `K` of residuals, `(..., m, m)` float64.
        regularisation: `lambda`; raised tenfold where the system is singular.

    Returns:
        Weights `(..., m)` float64; where no regularisation helps (a residual of 0, or NaN), 1 for
        the newest iterate.
    """
    m = products.shape[-1]
    newest = torch.zeros(m, dtype=products.dtype, device=products.device)
    newest[-1] = 1
    scale = products.diagonal(dim1=-2, dim2=-1).amin(-1)
    usable = torch.isfinite(scale) & (scale > 0)
    # Normalised, so that the regularisation is relative.
    system = products / torch.where(usable, scale, 1)[..., None, None]
    system = torch.where(usable[..., None, None], system, torch.zeros_like(system))
    identity = torch.eye(m, dtype=products.dtype, device=products.device)
    weights = newest.expand(products.shape[:-1]).clone()
    open_ = usable
    while open_.any() and regularisation <= 1e3:
        factor, failed = torch.linalg.cholesky_ex(system + regularisation * identity)
        solution = torch.cholesky_solve(torch.ones_like(weights)[..., None], factor)[..., 0]
        total = solution.sum(-1, keepdim=True)
        good = open_ & (failed == 0) & torch.isfinite(solution).all(-1) & (total[..., 0] > 0)
        weights = torch.where(good[..., None], solution / total, weights)
        open_ = open_ & ~good
        regularisation = max(10 * regularisation, 1e-14)
    return weights


def _with_newest(
    products: Tensor, iterates: list[Tensor], images: list[Tensor], *, blocks: bool
) -> Tensor:
    """Inner products `(B, N, m, m)` of all residuals, given those of all but the newest."""
    rows = []
    for z, image in zip(iterates, images, strict=True):
        residual = image - z
        rows.append(residual.flatten(2) if blocks else residual.flatten(1)[:, None])
    newest = float64(rows[-1])
    column = torch.stack([(newest * row.to(newest.device)).sum(-1) for row in rows], dim=-1)
    m = len(rows)
    grown = column.new_zeros(*column.shape[:-1], m, m)
    if m > 1:
        grown[..., :-1, :-1] = products[..., 1 - m :, 1 - m :]
    grown[..., -1, :] = column
    grown[..., :, -1] = column
    return grown


def _mixed(
    weights: Tensor, iterates: list[Tensor], images: list[Tensor], damping: float
) -> Tensor:
    """The sum of `w_i ((1 - beta) z_i + beta f(z_i))`, in the iterates' dtype."""
    mixed = torch.zeros_like(iterates[0])
    for i, (z, image) in enumerate(zip(iterates, images, strict=True)):
        weight = expand_like(weights[..., i], mixed)
        # Iterates of weight 0 may be infinite, and with a full step all iterates.
        value = image if damping == 1 else torch.lerp(z, image, damping)
        mixed += torch.where(weight == 0, 0, weight * value)
    return mixed


def _relative_residual(z: Tensor, image: Tensor) -> Tensor:
    """`||f(z) - z|| / ||f(z)||` of each sample, `(B,)` float64 on the CPU; NaN becomes inf."""
    norm, size = (each.flatten(1).norm(dim=1).cpu().double() for each in (image - z, image))
    residual = torch.where(norm == 0, torch.zeros_like(norm), norm / size)
    return residual.nan_to_num(nan=torch.inf, posinf=torch.inf)
