"""The levels that a sampler visits, one function per strategy.

Each returns a decreasing float64 tensor of `num_steps + 1` levels that ends at 0; sampling starts
at the first. Index `i` of a network trained on 0-based indices is level `i + 1`.

To add a strategy, write a function here; configs refer to it by its name. Its arguments are
`(num_levels, num_steps)`; or `(schedule, num_steps)`, if it depends on the noise; or
`(num_levels)` or `(schedule)`, if it fixes the number of steps.
"""

import inspect
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddim_pl.checks import check_at_least
from ddim_pl.damage import read_sealed, sealed
from ddim_pl.files import replacing
from ddim_pl.schedules import NoiseSchedule

Strategy = Callable[[NoiseSchedule, int], Tensor]


def linear(num_levels: int, num_steps: int) -> Tensor:
    """Evenly spaced real levels `T (1 - i / S)`, not rounded ([PD], section 3).

    >>> linear(1000, 4).tolist()
    [1000.0, 750.0, 500.0, 250.0, 0.0]
    """
    _check(num_levels, num_steps)
    return torch.linspace(num_levels, 0, num_steps + 1, dtype=torch.float64)


def quadratic(num_levels: int, num_steps: int) -> Tensor:
    """Indices `floor(linspace(0, sqrt(0.8 T), S)^2)`, dense near the data ([DDIM], D.2).

    The start at index `0.8 T` and the truncation are those of the authors' code, which produced
    the published distances; the paper's text has no rounding.

    >>> quadratic(1000, 10).tolist()
    [801.0, 633.0, 484.0, 356.0, 247.0, 159.0, 89.0, 40.0, 10.0, 1.0, 0.0]
    """
    _check(num_levels, num_steps)
    return _from_indices(num_levels, np.floor(_even(np.sqrt(0.8 * num_levels), num_steps) ** 2))


def leading(num_levels: int, num_steps: int) -> Tensor:
    """Indices `0, k, 2k, ...` with `k = T // S`, as in the DDIM code ("leading" in diffusers).

    It does not start at the last level: with T = 1000 and S = 50 it starts at index 980. Where S
    does not divide T it starts still lower, at half of T for S just above T / 2, and warns; the
    DDIM code then takes more steps, see `ddim_uniform`.

    >>> leading(1000, 4).tolist()
    [751.0, 501.0, 251.0, 1.0, 0.0]
    """
    _check(num_levels, num_steps)
    gap = num_levels // num_steps
    if num_levels % num_steps:
        warnings.warn(
            f"{num_steps} steps do not divide {num_levels} levels: 'leading' starts at level "
            f"{(num_steps - 1) * gap + 1}, with noise left out; 'ddim_uniform' has the DDIM "
            "code's levels, 'trailing' starts at the last",
            stacklevel=2,
        )
    return _from_indices(num_levels, np.arange(num_steps) * gap)


