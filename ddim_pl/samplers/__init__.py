"""Samplers: frozen dataclasses of hyperparameters, called with `(denoiser, z, levels)`."""

from typing import Any

from ddim_pl.renamed import successor
from ddim_pl.samplers.ancestral import Ancestral
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.samplers.consistency import Consistency
from ddim_pl.samplers.ddim import DDIM
from ddim_pl.samplers.deq import DEQ
from ddim_pl.samplers.dpm_solver import DPMSolverPP
from ddim_pl.samplers.gamma import GammaExact, GammaMoment, GammaQuantile, GammaReport
from ddim_pl.samplers.heun import Heun
from ddim_pl.samplers.paradigms import ParaDiGMS
from ddim_pl.samplers.pndm import PNDM
from ddim_pl.samplers.repaint import RePaint

__all__ = [
    "DDIM",
    "DEQ",
    "PNDM",
    "Ancestral",
    "Consistency",
    "DPMSolverPP",
    "GammaExact",
    "GammaMoment",
    "GammaQuantile",
    "GammaReport",
    "Heun",
    "ParaDiGMS",
    "RePaint",
    "Sampler",
    "State",
]


def __getattr__(name: str) -> Any:
    """The class that took the place of an old name, see `ddim_pl.renamed`."""
    return successor(__name__, name)
