"""LightningDataModules, one per file; batches are images in [-1, 1] with integer labels."""
