"""Every verdict of the claims about sampling is reached by numbers made for it."""

import pytest
from claim_rules import CLEAR
from claims_of_sampling import (
    at_equal,
    by_eta,
    chains,
    diversity,
    few_steps,
    gain,
    interpolation,
    label,
    one_latent,
    subsequences,
)
from studies import DIGITS

LEFT = {10: 10, 20: 20, 50: 49, 100: 96}
DDIMS = {f"DDIM(eta={eta}, clip=False)": eta for eta in (0.0, 0.2, 0.5, 1.0)}
HAT = "Ancestral(variance='large', clip=True)"


def row(sampler, timesteps, steps, fd):
    cells = {"sampler": sampler, "timesteps": timesteps, "steps": steps, "recall": 0.5}
    return {**cells, "network evaluations": steps, "fd": fd}


def etas(ddim, hat):
    """Rows in the order of a sweep: all samplers for a number of steps, then the next."""
    rows = []
    for asked, left in LEFT.items():
        rows += [
            row(name, "quadratic", left, ddim[asked] + eta / 100) for name, eta in DDIMS.items()
        ]
        rows.append(row(HAT, "quadratic", left, hat[asked]))
    return rows


def steps_seed(ddim, hat):
    whole = [row("DDIM(eta=0.0, clip=False)", "trailing", 1000, ddim[1000])]
    whole.append(row(HAT, "trailing", 1000, hat[1000]))
    return {"etas": etas(ddim, hat), "whole": whole}


FALLING = {10: 0.3, 20: 0.14, 50: 0.12, 100: 0.11, 1000: 0.1}
RISING = {10: 0.3, 20: 0.4, 50: 0.5, 100: 0.6, 1000: 0.7}


@pytest.mark.parametrize(
    ("ddim", "hat", "verdict"),
    [
        (FALLING, {10: 1.0, 20: 0.5, 50: 0.2, 100: 0.1, 1000: 0.1}, "holds"),
        (FALLING, {10: 1.0, 20: 0.5, 50: 0.1, 100: 0.1, 1000: 0.1}, "holds in part"),
        (RISING, dict.fromkeys(RISING, 0.1), "does not hold"),
    ],
)
def test_few_steps(ddim, hat, verdict):
    assert few_steps(DIGITS, [steps_seed(ddim, hat)] * 3).verdict == verdict


def test_rows_are_found_by_the_steps_that_were_asked_for():
    found = by_eta(DIGITS, steps_seed(FALLING, dict.fromkeys(FALLING, 9.0)))
    assert found["eta 0.2", 100]["steps"] == 96
    assert found["sigma-hat", 50]["fd"] == 9.0
    assert found["eta 0", 1000]["fd"] == 0.1
    assert len(found) == 5 * 4 + 2
    assert label("Ancestral(variance='large')") == "sigma-hat"


@pytest.mark.parametrize(
    ("near", "far", "verdict"),
    [(1.0, 1.9, "holds"), (1.0, 2.1, "holds in part"), (3.0, 3.0, "does not hold")],
)
def test_one_latent(near, far, verdict):
    seed = {"latents": {"same": {"quadratic, 10": far, "exponential": near}, "other": 4.0}}
    assert one_latent(DIGITS, [seed]).verdict == verdict


@pytest.mark.parametrize(
    ("between", "errors", "verdict"),
    [
        (1.0, {"10": 3.0, "20": 2.0, "50": 1.0}, "holds"),
        (1.0, {"10": 1.0, "20": 2.0, "50": 1.0}, "holds in part"),
        (9.0, {"10": 1.0, "20": 2.0, "50": 1.0}, "does not hold"),
    ],
)
def test_interpolation(between, errors, verdict):
    found = {"samples": 1.0, "real": 0.9, "interpolated": {"0.5": between}, "mixed": {"0.5": 2.0}}
    evidence = interpolation(DIGITS, [{"between": found, "reconstruct": errors}] * 2)
    assert evidence.verdict == verdict


def test_a_published_row_stands_beside_the_errors():
    from dataclasses import replace

    study = replace(DIGITS, published={3: {10: 0.014}})
    found = {"samples": 1.0, "real": 0.9, "interpolated": {"0.5": 1.0}, "mixed": {"0.5": 2.0}}
    seed = {"between": found, "reconstruct": {"10": 0.02, "20": 0.01}}
    rows = interpolation(study, [seed]).tables["Reconstruction error"]
    assert rows == [
        {"": "digits", "S = 10": "0.02", "S = 20": "0.01"},
        {"": "DDIM paper", "S = 10": 0.014},
    ]


