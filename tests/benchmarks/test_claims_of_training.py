"""Every verdict of the claims about students, Gamma noise and cost is reached."""

import pytest
from claims import CLAIMS
from claims_of_training import cost, gamma, ladder, one_step
from studies import DIGITS


def students(name, best, distances, luhman=None):
    """Rows of a comparison: the teacher, who is worse with fewer steps, then the students."""
    rows = [{"model": "teacher, DDIM", "steps": 256, "fd": best}]
    rows += [{"model": "teacher, DDIM", "steps": s, "fd": 8 * best / s} for s in distances]
    rows += [{"model": name, "steps": s, "fd": fd} for s, fd in distances.items()]
    return rows + [{"model": "luhman", "steps": 1, "fd": luhman}] * (luhman is not None)


def costs(share):
    """Every method as many times faster as it takes fewer evaluations, times a share."""
    calls = {"DDPM, 1000": 1000, "DDIM, 100": 100, "DDIM, 20": 20, "progressive, 4": 4}
    calls["Luhman, 1"] = 1
    return {
        name: {"calls": n, "seconds": n / 1000, "speed": 1000 / n * (share if n < 1000 else 1)}
        for name, n in calls.items()
    }


@pytest.mark.parametrize(
    ("luhman", "between", "share", "verdict"),
    [
        (0.15, 1.0, 1.0, "holds"),
        (0.15, 1.0, 0.5, "holds in part"),
        (0.15, 2.0, 1.0, "holds in part"),
    ],
)
def test_one_step(luhman, between, share, verdict):
    seed = {
        "students": students("ladder", 0.1, {4: 0.11, 1: 0.2}, luhman),
        "pair-teacher": [{"fd": 0.1}],
        "between-luhman": {"samples": 1.0, "interpolated": {"0.5": between}},
        "cost": costs(share),
    }
    evidence = one_step(DIGITS, [seed] * 3)
    assert evidence.verdict == verdict
    assert evidence.tables["One step"][1]["network passes of images in training"] == "2,547,200"


def test_one_step_of_no_use():
    """Three times its teacher's distance, slow, far from real images between two others."""
    found = costs(0.1)
    found["DDIM, 100"]["speed"] = 10.0
    seed = {
        "students": students("ladder", 0.1, {4: 0.11, 1: 0.2}, 0.3),
        "pair-teacher": [{"fd": 0.1}],
        "between-luhman": {"samples": 1.0, "interpolated": {"0.5": 2.0}},
        "cost": found,
    }
    assert one_step(DIGITS, [seed]).verdict == "does not hold"


def test_student_of_pairs_and_ladder_take_as_many_passes():
    assert DIGITS.passes["luhman"] / DIGITS.passes["ladder"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("four", "eight", "verdict"),
    [(0.12, 0.11, "holds"), (0.15, 0.11, "holds in part"), (0.25, 0.2, "does not hold")],
)
def test_ladder(four, eight, verdict):
    rows = students("ladder", 0.1, {8: eight, 4: four, 2: 0.3, 1: 0.4})
    assert ladder(DIGITS, [{"students": rows}] * 2).verdict == verdict


def gammas(moment, report, student):
    def rows(**distances):
        return [
            {"sampler": f"{name}(eta=0.0)", "steps": steps, "fd": fd}
            for name, fd in distances.items()
            for steps in DIGITS.gamma_steps
        ]

    seed = {"short-steps": rows(DDIM=0.1)}
    for theta in DIGITS.thetas:
        steps = rows(GammaMoment=moment, GammaQuantile=0.2, GammaReport=report)
        seed[f"gamma-{theta}-steps"] = steps
    seed["short-students"] = students("short-ladder", 0.1, {4: 0.2, 1: 0.3})
    seed["gamma-students"] = students("gamma-ladder", 0.1, {4: 0.2, 1: student})
    return seed


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ((0.1, 0.15, 0.3), "holds"),
        ((0.1, 40.0, 0.3), "holds in part"),
        ((0.2, 40.0, 0.5), "does not hold"),
    ],
)
def test_gamma(numbers, verdict):
    seed = gammas(*numbers)
    assert set(seed) == set(CLAIMS[9].stages(DIGITS))
    assert gamma(DIGITS, [seed] * 3).verdict == verdict


def test_cost_in_every_verdict():
    slow_student = costs(1.0)
    slow_student["Luhman, 1"]["speed"] = 100.0
    for found, verdict in (
        (costs(1.0), "holds"),
        (slow_student, "holds in part"),
        (costs(0.1), "does not hold"),
    ):
        assert cost(DIGITS, [{"cost": found}] * 3).verdict == verdict


def test_every_claim_of_the_report_has_its_place_and_stages():
    assert [*CLAIMS] == [*range(1, 11)]
    for claim in CLAIMS.values():
        assert claim.place.startswith("section")
        assert claim.sentence.endswith(".")
        assert claim.stages(DIGITS)
