"""Teachers that other programs have trained: read as data, and turned into our models."""
