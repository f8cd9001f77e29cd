"""Ancestral sampling: what is not told with DDIM, in test_ddim.py."""

import math

import pytest
import torch
from exact import ExactGaussian, propagate

from ddim_pl import timesteps
from ddim_pl.rng import image_generators, randn
from ddim_pl.samplers import Ancestral
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule
from ddim_pl.transitions import Variance

every_schedule = pytest.mark.parametrize(
    "schedule", [LinearSchedule(), CosineLogSNRSchedule()], ids=["linear", "cosine"]
)


def test_variance_must_be_small_or_large() -> None:
    with pytest.raises(
        ValueError, match=r"variance must be one of \('small', 'large'\).*'learned'"
    ):
        Ancestral("learned")


@every_schedule
@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_step_to_level_0_adds_no_noise(schedule: NoiseSchedule, variance: Variance) -> None:
    """[DDPM], algorithm 2; also where level 0 has noise."""
    denoiser = ExactGaussian(schedule)
    z = torch.ones(2, 3)
    for levels, same in (([300.0, 0.0], True), ([300.0, 1e-3], False)):
        one, other = (
            Ancestral(variance)(
                denoiser, z, torch.tensor(levels), generator=image_generators(s, [0, 1])
            )
            for s in (0, 1)
        )
        assert torch.equal(one, other) == same


def test_large_variance_makes_the_marginals_of_a_known_image_too_wide() -> None:
    """By `(1 - sigma_s^2 / sigma_t^2) var_ts` after one step, exactly; it fades in fine steps."""
    denoiser = ExactGaussian(LinearSchedule(), 0.3, 0.0)
    zero = torch.zeros(1, dtype=torch.float64)
    excess = []
    for step in (100, 50, 25):
        t, s = denoiser.schedule(500), denoiser.schedule(500 - step)
        levels = torch.tensor([500.0, 500.0 - step])
        mean, variance = propagate(
            Ancestral("large"), denoiser, levels, zero + 0.3 * t.alpha, zero + t.sigma**2
        )
        torch.testing.assert_close(mean, zero + 0.3 * s.alpha, rtol=0, atol=1e-11)
        wide = (1 - s.sigma**2 / t.sigma**2) * (1 - (t.alpha / s.alpha) ** 2)
        torch.testing.assert_close(variance, zero + s.sigma**2 + wide, rtol=0, atol=1e-11)
        excess.append(wide)
    # Second order in the step, so first order in the sum of all steps. A quarter at each halving,
    # but for the curvature of the schedule.
    ratios = torch.stack(excess)[:-1] / torch.stack(excess)[1:]
    assert (ratios > 3).all()


def test_large_variance_needs_many_steps() -> None:
    """Why [DDIM] has an FID of 367 with 10 steps and 3.17 with 1000 for sigma-hat."""
    denoiser = ExactGaussian(LinearSchedule(), 0.0, 0.1)
    zero = torch.zeros(1, dtype=torch.float64)
    spread = []
    for num_steps in (10, 100):
        levels = timesteps.leading(1000, num_steps)
        _, variance = propagate(Ancestral("large"), denoiser, levels, zero, zero + 1)
        spread.append(abs(variance.sqrt().item() - 0.1))
    assert spread[1] < spread[0] / 2


def test_all_thousand_steps_sample_the_data() -> None:
    """Monte Carlo, seed 0, 4,000 images of 8 numbers: 4 standard errors beyond the exact law.

    The exact law of the 1000-step chain is itself within 1 % of the data's.
    """
    denoiser = ExactGaussian(LinearSchedule(), 0.3, 0.5)
    levels = timesteps.linear(1000, 1000)
    generator = torch.Generator().manual_seed(0)
    z = randn((4000, 8), generator, torch.empty(0))
    images = Ancestral()(denoiser, z, levels, generator=generator).double()
    standard_error = 0.5 / math.sqrt(images.numel())
    assert abs(images.mean() - 0.3) < 4 * standard_error
    assert abs(images.std() / 0.5 - 1) < 0.01 + 4 / math.sqrt(2 * images.numel())
