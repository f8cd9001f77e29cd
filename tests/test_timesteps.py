"""Which levels a sampler visits: rules that hold for every strategy, and the published lists."""

import json
import math
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from ddim_pl import timesteps
from ddim_pl.schedules import (
    CosineLogSNRSchedule,
    LinearSchedule,
    NoiseSchedule,
    ZeroTerminalSNR,
)
from ddim_pl.timesteps import explicit, has_own_length, make_levels, save_levels, strategies

OWN_LENGTH = {"exponential": 12, "last100": 101, "first100last100": 200, "doubling": 28}
every_strategy = pytest.mark.parametrize("strategy", sorted(set(strategies()) - set(OWN_LENGTH)))
SIZES = [
    *((1000, s) for s in (1, 2, 3, 7, 10, 16, 20, 32, 48, 50, 100, 103, 199, 250, 333, 600, 1000)),
    *((100, s) for s in range(1, 101)),
    *((333, s) for s in range(1, 334, 11)),
    *((4000, s) for s in (1, 10, 25, 50, 160, 256, 1000, 3999, 4000)),
    *((t, s) for t in range(1, 9) for s in range(1, t + 1)),
]


def test_all_strategies_are_found() -> None:
    known = {"linear", "quadratic", "leading", "trailing", "linspace", "uniform_log_snr", "karras"}
    known.add("ddim_uniform")
    assert known | set(OWN_LENGTH) <= set(strategies())
    assert not {"explicit", "make_levels", "strategies", "load_levels"} & set(strategies())
    assert {name for name in strategies() if has_own_length(name)} == set(OWN_LENGTH)
    assert has_own_length([500.0, 0.0])
    assert not has_own_length("levels.json")


def of(strategy: str, num_levels: int, num_steps: int) -> torch.Tensor:
    return make_levels(strategy, LinearSchedule(num_levels), num_steps)


@every_strategy
def test_levels_fall_strictly_from_within_the_schedule_to_0(strategy: str) -> None:
    for num_levels, num_steps in SIZES:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            levels = of(strategy, num_levels, num_steps)
        assert levels.dtype == torch.float64
        assert levels.ndim == 1
        assert (levels.diff() < 0).all()
        assert levels[-1] == 0
        assert 0 < levels[0] <= num_levels
        # S + 1 levels, or another number and a warning that says how many evaluations it takes.
        taken = len(levels) - 1
        assert taken >= 1
        assert taken <= num_steps or strategy == "ddim_uniform"
        messages = [str(w.message) for w in caught if "'leading' starts" not in str(w.message)]
        assert len(messages) == (taken != num_steps)
        assert all(f"takes {taken} network evaluations" in message for message in messages)


@every_strategy
@pytest.mark.parametrize(("num_levels", "num_steps"), [(10, 11), (10, 0), (10, -1), (1000, 1001)])
def test_a_number_of_steps_that_does_not_fit_is_an_error(
    strategy: str, num_levels: int, num_steps: int
) -> None:
    with pytest.raises(
        ValueError, match=rf"num_steps must lie in \[1, {num_levels}\].*{num_steps}"
    ):
        of(strategy, num_levels, num_steps)


@every_strategy
def test_one_step_goes_straight_to_the_data(strategy: str) -> None:
    """From 0.8 T (quadratic), or T; "leading" starts at index 0 even then, as in the codes."""
    levels = of(strategy, 1000, 1)
    assert levels.tolist() in ([1000, 0], [801, 0], [1, 0])


@every_strategy
def test_as_many_steps_as_levels_visit_every_level(strategy: str) -> None:
    if strategy in ("quadratic", "uniform_log_snr", "karras"):
        pytest.skip("dense near the data by design")
    assert of(strategy, 50, 50).tolist() == list(range(50, -1, -1))


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


@pytest.mark.filterwarnings("ignore:.*'leading' starts")
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_leading_and_linspace_are_those_of_diffusers(spacing: str) -> None:
    """But for one step of "linspace", which is at the noisy end here and at index 0 there."""
    for num_levels, num_steps in SIZES:
        if (spacing, num_steps) == ("linspace", 1):
            continue
        ours = of(spacing, num_levels, num_steps).tolist()
        assert ours == diffusers_levels(spacing, num_levels, num_steps), (num_levels, num_steps)


