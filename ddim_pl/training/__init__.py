"""LightningModules, one training method per file."""

from ddim_pl.training.base import DiffusionModule
from ddim_pl.training.ddpm import DDPM

__all__ = ["DDPM", "DiffusionModule"]
