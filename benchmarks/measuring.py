"""What all benchmarks share: contenders timed in turn, and a file of results that grows.

A benchmark is a list of stages; a stage is a function of a `Bench`, and has cases. Contenders of a
case run one after the other, round after round (A B A B ...), and each round gives one ratio to
the first of them: the speed of a shared machine means nothing, that of a pair little less. The
first round is a warm-up. On a CPU with one thread seconds are those of the processor, which other
programs disturb less; otherwise those of the wall.
"""

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import subprocess
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import ddim_pl
from ddim_pl.files import replacing

Row = dict[str, Any]
Contender = Callable[[], object]
ROOT = Path(ddim_pl.__file__).parents[1]  # of the package that is measured
MIB = 2**20
LEAST_ROUNDS = 2
COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def device_of(text: str) -> str:
    """A device as an argument of a script.

    Raises:
        argparse.ArgumentTypeError: If it is not there.
    """
    if text.startswith("cuda") and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            f"must be cpu here, got {text}: PyTorch finds no GPU on this machine"
        )
    return text


def machine(device: str, threads: int) -> Row:
    """What the numbers depend on: hardware, driver and versions."""
    found: Row = {"processor": _processor(), "threads": threads}
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["driver"] = _driver()
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    found["commit"] = _commit()
    found["python"] = platform.python_version()
    for name in ("torch", "lightning", "diffusers", "denoising-diffusion-pytorch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _driver() -> str:
    return _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> str:
    """The last commit of what is measured."""
    measured = ("--", "ddim_pl", "callbacks", "configs")
    commit = _answer("git", "log", "-1", "--format=%h", *measured)
    changes = _answer("git", "status", "--porcelain", *measured)
    return commit + " with changes" * bool(changes and commit != "unknown")


def _answer(*command: str) -> str:
    """What a program prints, or "unknown" where it is not there."""
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


class Results:
    """Rows of all stages in `NAME.json`, and as tables in `NAME.md`.

    Args:
        folder: Where the files are; made if it is not there.
        name: Of the files.
        conditions: What all rows were measured under, as plain data.

    Raises:
        ValueError: If the file holds rows of other conditions.
    """

    def __init__(self, folder: Path, name: str, conditions: Row) -> None:
        self.file = folder / f"{name}.json"
        self.content: Row = {"conditions": conditions, "stages": {}}
        if self.file.is_file():
            self.content = json.loads(self.file.read_text())
            old = self.content["conditions"]
            other = {key: old.get(key) for key in conditions if old.get(key) != conditions[key]}
            if other:
                raise ValueError(
                    f"out must hold results of the same conditions, got {self.file} with {other}: "
                    "give another folder"
                )

    def stage(self, name: str) -> Row:
        """What is known of a stage: whether it is done, its cases' rows, and its notes."""
        return self.content["stages"].setdefault(name, {"done": False, "cases": {}, "notes": []})

    def rows(self, stage: str) -> list[Row]:
        """All rows of a stage, each with its case."""
        cases = self.content["stages"].get(stage, {}).get("cases", {})
        return [{"case": case, **row} for case, rows in cases.items() for row in rows]

    def write(self) -> None:
        """Write both files."""
        with replacing(self.file) as part:
            part.write_text(json.dumps(self.content, indent=1) + "\n")
        with replacing(self.file.with_suffix(".md")) as part:
            part.write_text(self.markdown())

    def markdown(self) -> str:
        """All tables."""
        conditions = self.content["conditions"]
        lines = ["# " + self.file.stem.replace("-", " ").capitalize(), ""]
        lines += [", ".join(f"{name} {value}" for name, value in conditions.items()), ""]
        for name, stage in self.content["stages"].items():
            lines += [f"## {name}{'' if stage['done'] else ' (not finished)'}", ""]
            lines += [table(self.rows(name)), ""] if stage["cases"] else []
            lines += [f"* {note}" for note in stage["notes"]] + [""] * bool(stage["notes"])
        return "\n".join(lines)


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table; its columns are all names in the rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(shown(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def shown(value: object) -> str:
    """A cell of a table: numbers to three digits or so."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")


@dataclass
class Bench:
    """What a stage measures with.

    Args:
        results: Where its rows go.
        device: "cpu" or "cuda".
        threads: Of the CPU.
        tiny: Whether all is to be small, to try the benchmark itself.
        compile: Whether contenders that compile take part.
        rounds: Rounds of a case after the warm-up, if there is time for them.
        stage: Name of the present stage.
        deadline: When the present stage has to end, in seconds of `time.monotonic`.
        case_seconds: A case makes no new round after so many.
    """

    results: Results
    device: str = "cpu"
    threads: int = 1
    tiny: bool = False
    compile: bool = False
    rounds: int = 7
    stage: str = ""
    deadline: float = float("inf")
    case_seconds: float = 15.0
    complete: bool = True
    failures: list[str] = field(default_factory=list)

    def now(self) -> float:
        """Seconds, with all work of the device done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        if self.device == "cpu" and self.threads == 1:
            return time.process_time()
        return time.perf_counter()

    def case(self, name: str, measure: Callable[[], list[Row]]) -> None:
        """Measure a case and write its rows, unless they are there or the time is up."""
        cases = self.results.stage(self.stage)["cases"]
        if name in cases:
            return
        if time.monotonic() > self.deadline:
            self.complete = False
            return
        print(f"{self.stage}: {name} ...", flush=True)
        self._forget_compiled()  # of what came before the first case
        try:
            rows = measure()
        except Exception as error:  # the other cases are worth having
            self.complete = False
            self.failures.append(f"{self.stage}, {name}: {type(error).__name__}: {error}")
            traceback.print_exc()
            return
        finally:
            self._forget_compiled(name)
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
        cases[name] = rows
        self.results.write()
        print(table(rows), flush=True)

    def _forget_compiled(self, name: str | None = None) -> None:
        """Let the next case compile anew, and say whether the one of this name did.

        The compiler gives up silently after eight versions of a function, which all cases share,
        and its second batch size gets slower kernels that serve any.
        """
        if not self.compile:
            return
        from torch._dynamo.utils import counters

        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        if name is not None and (graphs or breaks):
            self.note(f"{name}: {graphs} compiled graphs, {breaks} breaks between them")
        counters.clear()
        torch.compiler.reset()

    def note(self, text: str) -> None:
        """Write a remark below the stage's table."""
        notes = self.results.stage(self.stage)["notes"]
        if text not in notes:
            print(f"{self.stage}: {text}", flush=True)
            notes.append(text)

    def in_turn(
        self,
        contenders: Mapping[str, Contender],
        *,
        work: float = 1,
        unit: str = "calls",
        peers: Mapping[str, str] | None = None,
    ) -> list[Row]:
        """Time contenders in turn, each round against the first of them.

        Args:
            contenders: Functions by name. One that returns a float has measured its own seconds.
            work: What a call does, in units.
            unit: Of the work.
            peers: For some contenders the name of another that they are compared with, too.

        Returns:
            For each: median seconds of a call, work in a second, "speed" over the first
            contender's (median of the rounds), its quartiles, the number of rounds; on a GPU the
            memory of the call beside what was there before, in MiB; "over its peer" is the speed
            over the peer's, with quartiles, where there is one.
        """
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        peaks = dict.fromkeys(contenders, 0.0)
        stop = min(time.monotonic() + self.case_seconds, self.deadline)
        for turn in range(self.rounds + 1):
            if turn > LEAST_ROUNDS and time.monotonic() > stop:
                break
            for name, call in contenders.items():
                seconds, peaks[name] = self.timed(call)
                if turn:  # the first is a warm-up
                    taken[name].append(seconds)
        first = taken[next(iter(contenders))]
        return [
            {"contender": name, "seconds": statistics.median(seconds)}
            | {unit + "/s": work / statistics.median(seconds)}
            | speed(first, seconds)
            | ({"memory of a call, MiB": peaks[name] / MIB} if self.device == "cuda" else {})
            | _over(taken, name, peers or {})
            for name, seconds in taken.items()
        ]

    def timed(self, call: Contender) -> tuple[float, float]:
        """Seconds of a call, and the memory it took beside what was there, in bytes."""
        before = 0
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        begin = self.now()
        own = call()
        seconds = self.now() - begin
        peak = torch.cuda.max_memory_allocated() - before if self.device == "cuda" else 0
        return own if isinstance(own, float) else seconds, float(peak)


def _over(taken: dict[str, list[float]], name: str, peers: Mapping[str, str]) -> Row:
    if name not in peers:
        return {}
    found = speed(taken[peers[name]], taken[name])
    return {"over its peer": f"{found['speed']:.3f} ({found['quartiles']})"}


def speed(first: list[float], seconds: list[float]) -> Row:
    """Speed relative to the first contender, from pairs: above 1 is faster."""
    ratios = [a / b for a, b in zip(first, seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"speed": middle, "quartiles": f"{low:.3f} to {high:.3f}", "rounds": len(ratios)}


def check_rounds(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Refuse, before anything is measured, fewer rounds than quartiles need."""
    if rounds < LEAST_ROUNDS:
        parser.error(f"rounds must be at least {LEAST_ROUNDS}, got {rounds}: a ratio needs pairs")


def quieten() -> None:
    """Let neither warnings nor Lightning's remarks come between the tables."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


Stages = Mapping[str, tuple[Callable[[Bench], None], float]]


def command(stages: Stages, description: str, *, name: str, device: str, threads: int) -> int:
    """The command line of a list of stages; the exit status.

    Args:
        stages: As for `run`.
        description: For the help.
        name: Of the files of results, and of their folder below `runs`.
        device: By default.
        threads: By default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("runs", name), help="folder of results")
    parser.add_argument("--stage", nargs="+", choices=stages, default=[], help="by default all")
    parser.add_argument("--device", type=device_of, choices=["cpu", "cuda"], default=device)
    parser.add_argument("--threads", type=int, default=threads, help="of the CPU")
    parser.add_argument(
        "--rounds", type=int, default=7, help="of a case, at least 2, if there is time"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=device == "cuda",
        help="measure what compiles, too",
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="begin no case after so many; the same command goes on (default: no limit)",
    )
    options = parser.parse_args()
    check_rounds(parser, options.rounds)
    torch.set_num_threads(options.threads)
    quieten()
    conditions = machine(options.device, options.threads) | {"tiny": options.tiny}
    try:
        results = Results(options.out, name, conditions)
    except ValueError as error:
        parser.error(str(error))
    bench = Bench(results, options.device, options.threads, options.tiny)
    bench.compile, bench.rounds = options.compile, options.rounds
    with tempfile.TemporaryDirectory() as cache:
        # A call that is killed may leave half a kernel, on which every later one would fail.
        given = {COMPILED: os.environ.get(COMPILED, cache)}
        with mock.patch.dict(os.environ, given):
            return run(bench, stages, options.stage, 60 * options.minutes)


def run(bench: Bench, stages: Stages, wanted: list[str], seconds: float = float("inf")) -> int:
    """Run the stages that are not done; the exit status, 1 if one is left or a case failed.

    Args:
        bench: What they measure with.
        stages: Functions by name, and the seconds after which they begin nothing new.
        wanted: Names; all if empty.
        seconds: After which no stage begins anything new.
    """
    end = time.monotonic() + seconds
    for name in wanted or list(stages):
        function, limit = stages[name]
        stage = bench.results.stage(name)
        if stage["done"]:
            print(f"{name}: done before")
            continue
        bench.stage, bench.deadline, bench.complete = name, time.monotonic() + limit, True
        bench.deadline = min(bench.deadline, end)
        stage["notes"] = [
            note for note in stage["notes"] if note.partition(":")[0] in stage["cases"]
        ]
        function(bench)
        stage["done"] = bench.complete
        bench.results.write()
        if not bench.complete:
            print(f"{name}: not finished; call it again to go on")
    for failure in bench.failures:
        print(f"failed: {failure}")
    print(f"results: {bench.results.file} and {bench.results.file.with_suffix('.md')}")
    return int(any(not bench.results.stage(name)["done"] for name in wanted or stages))
