"""Every claim of the report measured on one data set, in one command, and a page that grows.

    make reproduce
    make reproduce DATA=cifar10 ROOT=folder BUDGET=3h
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/reproduce.py digits [--seeds 0 1 2] [--jobs 2]
        [--budget 3h] [--claims 6 7] [--out runs/reproduce-digits] [--publish]

The page is `OUT/claims.md`, with figures beside it, and is written after each stage. Call the
command again to go on where it was stopped, in whatever way: what is finished is kept as a small
JSON in `OUT/results`, training goes on from its last checkpoint, sweeps keep their cells. Once all
is done, another call gives the same page, byte for byte. `--budget` begins no stage after that
time; `--claims` makes what these claims need, and leaves the others for another call;
`--publish` copies the page and its figures to `docs/results`.

Seeds are those of training and of sampling. Stages of all seeds run as separate processes, `JOBS`
at a time, each with one thread, seed by seed: the first seed's page is complete after a third of
the time. CPU seconds of each stage are in `OUT/times.csv`.

Time of a seed on digits, CPU minutes of one that was measured while other programs ran too:

    eps teacher, 6,000 updates                7   claims 1 to 4, 8, 10
    teacher of the students, 6,000            8   claims 5 to 7, 10
    ladder 64 -> 1, 4,000 of 128             17   claims 6, 7, 10
    pairs, student of one step, 5,800        16   claims 6, 10: as many passes as the ladder
    three Gamma teachers, a Gaussian, 2,000  11   claim 9: a third of the length, among themselves
    their ladders 8 -> 1, 1,000              10   claim 9
    five etas at 10, 20, 50, 100 steps        8   claims 1, 8
    DDIM and DDPM at all 1000 levels         18   claims 1, 2
    Table 1 and adaptive levels               5   claim 4
    students and teacher                      4   claims 6, 7
    samplers of Gamma noise                   6   claim 9
    all else                                 11

That is 121, and for three seeds on two cores about three hours.
"""

import argparse
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from claim_page import with_needs, write_page
from claim_stages import Command, Maker, Stage
from claims import CLAIMS
from measuring import ROOT, machine
from studies import DIGITS, IMAGES_OF_AN_EPOCH, STUDIES, Study, cifar10

from ddim_pl.evaluation.tables import write_csv, write_text
from ddim_pl.files import replacing

UNITS = {"s": 1, "m": 60, "h": 3600}
TERMINATED = (128 + signal.SIGTERM, -signal.SIGTERM)
Results = dict[str, dict[str, Any]]
RESULTS = ROOT / "docs" / "results"


class Unfinished(Exception):
    """A fit was stopped, and has saved."""


