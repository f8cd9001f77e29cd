"""The pickles of the code of [EDM]: `network-snapshot-*.pkl`.

Their `ema` is a network in a preconditioning, and what it is made of stands beside it. A
`SongUNet` becomes ours, layer by layer; `EDMPrecond` becomes the prediction "edm" with its
`sigma_data`, over the levels of noise that their sampler takes.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim_pl.networks.songunet import Block, SongUNet
from ddim_pl.networks.unet_names import check_keys
from ddim_pl.samplers import Heun
from ddim_pl.schedules import EDMSchedule
from ddim_pl.teachers.base import Teacher
from ddim_pl.teachers.persistence import Record, read_persistence

SUPPORTED = (
    "supported is an EDMPrecond around a SongUNet (DDPM++ and NCSN++), as trained on CIFAR-10, "
    "FFHQ and AFHQv2"
)

SIGMA_RANGE = (0.002, 80.0)
"""Least and largest noise of their sampler, where the network allows more."""

STEPS, STEPS_OF_LARGER = 18, 40
"""Steps of their published samples: of images up to 32x32, and of larger ones."""

DEFAULTS: dict[str, Any] = {
    "img_resolution": None,
    "in_channels": None,
    "out_channels": None,
    "label_dim": 0,
    "augment_dim": 0,
    "model_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "channel_mult_emb": 4,
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.10,
    "label_dropout": 0,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
"""Arguments of their `SongUNet` in their order, and what they are if they are not given."""

CHOICES = {"encoder_type": ("standard", "residual"), "decoder_type": ("standard",)}
"""Values of those arguments that ours has too; no published model has another."""

IN_BLOCK = {
    "norm1": "norm0",
    "conv1": "conv0",
    "emb_proj": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "shortcut": "skip",
    "attention.norm": "norm2",
    "attention.qkv": "qkv",
    "attention.proj": "proj",
}
"""Layers of a block: our name and theirs."""

FILTER, AUGMENTATION = "resample_filter", "map_augment.weight"


def read_edm(path: Path) -> Teacher:
    """Read a pickle of EDM; no code in it is run.

    Args:
        path: The file.

    Raises:
        ValueError: If it names what it may not name, is of another program, or holds a network
            that ours cannot express; says what is supported.
    """
    content = read_persistence(path)
    outer = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(outer, Record):
        raise ValueError(
            f"source {str(path)!r} must hold the averaged network of EDM under 'ema', got none: "
            "give a network-snapshot-*.pkl"
        )
    inner = outer.module("model")
    kinds = outer.class_name, inner and inner.class_name
    if inner is None or kinds != ("EDMPrecond", "SongUNet"):
        raise ValueError(f"source {str(path)!r} holds a {kinds[0]} around {kinds[1]}: {SUPPORTED}")
    try:
        return _teacher(outer, inner)
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"source {str(path)!r} must hold a network as EDM writes it, got one with other "
            f"arguments ({type(error).__name__}: {error}): give another file"
        ) from None
    except ValueError as error:
        raise ValueError(f"source {str(path)!r}: {error}") from None


def _teacher(outer: Record, inner: Record) -> Teacher:
    theirs = _given(inner)
    network = SongUNet(**_arguments(theirs))
    weights = {name: value.float() for name, value in inner.tensors()}
    notes = ["network: SongUNet (the same layers as in EDM)"]
    if weights.pop(AUGMENTATION, None) is not None:
        notes.append("labels of augmentation: left out, as when EDM samples")
    _load(network, weights, theirs[FILTER])
    if network.null_class:
        notes.append("label_dropout: the network's null class, for guidance, is kept")
    size = network.image_size
    low, high = (float(outer.state[name]) for name in ("sigma_min", "sigma_max"))
    settings = {
        "schedule": EDMSchedule(
            sigma_min=max(low, SIGMA_RANGE[0]), sigma_max=min(high, SIGMA_RANGE[1])
        ),
        "prediction": "edm",
        "loss_weight": "edm",
        "time_input": "log_sigma",
        "sigma_data": float(outer.state["sigma_data"]),
        "clip": False,
        "sampler": Heun(),
        "timesteps": "karras",
        "num_steps": STEPS if size <= 32 else STEPS_OF_LARGER,
        "image_shape": (network.in_channels, size, size),
    }
    return Teacher(network.eval(), settings, notes)


def _given(inner: Record) -> dict[str, Any]:
    """All arguments that their network was made with."""
    named = dict(zip(DEFAULTS, inner.state["_init_args"], strict=False))
    named |= inner.state["_init_kwargs"]
    unknown = sorted(str(name) for name in named.keys() - DEFAULTS)
    if unknown:
        raise ValueError(f"its SongUNet has arguments that are not known here: {unknown}")
    theirs = DEFAULTS | named
    for name, values in CHOICES.items():
        if theirs[name] not in values:
            raise ValueError(f"{name} must be one of {values}, got {theirs[name]!r}: {SUPPORTED}")
    return theirs


def _arguments(theirs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of our network from those of theirs."""
    channels = int(theirs["model_channels"])
    return {
        "image_size": int(theirs["img_resolution"]),
        "in_channels": int(theirs["in_channels"]),
        "out_channels": int(theirs["out_channels"]),
        "channels": channels,
        "multipliers": [int(each) for each in theirs["channel_mult"]],
        "num_blocks": int(theirs["num_blocks"]),
        "attention": [int(each) for each in _present(theirs)],
        "dropout": float(theirs["dropout"]),
        "num_classes": int(theirs["label_dim"]) or None,
        "null_class": bool(theirs["label_dim"] and theirs["label_dropout"]),
        "embedding": theirs["embedding_type"],
        "time_width": channels * int(theirs["channel_mult_noise"]),
        "embedding_width": channels * int(theirs["channel_mult_emb"]),
        "encoder": theirs["encoder_type"],
        "resample_filter": [float(each) for each in theirs[FILTER]],
    }


