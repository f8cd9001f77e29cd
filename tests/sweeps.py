"""Small sweeps."""

import csv

from tiny import some_ddpm

from ddim_pl.commands import Trainer
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.metrics.digits import DigitsFeatures
from ddim_pl.samplers import DDIM, Heun


def trainer(folder, *callbacks, **settings):
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_test_batches=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **settings,
    )


def sweep(folder, model=None, **arguments):
    settings = {
        "timesteps": ["linear", "exponential"],
        "num_steps": [2, 3],
        "samplers": [DDIM(), Heun()],
        "features": DigitsFeatures,
        "num_samples": 40,
        "batch_size": 16,
        "num_shown": 4,
        "output": str(folder),
        **arguments,
    }
    trainer(folder).sweep(model or some_ddpm(), DigitsDataModule(), **settings)
    return list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
