"""The U-Net against published sizes, an independent implementation, and its own promises."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scipy.stats import kstest, truncnorm, uniform
from torch import Tensor, nn

from ddim_pl.networks import unet
from ddim_pl.networks.unet import SelfAttention, Stage, UNet

TINY: dict[str, Any] = {
    "image_size": 8,
    "channels": 16,
    "multipliers": (1, 2),
    "attention": (4,),
    "dropout": 0.0,
    "groups": 8,
}
FILM: dict[str, Any] = {"scale_shift": True, "resample": "block"}


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw every parameter, so that no zero layer hides a branch; activations stay O(1)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        parameter.data.copy_(noise)
    return network.eval()


def batch(size: int = 3, channels: int = 3, image_size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(size, channels, image_size, image_size, generator=generator)
    return z, torch.linspace(0, 1000, size)


def count(**arguments: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(**arguments).parameters())


# Sizes


@pytest.mark.parametrize(
    ("image_size", "multipliers", "parameters"),
    [
        (32, (1, 2, 2, 2), 35_746_307),
        (64, (1, 2, 2, 2, 4), 78_700_803),
        (256, (1, 1, 2, 2, 4, 4), 113_673_219),
    ],
)
def test_ddpm_networks_have_the_published_sizes(
    image_size: int, multipliers: tuple[int, ...], parameters: int
) -> None:
    assert count(image_size=image_size, multipliers=multipliers) == parameters


def test_salimans_ho_network_has_the_size_its_description_gives() -> None:
    c, e = 256, 1024

    def conv(wide: int, out: int, kernel: int = 3) -> int:
        return wide * out * kernel**2 + out

    def block(wide: int) -> int:  # norm, conv, scale and shift, norm, conv, and a shortcut
        shortcut = conv(wide, c, 1) if wide != c else 0
        return 2 * wide + conv(wide, c) + (e * 2 * c + 2 * c) + 2 * c + conv(c, c) + shortcut

    attention = 2 * c + 4 * conv(c, c, 1)
    time = (c * e + e) + (e * e + e)
    # Three levels of three blocks down and four up, two resampling blocks each way; the two
    # coarser levels attend after every block; every block up takes a skip of the same width.
    down = 9 * block(c) + 2 * block(c) + 6 * attention
    middle = 2 * block(c) + attention
    up = 12 * block(2 * c) + 2 * block(c) + 8 * attention
    ends = conv(3, c) + 2 * c + conv(c, 3)
    expected = time + down + middle + up + ends
    assert expected == 60_004_099

    salimans_ho = {"channels": c, "multipliers": (1, 1, 1), "num_blocks": 3, "attention": (8, 16)}
    assert count(**salimans_ho, **FILM, dropout=0.2) == expected


LSUN: dict[str, Any] = FILM | {
    "image_size": 128,
    "channels": 64,
    "multipliers": (1, 2, 4, 6, 8),
    "num_blocks": 3,
    "attention": (8, 16, 32),
    "dropout": 0.1,
    "embedding_width": 768,
    "head_width": 64,
    "initialisation": "lecun",
}


@pytest.mark.parametrize(("outputs", "parameters"), [(6, 139_578_502), (3, 139_576_771)])
def test_salimans_ho_network_for_lsun_has_the_size_of_their_code(
    outputs: int, parameters: int
) -> None:
    """With x and eps at once, and with v."""
    assert count(**LSUN, out_channels=outputs) == parameters


def test_wider_levels_have_more_heads() -> None:
    """4 at 32x32, 6 at 16x16 and 8 at 8x8 and in the middle, each of 64 channels."""
    with torch.device("meta"):
        network = UNet(**LSUN)
    found = [
        (module.qkv.in_features, module.num_heads)
        for module in network.modules()
        if isinstance(module, SelfAttention)
    ]
    down = [(256, 4)] * 3 + [(384, 6)] * 3 + [(512, 8)] * 3
    up = [(512, 8)] * 4 + [(384, 6)] * 4 + [(256, 4)] * 4
    assert sorted(found) == sorted([*down, (512, 8), *up])


def test_head_width_gives_the_function_of_as_many_heads() -> None:
    by_number, by_width = UNet(**TINY, num_heads=4), UNet(**TINY, head_width=8)
    by_width.load_state_dict(randomised(by_number).state_dict())
    torch.testing.assert_close(by_width.eval()(*batch()), by_number(*batch()), rtol=0, atol=0)
    one = UNet(**TINY)
    one.load_state_dict(by_number.state_dict())
    assert not torch.allclose(one.eval()(*batch()), by_number(*batch()))


def test_the_embedding_is_four_times_the_base_width_unless_given() -> None:
    assert count(**TINY, embedding_width=64) == count(**TINY)
    wide = randomised(UNet(**TINY, **FILM, embedding_width=96, num_classes=3))
    assert wide.time_out.weight.shape == (96, 96)
    assert wide.class_table.weight.shape == (3, 96)
    assert wide(*batch(), torch.tensor([0, 1, 2])).shape == (3, 3, 8, 8)


def test_digits_network_is_small() -> None:
    arguments = {"in_channels": 1, "channels": 32, "num_blocks": 1}
    assert count(**TINY | arguments) < 750_000


# The computation, against diffusers' independent implementation


def copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())


def copy_block(source: nn.Module, target: nn.Module) -> None:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        copy(getattr(source, name), getattr(target, name))
    copy(source.emb_proj, target.time_emb_proj)
    if not isinstance(source.shortcut, nn.Identity):
        copy(source.shortcut, target.conv_shortcut)


def copy_attention(source: nn.Module, target: nn.Module) -> None:
    copy(source.norm, target.group_norm)
    layers = (target.to_q, target.to_k, target.to_v)
    weights, biases = source.qkv.weight.chunk(3), source.qkv.bias.chunk(3)
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        layer.load_state_dict({"weight": weight, "bias": bias})
    copy(source.proj, target.to_out[0])


def copy_levels(steps: Iterator[nn.Module], levels: nn.ModuleList, resamplers: str) -> None:
    for level in levels:
        attentions = getattr(level, "attentions", [None] * len(level.resnets))
        for block, attention in zip(level.resnets, attentions, strict=True):
            step = next(steps)
            copy_block(step.block, block)
            assert isinstance(step.attention, nn.Identity) == (attention is None)
            if attention is not None:
                copy_attention(step.attention, attention)
        for resampler in getattr(level, resamplers) or []:
            step = next(steps)
            if hasattr(step, "conv"):
                copy(step.conv, resampler.conv)
            else:
                copy_block(step, resampler)
    assert next(steps, None) is None


def copy_to_diffusers(ours: UNet, theirs: nn.Module) -> None:
    """Copy every parameter of ours into diffusers' UNet2DModel, walking both in order."""
    copy(ours.conv_in, theirs.conv_in)
    copy(ours.time_in, theirs.time_embedding.linear_1)
    copy(ours.time_out, theirs.time_embedding.linear_2)
    if ours.class_table is not None:
        copy(ours.class_table, theirs.class_embedding)
    copy_levels(iter(ours.down), theirs.down_blocks, "downsamplers")
    first, last = ours.middle
    copy_block(first.block, theirs.mid_block.resnets[0])
    copy_attention(first.attention, theirs.mid_block.attentions[0])
    copy_block(last, theirs.mid_block.resnets[1])
    copy_levels(iter(ours.up), theirs.up_blocks, "upsamplers")
    copy(ours.norm_out, theirs.conv_norm_out)
    copy(ours.conv_out, theirs.conv_out)


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("film", [False, True], ids=["ho", "salimans_ho"])
def test_output_equals_that_of_diffusers_with_the_same_weights(film: bool, num_heads: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    # google/ddpm-cifar10-32 made small; "resnet" resampling and "scale_shift" are FILM.
    plain = "Resnet{}sampleBlock2D" if film else "{}Block2D"
    resampling = "resnet" if film else "conv"
    theirs = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=(plain.format("Down"), "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", plain.format("Up")),
        downsample_padding=0,
        downsample_type=resampling,
        upsample_type=resampling,
        resnet_time_scale_shift="scale_shift" if film else "default",
        attention_head_dim=64 // num_heads,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        num_class_embeds=5,
    ).eval()
    ours = UNet(
        16,
        channels=32,
        multipliers=(1, 2, 2),
        attention=(8, 4),
        num_heads=num_heads,
        num_classes=5,
        groups=8,
        **(FILM if film else {}),
    )
    randomised(ours)
    copy_to_diffusers(ours, theirs)
    z, t = batch(image_size=16)
    label = torch.tensor([0, 4, 2])
    with torch.no_grad():
        actual, expected = ours(z, t, label), theirs(z, t, label).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# Initialisation and training


