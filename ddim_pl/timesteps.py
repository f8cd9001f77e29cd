"""Which levels a sampler visits: functions `(num_levels, num_steps) -> levels`.

Each returns a decreasing float64 tensor of `num_steps + 1` levels that ends at 0; the first is
where the start noise is placed. Index `i` of a network trained on 0-based indices is level `i +
1`.

To add a strategy, write a function here with these two arguments: configs name it by its name.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Strategy = Callable[[int, int], Tensor]


def linear(num_levels: int, num_steps: int) -> Tensor:
    """Evenly spaced real levels `T (1 - i / S)`, not rounded (Salimans & Ho 2022, section 3).

    >>> linear(1000, 4).tolist()
    [1000.0, 750.0, 500.0, 250.0, 0.0]
    """
    _check(num_levels, num_steps)
    return torch.linspace(num_levels, 0, num_steps + 1, dtype=torch.float64)


def quadratic(num_levels: int, num_steps: int) -> Tensor:
    """Indices `floor(linspace(0, sqrt(0.8 T), S)^2)`, dense near the data (Song et al. 2021, D.2).

    The start at index `0.8 T` and the truncation, where the paper's text has no rounding at all,
    are those of the DDIM authors' code, which their published distances come from.

    >>> quadratic(1000, 10).tolist()
    [801.0, 633.0, 484.0, 356.0, 247.0, 159.0, 89.0, 40.0, 10.0, 1.0, 0.0]
    """
    _check(num_levels, num_steps)
    return _from_indices(num_levels, np.floor(_even(np.sqrt(0.8 * num_levels), num_steps) ** 2))


def leading(num_levels: int, num_steps: int) -> Tensor:
    """Indices `0, k, 2k, ...` with `k = T // S`, as in the DDIM code ("leading" in diffusers).

    It does not start at the last level: with T = 1000 and S = 50 it starts at index 980.

    >>> leading(1000, 4).tolist()
    [751.0, 501.0, 251.0, 1.0, 0.0]
    """
    _check(num_levels, num_steps)
    return _from_indices(num_levels, np.arange(num_steps) * (num_levels // num_steps))


def trailing(num_levels: int, num_steps: int) -> Tensor:
    """`linear` rounded to the trained levels, from T on ("trailing" in diffusers).

    >>> trailing(1000, 3).tolist()
    [1000.0, 667.0, 333.0, 0.0]
    """
    _check(num_levels, num_steps)
    # Round first, then take 1 away: halves go to the even level, as in diffusers.
    levels = num_levels - np.arange(num_steps) * (num_levels / num_steps)
    return _from_indices(num_levels, np.round(levels) - 1)


def linspace(num_levels: int, num_steps: int) -> Tensor:
    """Indices evenly spaced from `T - 1` to 0, both included ("linspace" in diffusers).

    >>> linspace(1000, 4).tolist()
    [1000.0, 667.0, 334.0, 1.0, 0.0]
    """
    _check(num_levels, num_steps)
    return _from_indices(num_levels, _even(num_levels - 1, num_steps))


def explicit(num_levels: int, levels: Sequence[float]) -> Tensor:
    """The given levels, decreasing, in (0, T]; the final 0 may be left out.

    >>> explicit(1000, [1000, 400.5, 10]).tolist()
    [1000.0, 400.5, 10.0, 0.0]

    Raises:
        ValueError: If the levels do not decrease strictly or leave [0, num_levels].
    """
    last = [] if len(levels) and levels[-1] == 0 else [0.0]
    values = torch.tensor([*levels, *last], dtype=torch.float64)
    if len(values) < 2 or values[0] > num_levels or not (values.diff() < 0).all():
        raise ValueError(
            f"timesteps must be levels that decrease strictly from at most {num_levels} to 0, "
            f"got {list(levels)}"
        )
    return values


def make_levels(timesteps: str | Sequence[float], num_levels: int, num_steps: int) -> Tensor:
    """Levels from a strategy's name or an explicit list.

    Args:
        timesteps: Name of a function of this module, or the levels themselves.
        num_levels: T.
        num_steps: S; not used with an explicit list.

    Returns:
        Decreasing float64 levels, `(S + 1,)`, that end at 0.

    Raises:
        ValueError: If the name is unknown, or the numbers do not fit.
    """
    if not isinstance(timesteps, str):
        return explicit(num_levels, timesteps)
    known = strategies()
    if timesteps not in known:
        raise ValueError(f"timesteps must be one of {sorted(known)} or a list, got {timesteps!r}")
    return known[timesteps](num_levels, num_steps)


def strategies() -> dict[str, Strategy]:
    """Every strategy by name: the public functions here that take (num_levels, num_steps)."""
    members = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    wanted = ["num_levels", "num_steps"]
    return {
        name: function
        for name, function in members
        if not name.startswith("_") and list(inspect.signature(function).parameters) == wanted
    }


def _check(num_levels: int, num_steps: int) -> None:
    if not 1 <= num_steps <= num_levels:
        raise ValueError(
            f"num_steps must lie in [1, {num_levels}], the number of levels, got {num_steps}"
        )


def _even(end: float, num_steps: int) -> np.ndarray:
    """`num_steps` numbers evenly spaced from 0 to `end`; a single one is `end`."""
    return np.linspace(0, end, num_steps) if num_steps > 1 else np.array([end])


def _from_indices(num_levels: int, indices: np.ndarray) -> Tensor:
    """Round 0-based indices, drop duplicates, and return decreasing levels ending at 0."""
    levels = np.unique(np.round(indices)) + 1
    if len(levels) < len(indices):
        warnings.warn(
            f"{len(indices)} steps hold {len(levels)} distinct levels of {num_levels}: sampling "
            f"takes {len(levels)} network evaluations",
            stacklevel=3,
        )
    return torch.tensor([*levels[::-1], 0], dtype=torch.float64)
