import torch

from ddim_pl.metrics.cifar import WEIGHTS, CIFARClassifier, folded


def test_the_shipped_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size < 2_000_000


def test_a_folded_network_is_the_same_function() -> None:
    torch.manual_seed(0)
    network = CIFARClassifier(norm=True).double()
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    network(x)  # running statistics other than 0 and 1
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    plain = folded(network)
    assert network.training
    torch.testing.assert_close(plain(x), network.eval()(x))
    assert plain.state_dict().keys() == CIFARClassifier().state_dict().keys()
