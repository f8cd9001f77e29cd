"""LightningModules, one training method per file."""

from ddim_pl.training.base import DiffusionModule
from ddim_pl.training.consistency import ConsistencyModel
from ddim_pl.training.ddpm import DDPM
from ddim_pl.training.guidance_distillation import GuidanceDistillation
from ddim_pl.training.luhman import LuhmanDistillation
from ddim_pl.training.progressive import ProgressiveDistillation
from ddim_pl.training.reflow import RectifiedFlow
from ddim_pl.training.tract import TRACT

__all__ = [
    "DDPM",
    "TRACT",
    "ConsistencyModel",
    "DiffusionModule",
    "GuidanceDistillation",
    "LuhmanDistillation",
    "ProgressiveDistillation",
    "RectifiedFlow",
]