def test_trailing_is_that_of_diffusers() -> None:
    """Halves round to even *before* 1 is taken away: T = 1000, S = 16 visits 938 after 1000.

    Where T / S is no float64 number, diffusers sees an exact half a rounding error too high or too
    low, and its level may be one off: only there a difference of 1 is let pass.
    """
    for num_levels, num_steps in SIZES:
        ours = of("trailing", num_levels, num_steps).tolist()
        theirs = diffusers_levels("trailing", num_levels, num_steps)
        step = Fraction(num_levels, num_steps)
        inexact = Fraction(num_levels / num_steps) != step
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            half = (num_levels - i * step) % 1 == Fraction(1, 2)
            allowed = 1 if half and inexact else 0
            assert abs(a - b) <= allowed, (num_levels, num_steps, i)


def test_leading_says_where_it_starts_if_the_steps_do_not_divide_the_levels() -> None:
    """S = 30 leaves out indices from 958 on, S = 501 half of the noise."""
    for num_steps, start in ((30, 958), (501, 501)):
        with pytest.warns(UserWarning, match=f"'leading' starts at level {start}, .*ddim_uniform"):
            assert timesteps.leading(1000, num_steps)[0] == start
    for num_steps in (1, 2, 10, 50, 1000):
        timesteps.leading(1000, num_steps)  # a warning would be an error


