"""Claims about students, Gamma noise and cost."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from claim_rules import (
    AS_GOOD,
    KEPT,
    NEAR_TEACHER,
    OF_THE_CALLS,
    READABLE,
    Evidence,
    Panel,
    Row,
    Seeds,
    at_least,
    at_most,
    ratios,
    spread,
)
from studies import Study

Distances = dict[tuple[str, int], list[float]]


def distances(seeds: Seeds, stage: str) -> Distances:
    """Of all seeds, by model and steps; "teacher" is any teacher."""
    found: Distances = {}
    for seed in seeds:
        for row in seed[stage]:
            name = "teacher" if row["model"].startswith("teacher") else row["model"]
            found.setdefault((name, row["steps"]), []).append(row["fd"])
    return found


def lines_of(fd: Distances, *names: str) -> dict[str, dict[Any, Sequence[float]]]:
    """For a panel."""
    return {n: {s: values for (m, s), values in fd.items() if m == n} for n in names}


# ---- 6: one step from pairs -------------------------------------------------------------------


def one_step(study: Study, seeds: Seeds) -> Evidence:
    """Luhman's student, beside the ladder's of one step."""
    fd = distances(seeds, "students")
    teacher = [seed["pair-teacher"][0]["fd"] for seed in seeds]
    student, ladder = fd["luhman", 1], fd["ladder", 1]
    between = [seed["between-luhman"] for seed in seeds]
    middle = [statistics.mean(each["interpolated"].values()) for each in between]
    many = f"DDIM, {study.steps[-1]}"
    checks = [
        at_most("FD of the student over its teacher's", ratios(student, teacher), NEAR_TEACHER),
        *speeds(seeds, "Luhman, 1", many),
        *speeds(seeds, "Luhman, 1", f"DDPM, {study.full}"),
        at_most(
            "distance of the student's interpolants from real images over that of its samples",
            ratios(middle, [each["samples"] for each in between]),
            AS_GOOD,
        ),
    ]
    rows = [
        {"model": f"teacher, {study.pair_steps} steps of DPM-Solver++", "FD": spread(teacher)},
        {"model": "student of pairs", "FD": spread(student), **passes(study, "luhman")},
        {"model": "progressive, 1 step", "FD": spread(ladder), **passes(study, "ladder")},
        {"model": "student of pairs over its teacher", "FD": spread(ratios(student, teacher))},
        {"model": "student of pairs over progressive", "FD": spread(ratios(student, ladder))},
    ]
    bars = {"teacher": teacher, "student of pairs": student, "progressive, 1": ladder}
    return Evidence(checks, {"One step": rows}, [Panel("model", "FD", {"": bars}, log="")])


def passes(study: Study, fit: str) -> dict[str, str]:
    """A cell of the table."""
    return {"network passes of images in training": f"{study.passes[fit]:,}"}


def speeds(seeds: Seeds, name: str, slower: str) -> list[Any]:
    """How many times faster one method is than another, over the ratio of their evaluations."""
    cost = [seed["cost"] for seed in seeds]
    calls = cost[0][slower]["calls"] / cost[0][name]["calls"]
    times = [each[name]["speed"] / each[slower]["speed"] / calls for each in cost]
    text = f"times faster than {slower}: {name}, over the {calls:g} times fewer evaluations"
    return [at_least(text, times, OF_THE_CALLS)]


# ---- 7: progressive ---------------------------------------------------------------------------


def ladder(study: Study, seeds: Seeds) -> Evidence:
    """Students of 8 steps and fewer over their teacher at its best."""
    fd = distances(seeds, "students")
    best = fd["teacher", study.teacher_steps[0]]
    counts = sorted({steps for name, steps in fd if name == "ladder"}, reverse=True)
    kept = counts[:-2]  # but for 2 and 1
    checks = [
        at_most(
            f"FD of the student of {s} steps over its teacher's with {study.teacher_steps[0]}",
            ratios(fd["ladder", s], best),
            KEPT,
        )
        for s in kept
    ]
    checks.append(
        at_most(
            f"FD of the student of {kept[-1]} steps over DDIM's with as many",
            ratios(fd["ladder", kept[-1]], fd["teacher", kept[-1]]),
            1,
        )
    )
    rows = [
        {
            "steps": s,
            "FD of the student": spread(fd["ladder", s]),
            "over the teacher's best": spread(ratios(fd["ladder", s], best)),
            "FD of DDIM": spread(fd["teacher", s]),
        }
        for s in counts
    ]
    title = f"The teacher has {spread(best)} with {study.teacher_steps[0]} steps"
    return Evidence(
        checks, {title: rows}, [Panel("steps", "FD", lines_of(fd, "teacher", "ladder"))]
    )


# ---- 9: Gamma noise ---------------------------------------------------------------------------


def gamma(study: Study, seeds: Seeds) -> Evidence:
    """Gamma noise of each scale beside Gaussian noise, after fits of one length."""
    gauss = by_steps([seed["short-steps"] for seed in seeds])["DDIM"]
    most = max(gauss)
    checks, rows = [], [row_of("Gaussian", "DDIM", gauss)]
    lines: dict[str, Mapping[Any, Sequence[float]]] = {"Gaussian, DDIM": gauss}
    for theta in study.thetas:
        found = by_steps([seed[f"gamma-{theta}-steps"] for seed in seeds])
        own = ratios(found["GammaMoment"][most], gauss[most])
        report = ratios(found["GammaReport"][most], gauss[most])
        text = f"theta_0 = {theta}, {most} steps: FD over Gaussian noise's, "
        checks.append(at_most(text + "DDIM's step", own, AS_GOOD))
        checks.append(at_most(text + "the report's step (eq. 18)", report, READABLE))
        rows += [row_of(f"theta_0 = {theta}", name, values) for name, values in found.items()]
        lines |= {f"{theta}, {name.removeprefix('Gamma')}": v for name, v in found.items()}
    students = distances(seeds, "gamma-students")
    gaussian = distances(seeds, "short-students")
    steps = sorted({s for name, s in students if name == "gamma-ladder"}, reverse=True)
    few = []
    for s in steps:
        mine, theirs = students["gamma-ladder", s], gaussian["short-ladder", s]
        few.append({"steps": s, "Gamma": spread(mine), "Gaussian": spread(theirs)})
    last = ratios(students["gamma-ladder", steps[-1]], gaussian["short-ladder", steps[-1]])
    text = f"FD of the ladder's student of {steps[-1]} step over that of Gaussian noise"
    checks.append(at_most(text, last, AS_GOOD))
    panels = [Panel("steps", "FD", lines)]
    both = lines_of(students, "gamma-ladder") | lines_of(gaussian, "short-ladder")
    panels.append(Panel("steps of a student", "FD", both))
    return Evidence(checks, {"Samplers": rows, "Ladders": few}, panels)


def by_steps(found: Sequence[Sequence[Row]]) -> dict[str, dict[int, list[float]]]:
    """Distances of all seeds by sampler and steps."""
    fd: dict[str, dict[int, list[float]]] = {}
    for row in (row for rows in found for row in rows):
        name = row["sampler"].partition("(")[0]
        fd.setdefault(name, {}).setdefault(row["steps"], []).append(row["fd"])
    return fd


def row_of(noise: str, sampler: str, fd: Mapping[int, Sequence[float]]) -> dict[str, str]:
    """A line of the table."""
    return {"noise": noise, "sampler": sampler, **{f"S = {s}": spread(v) for s, v in fd.items()}}


# ---- 10: cost ---------------------------------------------------------------------------------


def cost(study: Study, seeds: Seeds) -> Evidence:
    """Evaluations and time of every method, over those of DDPM with all steps."""
    found = [seed["cost"] for seed in seeds]
    first = f"DDPM, {study.full}"
    few = [f"DDIM, {study.steps[1]}", f"DDIM, {study.steps[-1]}", "Luhman, 1"]
    students = [name for name in found[0] if name.startswith("progressive")]
    checks = [check for name in (*few, *students) for check in speeds(seeds, name, first)]
    rows = [
        {
            "method, steps": name,
            "network evaluations": spread([each[name]["calls"] for each in found]),
            "ms an image": spread([1000 * each[name]["seconds"] for each in found]),
            "times faster": spread([each[name]["speed"] for each in found]),
        }
        for name in found[0]
    ]
    bars = {name: [each[name]["speed"] for each in found] for name in found[0]}
    panel = Panel("method", f"times faster than {first}", {"": bars}, log="y")
    return Evidence(checks, {"An image": rows}, [panel])
