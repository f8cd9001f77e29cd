"""The page of `reproduce.py`: each claim with its verdict, figure, tables, checks and commands."""

import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from claim_rules import Check, Claim, Evidence, Panel, Seeds
from claim_stages import Stage
from claim_training import trained
from claims import CLAIMS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from studies import Study

from ddim_pl.evaluation.plots import logarithmic_x, logarithmic_y
from ddim_pl.evaluation.tables import markdown, write_text
from ddim_pl.files import replacing

NOT_YET = "not measured yet"
MARKS = {True: "yes", False: "no"}


def write_page(
    study: Study,
    seeds: Sequence[int],
    stages: Sequence[Stage],
    found: Mapping[str, Any],
    out: Path,
    conditions: Mapping[str, Any],
) -> None:
    """Write `claims.md` and its figures from what the stages found, by their names."""
    parts, overview = [], []
    before = head(study, seeds, conditions) + models(study, stages, seeds[0])
    before += training(study, seeds, stages, out)
    for number, claim in CLAIMS.items():
        names = claim.stages(study)
        complete = [seed for seed in seeds if all(f"{name}-{seed}" in found for name in names)]
        data: Seeds = [{name: found[f"{name}-{seed}"] for name in names} for seed in complete]
        evidence = claim.evaluate(study, data) if data else None
        verdict = evidence.verdict if evidence else NOT_YET
        seen = ", ".join(map(str, complete))
        overview.append({"": number, "claim": claim.title, "verdict": verdict, "seeds": seen})
        text = section(number, claim, study, evidence)
        if evidence:
            draw(evidence.panels, out / "figures" / f"claim-{number:02d}.png")
            text += pictures(number, claim, complete[0], out)
        parts.append(text + commands(names, stages, seeds[0], study, out))
    write_text(out / "claims.md", before + markdown(overview) + "".join(parts))


def head(study: Study, seeds: Sequence[int], conditions: Mapping[str, Any]) -> str:
    """What holds for all claims."""
    listed = ", ".join(map(str, seeds))
    given = [study.name, *(["--root=$ROOT"] if study.root else [])]
    given += [] if study.images is None else [f"--images={study.images}"]
    given += ["--seeds", *map(str, seeds)]
    return (
        f"# The report's claims on {study.name}\n\n"
        "Written by\n\n```text\n"
        f"python benchmarks/reproduce.py {' '.join(given)}\n```\n\n"
        f"Numbers are mean ± sample deviation over the seeds ({listed}) of training and sampling. "
        f"FD is the Fréchet distance of {study.num_samples:,} images in the features of "
        f"`{study.features}`, to be compared with itself only. A check compares the mean over the "
        "seeds with its bound; a claim *holds* if all its checks do, *in part* if some do, and "
        "otherwise *does not hold*. Where each bound comes from: `benchmarks/claim_rules.py`.\n\n"
        + ", ".join(f"{name} {value}" for name, value in conditions.items())
        + ". Times are ratios of CPU seconds of one process, in which the methods took turns; "
        "those of claim 5 are of the wall.\n\n"
    )


def section(number: int, claim: Claim, study: Study, evidence: Evidence | None) -> str:
    """Claim, verdict, reason, checks, figure and tables."""
    verdict = evidence.verdict if evidence else NOT_YET
    lines = [f"\n## {number}. {claim.title}: {verdict}\n"]
    lines.append(f"*{claim.sentence}* (the report, {claim.place})\n")
    if evidence is None:
        return "\n".join(lines) + "\n"
    if number in study.why:
        lines.append(study.why[number] + "\n")
    lines.append(markdown([line(check) for check in evidence.checks]))
    lines.append(f"![{claim.title}](figures/claim-{number:02d}.png)\n")
    for title, rows in evidence.tables.items():
        lines += [f"{title}:\n", markdown(rows)]
    return "\n".join(lines) + "\n"


def line(check: Check) -> dict[str, str]:
    """A check as a line of a table."""
    values = check.values
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    sign = "at most" if check.below else "at least"
    return {
        "check": check.text,
        "found": f"{statistics.mean(values):.3g}{deviation}",
        "wanted": f"{sign} {check.bound:g}",
        "holds": MARKS[check.holds],
    }


def pictures(number: int, claim: Claim, seed: int, out: Path) -> str:
    """Copies of what the commands drew for a seed, and where they are on the page."""
    text = ""
    for index, (caption, place) in enumerate(claim.pictures.items(), 1):
        stage, _, file = place.partition("/")
        name = f"claim-{number:02d}-{index}.png"
        with replacing(out / "figures" / name) as part:
            shutil.copyfile(out / "stages" / f"{stage}-{seed}" / file, part)
        text += f"{caption}, seed {seed}:\n\n![{caption}](figures/{name})\n\n"
    return text


