"""Claims about sampling: steps, latents, subsequences, chains at once, diversity."""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from claim_rules import (
    AS_GOOD,
    CLEAR,
    COMPARABLE,
    FEWER,
    SAME_FEATURES,
    SAME_IMAGES,
    SLACK,
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

# ---- 1: few steps -----------------------------------------------------------------------------

HAT = "sigma-hat"
ETAS = ("eta 0", "eta 0.2", "eta 0.5", "eta 1")


def label(sampler: str) -> str:
    """How the DDIM paper calls a sampler."""
    found = re.search(r"eta=(\d\.\d+)", sampler)
    return f"eta {float(found[1]):g}" if found and sampler.startswith("DDIM") else HAT


def by_eta(study: Study, seed: Mapping[str, Any]) -> dict[tuple[str, int], Row]:
    """Rows by label and the number of steps that was asked for."""
    rows = seed["etas"]
    left = sorted({row["steps"] for row in rows})  # without duplicates of the quadratic levels
    asked = dict(zip(left, study.steps, strict=True))
    found = {(label(row["sampler"]), asked[row["steps"]]): row for row in rows}
    whole = {(label(row["sampler"]), study.full): row for row in seed.get("whole", [])}
    return found | whole


def few_steps(study: Study, seeds: Seeds) -> Evidence:
    """DDIM and DDPM by number of steps."""
    rows = [by_eta(study, seed) for seed in seeds]

    def fd(name: str, steps: int) -> list[float]:
        return [each[name, steps]["fd"] for each in rows]

    checks = [
        at_most(
            f"FD of DDIM with {steps} steps over that of DDPM ({HAT}) with {study.full}",
            ratios(fd("eta 0", steps), fd(HAT, study.full)),
            COMPARABLE,
        )
        for steps in study.steps[1:]
    ]
    for steps in study.steps[:3]:
        others = zip(*(fd(name, steps) for name in ETAS), strict=True)
        text = f"FD of DDPM ({HAT}) with {steps} steps over the largest of all eta"
        checks.append(at_least(text, ratios(fd(HAT, steps), [*map(max, others)]), 1))
    every = (*study.steps, study.full)
    rises = [max(b / a for a, b in pairwise(each)) for each in transposed(fd, every)]
    checks.append(at_most("largest FD of DDIM over that with the next fewer steps", rises, SLACK))
    lines = {
        name: {steps: fd(name, steps) for steps in every if (name, steps) in rows[0]}
        for name in (*ETAS, HAT)
    }
    table = [
        {"": name, **{f"S = {s}": spread(values) for s, values in line.items()}}
        for name, line in lines.items()
    ]
    return Evidence(checks, {"FD by noise and steps": table}, [Panel("steps", "FD", lines)])


def transposed(fd: Callable[[str, int], list[float]], steps: Sequence[int]) -> list[list[float]]:
    """DDIM's distances of each seed, by steps."""
    return [[*each] for each in zip(*(fd("eta 0", s) for s in steps), strict=True)]


# ---- 2 and 3: latents -------------------------------------------------------------------------


def one_latent(study: Study, seeds: Seeds) -> Evidence:
    """Images of one latent by other levels, beside other images of its class."""
    found = [seed["latents"] for seed in seeds]
    shares = {
        way: [each["same"][way] / each["other"] for each in found] for way in found[0]["same"]
    }
    checks = [
        at_most(
            f"{way}: distance from the image of all levels, over random pairs'", v, SAME_FEATURES
        )
        for way, v in shares.items()
    ]
    table = [
        {
            "levels": way,
            "distance": spread([each["same"][way] for each in found]),
            "over random pairs of the class": spread(share),
        }
        for way, share in shares.items()
    ]
    table.append({"levels": "random pairs", "distance": spread([each["other"] for each in found])})
    panel = Panel("levels", "distance over random pairs'", {"": shares}, log="")
    return Evidence(checks, {"Distance from the image of all levels": table}, [panel])


def interpolation(study: Study, seeds: Seeds) -> Evidence:
    """Interpolated latents, and images that are encoded and drawn again."""
    found = [seed["between"] for seed in seeds]
    errors = [seed["reconstruct"] for seed in seeds]
    middle = [statistics.mean(each["interpolated"].values()) for each in found]
    mixed = [statistics.mean(each["mixed"].values()) for each in found]
    falls = [max(b / a for a, b in pairwise(each.values())) for each in errors]
    checks = [
        at_most(
            "distance of interpolants from real images over that of samples",
            ratios(middle, [each["samples"] for each in found]),
            AS_GOOD,
        ),
        at_most("the same over that of mixtures of pixels", ratios(middle, mixed), 1),
        at_most("largest error of a reconstruction over that of fewer steps", falls, 1),
    ]
    rows = [{"images": "real, from the others", **nearest([each["real"] for each in found])}]
    rows.append({"images": "samples", **nearest([each["samples"] for each in found])})
    for kind, name in {"interpolated": "latents", "mixed": "pixels"}.items():
        for weight in found[0][kind]:
            values = [each[kind][weight] for each in found]
            rows.append({"images": f"{name} at {weight}", **nearest(values)})
    by_steps = {int(s): [each[s] for each in errors] for s in errors[0]}
    again = [{"": study.name, **{f"S = {s}": spread(v) for s, v in by_steps.items()}}]
    if 3 in study.published:
        again.append({"": "DDIM paper", **{f"S = {s}": v for s, v in study.published[3].items()}})
    lines = {
        kind: {float(w): [each[kind][w] for each in found] for w in found[0][kind]}
        for kind in ("interpolated", "mixed")
    }
    ends = [each["samples"] for each in found]
    lines["samples"] = {0.0: ends, 1.0: ends}
    panels = [Panel("weight of the second end", "distance from the nearest image", lines, log="")]
    panels.append(Panel("steps", "mean squared error, [0, 1]", {"reconstructions": by_steps}))
    titles = ("Mean distance from the nearest real image, features", "Reconstruction error")
    return Evidence(checks, dict(zip(titles, (rows, again), strict=True)), panels)


def nearest(values: Sequence[float]) -> dict[str, str]:
    """A cell of the table."""
    return {"distance": spread(values)}


# ---- 4: subsequences --------------------------------------------------------------------------


def subsequences(study: Study, seeds: Seeds) -> Evidence:
    """The report's Table 1."""
    few, many = study.steps[0], study.steps[-1]
    rows, adaptive = by_strategy(study, seeds)
    fd = {name: [row["fd"] for row in each] for name, each in rows.items()}
    worst, third, best = "first100last100", "last100", f"quadratic, {many}"

    def over(name: str, others: Iterable[str], pick: Callable[..., float]) -> list[float]:
        rivals = zip(*(fd[each] for each in others if each != name), strict=True)
        return ratios(fd[name], [pick(each) for each in rivals])

    better = [f"quadratic, {few}", best]
    checks = [
        at_most(f"FD of {best} over the least of the others", over(best, fd, min), 1),
        at_least(f"FD of {worst} over the largest of the others", over(worst, fd, max), 1),
        at_least(f"FD of {third} over the larger of the quadratic", over(third, better, max), 1),
        at_least(
            f"lesser FD of exponential and {worst} over that of {third}",
            [1 / r for r in over(third, ["exponential", worst], min)],
            1,
        ),
    ]
    calls = {name: of[0]["network evaluations"] for name, of in rows.items()}
    for name, count in calls.items():
        most = max(n for n in adaptive if n <= count or n == min(adaptive))
        text = f"FD of adaptive, {most} evaluations, over {name}, {count}"
        checks.append(at_most(text, ratios(adaptive[most], fd[name]), SLACK))
    table = [
        {"levels": name, "evaluations": calls[name], "FD": spread(fd[name])} for name in fd
    ] + [
        {"levels": "adaptive", "evaluations": n, "FD": spread(values)}
        for n, values in sorted(adaptive.items())
    ]
    lines = {name: {calls[name]: values} for name, values in fd.items()}
    lines["adaptive"] = dict(sorted(adaptive.items()))
    return Evidence(checks, {"DDIM": table}, [Panel("network evaluations", "FD", lines)])


def by_strategy(study: Study, seeds: Seeds) -> tuple[dict[str, list[Row]], dict[int, list[float]]]:
    """Rows of all seeds by strategy, and distances of adaptive levels by their evaluations."""
    rows: dict[str, list[Row]] = {}
    adaptive: dict[int, list[float]] = {}
    for seed in seeds:
        etas = by_eta(study, seed)
        mine = {f"quadratic, {s}": etas["eta 0", s] for s in (study.steps[-1], study.steps[0])}
        mine |= {r["timesteps"]: r for r in seed["table1"] if r["timesteps"] != "adaptive"}
        for name, row in mine.items():
            rows.setdefault(name, []).append(row)
        for row in seed["table1"]:
            if row["timesteps"] == "adaptive":
                adaptive.setdefault(row["network evaluations"], []).append(row["fd"])
    return rows, adaptive


# ---- 5: the chain at once ---------------------------------------------------------------------


def chains(study: Study, seeds: Seeds) -> Evidence:
    """DEQ-DDIM: sampling and inversion."""
    solver = "Anderson, triangular"
    exact = [max(float(row["error"]) for row in seed["deq"]["exact"]) for seed in seeds]
    checks = [at_most("largest relative error of an image, tolerance 3e-6", exact, SAME_IMAGES)]
    rows = []
    for steps in study.deq_steps:
        for method in dict.fromkeys(row["method"] for row in seeds[0]["deq"]["usual"]):
            of = [row for seed in seeds for row in seed["deq"]["usual"] if is_(row, steps, method)]
            names = ("error", "sweeps", "evaluations", "time")
            cells = {name: spread([float(row[name]) for row in of]) for name in names}
            rows.append({"T": steps, "method": method, **cells})
            if method == solver:
                share = [row["sweeps"] / steps for row in of]
                checks.append(at_most(f"T = {steps}: sweeps over steps, {method}", share, FEWER))
                times = [float(row["time"]) for row in of]
                text = f"T = {steps}: time over that of the sequential chain, {method}"
                checks.append(at_most(text, times, 1))
    panels, lost = [], []
    for steps in study.invert_steps:
        curves = [
            [seed["invert"][f"{steps} {m}"] for m in ("sequential", "DEQ")] for seed in seeds
        ]
        for x in ("seconds", "evaluations"):
            ends = [at_equal(x, *pair) for pair in curves]
            text = f"T = {steps}: DEQ's loss over the baseline's at equal {x}"
            checks.append(at_most(text, [deq / base for base, deq in ends], 1))
            for i, name in enumerate(("baseline", "DEQ")):
                cell = spread([end[i] for end in ends])
                lost.append({"T": steps, "at equal": x, "method": name, "loss": cell})
            lines = {
                name: {row[x]: [row["best loss"]] for row in curve}
                for name, curve in zip(("baseline", "DEQ"), curves[0], strict=True)
            }
            panels.append(Panel(f"{x}, T = {steps}", "best loss", lines, log="y"))
    tables = {"Sampling, tolerance 1e-3; time in units of the sequential chain's": rows}
    return Evidence(checks, {**tables, "Inversion from noise": lost}, panels)


def is_(row: Row, steps: int, method: str) -> bool:
    """Whether this is the row."""
    return (row["steps"], row["method"]) == (steps, method)


def at_equal(x: str, one: Sequence[Row], other: Sequence[Row]) -> tuple[float, float]:
    """Best losses of two curves where the shorter of them ends."""
    end = min(one[-1][x], other[-1][x])
    return tuple(  # type: ignore[return-value]
        [row["best loss"] for row in curve if row[x] <= end or row is curve[0]][-1]
        for curve in (one, other)
    )


# ---- 8: diversity -----------------------------------------------------------------------------


def diversity(study: Study, seeds: Seeds) -> Evidence:
    """Recall and coverage by eta."""
    found = [seed["diversity"] for seed in seeds]
    least, most = min(found[0], key=float), max(found[0], key=float)
    checks = []
    for name in ("recall", "coverage"):
        text = f"{name} at eta {most} less that at {least}, in units of its scatter"
        checks.append(at_least(text, [gain(found, name, least, most)], CLEAR))
    rows = []
    for eta in found[0]:
        cells: dict[str, Any] = {"eta": eta}
        for name in ("recall", "coverage", "precision", "density"):
            cells[name] = spread([each[eta][name] for each in found])
        for name in ("recall", "coverage"):
            scatter = statistics.mean(each[eta][f"{name} scatter"] for each in found)
            cells[f"{name}, scatter over images"] = f"{scatter:.2g}"
        rows.append(cells)
    lines = {
        name: {float(eta): [each[eta][name] for each in found] for eta in found[0]}
        for name in ("recall", "coverage", "precision")
    }
    steps = [by_eta(study, seed) for seed in seeds]
    recalls = {
        name: {s: [each[name, s]["recall"] for each in steps] for s in study.steps}
        for name in (*ETAS, HAT)
    }
    panels = [Panel("eta", f"share, {study.diverse_steps} steps", lines, log="")]
    panels.append(Panel("steps", "recall", recalls, log="x"))
    title = f"{study.num_samples} images, {study.diverse_steps} quadratic steps"
    return Evidence(checks, {title: rows}, panels)


def gain(found: Sequence[Mapping[str, Any]], name: str, least: str, most: str) -> float:
    """Mean gain over its scatter: that over the images or that of the seeds, the larger one."""
    gains = [each[most][name] - each[least][name] for each in found]
    variances = [sum(each[eta][f"{name} scatter"] ** 2 for eta in (least, most)) for each in found]
    variance = statistics.mean(variances)
    if len(gains) > 1:
        variance = max(variance, statistics.variance(gains))
    scatter = (variance / len(gains)) ** 0.5
    return statistics.mean(gains) / max(scatter, 1e-9)
