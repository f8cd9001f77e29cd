"""Small ladders."""

import functools

import lightning as L
import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.training import ProgressiveDistillation


def save(module, path):
    """Write a module as a trainer would, without a fit."""
    t = trainer(path.parent)
    t.strategy.connect(module)
    t.save_checkpoint(path)
    return str(path)


def trainer(folder, *callbacks, **arguments):
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "max_epochs": -1,
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            **arguments,
        }
    )


LADDER = [(4, 6), (2, 5), (1, 5)]  # after two updates of conversion it ends at update 18


def ladder(path, kind=ProgressiveDistillation, **arguments):
    # A run that resumes must not owe its result to the global generator.
    seed_everything(arguments.pop("global_seed", 0), verbose=False)
    return kind(
        **{
            "teacher": path,
            "rounds": LADDER,
            "conversion_updates": 2,
            "ema_decay": 0.5,
            "dropout": 0.1,
            "optimizer": functools.partial(torch.optim.Adam, lr=1e-3),
            **arguments,
        }
    )


def fit(module, folder, *callbacks, ckpt_path=None, **arguments):
    data = DigitsDataModule(batch_size=4, steps_per_epoch=8)
    t = trainer(folder, *callbacks, **arguments)
    t.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return t


def clone(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