def _present(theirs: dict[str, Any]) -> list[int]:
    """Resolutions with attention that the network has; theirs may name others."""
    has = [theirs["img_resolution"] >> level for level in range(len(theirs["channel_mult"]))]
    return [each for each in theirs["attn_resolutions"] if each in has]


@torch.no_grad()
def _load(network: SongUNet, weights: Mapping[str, Tensor], taps: list[float]) -> None:
    """Give our network their weights.

    Raises:
        ValueError: If a weight is missing, is left over, has another shape, or a filter is not the
            one of the arguments.
    """
    along = torch.tensor([float(tap) for tap in taps])
    kernel = along.outer(along) / along.sum().square()
    for name, value in weights.items():
        if name.endswith(FILTER) and not torch.equal(value.squeeze(), kernel):
            raise ValueError(f"weight {name} is not the filter {taps} of the arguments")
    layers = {key: value for key, value in weights.items() if not key.endswith(FILTER)}
    ours = network.state_dict()
    names = dict(_names(network))
    assert set(names) == set(ours)
    check_keys(set(names.values()), layers)
    for name, key in names.items():
        value = layers[key]
        wanted = ours[name].shape
        # Linear maps of pixels are 1x1 convolutions there.
        if value.shape[: len(wanted)] != wanted or value.numel() != math.prod(wanted):
            raise ValueError(f"weight {key} has shape {tuple(value.shape)}, not {tuple(wanted)}")
        if ".qkv." in name:  # there query, key and value of a channel stand together
            value = value.unflatten(0, (-1, 3)).transpose(0, 1)
        ours[name].copy_(value.reshape(wanted))


def _names(network: SongUNet) -> Iterator[tuple[str, str]]:
    """Yield the name of each weight of ours, and of theirs."""
    for ours, theirs in _layers(network):
        for part in ("weight", "bias"):
            yield f"{ours}.{part}", f"{theirs}.{part}"
    if network.init_args["embedding"] == "fourier":
        yield "time.frequencies", "map_noise.freqs"


def _layers(network: SongUNet) -> Iterator[tuple[str, str]]:
    """Yield the name of each layer of ours, and of theirs."""
    args = network.init_args
    sizes = [f"{args['image_size'] >> i}x{args['image_size'] >> i}" for i in _levels(network)]
    yield from {"emb_in": "map_layer0", "emb_out": "map_layer1"}.items()
    if network.class_in is not None:
        yield "class_in", "map_label"
    yield "conv_in", f"enc.{sizes[0]}_conv"
    yield "norm_out", f"dec.{sizes[0]}_aux_norm"
    yield "conv_out", f"dec.{sizes[0]}_aux_conv"
    for i in range(len(network.joins)):
        yield f"joins.{i}.conv", f"enc.{sizes[i + 1]}_aux_residual"
    down, up = [], []
    for level, size in enumerate(sizes):
        down += [f"enc.{size}_down"] if level > 0 else []
        down += [f"enc.{size}_block{i}" for i in range(args["num_blocks"])]
    for level, size in reversed([*enumerate(sizes)]):
        up += [f"dec.{size}_up"] if level < len(sizes) - 1 else []
        up += [f"dec.{size}_block{i}" for i in range(args["num_blocks"] + 1)]
    middle = [f"dec.{sizes[-1]}_in{i}" for i in range(2)]
    for way, names in {"down": down, "middle": middle, "up": up}.items():
        for i, name in enumerate(names):
            block = network.get_submodule(f"{way}.{i}")
            assert isinstance(block, Block)
            yield from _of_block(block, f"{way}.{i}", name)


def _levels(network: SongUNet) -> range:
    return range(len(network.init_args["multipliers"]))


def _of_block(block: Block, ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    has = {name.rpartition(".")[0] for name in block.state_dict()}
    yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in IN_BLOCK.items() if a in has)
