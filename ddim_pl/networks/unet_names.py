"""What the layers of `UNet` are called in diffusers, and in the code of [DDIM].

The networks are the same, layer by layer: a name of ours stands for one layer of theirs, or, for
`qkv`, for three that are stacked.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddim_pl.networks.unet import Stage, UNet

__all__ = ["DDIM_NAMES", "DIFFUSERS_NAMES", "LayerNames", "load_weights", "renamed_weights"]

Layers = Iterator[tuple[str, tuple[str, ...]]]
MOST_KEYS = 4
"""Keys that an error names at most."""


@dataclass(frozen=True)
class LayerNames:
    """How another program names the layers of a `UNet`.

    Args:
        single: Layers that stand alone: our name and theirs.
        middle: The parts of the middle: first block, attention, second block.
        block: A block of a way ("down" or "up") at a `level`, the `number`-th there.
        attention: The attention after that block.
        resample: What resamples behind a level, by way.
        resample_block: The same where it is a residual block.
        in_block: Parts of a residual block: our name and theirs.
        in_attention: Parts of an attention: our name and theirs, of `qkv` three.
        from_coarsest: Whether the levels of the way up are numbered from the coarsest.
    """

    single: Mapping[str, str]
    middle: tuple[str, str, str]
    block: str
    attention: str
    resample: Mapping[str, str]
    resample_block: Mapping[str, str]
    in_block: Mapping[str, str]
    in_attention: Mapping[str, tuple[str, ...]]
    from_coarsest: bool

    def layers(self, network: UNet) -> Layers:
        """Yield the name of each layer of ours, and those of theirs that it stands for."""
        yield from ((ours, (theirs,)) for ours, theirs in self.single.items())
        if network.class_table is not None:
            yield "class_table", ("class_embedding",)
        first, attention, last = self.middle
        yield from self._of_block("middle.0.block", first, network)
        yield from self._of_attention("middle.0.attention", attention)
        yield from self._of_block("middle.1", last, network)
        count = len(network.init_args["multipliers"])
        yield from self._of_way("down", [*range(count)], network)
        upwards = [*range(count)] if self.from_coarsest else [*reversed(range(count))]
        yield from self._of_way("up", upwards, network)

    def _of_way(self, way: str, levels: list[int], network: UNet) -> Layers:
        """The layers of the way down or up, with their numbers of the levels in its order."""
        level, number = 0, 0
        for i, step in enumerate(getattr(network, way)):
            place = {"way": way, "level": levels[level], "number": number}
            if isinstance(step, Stage):
                yield from self._of_block(f"{way}.{i}.block", self.block.format(**place), network)
                if not isinstance(step.attention, nn.Identity):
                    name = self.attention.format(**place)
                    yield from self._of_attention(f"{way}.{i}.attention", name)
                number += 1
                continue
            if hasattr(step, "conv"):
                yield f"{way}.{i}.conv", (self.resample[way].format(**place),)
            else:
                name = self.resample_block[way].format(**place)
                yield from self._of_block(f"{way}.{i}", name, network)
            level, number = level + 1, 0

    def _of_block(self, ours: str, theirs: str, network: UNet) -> Layers:
        block = network.get_submodule(ours)
        for name, part in self.in_block.items():
            if not isinstance(getattr(block, name), nn.Identity):
                yield f"{ours}.{name}", (f"{theirs}.{part}",)

    def _of_attention(self, ours: str, theirs: str) -> Layers:
        for name, parts in self.in_attention.items():
            yield f"{ours}.{name}", tuple(f"{theirs}.{part}" for part in parts)


_OF_BLOCK = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}

DIFFUSERS_NAMES = LayerNames(
    single={
        "time_in": "time_embedding.linear_1",
        "time_out": "time_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    },
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    block="{way}_blocks.{level}.resnets.{number}",
    attention="{way}_blocks.{level}.attentions.{number}",
    resample={
        "down": "down_blocks.{level}.downsamplers.0.conv",
        "up": "up_blocks.{level}.upsamplers.0.conv",
    },
    resample_block={
        "down": "down_blocks.{level}.downsamplers.0",
        "up": "up_blocks.{level}.upsamplers.0",
    },
    in_block={**_OF_BLOCK, "emb_proj": "time_emb_proj", "shortcut": "conv_shortcut"},
    in_attention={
        "norm": ("group_norm",),
        "qkv": ("to_q", "to_k", "to_v"),
        "proj": ("to_out.0",),
    },
    from_coarsest=True,
)
"""Those of diffusers' `UNet2DModel`."""

