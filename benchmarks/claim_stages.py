"""The stages of `reproduce.py`: which commands a study takes for one seed, and what they found.

A stage is a few commands in a row, with the stages whose checkpoints it needs. Training runs go on
from their last checkpoint, sweeps and comparisons keep finished cells, all else begins anew.
"""

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies import Fit, Study

Command = tuple[str, ...]
Rows = list[dict[str, Any]]
METRICS = "--metrics=[fd,precision_recall,density_coverage]"
QUIET = "--trainer.enable_progress_bar=false"
MEASURES = "benchmarks/claim_measures.py"
SOLVERS = ("Picard", "Anderson, triangular", "ParaDiGMS, window 10")
CURVE_POINTS = 60


@dataclass(frozen=True)
class Stage:
    """Commands that end in a few numbers.

    Args:
        name: With the seed at its end.
        commands: Scripts with their arguments, run one after the other.
        collect: Reads what they wrote.
        needs: Names of the stages that come before.
        folder: Of what the commands write.
        goes_on: Whether they find there what an earlier call left; else that is removed.
        run: Of a fit, whose command goes on from `last.ckpt` there.
    """

    name: str
    commands: tuple[Command, ...]
    collect: Callable[[], Any]
    needs: tuple[str, ...]
    folder: Path
    goes_on: bool = False
    run: Path | None = None

    def prepare(self) -> tuple[Command, ...]:
        """Remove what cannot be used of an earlier call; the commands as they are to be called."""
        last = None if self.run is None else self.run / "checkpoints" / "last.ckpt"
        # `fit` begins in no folder in which another has begun.
        if not self.goes_on or (last is not None and not last.exists()):
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if last is None:
            return self.commands
        begin = "--trainer.logger.init_args.version=0"
        return ((*self.commands[0], f"--ckpt_path={last}" if last.exists() else begin),)


