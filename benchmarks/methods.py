"""Methods that make students of few steps, at equal passes of the network, on digits.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/methods.py [--seeds 0 1 2] [--jobs 2]
        [--budget 3h] [--out runs/reproduce-digits] [--publish]

From one teacher of each seed: progressive distillation, TRACT, Luhman's student of one step,
rectified flow from the same pairs, consistency distillation, and consistency training from the
teacher's weights. Each is trained with as many network passes of an image, 2.56 million, a
backward pass counted as two. The page is `OUT/few-steps.md`, with its figures.

Teacher, ladder and student of pairs are those of `reproduce.py`, and are found where it has been
called with the same `--out`. As there, the command goes on where it was stopped, and `--publish`
copies the page to `docs/results`. A seed takes some two CPU hours, by single fits, of which the
other command shares one.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from claim_page import commands, draw
from claim_rules import Panel, ratios, spread
from claim_stages import QUIET, Command, Maker, Rows, Stage
from claims_of_training import distances
from reproduce import (
    RESULTS,
    Results,
    Runner,
    check_options,
    guarded,
    kept_conditions,
    publish,
    seconds_of,
)
from studies import DIGITS, LADDER, Fit, Study

from ddim_pl.evaluation.tables import markdown, write_text
from ddim_pl.files import replacing

PAGE = "few-steps"
STEPS = (256, 8, 4, 2, 1)
"""Of the teacher; B is its distance with the first."""

OF_PAIRS = DIGITS.fits["luhman"].options
CONSISTENCY = "configs/digits/consistency.yaml"
IN_TRAINING = (
    "--model.init_args.method=training",
    "--model.init_args.stage_updates=1875",
    "--model.init_args.lr_scheduler.init_args.total_iters=5000",
    "--trainer.max_epochs=10",
)

METHODS = {
    "ladder": "progressive",
    "tract": "TRACT",
    "luhman": "Luhman",
    "consistency": "consistency distillation",
    "consistency-training": "consistency training",
    "reflow": "rectified flow",
}
"""Titles of the fits."""

SIGMAS = {1: [20.0], 2: [20.0, 0.821], 4: [20.0, 5.0, 1.5, 0.5]}
"""Noises that a consistency model is sampled from, by steps."""

STUDY = replace(
    DIGITS,
    fits={
        **{name: DIGITS.fits[name] for name in ("teacher", "ladder", "luhman")},
        "tract": Fit("configs/digits/tract.yaml", (), "teacher", passes=LADDER),
        "consistency": Fit(CONSISTENCY, (), "teacher", passes=LADDER),
        "consistency-training": Fit(CONSISTENCY, IN_TRAINING, "teacher", passes=4),
        "reflow": Fit("configs/digits/reflow.yaml", OF_PAIRS, "teacher", pairs=True),
    },
    passes={
        **DIGITS.passes,
        "tract": 4000 * 128 * LADDER,
        "consistency": 4000 * 128 * LADDER,
        "consistency-training": 5000 * 128 * 4,
        "reflow": DIGITS.passes["luhman"],
    },
)


class MethodMaker(Maker):
    """Makes the stages of a seed: the fits, and what compares them."""

    def all(self) -> list[Stage]:
        """All stages, each after those it needs."""
        fits = {name: self.fit(name, fit) for name, fit in self.study.fits.items()}
        # Two at once would make the same pairs.
        reflow = fits["reflow"]
        fits["reflow"] = replace(reflow, needs=(*reflow.needs, self.named("luhman")))
        return [*fits.values(), self.few_steps()]

    def few_steps(self) -> Stage:
        """The students of each method beside the teacher, on one axis."""
        folder = self.folder("few-steps")
        exports, students = [], [str(self.checkpoint("ladder").parents[1])]
        students += [str(self.checkpoint("tract").parents[1]), str(self.checkpoint("luhman"))]
        for name, steps, options in variants():
            # In a folder like that of a run, so that the table knows its series.
            file = folder / name / "version_0" / "checkpoints" / f"{steps}.ckpt"
            export = ("main.py", "export", f"--ckpt_path={self.checkpoint(name)}", *options)
            exports.append((*export, f"--output={file}"))
            students.append(str(file))
        command: Command = ("main.py", "compare", f"--ckpt_path={self.checkpoint('teacher')}")
        command += (f"--students=[{','.join(students)}]", f"--num_steps={[*STEPS]}")
        command += (*self.images(), QUIET, f"--output={folder}")

        def collect() -> Rows:
            rows = self.rows(folder / "distillation.csv")
            return [{**row, "model": row["model"].removesuffix(f"-{self.seed}")} for row in rows]

        return self.stage("few-steps", (*exports, command), collect, *METHODS)


def variants() -> list[tuple[str, int, Command]]:
    """What can be drawn from with several numbers of steps: fit, steps and arguments of export."""
    found: list[tuple[str, int, Command]] = []
    for steps, sigmas in SIGMAS.items():
        options = (f"--model.sampling_sigmas={sigmas}",)
        found += [(n, steps, options) for n in ("consistency", "consistency-training")]
    return [*found, *(("reflow", s, (f"--model.num_steps={s}",)) for s in STEPS[1:])]


def write(
    study: Study, seeds: Sequence[int], stages: Sequence[Stage], done: Results, out: Path
) -> None:
    """Write the page, as far as seeds are complete."""
    complete = [seed for seed in seeds if f"few-steps-{seed}" in done]
    conditions = kept_conditions(out)
    if not complete:
        return
    found = [{"few-steps": done[f"few-steps-{seed}"]["found"]} for seed in complete]
    fd = distances(found, "few-steps")
    best = fd["teacher", STEPS[0]]
    lines = {"teacher, DDIM": over(fd, "teacher", best)}
    lines |= {title: over(fd, name, best) for name, title in METHODS.items()}
    draw([Panel("steps", "FD over B", lines)], out / PAGE / "steps.png")
    with replacing(out / PAGE / "grids.png") as part:
        shutil.copyfile(out / "stages" / f"few-steps-{complete[0]}" / "grids.png", part)
    listed = ", ".join(map(str, complete))
    text = (
        f"# Methods of few steps on {study.name}, at equal passes of the network\n\n"
        f"Written by\n\n```text\npython benchmarks/methods.py --seeds {' '.join(map(str, seeds))}"
        "\n```\n\nDistances are in units of B, that of the seed's teacher with "
        f"{STEPS[0]} DDIM steps, which is {spread(best)}: mean ± sample deviation over the seeds "
        f"{listed}. FD is the Fréchet distance of {study.num_samples:,} images in the features of "
        f"`{study.features}`. Passes are those of an image in training, a backward pass counted "
        "as two, pairs included.\n\n"
        + ", ".join(f"{name} {value}" for name, value in conditions.items())
        + ".\n\n"
        + markdown([line(study, name, title, lines[title]) for name, title in METHODS.items()])
        + f"\n![FD over B by steps]({PAGE}/steps.png)\n\n"
        f"The same latents, a row for each student, seed {complete[0]}:\n\n"
        f"![A row for each student]({PAGE}/grids.png)\n\n"
        + markdown([row(study, name) for name in METHODS])
        + "\n"
        + commands(["few-steps"], stages, seeds[0], study, out)
    )
    write_text(out / f"{PAGE}.md", text)


def over(
    fd: Mapping[tuple[str, int], list[float]], name: str, best: Sequence[float]
) -> dict[int, list[float]]:
    """Distances of a model in units of B, by steps."""
    found = {steps: values for (model, steps), values in fd.items() if model == name}
    return {steps: ratios(values, best) for steps, values in found.items() if steps in STEPS}


def line(study: Study, name: str, title: str, found: Mapping[int, Sequence[float]]) -> Any:
    """A method in the table of distances."""
    cells = {
        f"{s} step" + "s" * (s > 1): spread(found[s]) if s in found else ""
        for s in sorted(STEPS[1:])
    }
    return {"method": title, **cells, "passes": f"{study.passes[name]:,}"}


def row(study: Study, name: str) -> dict[str, str]:
    """A method in the table of fits."""
    options = (
        each.removeprefix("--").replace("init_args.", "") for each in study.fits[name].options
    )
    differs = ", ".join(f"`{option}`" for option in options)
    return {
        "method": METHODS[name],
        "config": f"`{study.fits[name].config}`",
        "what differs": differs,
    }


def run(study: Study, seeds: Sequence[int], runner: Runner, budget: float) -> int:
    """Run the stages and write the page; the exit status, 1 if a stage failed."""
    stages = [stage for seed in seeds for stage in MethodMaker(study, seed, runner.out).all()]
    done, failed = runner.results(stages), list[str]()

    def after(now: Results, broken: list[str]) -> None:
        done.update(now)
        failed[:] = broken
        write(study, seeds, stages, done, runner.out)

    after(done, [])
    runner.run(stages, time.monotonic() + budget, after)
    left = sum(stage.name not in done for stage in stages)
    if failed:
        print(f"{len(failed)} stages failed: {', '.join(failed)}")
    elif left:
        print(f"The budget is over, {left} stages are left: call the same command to go on")
    page = runner.out / f"{PAGE}.md"
    print(f"The page is {page}" if page.is_file() else "No seed is complete: there is no page yet")
    return int(bool(failed))


def main(given: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="stages at a time")
    parser.add_argument("--budget", type=seconds_of, default=float("inf"), help="such as 3h")
    parser.add_argument("--out", type=Path, default=Path("runs", "reproduce-digits"))
    parser.add_argument("--publish", action="store_true", help="copy the page to docs/results")
    options = parser.parse_args(given)
    check_options(parser, options.jobs, options.seeds)

    def work(runner: Runner) -> int:
        status = run(STUDY, options.seeds, runner, options.budget)
        if options.publish:
            publish(options.out, RESULTS, PAGE, page=PAGE, figures=PAGE)
        return status

    return guarded(parser, options.out, options.jobs, work)


if __name__ == "__main__":
    sys.exit(main())
