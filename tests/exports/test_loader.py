"""The loader in place: a step that takes noise."""

import torch
from foreign import random_weights
from tiny import tiny_ddpm, tiny_unet

from ddim_pl.clipping import ClipRange
from ddim_pl.exports.loader import Step, sample
from ddim_pl.exports.steps import step_numbers
from ddim_pl.samplers import DDIM, Ancestral


def test_a_stochastic_sampler_adds_its_noise():
    network = tiny_unet()
    random_weights(network)
    model = tiny_ddpm(network=network, num_steps=3, sampler=Ancestral(), ema_decay=0.0).eval()
    step = Step(model.average.module, step_numbers(model), ClipRange())
    z, noise = model.latents([0, 1], model.levels[0])
    for k in range(3):
        draw = torch.stack([torch.randn(z.shape[1:], generator=each) for each in noise])
        z = step(z, torch.tensor(k), draw)
    torch.testing.assert_close(z, model.sample([0, 1]), rtol=1e-5, atol=1e-5)


def test_without_noise_it_is_a_function_of_the_latent():
    network = tiny_unet()
    random_weights(network)
    model = tiny_ddpm(network=network, num_steps=3, sampler=DDIM(), ema_decay=0.0).eval()
    step = Step(model.average.module, step_numbers(model), ClipRange())
    z, _ = model.latents([0, 1], model.levels[0])
    assert torch.equal(sample(step, z), sample(step, z))
    torch.testing.assert_close(sample(step, z), model.sample([0, 1]), rtol=1e-5, atol=1e-5)