DDIM_NAMES = LayerNames(
    single={
        "time_in": "temb.dense.0",
        "time_out": "temb.dense.1",
        "conv_in": "conv_in",
        "norm_out": "norm_out",
        "conv_out": "conv_out",
    },
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    block="{way}.{level}.block.{number}",
    attention="{way}.{level}.attn.{number}",
    resample={"down": "down.{level}.downsample.conv", "up": "up.{level}.upsample.conv"},
    resample_block={},
    in_block={**_OF_BLOCK, "emb_proj": "temb_proj", "shortcut": "nin_shortcut"},
    in_attention={"norm": ("norm",), "qkv": ("q", "k", "v"), "proj": ("proj_out",)},
    from_coarsest=False,
)
"""Those of `Model` in the code of [DDIM], which is also that of DDPM's weights for PyTorch."""


@torch.no_grad()
def load_weights(network: UNet, weights: Mapping[str, Tensor], names: LayerNames) -> None:
    """Give a network the weights that another program has written.

    Args:
        network: The network, whose weights are replaced.
        weights: Theirs, by their names.
        names: What they are called.

    Raises:
        ValueError: If a weight is missing, is left over or has another shape; it is named.
    """
    ours = network.state_dict()
    sources = {
        f"{name}.{part}": [f"{each}.{part}" for each in theirs]
        for name, theirs in names.layers(network)
        for part in ("weight", "bias")
        if f"{name}.{part}" in ours
    }
    assert set(sources) == set(ours)
    check_keys({key for keys in sources.values() for key in keys}, weights)
    for name, keys in sources.items():
        parts = [weights[key] for key in keys]
        shape = (ours[name].shape[0] // len(keys), *ours[name].shape[1:])
        for key, part in zip(keys, parts, strict=True):
            # Linear maps of pixels are 1x1 convolutions elsewhere.
            fits = part.shape[: len(shape)] == shape and part.numel() == math.prod(shape)
            if not fits:
                raise ValueError(
                    f"weight {key} has shape {tuple(part.shape)} in place of {tuple(shape)}"
                )
        ours[name].copy_(torch.cat([part.reshape(shape) for part in parts]))


def renamed_weights(network: UNet, names: LayerNames) -> dict[str, Tensor]:
    """The weights of a network by another program's names: the inverse of `load_weights`.

    Linear maps of pixels keep their shape `(C, C)`, as diffusers has them.

    Args:
        network: The network.
        names: What its layers are called.
    """
    ours, found = network.state_dict(), dict[str, Tensor]()
    for name, theirs in names.layers(network):
        for part in ("weight", "bias"):
            if f"{name}.{part}" in ours:
                pieces = ours[f"{name}.{part}"].chunk(len(theirs))
                found |= {f"{each}.{part}": p for each, p in zip(theirs, pieces, strict=True)}
    assert sum(value.numel() for value in found.values()) == sum(map(Tensor.numel, ours.values()))
    return found


def check_keys(wanted: set[str], weights: Mapping[str, Tensor]) -> None:
    """Check that weights have exactly these names.

    Raises:
        ValueError: If not; some of the missing and left over ones are named.
    """
    different = {"missing": wanted - set(weights), "left over": set(weights) - wanted}
    if any(different.values()):
        found = "; ".join(
            f"{len(keys)} {what}: {', '.join(sorted(keys)[:MOST_KEYS])}"
            for what, keys in different.items()
            if keys
        )
        raise ValueError(f"weights do not fit the network ({found})")
