"""Train diffusion teachers, sample them, and distil them into few-step students."""

__version__ = "0.1.0"