class Runner:
    """Runs stages as processes and keeps what they found.

    Args:
        out: Folder of all.
        jobs: Stages at a time.
        lock: A file that no two calls hold; the processes of a killed one hold it to their end.
    """

    def __init__(self, out: Path, jobs: int, lock: int | None = None) -> None:
        self.out, self.jobs, self.lock = out, jobs, lock
        self.children: dict[subprocess.Popen[bytes], Stage] = {}
        self.told: set[subprocess.Popen[bytes]] = set()
        self.stopped = threading.Event()

    def file(self, stage: Stage) -> Path:
        """Of a stage's result."""
        return self.out / "results" / f"{stage.name}.json"

    def results(self, stages: Sequence[Stage]) -> Results:
        """What is finished, by stage.

        Raises:
            ValueError: If a result is that of other commands.
        """
        found: Results = {}
        for stage in stages:
            if not self.file(stage).is_file():
                continue
            content = json.loads(self.file(stage).read_text())
            if content["commands"] != [list(each) for each in stage.commands]:
                raise ValueError(
                    f"out must hold results of the same study, got {self.file(stage)} of other "
                    "commands: give another folder, or remove this one"
                )
            found[stage.name] = content
        return found

    def run(
        self, stages: Sequence[Stage], deadline: float, after: Callable[[Results, list[str]], None]
    ) -> None:
        """Run what is missing, in the order given.

        Args:
            stages: None begins before those that it needs.
            deadline: None begins after it, in seconds of `time.monotonic`, and fits are stopped
                then: the next call goes on with them.
            after: Called after each stage with all that is finished, and the names of the stages
                that failed.
        """
        done, failed = self.results(stages), list[str]()
        running: dict[Future[dict[str, Any]], Stage] = {}
        with ThreadPoolExecutor(self.jobs) as pool, self._ending_children():
            while True:
                busy = {stage.name for stage in running.values()} | done.keys() | {*failed}
                ready = [s for s in stages if s.name not in busy and done.keys() >= {*s.needs}]
                for stage in ready[: self.jobs - len(running)]:
                    if time.monotonic() < deadline:
                        print(f"{stage.name} ...", flush=True)
                        running[pool.submit(self.one, stage)] = stage
                if not running:
                    return
                ended = self._wait(running, deadline)
                for future in ended:
                    stage = running.pop(future)
                    try:
                        done[stage.name] = future.result()
                    except Unfinished:
                        print(
                            f"{stage.name} is stopped: the next call goes on with it", flush=True
                        )
                    except (subprocess.CalledProcessError, OSError, LookupError) as error:
                        failed.append(stage.name)
                        print(f"{stage.name} failed ({error}): see {self.log(stage)}", flush=True)
                    after(done, failed)

    def _wait(
        self, running: Mapping[Future[dict[str, Any]], Stage], deadline: float
    ) -> set[Future[dict[str, Any]]]:
        """Stages that have ended; after the deadline fits are told to save and end."""
        left = max(0.0, deadline - time.monotonic())
        ended = wait(running, left if math.isfinite(left) else None, FIRST_COMPLETED).done
        if ended:
            return ended
        for child, stage in list(self.children.items()):
            if stage.run is not None and child not in self.told:
                self.told.add(child)  # a second signal would not let it save
                child.terminate()
        return wait(running, return_when=FIRST_COMPLETED).done

    def one(self, stage: Stage) -> dict[str, Any]:
        """Run a stage and keep its result."""
        seconds = sum(self.call(command, stage) for command in stage.prepare())
        content = {"commands": [list(each) for each in stage.commands]}
        content |= {"found": stage.collect(), "cpu_seconds": round(seconds, 1)}
        write_text(self.file(stage), json.dumps(content, indent=1))
        return content

    def call(self, command: Command, stage: Stage) -> float:
        """Run a command; its CPU seconds."""
        self.log(stage).parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self.log(stage).open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                pass_fds=() if self.lock is None else (self.lock,),
            )
            self.children[child] = stage
            if self.stopped.is_set():
                child.terminate()
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            del self.children[child]
        if stage.run is not None and child.returncode in TERMINATED:
            raise Unfinished
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, command[:2])
        return usage.ru_utime + usage.ru_stime

    def log(self, stage: Stage) -> Path:
        """What a stage printed."""
        return self.out / "logs" / f"{stage.name}.log"

    @contextmanager
    def _ending_children(self) -> Iterator[None]:
        """End the processes if this one is stopped."""
        try:
            yield
        except BaseException:
            self.stopped.set()
            for child in list(self.children):
                child.terminate()
            raise


def reproduce(
    study: Study,
    seeds: Sequence[int],
    runner: Runner,
    budget: float,
    claims: Sequence[int] = tuple(CLAIMS),
) -> int:
    """Run the stages of these claims and write the page; the exit status, 1 if a stage failed."""
    stages = [stage for seed in seeds for stage in Maker(study, seed, runner.out).all()]
    names = {name for number in claims for name in CLAIMS[number].stages(study)}
    wanted = {name for seed in seeds for name in with_needs([*names], stages, seed)}
    asked = [stage for stage in stages if stage.name in wanted]
    deadline = time.monotonic() + budget
    conditions = kept_conditions(runner.out)
    done, failed = runner.results(stages), list[str]()

    def after(now: Results, broken: list[str]) -> None:
        done.update(now)
        failed[:] = broken
        write(study, seeds, stages, done, runner.out, conditions)

    after(done, [])
    runner.run(asked, deadline, after)
    left = sum(stage.name not in done for stage in asked)
    if left and not failed:
        print(f"The budget is over, {left} stages are left: call the same command to go on")
    if failed:
        print(f"{len(failed)} stages failed, {left} are left: {', '.join(failed)}")
    print(f"The page is {runner.out / 'claims.md'}")
    return int(bool(failed))


def kept_conditions(out: Path) -> dict[str, Any]:
    """What the numbers depend on, as it was when the first stage began."""
    file = out / "conditions.json"
    if not file.is_file():
        found = machine("cpu", 1)
        wanted = ("processor", "threads", "python", "torch", "lightning")
        write_text(file, json.dumps({name: found[name] for name in wanted}, indent=1))
    return json.loads(file.read_text())


