"""CPU seconds of a command's start, beside those of what it imports.

    .venv/bin/python benchmarks/start_up.py CHECKPOINT [--repeats 5] [--before FOLDER]

Each repeat runs every command once, so that a machine that is slow for a while is slow for all.
The table gives the median and the range of the repeats, user and system time together. `--before`
is another copy of the project, whose commands are run beside those of this one.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def cpu_seconds(arguments: list[str], root: Path) -> float:
    """User and system time of one process of Python that runs in this copy of the project."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {arguments} ended with status {process.returncode} in {root}")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--before", type=Path)
    given = parser.parse_args()
    checkpoint = str(given.checkpoint.resolve())
    commands = {
        "main.py --help": ["main.py", "--help"],
        "main.py sample --help": ["main.py", "sample", "--help"],
        "main.py sample, 4 images": [
            *("main.py", "sample", "--ckpt_path", checkpoint, "--num_images", "4")
        ],
        "import lightning.pytorch": ["-c", "import lightning.pytorch"],
        "import torch": ["-c", "import torch"],
    }
    roots = {"now": ROOT} if given.before is None else {"before": given.before, "now": ROOT}
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(given.repeats):
        for name, arguments in commands.items():
            for time, root in roots.items():
                seconds = cpu_seconds(arguments, root.resolve())
                found.setdefault((name, time), []).append(seconds)
    print("| command |", " | ".join(roots), "|\n|---|" + "---|" * len(roots))
    for name in commands:
        cells = []
        for time in roots:
            values = found[name, time]
            low, middle, high = min(values), statistics.median(values), max(values)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
