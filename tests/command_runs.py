"""A trainer and a model for tests of commands."""

import csv

import numpy as np
from tiny import some_ddpm, tiny_unet

from ddim_pl.commands import Trainer


def trainer(folder, *, devices=1, **settings):
    return Trainer(
        accelerator="cpu",
        devices=devices,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **settings,
    )


def with_classes(**changes):
    return some_ddpm(network=tiny_unet(num_classes=10), **changes)


def table(file):
    return list(csv.DictReader(file.read_text().splitlines()))


def close(a, b):
    """Equal uint8 pictures, but for the rounding of a batch of another size."""
    return (a.int() - b.int()).abs().max() <= 1


def arrays_of(file):
    """The arrays of an NPZ file, which is closed again."""
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
