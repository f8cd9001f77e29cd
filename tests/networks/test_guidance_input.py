"""The weight of guidance as an input of the networks."""

import pytest
import torch

from ddim_pl.networks.songunet import SongUNet
from ddim_pl.networks.unet import UNet

SMALL = {"image_size": 8, "in_channels": 1, "channels": 8, "num_blocks": 1, "attention": [4]}
SMALL |= {"multipliers": [1, 2], "num_classes": 3, "null_class": True}
MAKERS = [lambda **more: UNet(**SMALL, groups=4, **more), lambda **more: SongUNet(**SMALL, **more)]


@pytest.mark.parametrize("make", MAKERS, ids=["UNet", "SongUNet"])
def test_a_network_begins_as_one_without_the_input(make):
    torch.manual_seed(0)
    plain, after = make().eval(), torch.rand(1)
    torch.manual_seed(0)
    network = make(guidance_range=(1, 4)).eval()
    assert torch.equal(torch.rand(1), after)
    assert network.guidance_range == network.init_args["guidance_range"] == [1.0, 4.0]
    for weights in plain.state_dict():
        assert torch.equal(plain.state_dict()[weights], network.state_dict()[weights])
    (more,) = network.state_dict().keys() - plain.state_dict().keys()
    for each in [*plain.parameters(), *network.parameters()]:
        torch.manual_seed(each.numel())  # a new network answers zeros
        each.data += 0.1 * torch.randn(each.shape)
    network.get_parameter(more).data.zero_()
    z, t, label = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.7]), torch.tensor([1, 3])
    with torch.no_grad():
        expected = plain(z, t, label)
        assert expected.std() > 0.01
        weights = torch.tensor([1.0, 3.5])
        assert torch.equal(network(z, t, label, guidance=weights), expected)
        network.get_parameter(more).data.normal_()
        told = network(z, t, label, guidance=weights)
        other = network(z, t, label, guidance=torch.tensor([1.0, 3.0]))
    assert not torch.allclose(told, expected)
    torch.testing.assert_close(other[0], told[0])
    assert not torch.allclose(other[1], told[1])


@pytest.mark.parametrize("make", MAKERS, ids=["UNet", "SongUNet"])
def test_a_weight_must_be_given_where_it_is_an_input(make):
    z, t, label = torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    network = make(guidance_range=(1, 4))
    with pytest.raises(ValueError, match=r"guidance must be given if and only if .* got none"):
        network(z, t, label)
    with pytest.raises(ValueError, match=r"guidance must have shape \(2,\), got \(1,\)"):
        network(z, t, label, guidance=torch.ones(1))
    with pytest.raises(ValueError, match="guidance_range must be the lowest and the highest"):
        make(guidance_range=[])
    with pytest.raises(ValueError, match="got weights and guidance_range=None"):
        make()(z, t, label, guidance=torch.ones(2))