def commands(
    names: Sequence[str], stages: Sequence[Stage], seed: int, study: Study, out: Path
) -> str:
    """The commands of the stages of one seed, with those that they need, in their order."""
    wanted = with_needs(names, stages, seed)
    lines = [
        " ".join(("python", *(quoted(movable(word, study, out)) for word in command)))
        for stage in stages
        if stage.name in wanted
        for command in stage.commands
    ]
    text = "\n".join(lines)
    summary = f"<details><summary>Commands, seed {seed}, OUT=runs/reproduce-{study.name}</summary>"
    return f"{summary}\n\n```text\n{text}\n```\n\n</details>\n"


def movable(word: str, study: Study, out: Path | None = None) -> str:
    """An argument whose folders are variables of a shell."""
    word = word.replace(study.root, "$ROOT") if study.root else word
    return word.replace(f"{out}/", "$OUT/") if out else word


def with_needs(names: Sequence[str], stages: Sequence[Stage], seed: int) -> set[str]:
    """These stages of a seed and all that come before them."""
    by_name = {stage.name: stage for stage in stages}
    wanted: set[str] = set()
    left = [f"{name}-{seed}" for name in names]
    while left:
        name = left.pop()
        wanted.add(name)
        left += by_name[name].needs
    return wanted


def models(study: Study, stages: Sequence[Stage], seed: int) -> str:
    """The training runs of a seed, what differs from their configs, and whom they serve."""
    before = {n: with_needs(c.stages(study), stages, seed) for n, c in CLAIMS.items()}
    rows = []
    for name, fit in study.fits.items():
        options = (
            movable(each, study).removeprefix("--").replace("init_args.", "")
            for each in fit.options
        )
        row = {"model": name, "config": f"`{fit.config}`", "teacher": fit.teacher or ""}
        row["what differs"] = ", ".join(f"`{option}`" for option in options)
        row["claims"] = ", ".join(str(n) for n in before if f"{name}-{seed}" in before[n])
        rows.append(row)
    return f"Models of a seed:\n\n{markdown(rows)}\n"


def training(study: Study, seeds: Sequence[int], stages: Sequence[Stage], out: Path) -> str:
    """How far the fits are."""
    places = {stage.name: stage.run for stage in stages if stage.run}
    runs = {name: {seed: places[f"{name}-{seed}"] for seed in seeds} for name in study.fits}
    rows, panel = trained(study, runs)
    if not rows:
        return ""
    text = "What training saw so far, a backward pass counted as two:\n\n" + markdown(rows)
    if panel:
        draw([panel], out / "figures" / "training.png")
        text += "\n![FD while the models train](figures/training.png)\n"
    return text + "\n"


def quoted(word: str) -> str:
    """For a shell, which replaces its variables."""
    if not set(word) & set(' []{}"()'):
        return word
    return '"{}"'.format(word.replace('"', '\\"')) if "$" in word else f"'{word}'"


def draw(panels: Sequence[Panel], path: Path) -> None:
    """A figure of panels side by side."""
    figure = Figure(figsize=(5.4 * len(panels), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        has_names = any(isinstance(x, str) for line in panel.lines.values() for x in line)
        (bars if has_names else curves)(axes, panel)
        axes.grid(visible=True, which="both", alpha=0.25)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=90)


def curves(axes: Axes, panel: Panel) -> None:
    """Means with deviations."""
    for name, points in panel.lines.items():
        x = sorted(points)
        means = [statistics.mean(points[each]) for each in x]
        spreads = [statistics.stdev(points[v]) if len(points[v]) > 1 else 0.0 for v in x]
        # A logarithm has no room for a deviation larger than the mean.
        low = [min(s, 0.9 * abs(m)) for s, m in zip(spreads, means, strict=True)]
        marker = "o" if len(x) < 12 else ""
        axes.errorbar(
            x, means, yerr=[low, spreads], marker=marker, markersize=4, capsize=2, label=name
        )
    if "x" in panel.log:
        logarithmic_x(axes, {each for points in panel.lines.values() for each in points})
    if "y" in panel.log:
        axes.margins(y=0.1)
        logarithmic_y(axes)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    # Above, where it hides no point.
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)


def bars(axes: Axes, panel: Panel) -> None:
    """A bar for each name, and a dot for each seed."""
    (values,) = panel.lines.values()
    names = [*values]
    axes.barh(names, [statistics.mean(values[name]) for name in names], color="0.8")
    for place, name in enumerate(names):
        axes.plot(values[name], [place] * len(values[name]), "k.", markersize=5)
    axes.invert_yaxis()
    if "y" in panel.log:
        axes.set_xscale("log")
    axes.set(xlabel=panel.y, ylabel=panel.x)
