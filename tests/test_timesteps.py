"""Which levels a sampler visits: rules that hold for every strategy, and the published lists."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from ddim_pl import timesteps
from ddim_pl.timesteps import Strategy, explicit, make_levels, strategies

every_strategy = pytest.mark.parametrize("strategy", strategies().values(), ids=strategies())
SIZES = [
    *((1000, s) for s in (1, 2, 3, 7, 10, 16, 20, 32, 48, 50, 100, 103, 199, 250, 333, 600, 1000)),
    *((100, s) for s in range(1, 101)),
    *((333, s) for s in range(1, 334, 11)),
    *((4000, s) for s in (1, 10, 25, 50, 160, 256, 1000, 3999, 4000)),
    *((t, s) for t in range(1, 9) for s in range(1, t + 1)),
]


def test_all_strategies_are_found() -> None:
    assert {"linear", "quadratic", "leading", "trailing", "linspace"} <= set(strategies())
    assert not {"explicit", "make_levels", "strategies"} & set(strategies())


@every_strategy
def test_levels_fall_strictly_from_within_the_schedule_to_0(strategy: Strategy) -> None:
    for num_levels, num_steps in SIZES:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            levels = strategy(num_levels, num_steps)
        assert levels.dtype == torch.float64
        assert levels.ndim == 1
        assert (levels.diff() < 0).all()
        assert levels[-1] == 0
        assert 0 < levels[0] <= num_levels
        # S + 1 levels, or fewer and a warning that says how many evaluations are left.
        left = len(levels) - 1
        assert 1 <= left <= num_steps
        messages = [str(w.message) for w in caught]
        assert len(messages) == (left < num_steps)
        assert all(f"takes {left} network evaluations" in message for message in messages)


@every_strategy
@pytest.mark.parametrize(("num_levels", "num_steps"), [(10, 11), (10, 0), (10, -1), (1000, 1001)])
def test_a_number_of_steps_that_does_not_fit_is_an_error(
    strategy: Strategy, num_levels: int, num_steps: int
) -> None:
    with pytest.raises(
        ValueError, match=rf"num_steps must lie in \[1, {num_levels}\].*{num_steps}"
    ):
        strategy(num_levels, num_steps)


@every_strategy
def test_one_step_goes_straight_to_the_data(strategy: Strategy) -> None:
    """From 0.8 T (quadratic), or T; "leading" starts at index 0 even then, as in diffusers."""
    levels = strategy(1000, 1)
    assert levels.tolist() in ([1000, 0], [801, 0], [1, 0])


@every_strategy
def test_as_many_steps_as_levels_visit_every_level(strategy: Strategy) -> None:
    if strategy is timesteps.quadratic:
        pytest.skip("dense near the data by design")
    assert strategy(50, 50).tolist() == list(range(50, -1, -1))


def diffusers_levels(spacing: str, num_levels: int, num_steps: int) -> list[float]:
    """`set_timesteps` plus 1, and level 0.

    By the rounding of `np.arange`, "trailing" lists S + 1 timesteps for some S (61 of 1000), the
    last of them -1: it is left out.
    """
    scheduler = DDIMScheduler(num_train_timesteps=num_levels, timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    kept = scheduler.timesteps[scheduler.timesteps >= 0]
    assert len(kept) == num_steps
    return [*(kept + 1.0).tolist(), 0.0]


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_leading_and_linspace_are_those_of_diffusers(spacing: str) -> None:
    """But for one step of "linspace", which is at the noisy end here and at index 0 there."""
    for num_levels, num_steps in SIZES:
        if (spacing, num_steps) == ("linspace", 1):
            continue
        ours = make_levels(spacing, num_levels, num_steps).tolist()
        assert ours == diffusers_levels(spacing, num_levels, num_steps), (num_levels, num_steps)


def test_trailing_is_that_of_diffusers() -> None:
    """Halves round to even *before* 1 is taken away: T = 1000, S = 16 visits 938 after 1000.

    Where T / S is no float64 number, diffusers sees an exact half a rounding error too high or too
    low, and its level may be one off: only there a difference of 1 is let pass.
    """
    for num_levels, num_steps in SIZES:
        ours = make_levels("trailing", num_levels, num_steps).tolist()
        theirs = diffusers_levels("trailing", num_levels, num_steps)
        step = Fraction(num_levels, num_steps)
        inexact = Fraction(num_levels / num_steps) != step
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            half = (num_levels - i * step) % 1 == Fraction(1, 2)
            allowed = 1 if half and inexact else 0
            assert abs(a - b) <= allowed, (num_levels, num_steps, i)


def ddim_code_quadratic(num_levels: int, num_steps: int) -> list[int]:
    """The DDIM authors' lines, plus 1 for the level of an index, without duplicates."""
    seq = np.linspace(0, np.sqrt(num_levels * 0.8), num_steps) ** 2
    return [*sorted({int(s) + 1 for s in seq}, reverse=True), 0]


