"""Samplers: frozen dataclasses of hyperparameters, called with `(denoiser, z, levels)`."""

from ddim_pl.samplers.base import Sampler, State
from ddim_pl.samplers.ddim import DDIM
from ddim_pl.samplers.ddpm import DDPM

__all__ = ["DDIM", "DDPM", "Sampler", "State"]
