"""What is compared is the same: networks, images, settings."""

from typing import Any, Literal

import pytest
import torch
from networks.test_unet import copy_to_diffusers
from sampling_speed import clips, draw, draw_by_pipeline, step_by_step
from subjects import (
    Nothing,
    diffusers_network,
    diffusers_pipeline,
    diffusers_scheduler,
    make_model,
    network_arguments,
    offered,
    other_memory_format,
)

from ddim_pl.networks.unet import UNet
from ddim_pl.samplers import DDIM
from ddim_pl.timesteps import trailing
from ddim_pl.training import DDPM


@pytest.mark.filterwarnings("ignore:100 steps hold 96 distinct levels")
@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_diffusers_draws_the_same_images_by_the_same_weights(name):
    model = make_model(name, tiny=True).eval()
    theirs = diffusers_network(network_arguments(name, tiny=True)).eval()
    copy_to_diffusers(model.average.module, theirs)
    pipeline = diffusers_pipeline(model, theirs, clip=clips(model))
    ours = draw(model, 3, 4)
    expected = draw_by_pipeline(pipeline, 3, 4)  # in [0, 1], cut
    assert 0.1 < expected.std() < 0.5
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_both_networks_have_the_same_number_of_parameters(name):
    arguments = network_arguments(name)
    sizes = [
        sum(parameter.numel() for parameter in network.parameters())
        for network in (UNet(**arguments), diffusers_network(arguments))
    ]
    assert sizes[0] == sizes[1]
    assert name == "digits" or sizes[0] == 35_746_307


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_loops_without_a_network_give_the_same_states(eta):
    model = DDPM(Nothing(), image_shape=(1, 4, 4))
    ours = model.sample(range(3), sampler=DDIM(eta), levels=trailing(1000, 5))
    scheduler = diffusers_scheduler(model, clip=True)
    theirs = step_by_step(scheduler, Nothing(), (3, 1, 4, 4), 5, eta, "cpu")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_model_is_that_of_the_config():
    model = make_model("digits")
    assert (model.prediction, model.num_steps, model.num_classes) == ("v", 50, 10)
    optimizer = model.optimizer(model.network.parameters())
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (3e-3, (0.9, 0.99))
    assert isinstance(model.sampler, DDIM)  # whatever the config's


def test_settings_are_read_off_the_constructors():
    def new(
        network: Any,
        *,
        prediction: Literal["eps", "v"] = "eps",
        num_steps: int = 50,
        channels_last: bool = True,
        sampling_precision: Literal["32-true", "bf16-true"] | None = None,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        pass

    assert offered(new) == [
        ("channels_last", False),
        ("sampling_precision", "32-true"),
        ("sampling_precision", "bf16-true"),
        ("compile", False),
        ("compile", True),
    ]
    assert ("compile", True) in offered(DDPM.__mro__[1])


def test_a_setting_of_the_network_reaches_it():
    assert make_model("digits", scale_shift=False).network.init_args["scale_shift"] is False
    assert make_model("digits", clip=False).clip is False


def test_the_other_memory_format_is_the_other():
    network = make_model("digits", tiny=True).network
    word, layout = other_memory_format(network)
    back, own = other_memory_format(network.to(memory_format=layout))
    assert {word, back} == {"channels_last by hand", "contiguous by hand"}
    assert {layout, own} == {torch.channels_last, torch.contiguous_format}
