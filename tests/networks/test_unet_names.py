"""Weights by other programs' names, there and back."""

import pytest
import torch
from foreign import random_weights
from tiny import tiny_unet

from ddim_pl.networks.unet_names import (
    DDIM_NAMES,
    DIFFUSERS_NAMES,
    load_weights,
    renamed_weights,
)

NETWORKS = [{}, {"num_blocks": 2, "multipliers": [1, 2, 2], "attention": [8, 2]}]
BLOCKS = [{"resample": "block", "scale_shift": True}]


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        *((DIFFUSERS_NAMES, each) for each in [*NETWORKS, *BLOCKS, {"num_classes": 3}]),
        *((DDIM_NAMES, each) for each in NETWORKS),
    ],
)
def test_weights_come_back_by_their_names(names, arguments):
    network, other = tiny_unet(**arguments), tiny_unet(**arguments)
    random_weights(network)
    if "num_classes" in arguments:  # a table has no bias
        assert "class_embedding.weight" in renamed_weights(network, names)
    load_weights(other, renamed_weights(network, names), names)
    for name, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
