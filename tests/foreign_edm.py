"""EDM's networks with random weights, in pickles as EDM's code writes them."""

import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TINY = {  # DDPM++ as EDM's train.py asks for it, but narrow
    "img_resolution": 8,
    "in_channels": 3,
    "out_channels": 3,
    "label_dim": 0,
    "model_type": "SongUNet",
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "augment_dim": 9,
    "dropout": 0.13,
}
NCSN = {  # NCSN++ with classes
    **TINY,
    "label_dim": 3,
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
    "channel_mult": [2, 2, 3],
}
PRECONDITIONING = {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5, "use_fp16": False}
SOURCE = "raise SystemExit('the source text of a pickle was executed')"


# ---- weights ----------------------------------------------------------------------------------


def edm_weights(
    img_resolution: int,
    in_channels: int,
    out_channels: int,
    label_dim: int,
    model_channels: int,
    channel_mult: list[int],
    num_blocks: int,
    attn_resolutions: list[int],
    augment_dim: int = 0,
    channel_mult_noise: int = 1,
    embedding_type: str = "positional",
    encoder_type: str = "standard",
    resample_filter: tuple[int, ...] = (1, 1),
    **_: Any,
) -> dict[str, Tensor]:
    """Random weights of a `SongUNet`, and its buffers, by its names."""
    generator = torch.Generator().manual_seed(2)
    weights: dict[str, Tensor] = {}
    taps = torch.tensor(resample_filter).float()
    kernel = (taps[:, None] * taps / taps.sum() ** 2)[None, None]
    emb, noise = 4 * model_channels, channel_mult_noise * model_channels

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        fan = math.prod(shape[1:])
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.sqrt(fan)
        if bias:
            weights[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
        weights[f"{name}.bias"] = 0.3 * torch.randn(width, generator=generator)

    def block(name: str, before: int, after: int, attends: bool, resamples: bool = False) -> int:
        norm(f"{name}.norm0", before)
        layer(f"{name}.conv0", after, before, 3, 3)
        layer(f"{name}.affine", after, emb)
        norm(f"{name}.norm1", after)
        layer(f"{name}.conv1", after, after, 3, 3)
        if before != after or resamples:
            layer(f"{name}.skip", after, before, 1, 1)
        if resamples:
            weights[f"{name}.conv0.resample_filter"] = kernel.clone()
            weights[f"{name}.skip.resample_filter"] = kernel.clone()
        if attends:
            norm(f"{name}.norm2", after)
            layer(f"{name}.qkv", 3 * after, after, 1, 1)
            layer(f"{name}.proj", after, after, 1, 1)
        return after

    if embedding_type == "fourier":
        weights["map_noise.freqs"] = 16 * torch.randn(noise // 2, generator=generator)
    if label_dim:
        layer("map_label", noise, label_dim)
    if augment_dim:
        layer("map_augment", noise, augment_dim, bias=False)
    layer("map_layer0", emb, noise)
    layer("map_layer1", emb, emb)
    sizes = [img_resolution >> level for level in range(len(channel_mult))]
    widths, kept, of_image = [model_channels * each for each in channel_mult], [], in_channels
    for size, width in zip(sizes, widths, strict=True):
        place = f"enc.{size}x{size}"
        if not kept:
            layer(f"{place}_conv", model_channels, in_channels, 3, 3)
            kept = [model_channels]
        else:
            kept.append(block(f"{place}_down", kept[-1], kept[-1], False, True))
            if encoder_type == "residual":
                layer(f"{place}_aux_residual", kept[-1], of_image, 3, 3)
                weights[f"{place}_aux_residual.resample_filter"] = kernel.clone()
                of_image = kept[-1]
        for i in range(num_blocks):
            kept.append(block(f"{place}_block{i}", kept[-1], width, size in attn_resolutions))
    below = kept[-1]
    for size, width in [*zip(sizes, widths, strict=True)][::-1]:
        place = f"dec.{size}x{size}"
        if size == sizes[-1]:
            block(f"{place}_in0", below, below, True)
            block(f"{place}_in1", below, below, False)
        else:
            block(f"{place}_up", below, below, False, True)
        for i in range(num_blocks + 1):
            attends = i == num_blocks and size in attn_resolutions
            below = block(f"{place}_block{i}", below + kept.pop(), width, attends)
    norm(f"{place}_aux_norm", below)
    layer(f"{place}_aux_conv", out_channels, below, 3, 3)
    return weights


# ---- the network, stated once more by its weights alone ---------------------------------------


def edm_output(
    w: dict[str, Tensor], z: Tensor, time: Tensor, one_hot: Tensor | None = None
) -> Tensor:
    """What the `SongUNet` with these weights answers: DDPM++ or NCSN++, written as formulas."""

    def convolved(name: str, h: Tensor) -> Tensor:
        weight = w[f"{name}.weight"]
        return F.conv2d(h, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        groups = min(32, h.shape[1] // 4)
        grouped = h.unflatten(1, (groups, -1)).flatten(2)
        centred = grouped - grouped.mean(2, keepdim=True)
        scaled = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
        by_channel = w[f"{name}.weight"][:, None, None], w[f"{name}.bias"][:, None, None]
        return scaled.reshape(h.shape) * by_channel[0] + by_channel[1]

    def swish(h: Tensor) -> Tensor:
        return h * h.sigmoid()

    def halved(h: Tensor, kernel: Tensor, margin: int) -> Tensor:
        """Each second window of the image with a margin of zeros, summed under the kernel."""
        windows = F.pad(h, [margin] * 4).unfold(2, len(kernel), 2).unfold(3, len(kernel), 2)
        return (windows * kernel).sum((4, 5))

    def doubled(h: Tensor, kernel: Tensor) -> Tensor:
        """The image with zeros between its pixels, summed under four times the kernel."""
        taps = len(kernel)
        apart = h.new_zeros(*h.shape[:2], 2 * h.shape[2], 2 * h.shape[3])
        apart[:, :, ::2, ::2] = h
        # The kernels are symmetric; the first pixel's window begins half the taps before it.
        padded = F.pad(apart, [taps // 2, taps // 2 - 1] * 2)
        return (padded.unfold(2, taps, 1).unfold(3, taps, 1) * 4 * kernel).sum((4, 5))

    def block(name: str, h: Tensor) -> Tensor:
        def resampled(h: Tensor) -> Tensor:
            if name.endswith("_down"):
                kernel = w[f"{name}.conv0.resample_filter"][0, 0]
                return halved(h, kernel, len(kernel) // 2 - 1)
            if name.endswith("_up"):
                return doubled(h, w[f"{name}.conv0.resample_filter"][0, 0])
            return h

        inner = convolved(f"{name}.conv0", resampled(swish(norm(f"{name}.norm0", h))))
        inner = inner + linear(f"{name}.affine", emb)[:, :, None, None]
        inner = convolved(f"{name}.conv1", swish(norm(f"{name}.norm1", inner)))
        h = resampled(h)
        h = (convolved(f"{name}.skip", h) if f"{name}.skip.weight" in w else h) + inner
        h = h / math.sqrt(2)
        if f"{name}.qkv.weight" not in w:
            return h
        three = convolved(f"{name}.qkv", norm(f"{name}.norm2", h)).unflatten(1, (-1, 3)).flatten(3)
        q, k, v = three.unbind(2)
        match = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(h.shape[1])
        mixed = torch.einsum("bij,bcj->bci", match.softmax(2), v).reshape(h.shape)
        return (h + convolved(f"{name}.proj", mixed)) / math.sqrt(2)

    half = w["map_layer0.weight"].shape[1] // 2
    rates = 10000 ** (-torch.arange(half, dtype=z.dtype) / (half - 1))
    if "map_noise.freqs" in w:
        rates = 2 * math.pi * w["map_noise.freqs"]
    angles = time[:, None] * rates
    emb = torch.cat([angles.sin(), angles.cos()], 1)
    if one_hot is not None:
        emb = emb + linear("map_label", one_hot * math.sqrt(one_hot.shape[1]))
    emb = swish(linear("map_layer1", swish(linear("map_layer0", emb))))
    blocks = {name.split(".")[1]: None for name in w if name.startswith("enc.")}
    kept, image = [], z
    for name in blocks:
        place = f"enc.{name}"
        if name.endswith("_conv"):
            kept.append(convolved(place, z))
        elif name.endswith("_residual"):
            kernel = w[f"{place}.resample_filter"][0, 0]
            wide = F.conv2d(image, w[f"{place}.weight"], padding=len(kernel) // 2)
            joined = halved(wide, kernel, 0) + w[f"{place}.bias"][:, None, None]
            image = kept[-1] = (kept[-1] + joined) / math.sqrt(2)
        else:
            kept.append(block(place, kept[-1]))
    h = kept[-1]
    for name in {name.split(".")[1]: None for name in w if name.startswith("dec.")}:
        if "_block" in name:
            h = torch.cat([h, kept.pop()], 1)
        if "_aux" not in name:
            h = block(f"dec.{name}", h)
    place = f"dec.{name.split('_')[0]}_aux"
    return convolved(f"{place}_conv", swish(norm(f"{place}_norm", h)))


def edm_denoised(
    w: dict[str, Tensor], y: Tensor, sigma: float, one_hot: Tensor | None, sigma_data: float = 0.5
) -> Tensor:
    """The estimate of the image in `y = x + sigma n`: [EDM], eq. 7 and table 1."""
    total = sigma**2 + sigma_data**2
    # EDM's code has the time in float32.
    time = torch.full((len(y),), math.log(sigma) / 4).to(y.dtype)
    output = edm_output(w, y / math.sqrt(total), time, one_hot)
    return sigma_data**2 / total * y + sigma * sigma_data / math.sqrt(total) * output


# ---- the format -------------------------------------------------------------------------------


class EasyDict(dict[str, Any]):
    """As `dnnlib.EasyDict`: a dict of EDM's own class."""


class Persistent(nn.Module):
    """A module as `torch_utils.persistence` pickles it: with the source text of its class."""

    def __init__(self, class_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.class_name, self._init_args, self._init_kwargs = class_name, (), EasyDict(kwargs)

    def __reduce__(self) -> Any:
        meta = {"type": "class", "version": 6, "module_src": SOURCE}
        meta |= {"class_name": self.class_name, "state": dict(self.__dict__)}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


def _reconstruct_persistent_obj(meta: Any) -> Any:
    """Where EDM's own code would execute the source text."""
    raise AssertionError(meta["class_name"])


def song_unet(arguments: dict[str, Any], weights: dict[str, Tensor]) -> Persistent:
    """The modules that hold these weights."""
    kwargs = {name: value for name, value in arguments.items() if name != "model_type"}
    network = Persistent("SongUNet", **kwargs)
    for name, value in weights.items():
        *path, last = name.split(".")
        module: nn.Module = network
        for depth, part in enumerate(path):
            if part not in module._modules:
                own = nn.ModuleDict() if part in ("enc", "dec") and depth == 0 else None
                module.add_module(part, Persistent("Part") if own is None else own)
            module = module._modules[part]  # type: ignore[assignment]
        if last in ("resample_filter", "freqs"):
            module.register_buffer(last, value)
        else:
            module.register_parameter(last, nn.Parameter(value, requires_grad=False))
        if last == "weight":
            module.skip_scale = np.sqrt(0.5)  # theirs has numbers of NumPy too
    return network


def save_edm(
    path: Path,
    arguments: dict[str, Any],
    weights: dict[str, Tensor],
    kind: str = "EDMPrecond",
    change: Callable[[nn.Module], None] = lambda network: None,
    **content: Any,
) -> Path:
    """A `network-snapshot-*.pkl`, as EDM's training loop writes it."""
    given = {**PRECONDITIONING, **content.pop("preconditioning", {})}
    outer = Persistent(kind, img_channels=arguments["in_channels"], **arguments, **given)
    for name, value in given.items():
        setattr(outer, name, value)
    outer.model = song_unet(arguments, weights)
    change(outer.model)
    loss = Persistent("EDMLoss", P_mean=-1.2)
    data = {"ema": outer, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": {"path": "x"}}
    modules = {name: ModuleType(name) for name in ("torch_utils.persistence", "dnnlib.util")}
    found = {"_reconstruct_persistent_obj": _reconstruct_persistent_obj, "EasyDict": EasyDict}
    for module, (name, thing) in zip(modules.values(), found.items(), strict=True):
        setattr(module, name, thing)
    packages = {name: ModuleType(name) for name in ("torch_utils", "dnnlib")}
    with (
        patch.dict(sys.modules, {**packages, **modules}),
        patch.object(EasyDict, "__module__", "dnnlib.util"),
        patch.object(_reconstruct_persistent_obj, "__module__", "torch_utils.persistence"),
    ):
        path.write_bytes(pickle.dumps(OrderedDict(data) | content))
    return path
