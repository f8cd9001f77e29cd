"""Laws of noise, one per file, and the latents from which sampling starts."""

from ddim_pl.noise.base import GaussianNoise, Noise, latents
from ddim_pl.noise.gamma import GammaNoise

__all__ = ["GammaNoise", "GaussianNoise", "Noise", "latents"]
