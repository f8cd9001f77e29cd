"""The sampler of consistency models on the Gaussian, whose consistency function is known."""

import pytest
import torch
from exact import ExactConsistency, ExactGaussian, propagate
from torch import Tensor

from ddim_pl import timesteps
from ddim_pl.rng import image_generators, randn
from ddim_pl.samplers import DDIM, Consistency
from ddim_pl.scales import Scales
from ddim_pl.schedules import CosineLogSNRSchedule, EDMSchedule, LinearSchedule, NoiseSchedule

every_schedule = pytest.mark.parametrize(
    "schedule", [LinearSchedule(), CosineLogSNRSchedule(), EDMSchedule()], ids=repr
)


def marginal(exact: ExactGaussian, level: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation at a level; those of the data at level 0, whatever noise it has."""
    if level == 0:
        return like + exact.mean, like + exact.std
    return exact.marginal(level, like)


@every_schedule
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_the_exact_function_keeps_the_law_at_every_level(
    schedule: NoiseSchedule, num_steps: int
) -> None:
    exact, zero = ExactGaussian(schedule), torch.zeros(1, dtype=torch.float64)
    levels = timesteps.linear(schedule.num_levels, num_steps)
    mean, std = exact.marginal(levels[0], zero)
    for pair in levels.unfold(0, 2, 1):
        mean, variance = propagate(
            Consistency(), ExactConsistency(schedule), pair, zero + mean, zero + std**2
        )
        wanted, std = marginal(exact, pair[1], zero)
        torch.testing.assert_close(mean, zero + wanted, rtol=0, atol=1e-11)
        torch.testing.assert_close(variance, zero + std**2, rtol=0, atol=1e-11)


@pytest.mark.parametrize("num_steps", [2, 5, 100])
def test_a_denoiser_that_is_none_narrows_the_law(num_steps: int) -> None:
    """The mean of the images that a state may be of varies less than they do."""
    schedule, zero = EDMSchedule(), torch.zeros(1, dtype=torch.float64)
    exact, levels = ExactGaussian(schedule), timesteps.karras(schedule, num_steps)
    mean, std = exact.marginal(levels[0], zero)
    _, variance = propagate(Consistency(), exact, levels, zero + mean, zero + std**2)
    t = schedule(levels[-2])
    share = t.alpha**2 * 0.5**2 / (t.alpha**2 * 0.5**2 + t.sigma**2)
    assert variance < share * 0.5**2 * (1 + 1e-9)


def test_states_are_the_estimates_with_fresh_noise() -> None:
    """`alpha x + sigma n`, and at the end the estimate, also where level 0 has noise."""
    schedule = CosineLogSNRSchedule()
    function, z = ExactConsistency(schedule), torch.linspace(-1, 1, 6).double().reshape(2, 3)
    levels = torch.tensor([900.0, 400.0, 0.0], dtype=torch.float64)
    first, last = Consistency().trajectory(
        function, z, levels, generator=image_generators(0, [3, 4])
    )
    noise = randn(z.shape, image_generators(0, [3, 4]), z)
    alpha, sigma = Scales(*schedule(400.0))
    torch.testing.assert_close(first.x, function(z, levels[0]).x, rtol=0, atol=0)
    torch.testing.assert_close(first.z, alpha * first.x + sigma * noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last.x, function(first.z, levels[1]).x, rtol=0, atol=0)
    assert torch.equal(last.z, last.x)
    assert [float(state.t) for state in (first, last)] == [400.0, 0.0]


def test_a_single_step_is_that_of_ddim() -> None:
    exact, z = ExactGaussian(LinearSchedule()), torch.linspace(-1, 1, 6).reshape(2, 3)
    levels = timesteps.linear(1000, 1)
    assert torch.equal(Consistency()(exact, z, levels), DDIM()(exact, z, levels))