@pytest.mark.filterwarnings("ignore:.*distinct levels")
def test_ddim_uniform_is_the_selection_of_the_ddim_code() -> None:
    """`range(0, T, T // S)`, its `skip_type="uniform"`; 31 steps from index 990 for S = 30."""
    for num_levels, num_steps in SIZES:
        theirs = [*reversed(range(0, num_levels, num_levels // num_steps)), -1]
        ours = timesteps.ddim_uniform(num_levels, num_steps)
        assert (ours - 1).tolist() == theirs, (num_levels, num_steps)
    assert len(timesteps.ddim_uniform(1000, 30)) - 1 == 31
    assert timesteps.ddim_uniform(1000, 30)[0] == 991
    assert timesteps.ddim_uniform(1000, 501).tolist() == list(range(1000, -1, -1))


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
    assert make_levels(tuple(given), LinearSchedule(), 50).tolist() == [*given, 0.0]
    assert explicit(1000, [700]).tolist() == [700.0, 0.0]


@pytest.mark.parametrize(
    "levels",
    [[], [0], [1001], [5, 5], [5, 6], [5, -1], [5, 0, 0], [math.nan], [5, math.nan], [math.inf]],
)
def test_explicit_levels_that_do_not_fall_to_0_are_an_error(levels: list[float]) -> None:
    with pytest.raises(ValueError, match=r"timesteps must be levels that decrease strictly"):
        explicit(1000, levels)


def test_levels_may_end_at_level_1() -> None:
    schedule = LinearSchedule()
    assert make_levels([751, 501, 1], schedule, 50, 1).tolist() == [751, 501, 1]
    assert make_levels([751, 501, 0], schedule, 50, 1).tolist() == [751, 501, 1]
    assert make_levels("leading", schedule, 4, 1).tolist() == [751, 501, 251, 1]
    assert make_levels("trailing", schedule, 4, 0.5).tolist() == [1000, 750, 500, 250, 0.5]
    assert make_levels([751, 1], schedule, 50).tolist() == [751, 1, 0]


@pytest.mark.parametrize("last_level", [-1, 501, 1000, math.nan])
def test_a_last_level_outside_the_levels_is_an_error(last_level: float) -> None:
    with pytest.raises(ValueError, match=r"last_level must lie in \[0, 501\).*got"):
        make_levels([501, 1], LinearSchedule(), 50, last_level)


@pytest.mark.parametrize("strategy", ["karras", "uniform_log_snr"])
def test_levels_even_in_log_snr_need_a_signal_at_the_last_level(strategy: str) -> None:
    with pytest.raises(ValueError, match=f"timesteps must not be '{strategy}'.*ZeroTerminalSNR"):
        make_levels(strategy, ZeroTerminalSNR(), 10)


@pytest.mark.parametrize("name", ["cubic", "explicit", "make_levels", "_check", "", "Linear"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="timesteps must be one of") as error:
        make_levels(name, LinearSchedule(), 10)
    assert all(repr(known) in str(error.value) for known in strategies())
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(("strategy", "num_steps"), OWN_LENGTH.items())
def test_a_strategy_of_its_own_length_ignores_the_number_of_steps(
    strategy: str, num_steps: int
) -> None:
    levels = of(strategy, 1000, 50)
    assert len(levels) == num_steps + 1
    assert levels[0] == 1000
    assert (levels.diff() < 0).all()


def test_the_reports_lists() -> None:
    """[Report], eq. 22 and 23, in its 0-based indices; its 1000 is the last one, 999."""
    exponential = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 999]
    assert (of("exponential", 1000, 1).flip(0)[1:] - 1).tolist() == exponential
    assert (of("last100", 1000, 1).flip(0)[1:] - 1).tolist() == [*range(100), 999]
    both = [*range(100), *range(900, 1000)]
    assert (of("first100last100", 1000, 1).flip(0)[1:] - 1).tolist() == both


@pytest.mark.parametrize("num_levels", [1, 2, 3, 4, 5, 8, 9, 100, 513, 514])
def test_exponential_levels_of_any_schedule(num_levels: int) -> None:
    levels = of("exponential", num_levels, 1)
    assert levels[0] == num_levels
    assert levels[-2:].tolist() == [1, 0]
    assert (levels.diff() < 0).all()


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
def test_doubling_doubles_the_signal_to_noise_ratio(schedule: NoiseSchedule) -> None:
    levels = make_levels("doubling", schedule, 7)
    snr = schedule(levels[:-1]).snr
    torch.testing.assert_close(snr[1:] / snr[:-1], torch.full_like(snr[1:], 2), rtol=1e-8, atol=0)
    assert levels[-2] >= 1
    assert 2 * snr[-1] > schedule(1.0).snr  # one more would be below level 1
    assert levels[-1] == 0


@pytest.mark.parametrize(
    ("strategy", "num_levels"), [("last100", 100), ("first100last100", 199), ("exponential", 0)]
)
def test_hundreds_need_that_many_levels(strategy: str, num_levels: int) -> None:
    with pytest.raises(ValueError, match="num_levels"):
        of(strategy, num_levels, 10)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
@pytest.mark.parametrize("num_steps", [2, 7, 100])
def test_uniform_log_snr_and_karras_are_even_in_their_variable(
    schedule: NoiseSchedule, num_steps: int
) -> None:
    levels = make_levels("uniform_log_snr", schedule, num_steps)[:-1]
    assert levels[0] == 1000
    torch.testing.assert_close(levels[-1].item(), 1.0, rtol=1e-9, atol=0)
    steps = schedule(levels).log_snr.diff()
    torch.testing.assert_close(steps, steps.mean().expand(len(steps)), rtol=1e-9, atol=0)
    alpha, sigma = schedule(make_levels("karras", schedule, num_steps)[:-1])
    steps = ((sigma / alpha) ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(len(steps)), rtol=1e-9, atol=0)


def test_saved_levels_are_loaded_to_the_bit(tmp_path: Path) -> None:
    file, schedule = tmp_path / "deep" / "levels.json", LinearSchedule()
    levels = [torch.tensor([1000, 1 / 3 * 1e3, 0]).double(), torch.tensor([999.5, 0]).double()]
    save_levels(file, schedule, levels)
    for each in levels:
        assert torch.equal(make_levels(str(file), schedule, len(each) - 1), each)
    assert [f.name for f in file.parent.iterdir()] == ["levels.json"]


def test_levels_of_another_schedule_or_number_of_steps_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "levels.json"
    save_levels(file, LinearSchedule(), [torch.tensor([1000.0, 10, 0])])
    with pytest.raises(ValueError, match=r"beta_end=0.02.*beta_end=0.03"):
        make_levels(str(file), LinearSchedule(beta_end=0.03), 2)
    with pytest.raises(ValueError, match=r"num_steps must be one of \[2\].*got 3"):
        make_levels(str(file), LinearSchedule(), 3)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", b"\xff\xfe"])
def test_a_file_that_holds_no_levels_is_an_error(
    tmp_path: Path, content: str | bytes | None
) -> None:
    file = tmp_path / "levels.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="cannot be read as adaptive levels"):
        make_levels(str(file), LinearSchedule(), 2)


@pytest.mark.parametrize("levels", [None, [1, 2], {"2": 5}, {"2": ["a", 0]}, {"a": [5]}])
def test_a_file_whose_levels_have_another_form_is_an_error(tmp_path: Path, levels: object) -> None:
    file = tmp_path / "levels.json"
    file.write_text(json.dumps({"schedule": repr(LinearSchedule()), "levels": levels}))
    with pytest.raises(ValueError, match="cannot be read as adaptive levels"):
        make_levels(str(file), LinearSchedule(), 2)


def test_damaged_levels_in_a_file_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "levels.json"
    file.write_text(json.dumps({"schedule": repr(LinearSchedule()), "levels": {"2": [5, 7, 0]}}))
    with pytest.raises(ValueError, match="decrease strictly"):
        make_levels(str(file), LinearSchedule(), 2)
