"""How far do the students of digits depend on the seed? Teacher, ladder, pairs and measurement.

    .venv/bin/python benchmarks/distillation_seeds.py [--seeds 0 1 2] [--threads 1]

Each seed trains a teacher, distils it in both ways and compares the students with it, by the
commands of the README under another seed and name. A run that was stopped goes on when the script
is called again, and what is finished is not repeated. At the end the table of all seeds, with
means and sample deviations, is printed and written to `runs/distillation-seeds.md`.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = "configs/digits"
RUNS = Path("runs")
STUDENTS = ("progressive", "luhman")


def run_of(kind: str, seed: int) -> Path:
    """The folder of a run."""
    return RUNS / f"digits-{kind}-seed-{seed}" / "version_0"


def fit(kind: str, seed: int, *arguments: str) -> None:
    """Train, or go on with a run that was stopped, or find it done."""
    run = run_of(kind, seed)
    done, last = run / "done.txt", run / "checkpoints" / "last.ckpt"
    if done.exists():
        return
    options = [f"--config={CONFIGS}/{kind}.yaml", f"--seed_everything={seed}", *arguments]
    options.append(f"--trainer.logger.init_args.name={run.parent.name}")
    options.append("--trainer.enable_progress_bar=false")
    if last.exists():
        options.append(f"--ckpt_path={last}")
    else:
        options.append("--trainer.logger.init_args.version=0")
    begin = time.perf_counter()
    main("fit", *options)
    done.write_text(f"{time.perf_counter() - begin:.0f} s in this call\n")


def main(*arguments: str) -> None:
    """Call main.py."""
    print("main.py", *arguments, flush=True)
    subprocess.run([sys.executable, "main.py", *arguments], check=True)


def one_seed(seed: int) -> None:
    """All runs of one seed, and their comparison."""
    fit("teacher", seed)
    teacher = run_of("teacher", seed) / "checkpoints" / "last.ckpt"
    fit("progressive", seed, f"--model.init_args.teacher={teacher}")
    fit(
        "luhman",
        seed,
        f"--model.init_args.teacher={teacher}",
        f"--data.init_args.folder={RUNS / f'digits-pairs-seed-{seed}'}",
    )
    if not table_of(seed).exists():
        last = run_of("luhman", seed) / "checkpoints" / "last.ckpt"
        students = f"[{run_of('progressive', seed)},{last}]"
        main("compare", f"--ckpt_path={teacher}", f"--students={students}")


def table_of(seed: int) -> Path:
    """What `compare` writes."""
    return run_of("teacher", seed) / "distillation" / "distillation.csv"


def summary(seeds: list[int]) -> str:
    """The distances of all seeds, and in units of the teacher's with 256 steps, as Markdown."""
    values: dict[tuple[str, int], list[float]] = {}
    units: dict[tuple[str, int], list[float]] = {}
    for seed in seeds:
        with table_of(seed).open() as file:
            rows = list(csv.DictReader(file))
        distance = {
            (row["model"].replace(f"-seed-{seed}", ""), int(row["steps"])): float(row["digits_fd"])
            for row in rows
        }
        unit = next(v for (model, n), v in distance.items() if n == 256 and "teacher" in model)
        for key, value in distance.items():
            values.setdefault(key, []).append(value)
            units.setdefault(key, []).append(value / unit)
    lines = [f"| model | steps | digits_fd, mean of {len(seeds)} | deviation | each | over B |"]
    lines.append("|---|---|---|---|---|---|")
    for (model, steps), all_of in values.items():
        spread = statistics.stdev(all_of) if len(all_of) > 1 else float("nan")
        each = ", ".join(f"{value:.3f}" for value in all_of)
        over = ", ".join(f"{value:.2f}" for value in units[model, steps])
        mean = statistics.mean(all_of)
        lines.append(f"| {model} | {steps} | {mean:.3f} | {spread:.3f} | {each} | {over} |")
    return "\n".join(lines) + "\n"


def run() -> None:
    """Do all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    for seed in options.seeds:
        one_seed(seed)
    table = summary(options.seeds)
    (RUNS / "distillation-seeds.md").write_text(table)
    print(table)


if __name__ == "__main__":
    run()
