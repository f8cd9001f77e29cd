"""Stages of a study that run in this process."""

import runpy
import sys
import time
from concurrent.futures import Future

import claim_measures
from reproduce import Runner

from ddim_pl.cli import main


class Here:
    """An executor whose work is done when it is submitted, in the main thread."""

    def __init__(self, jobs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


class RunnerHere(Runner):
    """Runs commands in this process, which has everything imported, but for those of one stage."""

    def call(self, command, stage):
        if stage.name.startswith("eps"):
            return super().call(command, stage)
        begin = time.process_time()
        sys.argv = [*command]
        if command[0] == "main.py":
            main([*command[1:]])
        elif command[0].endswith("claim_measures.py"):
            claim_measures.main()
        else:
            runpy.run_path(command[0], run_name="__main__")
        return time.process_time() - begin
