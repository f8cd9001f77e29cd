"""Laws of noise, one per file, and the latents that sampling starts from."""

from ddim_pl.noise.base import GaussianNoise, Noise, latents
from ddim_pl.noise.gamma import GammaNoise

__all__ = ["GammaNoise", "GaussianNoise", "Noise", "latents"]
