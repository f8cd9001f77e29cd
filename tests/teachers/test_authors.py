"""Files of DDIM's code: the same answers, the sizes read off the weights."""

import pytest
import torch
from foreign import ddim_output, ddim_weights

from ddim_pl.networks.unet import UNet
from ddim_pl.teachers.authors import read_authors


@pytest.mark.parametrize(
    ("arguments", "image_size"),
    [
        ({}, 32),
        ({"multipliers": (1, 2), "num_blocks": 2, "attends": (0,), "in_channels": 1}, 16),
    ],
)
def test_the_network_answers_the_same(arguments, image_size):
    weights = ddim_weights(**arguments)
    teacher = read_authors(weights)
    network = teacher.network.double().eval()
    assert isinstance(network, UNet)
    assert network.image_size == image_size
    channels = network.in_channels
    assert teacher.settings["image_shape"] == (channels, image_size, image_size)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, image_size, image_size, generator=generator).double()
    t = torch.tensor([3.0, 700.0], dtype=torch.float64)
    in_double = {name: value.double() for name, value in weights.items()}
    with torch.no_grad():
        expected = ddim_output(in_double, x, t)
        actual = network(x, t)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_of_a_list_the_average_is_taken():
    average = ddim_weights()
    training = {f"module.{name}": value + 1 for name, value in average.items()}
    whole = read_authors([training, {"state": {}}, 3, 1000, average])
    assert "the average" in whole.notes[0]
    without = read_authors([training, {"state": {}}, 3, 1000])
    assert "no average" in without.notes[0]
    name = "conv_in.bias"
    assert torch.equal(whole.network.state_dict()[name], average[name])
    assert torch.equal(without.network.state_dict()[name], average[name] + 1)


def test_the_published_sizes_are_found():
    """CIFAR-10's 35.7 million parameters."""
    weights = ddim_weights(128, (1, 2, 2, 2), 2, (1,))
    network = read_authors(weights).network
    assert sum(value.numel() for value in network.parameters()) == 35_746_307
    assert (network.image_size, network.init_args["attention"]) == (32, [16])


def test_the_size_of_images_may_be_given():
    teacher = read_authors(ddim_weights(attends=(1, 2)), image_size=16)
    assert teacher.network.init_args["attention"] == [8, 4]
    with pytest.raises(ValueError, match="image_size must be given: attention is at 2 levels"):
        read_authors(ddim_weights(attends=(1, 2)))


def test_every_key_is_used():
    weights = ddim_weights()
    more = {**weights, "logvar": torch.zeros(1000)}
    with pytest.raises(ValueError, match=r"do not fit the network \(1 left over: logvar\)"):
        read_authors(more)
    del weights["mid.block_1.conv1.bias"]
    with pytest.raises(ValueError, match=r"1 missing: mid.block_1.conv1.bias"):
        read_authors(weights)


def test_shapes_are_compared():
    weights = ddim_weights()
    weights["down.0.block.0.conv2.weight"] = torch.zeros(32, 32, 1, 1)
    with pytest.raises(
        ValueError, match=r"down.0.block.0.conv2.weight has shape \(32, 32, 1, 1\)"
    ):
        read_authors(weights)


@pytest.mark.parametrize("content", [[], [3], {"a": torch.zeros(1)}, ["temb.dense.0.weight"]])
def test_other_content_is_refused(content):
    with pytest.raises(ValueError, match="must hold the weights of a Model of the code of DDIM"):
        read_authors(content, name="x.pth")
