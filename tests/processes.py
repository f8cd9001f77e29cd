"""Commands in processes of their own, for tests that stop or kill them."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tiny import tiny_config, write_config

ROOT = Path(__file__).parents[1]


def start(folder, *arguments, prefix=()):
    return subprocess.Popen(
        [*prefix, sys.executable, "-u", ROOT / "main.py", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(found, process, seconds=120):
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def config_of(folder, **trainer):
    config = tiny_config(folder, max_epochs=-1, limit_val_batches=0, **trainer)
    config["trainer"]["callbacks"] = [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"save_last": True, "every_n_train_steps": 20, "save_top_k": 0},
        }
    ]
    return write_config(config, folder / "config.yaml")
