"""Train diffusion teachers, sample them, and distil them into few-step students."""

__version__ = "0.1.0"

from ddim_pl.renamed import register_old_modules

register_old_modules()
