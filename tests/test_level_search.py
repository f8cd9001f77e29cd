"""Adaptive levels: the search finds the best path, and the best path draws better images."""

import itertools

import pytest
import torch
from exact import ExactGaussian, ExactMixture

from ddim_pl import timesteps
from ddim_pl.level_search import (
    StepErrors,
    candidate_levels,
    cheapest_levels,
    one_step_errors,
)
from ddim_pl.samplers import DDIM
from ddim_pl.schedules import CosineLogSNRSchedule, ImprovedCosineSchedule, LinearSchedule


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 8])
def test_the_search_finds_what_trying_all_paths_finds(num_steps):
    generator = torch.Generator().manual_seed(num_steps)
    levels = torch.arange(8, -1, -1, dtype=torch.float64)
    costs = torch.rand(9, 9, generator=generator, dtype=torch.float64).triu(1)
    costs[costs == 0] = torch.inf
    paths = [(0, *middle, 8) for middle in itertools.combinations(range(1, 8), num_steps - 1)]
    best = min(paths, key=lambda path: sum(costs[i, j] for i, j in itertools.pairwise(path)))
    assert cheapest_levels(costs, levels, num_steps).tolist() == levels[list(best)].tolist()


def test_a_cost_is_the_error_of_one_ddim_step_in_units_of_the_states_deviation():
    denoiser = ExactMixture(LinearSchedule())
    levels = torch.tensor([1000.0, 700, 300, 50, 0], dtype=torch.float64)
    z = torch.randn(300, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    costs = one_step_errors(denoiser, z, levels).costs()
    states = [z, *(state.z for state in DDIM().trajectory(denoiser, z, levels))]
    for i, j in itertools.product(range(5), repeat=2):
        if i >= j:
            assert costs[i, j] == torch.inf
            continue
        step = DDIM()(denoiser, states[i], levels[[i, j]])
        expected = (step - states[j]).square().mean().sqrt() / states[j].std()
        torch.testing.assert_close(costs[i, j], expected)
    assert costs.diagonal(1).abs().max() < 1e-12  # the trajectory's own steps


def test_errors_of_batches_are_the_sums_of_theirs():
    denoiser = ExactMixture(LinearSchedule())
    levels = candidate_levels(denoiser.schedule, 10)
    z = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batches = [one_step_errors(denoiser, part, levels) for part in z.split([1, 12, 17])]
    none = StepErrors.none(len(levels))
    summed = StepErrors(*(sum(parts) for parts in zip(none, *batches, strict=True)))
    expected = one_step_errors(denoiser, z, levels)
    torch.testing.assert_close(tuple(summed), tuple(expected))
    torch.testing.assert_close(summed.costs(), expected.costs())


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
@pytest.mark.parametrize("num_steps", [3, 5, 10])
def test_adaptive_levels_beat_the_others_on_an_exact_mixture(schedule, num_steps):
    """Judged by the distance from the exact end of the flow, on latents the search did not see.

    Not against "quadratic" on the cosine schedule: it starts at 0.8 T, where that schedule still
    holds a third of the signal, and so draws from another law than the search does.
    """
    denoiser = ExactMixture(schedule)
    generator = torch.Generator().manual_seed(1)
    seen, unseen = torch.randn(2, 2000, 1, generator=generator, dtype=torch.float64)
    candidates = candidate_levels(denoiser.schedule)
    costs = one_step_errors(denoiser, seen, candidates).costs()
    levels = cheapest_levels(costs, candidates, num_steps)
    assert len(levels) == num_steps + 1
    truth = denoiser.flow(unseen, 1000.0, 0.0)

    def error(levels):
        return (DDIM()(denoiser, unseen, levels) - truth).square().mean().sqrt()

    others = {"linear", "uniform_log_snr", "karras"}
    for name in others | ({"quadratic"} if isinstance(schedule, LinearSchedule) else set()):
        assert error(levels) < error(timesteps.make_levels(name, schedule, num_steps)), name


@pytest.mark.parametrize("kind", [LinearSchedule, ImprovedCosineSchedule, CosineLogSNRSchedule])
@pytest.mark.parametrize("num_levels", [1, 2, 50, 1000])
def test_candidates_fall_from_the_last_level_to_0(kind, num_levels):
    levels = candidate_levels(kind(num_levels))
    assert levels[0] == num_levels
    assert levels[-1] == 0
    assert (levels.diff() < 0).all()
    if kind is not CosineLogSNRSchedule:
        assert torch.equal(levels, levels.round())
        assert 1 in levels


@pytest.mark.parametrize("num_steps", [0, 5])
def test_more_steps_than_candidates_are_an_error(num_steps):
    with pytest.raises(ValueError, match=r"num_steps must lie in \[1, 4\]"):
        cheapest_levels(torch.zeros(5, 5).double(), torch.arange(5).flip(0).double(), num_steps)


def test_a_law_whose_flow_is_straight_costs_nothing():
    """A single point: the first estimate is right, whatever the step."""
    denoiser = ExactGaussian(LinearSchedule(), 0.4, 1e-9)
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = one_step_errors(denoiser, z, candidate_levels(denoiser.schedule, 20))
    costs = errors.costs()[:, :-1]
    assert costs[costs.isfinite()].max() < 1e-6
