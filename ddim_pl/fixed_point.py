"""Fixed points `z = f(z)` of a map that is applied to a batch of independent problems at once.

`Picard` repeats `z <- z + beta (f(z) - z)`. `Anderson` (1965; Walker & Ni 2011) mixes the last
iterates and their images by the weights, summing to one, that make the mixed residual `sum_i w_i
(f(z_i) - z_i)` smallest. A solver is a frozen dataclass of hyperparameters, called with `(f, z)`.
What one problem of the batch comes to does not depend on the others: each has its own weights, and
is left alone once it has converged. Small systems are solved in float64. Nothing here knows of
diffusion.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, final, get_args

import torch
from torch import Tensor

from ddim_pl.scales import float64

Map = Callable[[Tensor], Tensor]
Mixing = Literal["sample", "block", "triangular"]


class FixedPoint(NamedTuple):
    """What a solver found.

    Attributes:
        z: For each sample its image `f(z)` of least residual, `(B, ...)`.
        residuals: Relative residuals `||f(z) - z|| / ||f(z)||` of every sweep, `(sweeps, B)`
            float64; NaN where a sample had converged before.
        sweeps: Applications of the map that each sample took, `(B,)` int64.
        converged: Whether a sample's residual fell to the tolerance, `(B,)` bool.
    """

    z: Tensor
    residuals: Tensor
    sweeps: Tensor
    converged: Tensor


@dataclass(frozen=True)
class Solver(ABC):
    """What the solvers share.

    Args:
        tolerance: Relative residual at which a sample has converged.
        max_sweeps: Most applications of the map.
        damping: The share `beta`, in (0, 1], of a full step; 1 takes it whole.

    Raises:
        ValueError: If an argument is out of range.
    """

    tolerance: float = 1e-3
    max_sweeps: int = 50
    damping: float = 1.0

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {self.tolerance}: 1e-3 is usual")
        if self.max_sweeps < 1:
            raise ValueError(f"max_sweeps must be at least 1, got {self.max_sweeps}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}: 1 is a full step")

    @abstractmethod
    def _begin(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Make a function from an iterate and its image, `(B, ...)` each, to the next iterate."""

    @final
    @torch.no_grad()
    def __call__(self, f: Map, z: Tensor) -> FixedPoint:
        """Solve `z = f(z)` for each sample of a batch.

        Args:
            f: The map, which keeps the shape of its argument and must not mix samples.
            z: First guess, `(B, N, ...)`; at least two dimensions.
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
            found = torch.where(_columns(better, z), image, found)
            best = torch.where(better, residual, best)
            residuals.append(residual.masked_fill(done, torch.nan))
            sweeps += ~done
            done = done | (residual <= self.tolerance)
            if not done.all() and len(residuals) < self.max_sweeps:
                z = torch.where(_columns(done, z), found, propose(z, image))
        return FixedPoint(found, torch.stack(residuals), sweeps, best <= self.tolerance)


@dataclass(frozen=True)
class Picard(Solver):
    """Repeat the map. A strictly triangular map of S rows is solved exactly by S full sweeps."""

    def _begin(self) -> Callable[[Tensor, Tensor], Tensor]:
        if self.damping == 1:  # without the old iterate, which may not be finite
            return lambda z, image: image
        return lambda z, image: torch.lerp(z, image, self.damping)


@dataclass(frozen=True)
class Anderson(Solver):
    """Mix the last iterates.

    Args:
        memory: How many iterates are mixed, at least 1; with 1 it is `Picard`.
        mixing: Which part of a sample has weights of its own. "sample": all of it. "block": each
            entry of dimension 1, a row. "triangular": each row, by the residuals of the rows
            before it, for maps in which these alone decide a row. (Tang et al. 2024 count the row
            itself in. But its image does not depend on it; and without it a row that follows from
            exact ones is exact, as in `Picard`.)
        regularisation: Weight `lambda` of the squared weights, in units of the squared norm of the
            least residual that is mixed; raised tenfold as often as the system proves singular.

    Raises:
        ValueError: If an argument is out of range.
    """

    memory: int = 5
    mixing: Mixing = "triangular"
    regularisation: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ValueError(f"memory must be at least 1, got {self.memory}: 5 is usual")
        if self.mixing not in get_args(Mixing):
            raise ValueError(f"mixing must be one of {get_args(Mixing)}, got {self.mixing!r}")
        if not self.regularisation >= 0:
            raise ValueError(f"regularisation must not be negative, got {self.regularisation}")

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
            weights = mixing_weights(
                _of_rows_before(products) if self.mixing == "triangular" else products,
                self.regularisation,
            )
            return _mixed(weights, iterates, images, self.damping)

        return propose


def mixing_weights(products: Tensor, regularisation: float) -> Tensor:
    """Weights that sum to one and minimise `w' (K + lambda min_i K_ii I) w`.

    Args:
        products: Inner products `K` of residuals, `(..., m, m)` float64.
        regularisation: `lambda`; raised tenfold where the system is singular.

    Returns:
        Weights `(..., m)` float64; where no regularisation helps (a residual of 0, or NaN), the
        newest iterate alone.
    """
    m = products.shape[-1]
    newest = torch.zeros(m, dtype=products.dtype, device=products.device)
    newest[-1] = 1
    scale = products.diagonal(dim1=-2, dim2=-1).amin(-1)
    usable = torch.isfinite(scale) & (scale > 0)
    # In units of its own scale a system is neither tiny nor huge.
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


def _of_rows_before(products: Tensor) -> Tensor:
    """Inner products over all rows before each one, `(B, N, m, m)`: those that its image sees."""
    return torch.cat([torch.zeros_like(products[:, :1]), products.cumsum(1)[:, :-1]], dim=1)


def _mixed(
    weights: Tensor, iterates: list[Tensor], images: list[Tensor], damping: float
) -> Tensor:
    """The sum of `w_i ((1 - beta) z_i + beta f(z_i))`, in the iterates' dtype."""
    mixed = torch.zeros_like(iterates[0])
    shape = (*weights.shape[:2], *(1,) * (mixed.ndim - 2))
    for i, (z, image) in enumerate(zip(iterates, images, strict=True)):
        weight = weights[..., i].to(mixed).reshape(shape)
        # What has no weight may be infinite: an old iterate, and with a full step every one.
        value = image if damping == 1 else torch.lerp(z, image, damping)
        mixed += torch.where(weight == 0, 0, weight * value)
    return mixed


def _relative_residual(z: Tensor, image: Tensor) -> Tensor:
    """`||f(z) - z|| / ||f(z)||` of each sample, `(B,)` float64 on the CPU; infinite if not one."""
    norm = (image - z).flatten(1).norm(dim=1).cpu().double()
    size = image.flatten(1).norm(dim=1).cpu().double()
    residual = torch.where(norm == 0, torch.zeros_like(norm), norm / size)
    return residual.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _columns(mask: Tensor, like: Tensor) -> Tensor:
    """A mask `(B,)` that selects whole samples of `(B, ...)`."""
    return mask.to(like.device).reshape(-1, *(1,) * (like.ndim - 1))
