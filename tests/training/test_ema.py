"""The average of the weights."""

import torch
from tiny import tiny_ddpm
from torch import nn

from ddim_pl.training.ema import exponential_average


def test_average_follows_its_recurrence_and_copies_buffers():
    network = nn.BatchNorm1d(3)
    average = exponential_average(network, 0.5)
    expected = None
    for n in range(12):
        with torch.no_grad():
            network.weight.normal_(generator=torch.Generator().manual_seed(n))
            network.running_mean.fill_(float(n))
            network.num_batches_tracked.fill_(n)
        average.update_parameters(network)
        current = network.weight.detach().clone()
        keep = min(0.5, (1 + n) / (10 + n))
        expected = current if expected is None else keep * expected + (1 - keep) * current
    torch.testing.assert_close(average.module.weight, expected)
    assert average.module.num_batches_tracked == 11
    assert not any(p.requires_grad for p in average.parameters())


def test_average_stays_in_evaluation_mode():
    module = tiny_ddpm()
    module.train()
    assert module.network.training
    assert not any(part.training for part in module.average.modules())
