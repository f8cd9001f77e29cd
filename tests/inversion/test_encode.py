"""Encoding inverts sampling, interpolation keeps the norm, forward paths have the marginals."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from exact import ExactGaussian, ExactMixture
from tiny import tiny_ddpm

from ddim_pl import timesteps
from ddim_pl.clipping import DynamicThreshold
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.inversion import encode, forward_trajectory, reconstruct, slerp
from ddim_pl.samplers import DDIM, Ancestral
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule
from ddim_pl.transitions import ddim_forward, ddim_noise_scale, transition_variance

T = 1000


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
def test_an_encoding_tends_to_the_exact_flow_at_first_order(schedule):
    denoiser = ExactGaussian(schedule, 0.2, 0.5)
    x = 0.2 + 0.5 * normal(200, 1)
    exact = denoiser.flow(denoiser.schedule(0.0).alpha * x, 0.0, T)
    errors = []
    for num_steps in (100, 200, 400):
        latents = encode(denoiser, x, timesteps.linear(T, num_steps))
        errors.append((latents - exact).square().mean().sqrt())
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):
        assert 1.6 < coarse / fine < 2.4


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
def test_reconstruction_tends_to_the_image(schedule):
    denoiser = ExactMixture(schedule)
    x = denoiser.flow(normal(500, 1), T, 0.0)
    errors = [
        (reconstruct(denoiser, x, timesteps.linear(T, n)) - x).square().mean()
        for n in (10, 30, 100, 300, 1000)
    ]
    assert all(fine < coarse for coarse, fine in pairwise(errors))
    assert errors[-1] < 1e-4


def test_reconstruction_of_x_predictions_on_a_discrete_schedule():
    """At level 0 an x-prediction gives no noise estimate; encoding starts half a step above."""

    class XNetwork(torch.nn.Module):
        def forward(self, z, t):
            return exact(z, t[0].double() + 1).x

    exact = ExactGaussian(LinearSchedule(), 0.2, 0.5)
    denoiser = NetworkDenoiser(XNetwork(), LinearSchedule(), prediction="x", clip=False)
    x = 0.2 + 0.5 * normal(100, 1)
    error = (reconstruct(denoiser, x, timesteps.linear(T, 200)) - x).square().mean()
    assert error < 1e-3


def test_a_clipped_denoiser_cannot_encode():
    denoiser = tiny_ddpm().denoiser
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="clip=True"):
        encode(denoiser, x, timesteps.linear(T, 2))
    assert encode(replace(denoiser, clip=False), x, timesteps.linear(T, 2)).shape == x.shape


@pytest.mark.parametrize("sampler", [Ancestral(), DDIM(0.5)])
def test_a_stochastic_sampler_cannot_encode(sampler):
    with pytest.raises(ValueError, match="deterministic"):
        encode(
            ExactGaussian(LinearSchedule()),
            torch.zeros(1, 1),
            timesteps.linear(T, 2),
            sampler=sampler,
        )


def test_slerp_has_the_ends_and_the_angle():
    a, b = normal(5, 3, 4), normal(5, 3, 4, seed=1)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    unit = a.flatten(1) / a.flatten(1).norm(dim=1, keepdim=True)
    other = b.flatten(1) - (b.flatten(1) * unit).sum(1, keepdim=True) * unit
    other = other / other.norm(dim=1, keepdim=True)
    b = (0.5 * unit + math.sqrt(0.75) * other).reshape(a.shape)  # 60 degrees away
    third = slerp(unit.reshape(a.shape), b, 1 / 3).flatten(1)  # 20 degrees
    expected = math.cos(math.pi / 9) * unit + math.sin(math.pi / 9) * other
    torch.testing.assert_close(third, expected)


def test_slerp_keeps_the_norm_of_gaussian_latents():
    a, b = normal(50, 1000), normal(50, 1000, seed=1)
    middle = slerp(a, b, 0.5).norm(dim=1) / math.sqrt(1000)
    assert (middle - 1).abs().max() < 0.15
    assert ((a + b) / 2).norm(dim=1).max() < 0.8 * math.sqrt(1000)


def test_slerp_of_parallel_latents_is_straight():
    a = normal(3, 10)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)


def test_slerp_takes_a_weight_for_each_image():
    a, b = normal(3, 10), normal(3, 10, seed=1)
    weights = torch.tensor([0.0, 0.4, 1.0])
    together = slerp(a, b, weights)
    for i, weight in enumerate(weights.tolist()):
        torch.testing.assert_close(together[i : i + 1], slerp(a[i : i + 1], b[i : i + 1], weight))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_forward_path_has_the_marginal_of_every_level(eta):
    """200,000 paths: a mean within 5 standard errors, 0.011; a variance within 5, 1.6 %."""
    schedule, x = LinearSchedule(), torch.tensor(0.7, dtype=torch.float64).expand(200_000, 1)
    levels = [1, 50, 300, 301, 1000]
    generator = torch.Generator().manual_seed(0)
    path = list(forward_trajectory(schedule, x, levels, eta=eta, generator=generator))
    assert [float(state.t) for state in path] == levels
    for state in path:
        scales = schedule(state.t)
        assert abs(state.z.mean() - scales.alpha * 0.7) < 0.012 * scales.sigma
        assert abs(state.z.var() / scales.sigma**2 - 1) < 0.016


def test_the_forward_process_and_the_backward_step_are_one_joint_law():
    """The covariance of neighbours is that of the backward step given x."""
    schedule, eta = LinearSchedule(), 0.6
    x = torch.zeros(400_000, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    s, t = forward_trajectory(schedule, x, [200, 500], eta=eta, generator=generator)
    low, high = schedule(s.t), schedule(t.t)
    c = ddim_noise_scale(high, low, eta)
    expected = (low.sigma**2 - c**2).sqrt() * high.sigma  # of z_s = kept eps_t + c n
    measured = (s.z * t.z).mean()
    assert abs(measured - expected) < 5 * low.sigma * high.sigma / math.sqrt(400_000) * math.sqrt(
        2
    )


def test_with_eta_one_the_forward_process_is_that_of_ddpm():
    """It is `q(z_t | z_s, x) = N(alpha_t / alpha_s z_s, 1 - alpha_t^2 / alpha_s^2)` for any x."""
    schedule = LinearSchedule()
    s, t = schedule(200.0), schedule(500.0)
    z = normal(4, 3)
    for x in (torch.zeros_like(z), normal(4, 3, seed=1)):
        mean, std = ddim_forward(z, x, s, t, eta=1.0)
        torch.testing.assert_close(mean, t.alpha / s.alpha * z)
        torch.testing.assert_close(std**2, transition_variance(t, s))


def test_with_eta_zero_a_forward_path_keeps_its_noise():
    schedule, x = LinearSchedule(), normal(4, 3)
    first, *others = forward_trajectory(schedule, x, [1, 10, 999], eta=0.0)
    eps = [(s.z - schedule(s.t).alpha * x) / schedule(s.t).sigma for s in (first, *others)]
    torch.testing.assert_close(eps[1], eps[0])
    torch.testing.assert_close(eps[2], eps[0])


@pytest.mark.parametrize(
    ("levels", "eta", "message"),
    [
        ([0, 10], 1.0, "levels must start where there is noise"),
        ([10, 5], 1.0, "levels must rise strictly"),
        ([], 1.0, "levels must rise strictly"),
        ([1, 10], 1.5, "eta must lie in"),
    ],
)
def test_wrong_forward_paths_are_errors(levels, eta, message):
    with pytest.raises(ValueError, match=message):
        forward_trajectory(LinearSchedule(), torch.zeros(1, 1), levels, eta=eta)


@pytest.mark.parametrize("clip", [True, DynamicThreshold()])
def test_a_sampler_that_clips_does_not_encode(clip):
    levels = timesteps.linear(T, 5)
    for use in (encode, reconstruct):
        with pytest.raises(ValueError, match=r"sampler must not clip, got DDIM\(.*clip="):
            use(
                tiny_ddpm(clip=False).denoiser,
                torch.zeros(1, 1, 8, 8),
                levels,
                sampler=DDIM(clip=clip),
            )