def write(
    study: Study,
    seeds: Sequence[int],
    stages: Sequence[Stage],
    done: Results,
    out: Path,
    conditions: dict[str, Any],
) -> None:
    """Write the page and the times."""
    write_page(study, seeds, stages, {k: v["found"] for k, v in done.items()}, out, conditions)
    times = [
        {"stage": stage.name, "CPU seconds": done[stage.name]["cpu_seconds"]}
        for stage in stages
        if stage.name in done
    ]
    if times:
        write_csv(out / "times.csv", times)


def publish(out: Path, place: Path, name: str, *, page: str, figures: str) -> None:
    """Copy a page and its figures to another place.

    Args:
        out: Folder that holds both.
        place: Folder they are copied to, as `NAME.md` and the folder `NAME`.
        name: Of the page there.
        page: Of the page here, without `.md`.
        figures: Name of the folder of its figures.

    Raises:
        ValueError: If there is no page yet.
    """
    file = out / f"{page}.md"
    if not file.is_file():
        raise ValueError(
            f"publish must wait until a seed is complete, got no {file}: leave it out"
        )
    text = file.read_text()
    shutil.rmtree(place / name, ignore_errors=True)
    shutil.copytree(out / figures, place / name)
    with replacing(place / f"{name}.md") as part:
        part.write_text(text.replace(f"]({figures}/", f"]({name}/"))


def seconds_of(text: str) -> float:
    """Seconds of a time such as 3h, 90m or 45s."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"budget must be a number with s, m or h, got {text!r}: 3h, for example"
        )
    return float(found[1]) * UNITS[found[2]]


@contextmanager
def alone(out: Path) -> Iterator[int]:
    """Hold the folder's lock, which the processes of a killed call keep until they end.

    Raises:
        ValueError: If another call works there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out must be a folder in which no other call works, got {out}: wait until it, or "
                "what a killed call left running, has ended"
            ) from None
        yield file.fileno()


def check_options(parser: argparse.ArgumentParser, jobs: int, seeds: Sequence[int]) -> None:
    """Check the numbers that a command line gives."""
    if jobs < 1:
        parser.error(f"--jobs must be at least 1, got {jobs}")
    if min(seeds) < 0 or len({*seeds}) < len(seeds):
        parser.error(f"--seeds must be distinct and at least 0, got {seeds}")


def guarded(
    parser: argparse.ArgumentParser, out: Path, jobs: int, work: Callable[[Runner], int]
) -> int:
    """Work in a folder alone, and say what is wrong or how to go on; the exit status."""
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with alone(out) as lock:
            return work(Runner(out, jobs, lock))
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("stopped: call the same command to go on")
        return 130


def study_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Study:
    """The study that the options describe."""
    own = {"--root": options.root, "--images": options.images}
    if options.data == "digits":
        for name, value in own.items():
            if value is not None:
                parser.error(f"{name} must be left out for digits, got {value}: it is of cifar10")
        return DIGITS
    if options.root is None or not Path(options.root).is_dir():
        parser.error(
            f"--root must be the folder of CIFAR-10's training images, got {options.root}: with a "
            "subfolder for each class"
        )
    images = 1_000_000 if options.images is None else options.images
    if images < IMAGES_OF_AN_EPOCH:
        parser.error(f"--images must be at least {IMAGES_OF_AN_EPOCH}, an epoch, got {images}")
    return cifar10(str(Path(options.root).resolve()), images)


def main(given: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default="digits", choices=STUDIES)
    parser.add_argument("--root", help="folder of CIFAR-10's training images, by classes")
    parser.add_argument("--images", type=int, help="of a long fit on CIFAR-10 (default 1000000)")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 0 1 2, on CIFAR-10 0")
    parser.add_argument("--jobs", type=int, default=2, help="stages at a time")
    parser.add_argument("--budget", type=seconds_of, default=float("inf"), help="such as 3h")
    parser.add_argument("--claims", type=int, nargs="+", default=[*CLAIMS], choices=[*CLAIMS])
    parser.add_argument("--out", type=Path, help="folder of all, by default runs/reproduce-DATA")
    parser.add_argument("--publish", action="store_true", help="copy the page to docs/results")
    options = parser.parse_args(given)
    study = study_of(parser, options)
    seeds = options.seeds or list(study.seeds)
    check_options(parser, options.jobs, seeds)
    out = options.out or Path("runs", f"reproduce-{options.data}")

    def work(runner: Runner) -> int:
        status = reproduce(study, seeds, runner, options.budget, options.claims)
        if options.publish:
            name = "claims" if study.name == "digits" else f"claims-{study.name}"
            publish(out, RESULTS, name, page="claims", figures="figures")
        return status

    return guarded(parser, out, options.jobs, work)


if __name__ == "__main__":
    sys.exit(main())
