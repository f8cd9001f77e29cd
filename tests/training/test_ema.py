"""The average of the weights."""

import torch
from tiny import tiny_ddpm
from torch import nn

from ddim_pl.training.ema import ExponentialAverage


def test_average_follows_its_recurrence_and_copies_buffers():
    network = nn.BatchNorm1d(3)
    average = ExponentialAverage(network, 0.5)
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


def test_the_count_comes_with_a_checkpoint_and_can_restart():
    network = nn.Linear(2, 2)
    average, other = ExponentialAverage(network, 0.9), ExponentialAverage(network, 0.9)
    values = [nn.Linear(2, 2) for _ in range(4)]
    for value in values[:3]:
        average.update_parameters(value)
    other.update_parameters(values[0])  # its own count is 1 before it reads another
    other.load_state_dict(average.state_dict())
    average.update_parameters(values[3])
    other.update_parameters(values[3])
    assert other.n_averaged == average.n_averaged == 4
    assert torch.equal(other.module.weight, average.module.weight)
    assert not torch.equal(average.module.weight, values[3].weight)
    average.restart()
    average.update_parameters(values[0])
    assert average.n_averaged == 1
    assert torch.equal(average.module.weight, values[0].weight)


def test_an_update_reads_nothing_from_the_device():
    """On a meta device there are no values, and whoever reads one gets an error."""
    network = nn.Linear(2, 2)
    average = ExponentialAverage(network, 0.9)
    average.update_parameters(network)
    average.to("meta").update_parameters(network.to("meta"))
