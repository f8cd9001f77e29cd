"""A check looks at the mean over the seeds; a claim holds if all do, in part if some do."""

import pytest
from claim_rules import Check, Evidence, at_least, at_most, ratios, spread


@pytest.mark.parametrize(
    ("check", "holds"),
    [
        (at_most("", [1.0, 3.0], 2), True),  # the mean, and the bound belongs to it
        (at_most("", [1.0, 3.1], 2), False),
        (at_least("", [1.0, 3.0], 2), True),
        (at_least("", [1.0, 2.9], 2), False),
        (at_most("", [float("nan")], 2), False),
        (at_least("", [float("nan")], 2), False),
    ],
)
def test_a_check_compares_the_mean_with_its_bound(check, holds):
    assert check.holds == holds


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((0, 0), "holds"), ((0, 2), "holds in part"), ((2, 2), "does not hold")],
)
def test_the_verdict_is_that_of_all_checks(values, verdict):
    evidence = Evidence([Check("", [value], 1) for value in values], {}, [])
    assert evidence.verdict == verdict


def test_a_ratio_is_that_of_each_seed():
    assert ratios([1.0, 6.0], [2.0, 3.0]) == [0.5, 2.0]
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


def test_a_deviation_is_that_of_a_sample():
    assert spread([1.0, 2.0, 3.0]) == "2 ± 1"
    assert spread([0.12345]) == "0.123"
