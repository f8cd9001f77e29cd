"""A model and a config small enough to train in seconds, for tests of training and command
line."""

from pathlib import Path
from typing import Any

import torch
import yaml

from ddim_pl.networks.unet import UNet
from ddim_pl.samplers import DDIM
from ddim_pl.schedules import LinearSchedule
from ddim_pl.training import DDPM

NETWORK: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 1,
    "channels": 8,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention": [4],
    "dropout": 0.1,
    "groups": 4,
}


def tiny_unet(**changes: Any) -> UNet:
    return UNet(**{**NETWORK, **changes})


def tiny_ddpm(**changes: Any) -> DDPM:
    arguments: dict[str, Any] = {"num_steps": 5, "ema_decay": 0.9, "warmup_steps": 10, **changes}
    network = arguments.pop("network", None) or tiny_unet()
    schedule = arguments.pop("schedule", LinearSchedule())
    return DDPM(network, schedule, **{"sampler": DDIM(), **arguments})


def some_ddpm(**changes: Any) -> DDPM:
    """A tiny model that is not trained, but answers something: a new U-Net answers zeros."""
    model = tiny_ddpm(**changes)
    generator = torch.Generator().manual_seed(0)
    for weights in model.average.module.parameters():
        weights.data += 0.1 * torch.randn(weights.shape, generator=generator)
    return model


def tiny_config(folder: Path, **trainer: Any) -> dict[str, Any]:
    """A config as in configs/digits/ddpm.yaml, with runs under `folder`."""
    return {
        "seed_everything": 3,
        "model": {
            "class_path": "ddim_pl.training.DDPM",
            "init_args": {
                "network": {
                    "class_path": "ddim_pl.networks.unet.UNet",
                    "init_args": dict(NETWORK),
                },
                "schedule": {"class_path": "ddim_pl.schedules.LinearSchedule"},
                "sampler": {"class_path": "ddim_pl.samplers.DDIM", "init_args": {"eta": 0.0}},
                "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
                "num_steps": 4,
                "ema_decay": 0.9,
                "warmup_steps": 5,
            },
        },
        "data": {
            "class_path": "ddim_pl.data.digits.DigitsDataModule",
            "init_args": {"batch_size": 32, "steps_per_epoch": 10, "num_predict": 6},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 5,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 2,
            "limit_test_batches": 2,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder), "name": "tiny"},
            },
            "callbacks": [
                {
                    "class_path": "callbacks.FrechetDistance",
                    "init_args": {
                        "features": "ddim_pl.metrics.digits.DigitsFeatures",
                        "num_samples": 41,
                        "batch_size": 16,
                    },
                },
                {"class_path": "callbacks.SampleGrid", "init_args": {"num_images": 4}},
                {"class_path": "callbacks.ImageWriter"},
                {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
                {"class_path": "callbacks.Throughput"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"save_last": True, "every_n_train_steps": 5, "save_top_k": -1},
                },
            ],
            **trainer,
        },
    }


def write_config(config: dict[str, Any], path: Path) -> str:
    path.write_text(yaml.safe_dump(config))
    return str(path)
