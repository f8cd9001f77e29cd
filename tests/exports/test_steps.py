"""The numbers of a step are those of our samplers."""

import pytest
import torch
from foreign import random_weights
from tiny import tiny_ddpm, tiny_unet

from ddim_pl.exports.steps import step_numbers
from ddim_pl.noise import GammaNoise
from ddim_pl.rng import randn
from ddim_pl.samplers import DDIM, Ancestral, Consistency, Heun
from ddim_pl.schedules import CosineLogSNRSchedule

SCALED = {"loss_weight": "uniform", "sigma_data": 0.5}
COSINE = {"schedule": CosineLogSNRSchedule(), "time_input": "log_snr", "timesteps": "linear"}


SAMPLERS = [DDIM(), DDIM(0.4), Ancestral(), Ancestral("large"), Consistency()]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"last_level": 3.0, "prediction": "x"},
        {**COSINE, "prediction": "v"},
        {"prediction": "edm", **SCALED},
        {"prediction": "v", **SCALED},
    ],
    ids=["DDPM", "last level", "cosine", "EDM", "v of scaled states"],
)
def test_a_step_leads_where_the_sampler_leads(settings, sampler):
    """A network of 0.25 less a tenth of what it is fed: the formula of the module, in float64."""
    model = tiny_ddpm(num_steps=3, sampler=sampler, clip=False, **settings)
    network = model.average.module.double()
    network.forward = lambda z, t: 0.25 - 0.1 * z
    z = torch.full((1, 1, 8, 8), 0.7, dtype=torch.float64)
    noise = torch.Generator().manual_seed(1)
    states = sampler.trajectory(model.denoiser, z, model.levels, generator=noise)
    again = torch.Generator().manual_seed(1)
    for state, step in zip(states, step_numbers(model), strict=True):
        output = 0.25 - 0.1 * step["input_scale"] * z
        x = step["z_weight"] * z + step["output_weights"][0] * output
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
    with pytest.raises(ValueError, match="sampler must be DDIM, Ancestral or Consistency"):
        step_numbers(tiny_ddpm(sampler=Heun()))
    with pytest.raises(ValueError, match="noise must be Gaussian"):
        step_numbers(tiny_ddpm(sampler=None, noise=GammaNoise()))
