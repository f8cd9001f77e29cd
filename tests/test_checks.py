"""Checks of arguments name the argument, what it must be, and what it was."""

import math
from typing import Literal

import pytest

from ddim_pl.checks import check_at_least, check_one_of

Kind = Literal["a", "b"]


def test_numbers_that_are_large_enough_pass_and_none_too() -> None:
    check_at_least(1, window=1, max_batch=None, tolerance=2.5)


@pytest.mark.parametrize("value", [0, -3, 0.5, math.nan])
def test_a_number_that_is_too_small_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^window must be at least 1, got {value}$"):
        check_at_least(1, max_batch=4, window=value)


def test_a_value_that_is_not_a_choice_is_named() -> None:
    check_one_of(Kind, first="a", second="b")
    with pytest.raises(ValueError, match=r"^second must be one of \('a', 'b'\), got 'c'$"):
        check_one_of(Kind, first="a", second="c")
