"""The numbers of a step are those of our samplers."""

import pytest
import torch
from foreign import random_weights
from tiny import tiny_ddpm, tiny_unet

from ddim_pl.clipping import ClipRange, DynamicThreshold
from ddim_pl.exports.steps import clip_range, step_numbers
from ddim_pl.noise import GammaNoise
from ddim_pl.rng import randn
from ddim_pl.samplers import DDIM, Ancestral, Heun
from ddim_pl.schedules import CosineLogSNRSchedule

COSINE = {"schedule": CosineLogSNRSchedule(), "time_input": "log_snr", "timesteps": "linear"}


@pytest.mark.parametrize("sampler", [DDIM(), DDIM(0.4), Ancestral(), Ancestral("large")], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"last_level": 3.0, "prediction": "x"}, {**COSINE, "prediction": "v"}],
    ids=["DDPM", "last level", "cosine"],
)
def test_a_step_leads_where_the_sampler_leads(settings, sampler):
    """One pixel, an output of the network of 0.25: the formula of the module, in float64."""
    model = tiny_ddpm(num_steps=3, sampler=sampler, clip=False, **settings)
    model.average.module.forward = lambda z, t: torch.full_like(z, 0.25)
    z = torch.full((1, 1, 8, 8), 0.7, dtype=torch.float64)
    noise = torch.Generator().manual_seed(1)
    states = sampler.trajectory(model.denoiser, z, model.levels, generator=noise)
    again = torch.Generator().manual_seed(1)
    for state, step in zip(states, step_numbers(model), strict=True):
        x = step["z_weight"] * z + step["output_weights"][0] * 0.25
        eps = (z - step["alpha"] * x) / step["sigma"]
        wanted = step["x_weight"] * x + step["eps_weight"] * eps
        if step["noise_weight"]:
            wanted = wanted + step["noise_weight"] * randn(z.shape, again, z)
        torch.testing.assert_close(state.z, wanted, rtol=1e-9, atol=1e-9)
        z = state.z


def test_both_x_and_eps_are_two_parts():
    network = tiny_unet(out_channels=2)
    random_weights(network)
    model = tiny_ddpm(network=network, prediction="both", ema_decay=0.0)
    first, level = step_numbers(model)[0], model.levels[0]
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    time = torch.full((2,), first["time"])
    parts = model.average.module.eval()(z, time).chunk(2, dim=1)
    weighted = [weight * part for weight, part in zip(first["output_weights"], parts, strict=True)]
    wanted = model.denoiser.without_clipping()(z, level).x
    torch.testing.assert_close(first["z_weight"] * z + sum(weighted), wanted)


def test_other_samplers_and_noise_are_refused():
    with pytest.raises(ValueError, match="sampler must be DDIM or Ancestral"):
        step_numbers(tiny_ddpm(sampler=Heun()))
    with pytest.raises(ValueError, match="noise must be Gaussian"):
        step_numbers(tiny_ddpm(sampler=None, noise=GammaNoise()))


@pytest.mark.parametrize(
    ("clip", "own", "found"),
    [
        (True, None, [-1, 1]),
        (False, None, None),
        (False, ClipRange(-2, 3), [-2, 3]),
        (True, False, None),
    ],
)
def test_the_range_is_the_samplers_or_the_models(clip, own, found):
    assert clip_range(tiny_ddpm(clip=clip, sampler=DDIM(clip=own))) == found


def test_another_rule_of_clipping_is_refused():
    with pytest.raises(ValueError, match="clip must be true, false or a ClipRange"):
        clip_range(tiny_ddpm(clip=DynamicThreshold()))


@pytest.mark.parametrize("prediction", ["v", "edm"])
def test_a_network_that_is_fed_scaled_states_is_refused(prediction):
    model = tiny_ddpm(prediction=prediction, loss_weight="uniform", sigma_data=0.5)
    with pytest.raises(ValueError, match=r"sigma_data must be 1 .* got 0\.5: .* checkpoint"):
        step_numbers(model)
