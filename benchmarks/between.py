"""Two checkouts of this package in turn: what did a change do for the speed?

    git worktree add ../before v0.1.0
    .venv/bin/python benchmarks/between.py ../before --case "sampling, cifar10, bf16"

A process for each checkout holds its case ready, and they are called in turn, A B A B ..., each
while the other waits. The ratios are of pairs, as in `measuring.py`; above 1 this checkout is the
faster. The other checkout needs no such script: this one imports the package of each. `--case` may
be given several times; by default all are run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from distillation_speed import Updates
from measuring import (
    ROOT,
    Bench,
    Contender,
    Results,
    Row,
    check_rounds,
    device_of,
    machine,
    quieten,
    speed,
    table,
)
from sampling_speed import DEQ_SWEEPS, draw
from subjects import Nothing, converted, in_precision, make_model
from training_speed import fit_for

from ddim_pl.fixed_point import Anderson
from ddim_pl.samplers import DDIM, DEQ
from ddim_pl.schedules import LinearSchedule
from ddim_pl.timesteps import linear, trailing
from ddim_pl.training import DDPM

SIZES = {"digits": (64, 50), "cifar10": (8, 2)}
FITS = {"digits": (48, 30), "cifar10": (8, 3)}


def _sampling(bench: Bench, name: str, precision: str) -> Contender:
    model = converted(make_model(name, tiny=bench.tiny), precision).to(bench.device)
    batch, steps = (2, 2) if bench.tiny else SIZES[name]
    return partial(draw, model, batch, steps)


def _loop(bench: Bench, eta: float) -> Contender:
    model = DDPM(Nothing(), LinearSchedule(), image_shape=(3, 32, 32)).to(bench.device)
    levels = trailing(1000, 2 if bench.tiny else 100)
    return lambda: model.sample(range(64), sampler=DDIM(eta), levels=levels)


def _update(bench: Bench, name: str) -> Contender:
    module = make_model(name, tiny=bench.tiny)
    return partial(Updates(bench, module, 4 if bench.tiny else 48, "float32"), 5)


def _fit(bench: Bench, name: str, precision: str) -> Contender:
    folder = Path(tempfile.mkdtemp())
    batch, steps = (4, 2) if bench.tiny else FITS[name]
    model = make_model(name, tiny=bench.tiny)
    return partial(fit_for, bench, folder, batch, steps, 1, precision, model)


def _deq(bench: Bench) -> Contender:
    model = make_model("digits", tiny=bench.tiny).eval().to(bench.device)
    levels = linear(1000, 3 if bench.tiny else 100)
    sampler = DEQ(Anderson(tolerance=0.0, max_sweeps=DEQ_SWEEPS))
    z, _ = model.latents(range(2), 1000)
    z, denoiser = z.to(bench.device), model.conditioned(model.label_of(range(2)))
    return lambda: sampler.solve(denoiser, z, levels)


CASES: dict[str, Callable[[Bench], Contender]] = {
    f"sampling, {name}, {precision}": partial(_sampling, name=name, precision=precision)
    for name in SIZES
    for precision in ("float32", "bf16")
}
CASES |= {f"loop, eta {eta:g}": partial(_loop, eta=eta) for eta in (0.0, 1.0)}
CASES |= {"update, digits": partial(_update, name="digits")}
CASES |= {"fit, digits": partial(_fit, name="digits", precision="float32"), "DEQ, digits": _deq}
CASES |= {f"fit, {name}, bf16": partial(_fit, name=name, precision="bf16") for name in SIZES}


def serve(bench: Bench, case: str) -> None:
    """Call the case once for each line of the input, and answer with its seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with in_precision("float32"):
        call = CASES[case](bench)
        for _ in sys.stdin:
            answers.write(f"{bench.timed(call)[0]!r}\n")
            answers.flush()


class Checkout:
    """A process with the package of a checkout, which holds a case ready."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        command = [sys.executable, __file__, str(folder), "--serve", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self) -> float:
        """Seconds of one call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args} has ended, see above")
        return float(answer)

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()


def compare(bench: Bench, case: str, other: Path, arguments: list[str]) -> Row:
    """Median seconds of both checkouts, and the speed of this one over the other's."""
    checkouts = [Checkout(folder, arguments) for folder in (other, ROOT)]
    try:
        taken = [[each() for each in checkouts] for _ in range(bench.rounds + 1)][1:]
    finally:
        for each in checkouts:
            each.close()
    before, after = (list(column) for column in zip(*taken, strict=True))
    middle = [sorted(column)[len(column) // 2] for column in (before, after)]
    return {"case": case, "other, s": middle[0], "this, s": middle[1], **speed(before, after)}


def main() -> None:
    """Print a table, or serve a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument(
        "--case",
        action="append",
        choices=CASES,
        metavar="CASE",
        help=f"may be given several times; by default all of: {'; '.join(CASES)}",
    )
    parser.add_argument("--device", type=device_of, choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=9, help="of a case, at least 2")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.other / "ddim_pl").is_dir():
        parser.error(f"other must be a checkout of this package, got {options.other}")
    check_rounds(parser, options.rounds)
    torch.set_num_threads(options.threads)
    quieten()
    bench = Bench(Results(Path(), "between", {}), options.device, options.threads, options.tiny)
    bench.rounds = options.rounds
    if options.serve:
        serve(bench, options.case[0])
        return
    print(", ".join(f"{k} {v}" for k, v in machine(options.device, options.threads).items()))
    rows = []
    for case in options.case or CASES:
        arguments = ["--case", case, "--device", options.device]
        arguments += ["--threads", str(options.threads)] + ["--tiny"] * options.tiny
        rows.append(compare(bench, case, options.other, arguments))
        print(rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
