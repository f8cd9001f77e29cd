"""The network of EDM; that its weights answer as theirs is tested in `tests/teachers`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddim_pl.networks.songunet import FourierEmbedding, Resample, SongUNet
from ddim_pl.training.hyperparameters import build, describe

TINY = {"image_size": 8, "channels": 8, "multipliers": [1, 2], "num_blocks": 1, "attention": [4]}
NCSN = {**TINY, "embedding": "fourier", "encoder": "residual", "resample_filter": [1, 3, 3, 1]}
KINDS = pytest.mark.parametrize("arguments", [TINY, NCSN], ids=["DDPM++", "NCSN++"])


def inputs(count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.tensor([-1.5, 1.0])[:count]


def test_it_has_the_parameters_of_the_published_models():
    """Of EDM's own classes, which count the same without their labels of augmentation."""
    ncsn = {"embedding": "fourier", "time_width": 256, "encoder": "residual"}
    counts = {55_732_739: {}, 56_398_339: {**ncsn, "num_classes": 10}}
    for count, arguments in counts.items():
        with torch.device("meta"):
            network = SongUNet(**arguments)
        assert sum(value.numel() for value in network.parameters()) == count


@KINDS
def test_it_is_described_by_its_arguments(arguments):
    network = SongUNet(**arguments, num_classes=3)
    described = describe(network)
    again = build(described, nn.Module, "a test")
    assert describe(again) == described
    again.load_state_dict(network.state_dict())
    z, t = inputs()
    label = torch.tensor([0, 2])
    with torch.no_grad():
        one, other = (each.eval()(z, t, label) for each in (network, again))
    assert torch.equal(one, other)


@KINDS
def test_all_weights_take_part(arguments):
    network = SongUNet(**arguments, out_channels=2, num_classes=3, num_augment_labels=4)
    z, t = inputs()
    output = network(z, t, torch.tensor([1, 1]), torch.ones(2, 4))
    assert output.shape == (2, 2, 8, 8)
    output.square().sum().backward()
    for name, value in network.named_parameters():
        assert value.grad.abs().max() > 0, name


@KINDS
def test_it_begins_as_edm_does(arguments):
    """Variance 1 / fan_avg, biases 0; the last layers of the branches are almost 0."""
    torch.manual_seed(0)
    network = SongUNet(**{**arguments, "channels": 32})
    z, t = inputs()
    with torch.no_grad():
        assert 0 < network.eval()(z, t).abs().max() < 1e-3
    block = network.down[0]
    fan = (32 + 32) / 2 * 9
    assert block.conv1.weight.var().item() == pytest.approx(1 / fan, rel=0.1)
    assert block.conv2.weight.var().item() == pytest.approx(1e-10 / fan, rel=0.1)
    assert block.conv1.bias.abs().max() == 0
    attention = network.middle[0].attention
    width = attention.qkv.in_features
    wanted = 0.2 * 2 / (width + 3 * width)
    assert attention.qkv.weight.var().item() == pytest.approx(wanted, rel=0.1)


def test_the_filter_of_two_is_the_mean_and_nearest_neighbours():
    h = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Resample([1, 1], up=False)(h), F.avg_pool2d(h, 2))
    torch.testing.assert_close(Resample([2, 2], up=True)(h), F.interpolate(h, scale_factor=2))


@pytest.mark.parametrize("up", [True, False])
def test_the_filters_keep_what_is_constant_within(up):
    h = torch.full((1, 2, 8, 8), 0.75)
    out = Resample([1, 3, 3, 1], up=up)(h)
    assert out.shape[2] == (16 if up else 4)
    inner = out[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.75))


def test_frequencies_keep_their_precision_wherever_the_network_goes():
    """In bfloat16 an angle of 300 would be off by a radian."""
    network = SongUNet(**NCSN).eval()
    before = network.time.frequencies.clone()
    reduced = copy.deepcopy(network).to(torch.bfloat16)
    assert reduced.time.frequencies.dtype == torch.float32
    assert torch.equal(reduced.time.frequencies, before)
    assert "time.frequencies" in reduced.state_dict()
    z, t = inputs()
    with torch.no_grad():
        exact, rough = network(z, t), reduced(z.bfloat16(), t).float()
    scale = exact.std()
    torch.testing.assert_close(rough / scale, exact / scale, rtol=0, atol=0.1)
    embedding = FourierEmbedding(4)
    t = torch.tensor([0.5])
    angles = 2 * torch.pi * embedding.frequencies * 0.5
    torch.testing.assert_close(embedding(t)[0], torch.cat([angles.sin(), angles.cos()]))


def test_dropout_is_only_for_training():
    network = SongUNet(**{**TINY, "dropout": 0.5})
    for each in network.modules():
        if hasattr(each, "conv2"):  # which begins at almost 0
            nn.init.xavier_uniform_(each.conv2.weight)
    nn.init.xavier_uniform_(network.conv_out.weight)
    z, t = inputs()
    with torch.no_grad():
        assert not torch.equal(network(z, t), network(z, t))
        network.eval()
        assert torch.equal(network(z, t), network(z, t))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 9}, "image_size must be a multiple of 2 for 2 multipliers, got 9: use 10"),
        (
            {"attention": [16]},
            r"attention must be resolutions .* got \[16\]: choose from \[8, 4\]",
        ),
        ({"multipliers": []}, "multipliers must be one or more positive integers"),
        ({"channels": 6}, "channels must be a multiple of 4, got 6"),
        ({"channels": 132}, "channels must give widths that 32 groups divide, got a width of 132"),
        ({"time_width": 3}, "time_width must be even and at least 4, got 3"),
        ({"embedding": "learned"}, "embedding must be one of .* got 'learned'"),
        ({"encoder": "skip"}, "encoder must be one of .* got 'skip'"),
        ({"resample_filter": [1, 2, 1]}, "resample_filter must have an even length"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SongUNet(**{**TINY, **arguments})


def test_wrong_inputs_are_named():
    network = SongUNet(**TINY)
    z, t = inputs()
    with pytest.raises(ValueError, match="z must have shape"):
        network(z[..., :4], t)
    with pytest.raises(ValueError, match="t must have shape"):
        network(z, t[:1])
    with pytest.raises(ValueError, match="label must be given if and only if"):
        network(z, t, torch.tensor([0, 1]))
