"""LightningModules, one training method per file."""

from ddim_pl.training.base import DiffusionModule
from ddim_pl.training.consistency import ConsistencyModel
from ddim_pl.training.ddpm import DDPM
from ddim_pl.training.luhman import LuhmanDistillation
from ddim_pl.training.progressive import ProgressiveDistillation

__all__ = [
    "DDPM",
    "ConsistencyModel",
    "DiffusionModule",
    "LuhmanDistillation",
    "ProgressiveDistillation",
]