@dataclass(frozen=True)
class Maker:
    """Makes the stages of a seed.

    Args:
        study: What is measured.
        seed: Of training and of the images.
        out: Folder of all runs and results.
    """

    study: Study
    seed: int
    out: Path

    def all(self) -> list[Stage]:
        """All stages, each after those it needs, and those that many claims use first."""
        study = self.study
        fits = {name: self.fit(name, fit) for name, fit in study.fits.items()}
        found = [fits["eps"], self.etas(), self.table1(), self.latents(), self.diversity()]
        found += [self.between("between", "eps"), self.reconstruct(), self.whole()]
        found += [fits["teacher"], self.deq(), self.invert(), self.pairs()]
        found += [fits["luhman"], self.between("between-luhman", "luhman"), fits["ladder"]]
        luhman = str(self.checkpoint("luhman"))
        found.append(self.compare("students", "teacher", "ladder", study.teacher_steps, luhman))
        found += [fits["short"], self.gaussian()]
        for theta in study.thetas:
            found += [fits[f"gamma-{theta}"], self.gamma(theta)]
        few = study.teacher_steps[-4:]
        found += [
            fits["short-ladder"],
            self.compare("short-students", "short", "short-ladder", few),
        ]
        gamma = study.fits["gamma-ladder"].teacher or ""
        found += [fits["gamma-ladder"], self.compare("gamma-students", gamma, "gamma-ladder", few)]
        return [*found, self.cost(gamma)]

    # ---- training -----------------------------------------------------------------------------

    def fit(self, name: str, fit: Fit) -> Stage:
        """Train a model."""
        run = self.checkpoint(name).parents[1]
        command = ["main.py", "fit", f"--config={fit.config}", f"--seed_everything={self.seed}"]
        command += fit.options
        if fit.teacher:
            command.append(f"--model.init_args.teacher={self.checkpoint(fit.teacher)}")
        if fit.pairs:
            command.append(f"--data.init_args.folder={self.out / 'runs' / self.named('pairs')}")
        command.append(f"--trainer.logger.init_args.save_dir={run.parents[1]}")
        command += [f"--trainer.logger.init_args.name={run.parent.name}", QUIET]
        needs = (self.named(fit.teacher),) if fit.teacher else ()
        stage = (self.named(name), (tuple(command),), dict, needs, run)
        return Stage(*stage, goes_on=True, run=run)

    # ---- measuring, by commands of main.py ----------------------------------------------------

    def etas(self) -> Stage:
        """Table 1 of the DDIM paper, to the steps of which the quadratic levels are usual."""
        ways = [ddim(eta) for eta in (0.0, 0.2, 0.5, 1.0)] + [ANCESTRAL]
        return self.sweep("etas", "eps", ways, ["quadratic"], self.study.steps)

    def whole(self) -> Stage:
        """DDIM and DDPM at all levels."""
        return self.sweep("whole", "eps", [ddim(), ANCESTRAL], ["trailing"], [self.study.full])

    def table1(self) -> Stage:
        """The report's Table 1, and searched levels; the quadratic ones are in `etas`."""
        names = ["last100", "exponential", "first100last100", "adaptive"]
        return self.sweep("table1", "eps", [ddim()], names, self.study.adaptive_steps)

    def pairs(self) -> Stage:
        """What the single-step student learns from."""
        solver = {"class_path": "ddim_pl.samplers.DPMSolverPP"}
        return self.sweep("pair-teacher", "teacher", [solver], ["linear"], [self.study.pair_steps])

    def gaussian(self) -> Stage:
        """DDIM from the teacher that is trained as long as those of Gamma noise."""
        way = {"class_path": "ddim_pl.samplers.DDIM", "init_args": {"eta": 0.0}}
        return self.sweep("short-steps", "short", [way], ["linear"], self.study.gamma_steps)

    def gamma(self, theta: float) -> Stage:
        """DDIM's step, the quantile step and the report's of a model of Gamma noise."""
        kinds: dict[str, dict[str, float]] = {"Moment": {"eta": 0.0}, "Quantile": {}}
        kinds["Report"] = {"eta": 0.0}
        ways = [
            {
                "class_path": f"ddim_pl.samplers.Gamma{kind}",
                "init_args": {"theta_0": theta, **more},
            }
            for kind, more in kinds.items()
        ]
        name = f"gamma-{theta}"
        return self.sweep(f"{name}-steps", name, ways, ["linear"], self.study.gamma_steps)

    def sweep(self, name: str, fit: str, ways: list[dict], levels: list[str], steps: Any) -> Stage:
        """Measure ways of sampling."""
        folder = self.folder(name)
        command = ("main.py", "sweep", f"--ckpt_path={self.checkpoint(fit)}")
        command += (f"--samplers={json.dumps(ways)}", f"--timesteps=[{','.join(levels)}]")
        command += (f"--num_steps={json.dumps(list(steps))}", METRICS, *self.images(), QUIET)
        command += (f"--output={folder}",)

        def collect() -> Rows:
            return self.rows(folder / "sweep.csv")

        return self.stage(name, (command,), collect, fit, goes_on=True)

    def compare(
        self, name: str, teacher: str, ladder: str, steps: tuple[int, ...], *students: str
    ) -> Stage:
        """Measure students beside their teacher."""
        folder = self.folder(name)
        run = self.checkpoint(ladder).parents[1]
        command = ("main.py", "compare", f"--ckpt_path={self.checkpoint(teacher)}")
        command += (f"--students=[{','.join([str(run), *students])}]",)
        command += (f"--num_steps={json.dumps(list(steps))}", *self.images(), QUIET)
        command += (f"--output={folder}",)

        def collect() -> Rows:
            rows = self.rows(folder / "distillation.csv")
            return [{**row, "model": row["model"].removesuffix(f"-{self.seed}")} for row in rows]

        needs = (ladder, *(["luhman"] if students else []))
        return self.stage(name, (command,), collect, *needs, goes_on=True)

    def reconstruct(self) -> Stage:
        """The DDIM paper's table 2."""
        folder = self.folder("reconstruct")
        command = ("main.py", "reconstruct", f"--ckpt_path={self.checkpoint('eps')}")
        command += (f"--num_images={self.study.num_reconstructed}", QUIET)
        command += (f"--num_steps={json.dumps(list(self.study.reconstruct_steps))}",)
        shown = ("main.py", "interpolate", f"--ckpt_path={self.checkpoint('eps')}", QUIET)
        command += (f"--output={folder}",)
        shown += (f"--output={folder / 'interpolate'}",)

        def collect() -> dict[str, float]:
            return {str(r["steps"]): r["error"] for r in self.rows(folder / "reconstruct.csv")}

        return self.stage("reconstruct", (command, shown), collect, "eps")

    def invert(self) -> Stage:
        """The report's Figure 1: by the chain's exact gradient and the fixed point's."""
        study, folder = self.study, self.folder("invert")
        methods = {"sequential": SEQUENTIAL, "DEQ": ONE_SWEEP}
        commands, places = [], {}
        for steps, seconds in study.invert_steps.items():
            for i, (name, method) in enumerate(methods.items()):
                place = folder / f"{steps}-{name}"
                command = ("main.py", "invert", f"--ckpt_path={self.checkpoint('teacher')}")
                command += (f"--method={json.dumps(method)}", "--start=noise", QUIET)
                command += (f"--num_images={study.num_inverted}", "--timesteps=linear")
                command += (f"--num_steps={steps}", f"--lr={study.invert_rates[steps][i]}")
                command += (f"--max_seconds={seconds}", "--num_updates=100000")
                commands.append((*command, f"--output={place}"))
                places[f"{steps} {name}"] = place / "curves.csv"

        def collect() -> dict[str, Rows]:
            return {name: thinned(self.rows(file)) for name, file in places.items()}

        return self.stage("invert", tuple(commands), collect, "teacher")

    # ---- measuring, by scripts ----------------------------------------------------------------

    def deq(self) -> Stage:
        """Chains solved at once: to the usual tolerance, and nearly exactly."""
        study, folder = self.study, self.folder("deq")
        common = ("benchmarks/deq_sampling.py", str(self.checkpoint("teacher")), "--steps")
        common += (*map(str, study.deq_steps), "--methods")
        usual = (*common, *SOLVERS, f"--batch={study.deq_batch}", "--tolerance=1e-3")
        exact = (*common, *SOLVERS[:2], f"--batch={max(1, study.deq_batch // 4)}")
        usual += (f"--output={folder / 'usual'}",)
        exact += ("--tolerance=3e-6", f"--output={folder / 'exact'}")

        def collect() -> dict[str, Rows]:
            found = {name: self.rows(folder / f"{name}.csv") for name in ("usual", "exact")}
            for row in [row for rows in found.values() for row in rows]:
                row["sweeps"] = float(str(row["sweeps"]).partition(" ")[0])
            return found

        return self.stage("deq", (usual, exact), collect, "teacher")

    def latents(self) -> Stage:
        """One latent by many levels."""
        more = (f"--images={self.study.num_latents}", *self.all_steps())
        return self.measure("latents", "latents", "eps", *more)

    def between(self, name: str, fit: str) -> Stage:
        """Images of interpolated latents."""
        # The data of a student of pairs are pairs.
        data = self.study.fits[fit].teacher or fit
        more = (f"--images={self.study.num_latents}", f"--data={self.checkpoint(data)}")
        return self.measure(name, "between", fit, *more)

    def diversity(self) -> Stage:
        """Recall and coverage for each eta."""
        more = (f"--images={self.study.num_samples}", f"--halves={self.study.num_halves}")
        more += ("--steps", str(self.study.diverse_steps))
        return self.measure("diversity", "diversity", "eps", *more)

    def measure(self, name: str, kind: str, fit: str, *more: str) -> Stage:
        """A measurement of `claim_measures.py`."""
        folder = self.folder(name)
        command = (MEASURES, kind, str(self.checkpoint(fit)), *more)
        command += (f"--batch_size={self.study.batch_size}",)
        command += (f"--features={self.study.features}", f"--output={folder}")

        def collect() -> dict[str, Any]:
            return json.loads((folder / f"{kind}.json").read_text())

        return self.stage(name, (command,), collect, fit)

    def cost(self, gamma: str) -> Stage:
        """Evaluations and time of every method."""
        study, folder = self.study, self.folder("cost")
        students = {int(s): self.checkpoint("ladder").parent for s in study.teacher_steps[-3:]}
        models = {"eps": self.checkpoint("eps"), "teacher": self.checkpoint("teacher")}
        models["gamma"] = self.checkpoint(gamma)
        for steps, place in students.items():
            models[f"progressive, {steps}"] = place / f"student-{steps:04d}-steps.ckpt"
        models["Luhman, 1"] = self.checkpoint("luhman")
        command = (MEASURES, "cost", "--models", *(f"{n}={file}" for n, file in models.items()))
        command += (f"--images={study.cost_images}", f"--rounds={study.cost_rounds}")
        command += (*self.all_steps(), f"--pair_steps={study.pair_steps}", f"--output={folder}")

        def collect() -> dict[str, Any]:
            return json.loads((folder / "cost.json").read_text())

        needs = ("eps", "teacher", "ladder", "luhman", gamma)
        return self.stage("cost", (command,), collect, *needs)

    # ---- parts --------------------------------------------------------------------------------

    def stage(
        self,
        name: str,
        commands: tuple[Command, ...],
        collect: Callable[[], Any],
        *needs: str,
        goes_on: bool = False,
    ) -> Stage:
        """A stage in a folder of its own, after the fits of these names."""
        before = tuple(self.named(each) for each in needs)
        return Stage(self.named(name), commands, collect, before, self.folder(name), goes_on)

    def named(self, name: str) -> str:
        """With the seed."""
        return f"{name}-{self.seed}"

    def checkpoint(self, fit: str) -> Path:
        """Of a fit."""
        return self.out / "runs" / self.named(fit) / "version_0" / "checkpoints" / "last.ckpt"

    def folder(self, name: str) -> Path:
        """Of what a stage writes."""
        return self.out / "stages" / self.named(name)

    def images(self) -> Command:
        """How many images are measured and shown."""
        study = self.study
        found = (f"--num_samples={study.num_samples}", f"--num_shown={study.num_shown}")
        return (*found, f"--batch_size={study.batch_size}")

    def all_steps(self) -> Command:
        """The numbers of steps, and those of the whole chain."""
        return ("--steps", *map(str, self.study.steps), f"--full={self.study.full}")

    def rows(self, file: Path) -> Rows:
        """A table, its metrics without the extractor's name, its numbers as numbers."""
        with file.open(newline="") as text:
            return [
                {
                    name.removeprefix(f"{self.study.extractor}_"): number(value)
                    for name, value in row.items()
                }
                for row in csv.DictReader(text)
            ]


def ddim(eta: float = 0.0) -> dict[str, Any]:
    """DDIM as published, without clipping."""
    return {"class_path": "ddim_pl.samplers.DDIM", "init_args": {"eta": eta, "clip": False}}


ANCESTRAL = {
    "class_path": "ddim_pl.samplers.Ancestral",
    "init_args": {"variance": "large", "clip": True},
}
SEQUENTIAL = {"class_path": "ddim_pl.inversion.Sequential"}
ONE_SWEEP = {
    "class_path": "ddim_pl.inversion.Implicit",
    "init_args": {
        "deq": {
            "class_path": "ddim_pl.samplers.DEQ",
            "init_args": {
                "solver": {
                    "class_path": "ddim_pl.fixed_point.Picard",
                    "init_args": {"tolerance": 0.0, "max_sweeps": 1},
                },
                "first_guess": 10,
            },
        }
    },
}


def number(text: str) -> Any:
    """What a cell of a CSV holds."""
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def thinned(rows: Rows) -> Rows:
    """A curve of a few points, the last one included."""
    step = max(1, len(rows) // CURVE_POINTS)
    kept = rows[::step]
    return kept if kept[-1] is rows[-1] else [*kept, rows[-1]]
