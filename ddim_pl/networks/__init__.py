"""Backbones: plain modules `forward(z, t, label=None)` that know nothing of diffusion."""