def table1(last, exponential, both, adaptive):
    ddim = "DDIM(eta=0.0, clip=False)"
    rows = [row(ddim, "last100", 101, last), row(ddim, "exponential", 12, exponential)]
    rows.append(row(ddim, "first100last100", 200, both))
    return [*rows, *(row(ddim, "adaptive", n, adaptive) for n in (10, 12, 96))]


@pytest.mark.parametrize(
    ("ddim", "rest", "verdict"),
    [
        (FALLING, (0.5, 0.6, 0.7, 0.1), "holds"),
        (FALLING, (0.8, 0.6, 0.7, 0.1), "holds in part"),  # last100 is worst
        (dict.fromkeys(FALLING, 1.0), (0.8, 0.6, 0.7, 9.0), "does not hold"),
    ],
)
def test_subsequences(ddim, rest, verdict):
    seed = {"etas": etas(ddim, ddim), "table1": table1(*rest)}
    assert subsequences(DIGITS, [seed] * 2).verdict == verdict


def test_adaptive_levels_are_compared_at_no_more_evaluations():
    seed = {"etas": etas(FALLING, FALLING), "table1": table1(0.5, 0.6, 0.7, 0.1)}
    texts = [
        check.text for check in subsequences(DIGITS, [seed]).checks if "adaptive" in check.text
    ]
    assert [text.removeprefix("FD of adaptive, ") for text in texts] == [
        "96 evaluations, over quadratic, 100, 96",
        "10 evaluations, over quadratic, 10, 10",
        "96 evaluations, over last100, 101",
        "12 evaluations, over exponential, 12",
        "96 evaluations, over first100last100, 200",
    ]


def curve(end, speed, loss):
    return [
        {"seconds": s, "evaluations": s * speed, "best loss": 10 - (10 - loss) * s / end}
        for s in range(end + 1)
    ]


def chain_seed(error, sweeps, time, deq, base):
    usual = [
        {
            **{"steps": steps, "method": "Anderson, triangular", "error": 1e-3, "time": time},
            **{"sweeps": sweeps * steps, "evaluations": 9},
        }
        for steps in DIGITS.deq_steps
    ]
    invert = {}
    for steps in DIGITS.invert_steps:
        invert |= {f"{steps} DEQ": curve(10, 1, deq), f"{steps} sequential": curve(10, 1, base)}
    return {"deq": {"usual": usual, "exact": [{"error": error}]}, "invert": invert}


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ((1e-5, 0.2, 0.5, 1, 2), "holds"),
        ((1e-5, 0.2, 3.0, 1, 2), "holds in part"),
        ((1e-2, 0.8, 3.0, 2, 1), "does not hold"),
    ],
)
def test_chains(numbers, verdict):
    assert chains(DIGITS, [chain_seed(*numbers)] * 3).verdict == verdict


def test_losses_are_compared_where_the_shorter_curve_ends():
    one, other = curve(4, 1, 2.0), curve(10, 1, 0.0)
    assert at_equal("seconds", one, other) == (2.0, 6.0)
    late = [{"seconds": 7, "best loss": 5.0}]  # whose first point comes after the other's end
    assert at_equal("seconds", one, late) == (2.0, 5.0)


def diverse(low, high, scatter):
    def of(value):
        return {
            name: value if name in ("recall", "coverage") else 0.5
            for name in ("precision", "recall", "density", "coverage")
        } | {"recall scatter": scatter, "coverage scatter": scatter}

    return {"0": of(low), "0.5": of(0.5), "1": of(high)}


@pytest.mark.parametrize(
    ("low", "high", "coverage", "verdict"),
    [(0.6, 0.7, 0.7, "holds"), (0.6, 0.7, 0.6, "holds in part"), (0.7, 0.6, 0.6, "does not hold")],
)
def test_diversity(low, high, coverage, verdict):
    found = diverse(low, high, 0.01)
    found["1"]["coverage"] = coverage
    seed = {"diversity": found, "etas": etas(FALLING, FALLING)}
    assert diversity(DIGITS, [seed] * 3).verdict == verdict


def test_a_gain_is_measured_by_the_larger_scatter():
    alike = [diverse(0.5, 0.6, 0.05)] * 2  # 0.1 over 0.05 sqrt(2) / sqrt(2)
    assert gain(alike, "recall", "0", "1") == pytest.approx(CLEAR)
    apart = [diverse(0.5, 0.4, 1e-6), diverse(0.5, 0.8, 1e-6)]  # seeds of -0.1 and 0.3
    assert gain(apart, "recall", "0", "1") == pytest.approx(0.1 / 0.2)
