"""One process at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddim_pl.locks import alone_in

ROOT = Path(__file__).parents[1]


def test_a_folder_is_of_one_process_until_it_ends_or_dies(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from ddim_pl.locks import alone_in\n"
        "with alone_in(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match=f"no other process.*process {other.pid} on"):
            alone_in(tmp_path).__enter__()
        other.kill()
        other.wait()
    assert (tmp_path / ".lock").exists()
    with alone_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_process_that_loads_data_does_not_keep_the_lock_of_one_that_died(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from ddim_pl.locks import alone_in\n"
        "with alone_in(Path(sys.argv[1])):\n"
        "    if os.fork() == 0: print(os.getpid(), flush=True)\n"
        "    time.sleep(60)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        child = int(other.stdout.readline())
        other.kill()
        other.wait()
        try:
            with alone_in(tmp_path):
                os.kill(child, 0)  # it lives
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_process_that_waits_is_the_next(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ddim_pl.locks import alone_in\n"
        "with alone_in(Path(sys.argv[1])):\n"
        "    print('in', flush=True); sys.stdin.readline(); print('out', flush=True)"
    )
    waiting = (
        "import sys; from pathlib import Path; from ddim_pl.locks import alone_in\n"
        "print('begins', flush=True)\n"
        "with alone_in(Path(sys.argv[1]), wait=True):\n"
        "    print(len(list(Path(sys.argv[1]).iterdir())), flush=True)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def start(code):
        arguments = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.Popen(arguments, cwd=ROOT, text=True, **pipes)

    with start(code) as first:
        assert first.stdout.readline() == "in\n"
        with start(waiting) as second:
            assert second.stdout.readline() == "begins\n"
            # It says so before it waits, and does not go on.
            said = next(line for line in second.stderr if "waiting" in line)
            assert f"process {first.pid} on" in said
            assert second.poll() is None
            first.communicate("\n")
            assert second.communicate()[0] == "1\n"  # its own lock
    assert not list(tmp_path.iterdir())
