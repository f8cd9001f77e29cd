"""What the comparisons with diffusers share: schedules, a network, tolerances."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddim_pl.noise import latents
from ddim_pl.prediction import PredictionType
from ddim_pl.schedules import (
    DiscreteSchedule,
    ImprovedCosineSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
)

KINDS: dict[PredictionType, str] = {"eps": "epsilon", "x": "sample", "v": "v_prediction"}
SCHEDULES: dict[str, DiscreteSchedule] = {
    "linear": LinearSchedule(),
    "scaled_linear": ScaledLinearSchedule(),
    "squaredcos_cap_v2": ImprovedCosineSchedule(),
}
SPACINGS = ("leading", "trailing", "linspace")
SHAPE = (3, 8, 8)


class SmallNetwork(nn.Module):
    """A fixed random network whose output is bounded by 1.5, so that clipping has work to do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.25, generator=generator)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        h = torch.tanh(self.first(z) + t.to(z).reshape(-1, 1, 1, 1) / 1000)
        return 1.5 * torch.tanh(self.last(h))


def start(dtype: torch.dtype, num_images: int = 2) -> tuple[Tensor, list[torch.Generator]]:
    z, generators = latents(0, range(num_images), SHAPE)
    return z.to(dtype), generators


def float64_tables(scheduler: Any, schedule: DiscreteSchedule) -> None:
    """Replace diffusers' float32 tables by tables formed in float64."""
    scheduler.alphas_cumprod = (1 - schedule.betas()).cumprod(0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)


Arguments = dict[str, Any]


def diffusers_arguments(beta: str, kind: PredictionType, clip: bool, spacing: str) -> Arguments:
    schedule = SCHEDULES[beta]
    ends = {"beta_start": 1e-4, "beta_end": 0.02}
    if isinstance(schedule, ScaledLinearSchedule):
        ends = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    return {
        "beta_schedule": beta,
        "prediction_type": KINDS[kind],
        "clip_sample": clip,
        "timestep_spacing": spacing,
        **ends,
    }


def assert_same_images(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4 in float32 and 1e-10 in float64.

    Images far outside [-1, 1], which an unclipped eps-prediction of a network that was never
    trained gives (1e2 to 1e5), are held to the same tolerance relative to the largest value.
    """
    scale = max(1.0, theirs.abs().max().item())
    tolerance = 1e-4 if ours.dtype == torch.float32 else 1e-10
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


every_case = [
    pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"]),
    pytest.mark.parametrize("spacing", SPACINGS),
    pytest.mark.parametrize("kind", KINDS),
    pytest.mark.parametrize("beta", SCHEDULES),
    pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"]),
]


def in_every_case(test: Callable[..., None]) -> Callable[..., None]:
    for mark in every_case:
        test = mark(test)
    return test
