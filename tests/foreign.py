"""Teachers of other programs with random weights, in their real formats."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

CIFAR10 = {  # google/ddpm-cifar10-32, its config.json
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CIFAR10_SCHEDULER = {  # its scheduler_config.json, in the form of that of google/ddpm-cat-256
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}
PUBLISHED_256 = {  # google/ddpm-celebahq-256, ddpm-cat-256 and the like
    **CIFAR10,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
    "sample_size": 256,
}
TINY = {  # of the same kind
    **CIFAR10,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
}
OWN_DEFAULTS = {  # what UNet2DModel does if it is not told otherwise, which UNet lacks
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
}


@torch.no_grad()
def random_weights(network: nn.Module, seed: int = 0) -> None:
    """Weights, biases and norms that are all drawn, so that none can be mistaken for another."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.named_parameters():
        draw = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            value.copy_(draw / math.sqrt(value[0].numel()))
        else:
            value.copy_(0.3 * draw + name.endswith("weight"))


def random_unet(**arguments: Any) -> UNet2DModel:
    network = UNet2DModel(**(arguments or TINY)).eval()
    random_weights(network)
    return network


def save_pipeline(folder: Path, network: nn.Module, kind: str = "DDIM", **scheduler: Any) -> Path:
    """A pipeline's folder, as diffusers saves it."""
    pipelines: Any = {"DDIM": (DDIMPipeline, DDIMScheduler), "DDPM": (DDPMPipeline, DDPMScheduler)}
    pipeline, schedule = pipelines[kind]
    pipeline(network, schedule(**scheduler)).save_pretrained(folder)
    return folder


def save_as_before(folder: Path, network: UNet2DModel, scheduler: dict[str, Any]) -> Path:
    """A folder as on the Hub in 2022: all in one place, `.bin`, an attention's names of then."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, value in network.state_dict().items():
        for now, before in names.items():
            name = name.replace(f".{now}.", f".{before}.")
        weights[name] = value
    folder.mkdir()
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    config = {name: value for name, value in network.config.items() if name in CIFAR10}
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    index["unet"] = ["diffusers", "UNet2DModel"]
    contents = {"config": {**config, "_class_name": "UNet2DModel"}, "scheduler_config": scheduler}
    for name, content in {**contents, "model_index": index}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


# The network of DDIM's code, stated once more by its weights alone


def ddim_weights(
    channels: int = 32,
    multipliers: tuple[int, ...] = (1, 2, 2),
    num_blocks: int = 1,
    attends: tuple[int, ...] = (1,),
    in_channels: int = 3,
) -> dict[str, Tensor]:
    """Random weights of a `Model`, by its names."""
    generator = torch.Generator().manual_seed(1)
    weights: dict[str, Tensor] = {}

    def layer(name: str, *shape: int) -> None:
        fan = math.prod(shape[1:])
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.sqrt(fan)
        weights[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
        weights[f"{name}.bias"] = 0.3 * torch.randn(width, generator=generator)

    def block(name: str, before: int, after: int) -> None:
        norm(f"{name}.norm1", before)
        layer(f"{name}.conv1", after, before, 3, 3)
        layer(f"{name}.temb_proj", after, 4 * channels)
        norm(f"{name}.norm2", after)
        layer(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            layer(f"{name}.nin_shortcut", after, before, 1, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1, 1)

    layer("temb.dense.0", 4 * channels, channels)
    layer("temb.dense.1", 4 * channels, 4 * channels)
    layer("conv_in", channels, in_channels, 3, 3)
    widths, kept = [channels * each for each in multipliers], [channels]
    for i, width in enumerate(widths):
        for j in range(num_blocks):
            block(f"down.{i}.block.{j}", kept[-1], width)
            if i in attends:
                attention(f"down.{i}.attn.{j}", width)
            kept.append(width)
        if i < len(widths) - 1:
            layer(f"down.{i}.downsample.conv", width, width, 3, 3)
            kept.append(width)
    block("mid.block_1", widths[-1], widths[-1])
    attention("mid.attn_1", widths[-1])
    block("mid.block_2", widths[-1], widths[-1])
    below = widths[-1]
    for i, width in reversed([*enumerate(widths)]):
        for j in range(num_blocks + 1):
            block(f"up.{i}.block.{j}", below + kept.pop(), width)
            if i in attends:
                attention(f"up.{i}.attn.{j}", width)
            below = width
        if i > 0:
            layer(f"up.{i}.upsample.conv", width, width, 3, 3)
    norm("norm_out", widths[0])
    layer("conv_out", in_channels, widths[0], 3, 3)
    return weights


def ddim_output(weights: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    """What the `Model` with these weights answers; DDPM's U-Net, written as formulas."""
    w = weights

    def conv(name: str, h: Tensor, **settings: Any) -> Tensor:
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **settings)

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        grouped = h.unflatten(1, (32, -1)).flatten(2)
        centred = grouped - grouped.mean(2, keepdim=True)
        scaled = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
        by_channel = w[f"{name}.weight"][:, None, None], w[f"{name}.bias"][:, None, None]
        return scaled.reshape(h.shape) * by_channel[0] + by_channel[1]

    def swish(h: Tensor) -> Tensor:
        return h * h.sigmoid()

    def block(name: str, h: Tensor) -> Tensor:
        inner = conv(f"{name}.conv1", swish(norm(f"{name}.norm1", h)), padding=1)
        inner = inner + linear(f"{name}.temb_proj", swish(emb))[:, :, None, None]
        inner = conv(f"{name}.conv2", swish(norm(f"{name}.norm2", inner)), padding=1)
        return inner + (conv(f"{name}.nin_shortcut", h) if f"{name}.nin_shortcut.bias" in w else h)

    def attention(name: str, h: Tensor) -> Tensor:
        if f"{name}.q.weight" not in w:
            return h
        normed = norm(f"{name}.norm", h)
        q, k, v = (conv(f"{name}.{part}", normed).flatten(2) for part in "qkv")
        match = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(h.shape[1])
        mixed = torch.einsum("bij,bcj->bci", match.softmax(2), v).reshape(h.shape)
        return h + conv(f"{name}.proj_out", mixed)

    half = w["temb.dense.0.weight"].shape[1] // 2
    rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, dtype=x.dtype))
    angles = t[:, None] * rates
    emb = torch.cat([angles.sin(), angles.cos()], 1)
    emb = linear("temb.dense.1", swish(linear("temb.dense.0", emb)))
    levels = len({name.split(".")[1] for name in w if name.startswith("down.")})
    blocks = len({name.split(".")[3] for name in w if name.startswith("down.0.block.")})
    kept = [conv("conv_in", x, padding=1)]
    for i in range(levels):
        for j in range(blocks):
            h = block(f"down.{i}.block.{j}", kept[-1])
            kept.append(attention(f"down.{i}.attn.{j}", h))
        if i < levels - 1:
            padded = F.pad(kept[-1], (0, 1, 0, 1))
            kept.append(conv(f"down.{i}.downsample.conv", padded, stride=2))
    h = block("mid.block_2", attention("mid.attn_1", block("mid.block_1", kept[-1])))
    for i in reversed(range(levels)):
        for j in range(blocks + 1):
            h = block(f"up.{i}.block.{j}", torch.cat([h, kept.pop()], 1))
            h = attention(f"up.{i}.attn.{j}", h)
        if i > 0:
            doubled = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = conv(f"up.{i}.upsample.conv", doubled, padding=1)
    return conv("conv_out", swish(norm("norm_out", h)), padding=1)
