"""Denoisers that are exact, and hence tests of everything else."""

import atexit
import os
import shutil
import tempfile
import uuid

import pytest
import torch
from exact import ExactGaussian, ExactMixture

from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule

# One thread, for millions of tiny operations: two that wait for each other on a busy machine make
# them thirty times slower. The environment is for the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Lightning calls what the newest jsonargparse has deprecated.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
# For what is made before a test's own, see `own_cache`.
os.environ["DDIM_PL_CACHE"] = tempfile.mkdtemp(prefix="ddim-pl-cache-")
atexit.register(shutil.rmtree, os.environ["DDIM_PL_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Each test has a cache of its own, not the user's."""
    monkeypatch.setenv("DDIM_PL_CACHE", str(tmp_path_factory.getbasetemp() / uuid.uuid4().hex))


@pytest.fixture
def gaussian() -> ExactGaussian:
    """Images `(3, 4, 4)` whose dimensions are Gaussian, each with its own mean and deviation."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(3, 4, 4, generator=generator, dtype=torch.float64) - 0.5
    std = 0.1 + torch.rand(3, 4, 4, generator=generator, dtype=torch.float64)
    return ExactGaussian(LinearSchedule(), mean, std)


@pytest.fixture
def mixture() -> ExactMixture:
    """Two overlapping modes, under the schedule whose states are smooth in the level."""
    return ExactMixture(CosineLogSNRSchedule())