@pytest.mark.parametrize("variant", [{}, FILM], ids=["ho", "salimans_ho"])
def test_output_at_initialisation_is_zero(variant: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = UNet(**TINY, **variant)
    assert not network(*batch()).any()


def test_every_residual_branch_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    network = UNet(**TINY)
    h, emb = torch.randn(2, 16, 8, 8), torch.randn(2, 64)
    torch.testing.assert_close(network.down[0](h, emb), h, rtol=0, atol=0)
    h = torch.randn(2, 32, 4, 4)
    torch.testing.assert_close(network.middle[0](h, emb), h, rtol=0, atol=0)


def test_initial_weights_have_variance_one_over_the_average_fan() -> None:
    torch.manual_seed(0)
    network = UNet(**TINY | {"channels": 64})
    block, attention = network.middle[0].block, network.middle[0].attention
    # 128^2 uniform weights give the standard deviation to about 0.5 %; 2 % is four of those.
    for weight, fan in [(block.conv1.weight, 9 * 128), (attention.qkv.weight, 128)]:
        assert weight.std().item() == pytest.approx(fan**-0.5, rel=0.02)


def drawn(network: UNet) -> dict[str, Tensor]:
    """Weights of different kinds and their fans in, by the layers' names."""
    block, attention = network.middle[0].block, network.middle[0].attention
    parts = dict(zip(("q", "k", "v"), attention.qkv.weight.chunk(3), strict=True))
    shortcut = next(
        step.block.shortcut.weight
        for step in network.up
        if isinstance(step, Stage) and isinstance(step.block.shortcut, nn.Conv2d)
    )
    return parts | {
        "conv_in": network.conv_in.weight,
        "conv1": block.conv1.weight,
        "emb_proj": block.emb_proj.weight,
        "time_in": network.time_in.weight,
        "shortcut": shortcut,
    }


def test_lecun_weights_are_normal_up_to_two_standard_deviations() -> None:
    """As flax draws them by default, which the code of Salimans & Ho leaves at that."""
    torch.manual_seed(0)
    network = UNet(**TINY | {"channels": 64}, **FILM, num_classes=10, initialisation="lecun")
    weights = drawn(network) | {"class": network.class_table.weight.T}
    for name, weight in weights.items():
        std = weight[0].numel() ** -0.5 / truncnorm(-2, 2).std()
        law = truncnorm(-2, 2, scale=std)
        assert kstest(weight.detach().flatten().double().numpy(), law.cdf).pvalue > 1e-3, name
        assert weight.abs().max() <= 2 * std * (1 + 1e-6)
        # The standard deviation is 1 / sqrt(fan in), to four of its errors.
        assert weight.std().item() == pytest.approx(
            weight[0].numel() ** -0.5, rel=4 / (2 * weight.numel()) ** 0.5
        ), name
    assert not network(*batch(), torch.tensor([0, 1, 2])).any()
    assert not network.middle[0].attention.proj.weight.any()
    assert not any(p.any() for name, p in network.named_parameters() if name.endswith(".bias"))


def test_the_first_layer_for_lsun_has_the_deviation_seen_in_the_authors_code() -> None:
    """0.194 in a draw of theirs: 27 ** -0.5 with an error of 1.7 %. Xavier's is 0.058."""
    torch.manual_seed(0)
    first = UNet(**TINY | {"channels": 64}, initialisation="lecun").conv_in.weight
    assert first.shape == (LSUN["channels"], 3, 3, 3)
    assert first.std().item() == pytest.approx(0.194, rel=0.05)


def test_torchs_initialisation_is_that_of_its_layers() -> None:
    """The code of DDIM leaves it at that: nothing is zero, not even a bias."""
    torch.manual_seed(0)
    network = UNet(**TINY | {"channels": 64}, initialisation="torch")
    for name, weight in drawn(network).items():
        bound = weight[0].numel() ** -0.5  # kaiming_uniform_ with a = sqrt(5)
        law = uniform(-bound, 2 * bound)
        assert kstest(weight.detach().flatten().double().numpy(), law.cdf).pvalue > 1e-3, name
    assert network(*batch()).std() > 0.01
    norms = {id(m.bias) for m in network.modules() if isinstance(m, nn.GroupNorm)}
    biases = [p for name, p in network.named_parameters() if name.endswith(".bias")]
    assert all(p.all() for p in biases if id(p) not in norms)


@pytest.mark.parametrize("variant", [{}, FILM], ids=["ho", "salimans_ho"])
def test_gradient_reaches_every_parameter(variant: dict[str, Any]) -> None:
    network = randomised(UNet(**TINY, **variant, num_classes=3))
    network(*batch(), torch.tensor([0, 1, 2])).square().sum().backward()
    unreached = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert unreached == []


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    network = randomised(UNet(**TINY | {"dropout": 0.5}))
    z, t = batch()
    torch.testing.assert_close(network(z, t), network(z, t), rtol=0, atol=0)
    network.train()
    assert not torch.equal(network(z, t), network(z, t))


# Shapes, devices, compilers


@pytest.mark.parametrize(
    "variant",
    [
        {},
        FILM,
        {"scale_shift": True},
        {"resample": "block"},
        {"out_channels": 6},
        {"multipliers": (2,), "attention": ()},
        {"image_size": 12, "multipliers": [1, 2, 3], "attention": [3, 12], "num_heads": 2},
    ],
    ids=str,
)
def test_output_has_the_shape_of_the_input(variant: dict[str, Any]) -> None:
    network = randomised(UNet(**TINY | variant))
    z, t = batch(image_size=network.image_size)
    output = network(z, t)
    assert output.shape == (3, network.out_channels, *z.shape[2:])
    assert output.isfinite().all()


def test_patches_of_pixels_are_the_channels_of_a_smaller_image() -> None:
    patched = randomised(UNet(**TINY | {"image_size": 16, "patch_size": 2}, in_channels=1))
    plain = randomised(UNet(**TINY, in_channels=4))
    z, t = batch(channels=1, image_size=16)
    # Channel 2 i + j of a position is the pixel in row i and column j of its patch.
    small = torch.cat([z[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=1)
    output = patched(z, t)
    assert output.shape == z.shape
    for channel, wanted in enumerate(plain(small, t).unbind(1)):
        i, j = divmod(channel, 2)
        torch.testing.assert_close(output[:, 0, i::2, j::2], wanted)


@pytest.mark.parametrize("variant", [{}, FILM], ids=["ho", "salimans_ho"])
def test_channels_last_gives_the_same_result(variant: dict[str, Any]) -> None:
    network = randomised(UNet(**TINY, **variant))
    z, t = batch()
    expected = network(z, t)
    network.to(memory_format=torch.channels_last)
    actual = network(z.to(memory_format=torch.channels_last), t)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    # Another order of summation: float32 rounding over some twenty layers.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_autocast_gives_nearly_the_same_result() -> None:
    network = randomised(UNet(**TINY))
    z, t = batch()
    expected = network(z, t)
    with torch.autocast("cpu", torch.bfloat16):
        actual = network(z, t).float()
    # bfloat16 has 8 bits: 0.4 % a layer, some twenty layers.
    assert (actual - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_network_runs_in_other_precisions(dtype: torch.dtype) -> None:
    network = randomised(UNet(**TINY)).to(dtype)
    z, t = batch()
    assert network(z.to(dtype), t).dtype == dtype


def assert_compiled_network_agrees(variant: dict[str, Any], backend: str) -> None:
    network = randomised(UNet(**TINY | {"num_blocks": 1, "num_classes": 3}, **variant))
    z, t = batch()
    label = torch.tensor([0, 1, 2])
    with torch.no_grad():
        actual = torch.compile(network, fullgraph=True, backend=backend)(z, t, label)
        torch.testing.assert_close(actual, network(z, t, label), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", [{}, FILM], ids=["ho", "salimans_ho"])
def test_network_is_one_graph(variant: dict[str, Any]) -> None:
    assert_compiled_network_agrees(variant, backend="eager")


@pytest.mark.slow
def test_compiled_network_gives_the_same_result() -> None:
    assert_compiled_network_agrees(FILM, backend="inductor")


# Classes


def test_label_changes_the_output_of_its_image_only() -> None:
    network = randomised(UNet(**TINY, num_classes=4))
    z, t = batch()
    first, second = network(z, t, torch.tensor([0, 1, 2])), network(z, t, torch.tensor([0, 3, 2]))
    changed = (first - second).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert changed.tolist() == [False, True, False]


# Errors


def test_labels_and_classes_must_go_together() -> None:
    z, t = batch()
    with pytest.raises(ValueError, match=r"label must be given .*, got none and num_classes=4"):
        UNet(**TINY, num_classes=4)(z, t)
    with pytest.raises(
        ValueError, match=r"label must be given .*, got labels and num_classes=None"
    ):
        UNet(**TINY)(z, t, torch.tensor([0, 1, 2]))
    with pytest.raises(
        ValueError, match=r"label must have shape \(3,\), got \(1,\): give one per image"
    ):
        UNet(**TINY, num_classes=4)(z, t, torch.tensor([0]))


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 3, 16, 16), (3, 3, 8, 4), (3, 8, 8)], ids=str)
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"z must have shape \(B, \*\(3, 8, 8\)\), got \("):
        UNet(**TINY)(torch.zeros(shape), torch.zeros(3))


@pytest.mark.parametrize("shape", [(), (1,), (3, 1)], ids=str)
def test_times_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"t must have shape \(3,\), got \(.*: give one per image"
    ):
        UNet(**TINY)(batch()[0], torch.zeros(shape))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"image_size": 30, "multipliers": (1, 2, 2)},
            "image_size must be a multiple of 4 for 3 multipliers, got 30: use 32, or at most 2 ",
        ),
        (
            {"patch_size": 2, "image_size": 6, "attention": ()},
            "multiple of 4 for 2 multipliers and patch_size=2, got 6: use 8, or at most 1 mult",
        ),
        ({"patch_size": 3, "attention": ()}, "patch_size=3, got 8: use 12$"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"patch_size": 4}, r"got \[4\]: choose from \[2, 1\]"),
        ({"attention": (4, 16)}, r"attention must be .*, got \[16\]: choose from \[8, 4\]"),
        ({"groups": 3}, "groups must divide .* got 3 and 16: choose a divisor of 16"),
        ({"num_heads": 3}, "num_heads must divide .* got 3 and 16: choose a divisor of 16"),
        ({"head_width": 5}, "head_width must divide .* with attention, got 5 and 32: .* of 32"),
        ({"head_width": 0}, "head_width must be at least 1, got 0"),
        (
            {"head_width": 8, "num_heads": 1},
            "num_heads must be left out where head_width is given",
        ),
        ({"embedding_width": 0}, "embedding_width must be at least 1, got 0"),
        ({"initialisation": "he"}, r"initialisation must be one of \('xavier', .*, got 'he'"),
        ({"channels": 15}, "channels must be even and at least 4, got 15"),
        ({"channels": 2}, "channels must be even and at least 4, got 2"),
        ({"multipliers": ()}, r"multipliers must be one or more positive integers, got \[\]"),
        ({"multipliers": (1, 0)}, r"multipliers must be .* positive integers, got \[1, 0\]"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        ({"resample": "fourier"}, r"resample must be one of \('conv', 'block'\), got 'fourier'"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_with_a_remedy(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**TINY | wrong)


# Configuration


@pytest.mark.parametrize("more", [{}, {"head_width": 16, "embedding_width": 24}], ids=str)
def test_init_args_rebuild_the_network(more: dict[str, Any]) -> None:
    network = UNet(**TINY, **FILM, num_classes=3, **more)
    again = UNet(**network.init_args)
    assert again.init_args == network.init_args
    assert network.init_args["multipliers"] == [1, 2]
    assert network.init_args.keys() == inspect.signature(UNet).parameters.keys()
    again.load_state_dict(network.state_dict())


def test_arguments_can_be_read_from_yaml() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(UNet, "network")
    options = ["image_size=8", "channels=16", "multipliers=[1, 2]", "attention=[4]", "groups=8"]
    config = parser.parse_args([f"--network.{option}" for option in options])
    network = parser.instantiate(config).network
    assert network.init_args["multipliers"] == [1, 2]
    assert network.init_args["attention"] == [4]


@pytest.mark.parametrize("count", [4, 64])
def test_its_attention_is_pytorchs_in_bfloat16(count):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, count, 16, generator=generator, dtype=torch.float64)
    exact = nn.functional.scaled_dot_product_attention(q, k, v)
    q, k, v = (each.bfloat16().requires_grad_() for each in (q, k, v))
    with torch.profiler.profile() as profile:
        output = unet.attend(q, k, v)
    assert not any("scaled_dot_product" in event.key for event in profile.key_averages())
    assert output.dtype == torch.bfloat16
    # Eight bits of the inputs, of the weights and of the sum.
    torch.testing.assert_close(output.double(), exact, rtol=0.03, atol=0.03)
    found = torch.autograd.grad(output.float().square().sum(), (q, k, v))
    theirs = nn.functional.scaled_dot_product_attention(q, k, v)
    expected = torch.autograd.grad(theirs.float().square().sum(), (q, k, v))
    for one, other in zip(found, expected, strict=True):
        scale = other.float().abs().max().item()
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=0.03 * scale)


@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_its_group_norm_is_pytorchs_in_bfloat16(side, memory_format):
    """With small images by another kernel, which rounds less."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(3, 16, side, side, generator=generator).bfloat16()
    norm, plain = unet.GroupNorm(4, 16).bfloat16(), torch.nn.GroupNorm(4, 16)
    with torch.no_grad():
        for own, theirs in zip(norm.parameters(), plain.parameters(), strict=True):
            theirs.copy_(own.normal_(generator=generator))
        found = norm(h.to(memory_format=memory_format))
        exact = plain(h.float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_images_is_one(dtype):
    network = UNet(**TINY).to(dtype)
    assert network(torch.zeros(0, 3, 8, 8, dtype=dtype), torch.zeros(0)).shape == (0, 3, 8, 8)