@pytest.mark.filterwarnings("ignore:.*distinct levels")
@pytest.mark.parametrize("num_steps", [10, 20, 50, 100, 1000])
def test_quadratic_with_a_published_number_of_steps_is_that_of_the_ddim_code(
    num_steps: int,
) -> None:
    assert timesteps.quadratic(1000, num_steps).tolist() == ddim_code_quadratic(1000, num_steps)


@pytest.mark.filterwarnings("ignore:.*distinct levels")
def test_quadratic_with_any_number_of_steps_is_that_of_the_ddim_code() -> None:
    """But for one step, which is at the noisy end here and at index 0 there."""
    different = [
        size
        for size in SIZES
        if size[1] > 1 and timesteps.quadratic(*size).tolist() != ddim_code_quadratic(*size)
    ]
    assert different == []


def test_a_hundred_quadratic_steps_are_96() -> None:
    with pytest.warns(UserWarning, match="takes 96 network evaluations"):
        levels = timesteps.quadratic(1000, 100)
    assert len(levels) == 97
    assert levels[0] == 801


def test_linear_levels_are_not_rounded() -> None:
    levels = timesteps.linear(1000, 7)
    torch.testing.assert_close(levels, 1000 * (1 - torch.arange(8).double() / 7))


def test_half_of_the_linear_levels_are_those_of_half_the_steps() -> None:
    """Two teacher steps per student step, in progressive distillation."""
    fine, coarse = timesteps.linear(1000, 128), timesteps.linear(1000, 64)
    torch.testing.assert_close(fine[::2], coarse, rtol=0, atol=0)


def test_explicit_levels_are_taken_as_they_are() -> None:
    given = [1000, 400.1, 1 / 3, 1e-9]
    assert explicit(1000, given).tolist() == [*given, 0.0]
    assert explicit(1000, [*given, 0]).tolist() == [*given, 0.0]
    assert explicit(1000, given).dtype == torch.float64
    assert make_levels(tuple(given), 1000, 50).tolist() == [*given, 0.0]
    assert explicit(1000, [700]).tolist() == [700.0, 0.0]


@pytest.mark.parametrize(
    "levels",
    [[], [0], [1001], [5, 5], [5, 6], [5, -1], [5, 0, 0], [math.nan], [5, math.nan], [math.inf]],
)
def test_explicit_levels_that_do_not_fall_to_0_are_an_error(levels: list[float]) -> None:
    with pytest.raises(ValueError, match=r"timesteps must be levels that decrease strictly"):
        explicit(1000, levels)


def test_a_name_stands_for_its_function() -> None:
    for name, strategy in strategies().items():
        assert torch.equal(make_levels(name, 1000, 10), strategy(1000, 10))


@pytest.mark.parametrize("name", ["cubic", "explicit", "make_levels", "_check", "", "Linear"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="timesteps must be one of") as error:
        make_levels(name, 1000, 10)
    assert all(repr(known) in str(error.value) for known in strategies())
    assert repr(name) in str(error.value)
