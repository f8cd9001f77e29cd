"""Does a killed run lose anything? SIGKILL, resume, compare with an unbroken run.

    make faults                                    # 20 trials of each method, docs/reliability.md
    .venv/bin/python benchmarks/faults.py --trials 3 --methods ddpm

Each trial fits a small model with the settings for checkpoints that the digits configs ship: one
every epoch. It is killed one to three times: at any moment, while a checkpoint or a shard is being
written, in validation, or where an epoch or a round ends. After each kill the same command with
`--ckpt_path last` continues it. The end is compared with that of an unbroken run: weights,
averages, optimiser, rates and counters, bit for bit. Every other trial has its temporary files on
another device. Trials are seeded; finished ones are kept in `runs/faults`, so that the script can
be stopped and called again.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ddim_pl.cli import main as run_command  # noqa: E402
from ddim_pl.runs import read_checkpoint  # noqa: E402

WORK = ROOT / "runs" / "faults"
EVENTS = "DDIM_PL_FAULT_EVENTS"
EPOCH = 20
SECONDS_AT_MOST = 900
NETWORK = {"channels": 8, "groups": 4, "attention": []}
KEYS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "loops")
MOMENTS = {
    "ddpm": ("any", "checkpoint", "validation", "epoch end"),
    "gamma": ("any", "checkpoint", "validation", "epoch end"),
    "progressive": ("any", "checkpoint", "validation", "epoch end"),
    "luhman": ("any", "checkpoint", "validation", "epoch end", "shard"),
}
"""When each method is killed. A round of the ladder is an epoch long, so that both end at once."""


class Progress(L.Callback):
    """Says what a fit is doing, in a file that outlives it."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """The number of updates so far."""
        self._say(f"step {trainer.global_step}")

    def on_validation_start(self, *_: Any) -> None:
        """Validation begins."""
        self._say("validation")

    def _say(self, text: str) -> None:
        with open(os.environ[EVENTS], "a") as file:
            file.write(f"{text}\n")


def small(method: str) -> dict[str, Any]:
    """What makes a digits config small enough for many trials."""
    save = {"every_n_train_steps": EPOCH}
    checkpoint = "lightning.pytorch.callbacks.ModelCheckpoint"
    distance = {"num_samples": 64, "batch_size": 64, "every_n_validations": 0}
    callbacks = [
        {"class_path": checkpoint, "init_args": save},
        {"class_path": "callbacks.FrechetDistance", "init_args": distance},
        {"class_path": "faults.Progress"},
    ]
    if method != "progressive":
        grid = {"class_path": "callbacks.SampleGrid", "init_args": {"num_images": 4}}
        callbacks.append(grid)
    trainer: dict[str, Any] = {
        "logger": {"init_args": {"save_dir": "runs", "name": method}},
        "callbacks+": callbacks,
        "limit_val_batches": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    data: dict[str, Any] = {"batch_size": 16, "steps_per_epoch": EPOCH}
    model: dict[str, Any] = {"num_steps": 2}
    if method in ("ddpm", "gamma"):
        trainer["max_epochs"] = 4
        model |= {"network": {"init_args": NETWORK}, "warmup_steps": 10}
        model["lr_scheduler"] = {"init_args": {"total_iters": 4 * EPOCH}}
    elif method == "progressive":
        model = {"rounds": [[4, EPOCH], [2, EPOCH], [1, EPOCH]]}
    else:
        trainer["max_epochs"] = 3
        model = {"teacher_num_steps": 2, "warmup_steps": 10}
        model["lr_scheduler"] = {"init_args": {"total_iters": 3 * EPOCH}}
        data |= {"num_pairs": 480, "num_validation": 32, "shard_size": 64, "folder": "runs/pairs"}
    return {"model": {"init_args": model}, "data": {"init_args": data}, "trainer": trainer}


def arguments(method: str, folder: Path) -> list[str]:
    """The command of a fit, with its small config written into the folder."""
    shipped = {"gamma": "gamma_ddpm"}.get(method, method)
    config = small(method)
    if method in ("progressive", "luhman"):
        config["model"]["init_args"]["teacher"] = str(teacher())
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["fit", "--config", f"{ROOT}/configs/digits/{shipped}.yaml", "--config", str(path)]


def teacher() -> Path:
    """A small teacher, fitted once."""
    folder = WORK / "teacher"
    found = folder / "runs" / "ddpm" / "version_0" / "checkpoints" / "last.ckpt"
    if not (folder / "done").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        args = [
            each.replace("digits/ddpm", "digits/teacher") for each in arguments("ddpm", folder)
        ]
        wait_for(start(args, folder), lambda: False)
        read_checkpoint(found)
        (folder / "done").touch()
    return found


def start(args: list[str], folder: Path, temporary: str | None = None) -> int:
    """Run a command in a child of this process, which has everything imported already."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        os.environ[EVENTS] = str(folder / "events")
        if temporary:
            os.environ["TMPDIR"] = temporary
        log = os.open(folder / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        warnings.simplefilter("ignore")
        run_command(args)
        code = 0
    except SystemExit as stop:
        print(stop.code, file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(child: int, is_time: Callable[[], bool]) -> str:
    """Wait until a child has ended, or kill it when it is time; returns "ended" or "killed"."""
    begin = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"a fit failed with status {status}: see its log")
            return "ended"
        late = time.monotonic() - begin > SECONDS_AT_MOST
        if late or is_time():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if late:
                raise RuntimeError("a fit hangs: see its log")
            return "killed"
        time.sleep(0.0005)


def moment(kind: str, folder: Path, chance: random.Random) -> Callable[[], bool]:
    """A function that says whether it is time to kill."""
    events, begun = folder / "events", _length(folder / "events")
    step, delay = chance.randrange(1, 3 * EPOCH), chance.random() * 0.05
    if kind == "epoch end":
        step, delay = EPOCH * chance.randrange(1, 4) - 1, chance.random() * 0.03
    if kind in ("checkpoint", "shard"):
        place = folder / "runs" / ("pairs" if kind == "shard" else "")
        before, number = _state(place), chance.randrange(1, 4)
        return _counted(lambda: _state(place), before, number)
    wanted = "validation" if kind == "validation" else f"step {step}"
    number = chance.randrange(1, 3) if kind == "validation" else 1

    def is_time() -> bool:
        if not events.is_file():
            return False
        new = events.read_text().splitlines()[begun:]
        if new.count(wanted) < number:
            return False
        time.sleep(delay)
        return True

    return is_time


def _counted(look: Callable[[], Any], before: Any, number: int) -> Callable[[], bool]:
    seen = [before]

    def is_time() -> bool:
        now = look()
        if now != seen[-1]:
            seen.append(now)
        return len(seen) > number

    return is_time


def _state(place: Path) -> list[tuple[str, int]]:
    """Names and sizes of the checkpoints or shards, unfinished ones included."""
    found = []
    for path in place.rglob("*"):
        if ".ckpt" in path.name or ".safetensors" in path.name:
            with contextlib.suppress(OSError):
                found.append((str(path), path.stat().st_size))
    return sorted(found)


def _length(events: Path) -> int:
    return len(events.read_text().splitlines()) if events.is_file() else 0


def last_checkpoint(folder: Path, method: str) -> Path | None:
    """The newest `last.ckpt` of a run, if there is one."""
    found = sorted((folder / "runs" / method).glob("version_*/checkpoints/last.ckpt"))
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


def differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Where two checkpoints differ."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if not torch.equal(one, other):
            yield place
    elif isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            yield f"{place} (names)"
        for key in one.keys() & other.keys():
            yield from differences(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield f"{place} (length)"
        for i, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from differences(a, b, f"{place}[{i}]")
    elif one != other:
        yield place


def contents(path: Path) -> dict[str, Any]:
    """What must be the same in a checkpoint."""
    file = torch.load(path, map_location="cpu", weights_only=True)
    return {key: file[key] for key in KEYS}


def unbroken(method: str) -> Path:
    """The run that nothing interrupted."""
    folder = WORK / method / "unbroken"
    if not (folder / "done").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        wait_for(start(arguments(method, folder), folder), lambda: False)
        (folder / "done").touch()
    found = last_checkpoint(folder, method)
    assert found is not None
    return found


def trial(method: str, number: int) -> dict[str, Any]:
    """One run, killed and resumed until it ends."""
    chance = random.Random(f"{method} {number}")
    kind = MOMENTS[method][number % len(MOMENTS[method])]
    wanted = 1 + chance.randrange(3)
    temporary = "/dev/shm" if number % 2 else None
    folder = WORK / method / f"trial-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    args, lost, broken, kills = arguments(method, folder), [], 0, 0
    while True:
        found = last_checkpoint(folder, method)
        resume = ["--ckpt_path", "last"] if found else []
        is_time = moment(kind, folder, chance) if kills < wanted else (lambda: False)
        if wait_for(start([*args, *resume], folder, temporary), is_time) == "ended":
            break
        kills += 1
        found = last_checkpoint(folder, method)
        broken += sum(not _is_readable(path) for path in (folder / "runs").rglob("*.ckpt"))
        saved = contents(found)["global_step"] if found and _is_readable(found) else 0
        lost.append(max(0, _last_step(folder) - saved))
    found = last_checkpoint(folder, method)
    assert found is not None
    different = list(differences(contents(unbroken(method)), contents(found)))
    left = [path.name for path in (folder / "runs").rglob("*.part*")]
    if not different:
        shutil.rmtree(folder)
    return {
        "method": method,
        "number": number,
        "moment": kind,
        "kills": kills,
        "other device": temporary is not None,
        "updates lost": lost,
        "damaged files": broken,
        "left over": left,
        "differences": different[:5],
    }


def _last_step(folder: Path) -> int:
    lines = (folder / "events").read_text().splitlines() if _length(folder / "events") else []
    steps = [int(line.split()[1]) for line in lines if line.startswith("step")]
    return steps[-1] if steps else 0


def _is_readable(path: Path) -> bool:
    try:
        read_checkpoint(path)
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return False
    return True


def report(rows: list[dict[str, Any]]) -> str:
    """The table of docs/reliability.md."""
    lines = [
        "| method | killed | trials | kills | updates lost: mean, most | damaged files "
        "| files left over | runs that differ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, moments in MOMENTS.items():
        for kind in moments:
            some = [row for row in rows if (row["method"], row["moment"]) == (method, kind)]
            if not some:
                continue
            lost = [each for row in some for each in row["updates lost"]] or [0]
            cells = [
                method,
                {"any": "at any moment"}.get(
                    kind, f"in a {kind}" if kind != "epoch end" else "where an epoch or round ends"
                ),
                len(some),
                sum(row["kills"] for row in some),
                f"{statistics.mean(lost):.1f}, {max(lost)}",
                sum(row["damaged files"] for row in some),
                sum(len(row["left over"]) for row in some),
                sum(bool(row["differences"]) for row in some),
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the trials that are missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="of each method")
    parser.add_argument("--methods", nargs="+", choices=MOMENTS, default=list(MOMENTS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / "trials.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    known = {(row["method"], row["number"]) for row in rows}
    for number in range(given.trials):
        for method in given.methods:
            if (method, number) not in known:
                rows.append(trial(method, number))
                print(json.dumps(rows[-1]), flush=True)
                with log.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    table = report(rows)
    print(table)
    page = ROOT / "docs" / "reliability.md"
    head, _, rest = page.read_text().partition("<!-- table -->")
    tail = rest.partition("<!-- end -->")[2]
    page.write_text(f"{head}<!-- table -->\n{table}\n<!-- end -->{tail}")


if __name__ == "__main__":
    main()
