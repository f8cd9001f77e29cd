"""Benchmarks are scripts that import one another by name, and that make Lightning quiet."""

import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def heard_again():
    """What Lightning says after a benchmark's test, as before it."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)
