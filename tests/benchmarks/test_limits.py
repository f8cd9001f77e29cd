"""Operations are counted as by hand."""

import pytest
import torch
from limits import count_flops, counted, example, inputs_of_layers, run_layers
from subjects import make_network
from torch import nn


def test_the_count_of_a_convolution_is_that_by_hand():
    network = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    assert count_flops(network, torch.randn(1, 3, 4, 4)) == 2 * 5 * 16 * 3 * 9


def test_the_cifar10_network_takes_12_gflop():
    network = make_network("cifar10")
    layers = 0
    for layer, x in inputs_of_layers(network, example(network, 1)):
        layers += count_flops(layer, x)
    # By hand, of the layers alone; attention's two products are the rest.
    assert round(layers / 1e9, 2) == 12.11
    products = 2 * 2 * 256**3 * 5 + 2 * 2 * 16**2 * 256  # of 16x16 five times, and of 4x4
    assert count_flops(network, *example(network, 1)) == layers + products


def test_every_layer_is_called_alone_with_its_own_input():
    network = make_network("digits", tiny=True).eval()
    layers = inputs_of_layers(network, example(network, 2))
    kinds = (nn.Conv2d, nn.Linear)
    assert {id(m) for m, _ in layers} == {id(m) for m in network.modules() if isinstance(m, kinds)}
    run_layers(layers)


def test_a_layer_takes_the_longer_of_its_operations_and_its_bytes():
    layer, x = nn.Linear(100, 50), torch.randn(7, 100)
    flops, size = 2 * 7 * 100 * 50 / 1e9, 4 * (7 * 100 + 100 * 50 + 50 + 7 * 50) / 1e9
    slow, fast = 1.0, 1e9
    assert counted([(layer, x)], slow, fast) == pytest.approx((flops, size))
    assert counted([(layer, x)] * 2, fast, slow) == pytest.approx((2 * size, 2 * size))
