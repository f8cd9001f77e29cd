"""Generating images with a model and measuring them, once for everyone who does."""