def ddim_uniform(num_levels: int, num_steps: int) -> Tensor:
    """Indices `0, k, 2k, ...` below T with `k = T // S`: the DDIM code's `skip_type="uniform"`.

    Where S divides T it is `leading`. Else it takes more than S steps, and warns: 31 for S = 30,
    from index 990, and all T for S above T / 2.

    >>> ddim_uniform(1000, 4).tolist()
    [751.0, 501.0, 251.0, 1.0, 0.0]
    """
    _check(num_levels, num_steps)
    indices = np.arange(0, num_levels, num_levels // num_steps)
    if len(indices) > num_steps:
        warnings.warn(
            f"{num_steps} steps become {len(indices)} distinct levels of {num_levels}: sampling "
            f"takes {len(indices)} network evaluations",
            stacklevel=2,
        )
    return _from_indices(num_levels, indices)


def trailing(num_levels: int, num_steps: int) -> Tensor:
    """`linear` rounded to the trained levels, from T on ("trailing" in diffusers).

    >>> trailing(1000, 3).tolist()
    [1000.0, 667.0, 333.0, 0.0]
    """
    _check(num_levels, num_steps)
    # Round before subtracting 1: halves go to the even level, as in diffusers.
    levels = num_levels - np.arange(num_steps) * (num_levels / num_steps)
    return _from_indices(num_levels, np.round(levels) - 1)


def linspace(num_levels: int, num_steps: int) -> Tensor:
    """Indices evenly spaced from `T - 1` to 0, both included ("linspace" in diffusers).

    >>> linspace(1000, 4).tolist()
    [1000.0, 667.0, 334.0, 1.0, 0.0]
    """
    _check(num_levels, num_steps)
    return _from_indices(num_levels, _even(num_levels - 1, num_steps))


def exponential(num_levels: int) -> Tensor:
    """Indices `0, 1, 2, 4, 8, ...` and the last one ([Report], eq. 23).

    >>> exponential(1000).tolist()[:4], len(exponential(1000)) - 1
    ([1000.0, 513.0, 257.0, 129.0], 12)
    """
    _check(num_levels, 1)
    powers = 2 ** np.arange(math.ceil(math.log2(max(num_levels - 1, 1))))
    return _from_indices(num_levels, np.unique([0, *powers, num_levels - 1]))


def last100(num_levels: int) -> Tensor:
    """The last level, then the hundred cleanest, indices 99 to 0 ([Report], eq. 22).

    >>> last100(1000).tolist()[:3], len(last100(1000)) - 1
    ([1000.0, 100.0, 99.0], 101)
    """
    check_at_least(101, num_levels=num_levels)
    return _from_indices(num_levels, np.append(np.arange(100), num_levels - 1))


def first100last100(num_levels: int) -> Tensor:
    """The hundred noisiest levels and the hundred cleanest, one step between ([Report]).

    >>> levels = first100last100(1000)
    >>> levels.tolist()[98:102], len(levels) - 1
    ([902.0, 901.0, 100.0, 99.0], 200)
    """
    check_at_least(200, num_levels=num_levels)
    ends = np.arange(100)
    return _from_indices(num_levels, np.append(ends, num_levels - 1 - ends))


def uniform_log_snr(schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """Levels evenly spaced in log-SNR from T to 1, then 0 ([DPM-Solver], 3.4).

    They are real numbers, not rounded to the trained levels.
    """
    _check(schedule.num_levels, num_steps)
    _check_signal(schedule, "uniform_log_snr")
    start, end = schedule(torch.tensor([schedule.num_levels, 1.0])).log_snr.tolist()
    return _from_log_snr(schedule, torch.from_numpy(np.linspace(start, end, num_steps)))


def karras(schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """Levels from T to 1 whose `(sigma / alpha)^(1/7)` is evenly spaced, then 0.

    [EDM], eq. 5, with rho = 7. They are real numbers, not rounded.
    """
    _check(schedule.num_levels, num_steps)
    _check_signal(schedule, "karras")
    ends = schedule(torch.tensor([schedule.num_levels, 1.0])).log_snr
    start, end = (-ends / 14).exp().tolist()
    ratio = torch.from_numpy(np.linspace(start, end, num_steps)) ** 7
    return _from_log_snr(schedule, -2 * ratio.log())


def doubling(schedule: NoiseSchedule) -> Tensor:
    """Levels whose signal-to-noise ratios double, from T to the last above 1, then 0.

    The shapes of Gamma noise halve with each step, as the derivation of [Report], eq. 18, assumes:
    `k_{t+1} = sum_{i <= t} k_i`. They are real numbers, not rounded.
    """
    start, end = schedule(torch.tensor([schedule.num_levels, 1.0])).log_snr.tolist()
    count = math.floor((end - start) / math.log(2)) + 1
    ratios = start + math.log(2) * torch.arange(count, dtype=torch.float64)
    return _from_log_snr(schedule, ratios)


def explicit(num_levels: int, levels: Sequence[float]) -> Tensor:
    """The given decreasing levels in (0, T]; the final 0 may be omitted.

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


def make_levels(
    timesteps: str | Sequence[float],
    schedule: NoiseSchedule,
    num_steps: int,
    last_level: float = 0.0,
) -> Tensor:
    """Levels from a strategy's name, a file of adaptive levels, or an explicit list.

    Args:
        timesteps: Name of a strategy of this module, path of a `.json` file that `save_levels`
            wrote, or the levels themselves.
        schedule: Noise schedule.
        num_steps: S; not used with an explicit list, nor by strategies that fix their length.

        last_level: Level to end at, in place of 0: levels at or below it are left out.

    Returns:
        Decreasing float64 levels, `(S + 1,)`, that end at `last_level`.

    Raises:
        ValueError: If the name is unknown, or the file or the numbers do not fit.
    """
    levels = _levels_to_0(timesteps, schedule, num_steps)
    if not 0 <= last_level < levels[0]:
        raise ValueError(
            f"last_level must lie in [0, {levels[0]:g}), below the first level, got {last_level}: "
            "0 is clean data, 1 is diffusers' set_alpha_to_one=False"
        )
    last = torch.tensor([last_level], dtype=torch.float64)
    return torch.cat([levels[levels > last_level], last])


def _levels_to_0(
    timesteps: str | Sequence[float], schedule: NoiseSchedule, num_steps: int
) -> Tensor:
    if not isinstance(timesteps, str):
        return explicit(schedule.num_levels, timesteps)
    if timesteps.endswith(".json"):
        return load_levels(Path(timesteps), schedule, num_steps)
    known = strategies()
    if timesteps not in known:
        raise ValueError(
            f"timesteps must be one of {sorted(known)}, a .json file of adaptive levels or a "
            f"list, got {timesteps!r}"
        )
    return known[timesteps](schedule, num_steps)


def strategies() -> dict[str, Strategy]:
    """Every strategy by name, called with (schedule, num_steps): the public functions here."""
    return {name: partial(_call, function) for name, function in _functions().items()}


def has_own_length(timesteps: str | Sequence[float]) -> bool:
    """Whether the strategy fixes the number of steps."""
    if not isinstance(timesteps, str):
        return True
    function = _functions().get(timesteps)
    return function is not None and "num_steps" not in inspect.signature(function).parameters


def save_levels(path: Path, schedule: NoiseSchedule, levels: Sequence[Tensor]) -> None:
    """Write levels, one tensor `(S + 1,)` for each number of steps, for `make_levels` to load.

    The file is JSON that names the schedule; it is written atomically.
    """
    content = {
        "schedule": repr(schedule),
        "levels": {str(len(each) - 1): each.tolist() for each in levels},
    }
    with replacing(path) as part:
        part.write_text(json.dumps(sealed(content), indent=1) + "\n")


def load_levels(path: Path, schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """Levels `(S + 1,)` from a file of `save_levels`.

    Raises:
        ValueError: If the file cannot be read, has another schedule, or lacks `num_steps`.
    """
    try:
        content = read_sealed(path)
        written = content["schedule"]
        by_steps = {int(steps): list(map(float, of)) for steps, of in content["levels"].items()}
    # Damaged, or of another form.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"timesteps must be a file of `main.py levels`, got {str(path)!r}, which cannot be "
            f"read as adaptive levels ({error}): write it again"
        ) from error
    if written != repr(schedule):
        raise ValueError(
            f"timesteps must be levels for the model's schedule, got {str(path)!r}, whose levels "
            f"were found for {written}, but the model has {schedule!r}: search again with "
            "`main.py levels`"
        )
    if num_steps not in by_steps:
        raise ValueError(
            f"num_steps must be one of {sorted(by_steps)} for timesteps {str(path)!r}, got "
            f"{num_steps}: search again with `main.py levels`"
        )
    return explicit(schedule.num_levels, by_steps[num_steps])


def _functions() -> dict[str, Callable[..., Tensor]]:
    """The public functions of this module with the arguments of a strategy."""
    kinds = {
        ("schedule", "num_steps"),
        ("schedule",),
        ("num_levels", "num_steps"),
        ("num_levels",),
    }
    return {
        name: function
        for name, function in inspect.getmembers(sys.modules[__name__], inspect.isfunction)
        if not name.startswith("_") and tuple(inspect.signature(function).parameters) in kinds
    }


def _call(function: Callable[..., Tensor], schedule: NoiseSchedule, num_steps: int) -> Tensor:
    known = {
        "schedule": schedule,
        "num_levels": schedule.num_levels,
        "num_steps": num_steps,
    }
    return function(**{name: known[name] for name in inspect.signature(function).parameters})


def _check(num_levels: int, num_steps: int) -> None:
    if not 1 <= num_steps <= num_levels:
        raise ValueError(
            f"num_steps must lie in [1, {num_levels}], the number of levels, got {num_steps}"
        )


def _check_signal(schedule: NoiseSchedule, name: str) -> None:
    if schedule.ends_without_signal:
        raise ValueError(
            f"timesteps must not be {name!r} with a schedule whose last level has no signal, got "
            f"{schedule}: its log-SNR is infinite there; use 'trailing'"
        )


def _from_log_snr(schedule: NoiseSchedule, log_snr: Tensor) -> Tensor:
    levels = schedule.level_at(log_snr)
    levels[0] = schedule.num_levels  # bisection ends a rounding below
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


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
