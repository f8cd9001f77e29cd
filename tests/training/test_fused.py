"""Which optimisers are fused."""

import copy
from unittest.mock import PropertyMock, patch

import pytest
import torch
from torch import nn

from ddim_pl.training.fused import keep_layout, use_fused_kernels


def fused(make, **arguments):
    """Whether an optimiser of weights that say they are on a GPU becomes a fused one."""
    optimizer = make(nn.Linear(2, 2).parameters(), lr=0.1, **arguments)
    with patch.object(nn.Parameter, "is_cuda", PropertyMock(return_value=True), create=True):
        use_fused_kernels(optimizer)
    return optimizer.param_groups[0].get("fused")


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_is_fused_on_a_gpu_unless_it_was_told_otherwise(make):
    assert fused(make) is True
    assert fused(make, fused=False) is False
    assert not fused(make, foreach=True)
    optimizer = make(nn.Linear(2, 2).parameters(), lr=0.1)
    use_fused_kernels(optimizer)  # on the CPU
    assert not optimizer.param_groups[0]["fused"]


def test_other_optimisers_stay_as_they_are():
    assert not fused(torch.optim.SGD)


def test_a_fused_optimiser_makes_the_same_updates():
    torch.manual_seed(0)
    networks = [nn.Linear(5, 3) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.1) for each in networks]
    with patch.object(nn.Parameter, "is_cuda", PropertyMock(return_value=True), create=True):
        use_fused_kernels(optimizers[1])
    for _ in range(5):
        for network, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            network(torch.arange(10.0).reshape(2, 5)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(networks[0].weight, networks[1].weight, rtol=1e-5, atol=1e-6)
    assert not torch.equal(networks[0].weight, torch.zeros(3, 5))


@pytest.mark.parametrize("last_first", [True, False])
def test_states_of_the_other_layout_are_read_and_give_the_same_updates(last_first):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)

    def made(is_last):
        network = nn.Conv2d(3, 4, 3)
        if is_last:
            network = network.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1, fused=True)
        keep_layout(optimizer)
        return network, optimizer

    def step(network, optimizer):
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()

    network, optimizer = made(last_first)
    step(network, optimizer)
    other, other_optimizer = made(not last_first)
    other.load_state_dict(network.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weight = other.weight
    assert other_optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    for _ in range(2):
        step(network, optimizer)
        step(other, other_optimizer)
    torch.testing.assert_close(other.weight, network.weight, rtol=1e-5, atol=1e-6)


def test_the_number_of_updates_of_a_single_number_stays_on_the_host():
    """It has the shape of that weight, and Adam would wait for the device to read it."""

    def made(device):
        weight = nn.Parameter(torch.tensor(1.0, device=device))
        optimizer = torch.optim.Adam([weight], lr=0.1)
        keep_layout(optimizer)
        return weight, optimizer

    weight, optimizer = made("cpu")
    weight.square().backward()
    optimizer.step()
    other, other_optimizer = made("meta")
    other_optimizer.load_state_dict(optimizer.state_dict())
    state = other_optimizer.state[other]
    assert state["step"].device.type == "cpu"
    assert state["exp_avg"].device.type == "meta"
    assert float(state["step"]) == 1
