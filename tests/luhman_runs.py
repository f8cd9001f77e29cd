"""Small distillations in one step."""

import functools
from pathlib import Path

import lightning as L
import torch

from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.data.teacher_pairs import TeacherPairsDataModule
from ddim_pl.training import LuhmanDistillation

ROOT = Path(__file__).parents[1]


def trainer(folder, kind=L.Trainer, **arguments):
    return kind(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        **arguments,
    )


def saved(module, path):
    """A checkpoint of a module, as its trainer writes it."""
    t = trainer(path.parent, max_epochs=0)
    t.fit(module, DigitsDataModule())
    t.save_checkpoint(path)
    return str(path)


def pairs(folder, **arguments):
    settings = {
        "num_pairs": 40,
        "num_validation": 8,
        "shard_size": 16,
        "batch_size": 10,
        **arguments,
    }
    return TeacherPairsDataModule(DigitsDataModule(), str(folder / "pairs"), **settings)


def student(teacher_file, **arguments):
    settings = {
        "teacher_timesteps": "linear",
        "teacher_num_steps": 4,
        "ema_decay": 0.9,
        "optimizer": functools.partial(torch.optim.Adam, lr=1e-3),
        **arguments,
    }
    return LuhmanDistillation(teacher=teacher_file[0], **settings)
