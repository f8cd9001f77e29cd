"""The U-Net of DDPM ([DDPM]) and its FiLM variant ([PD]).

The down path is a sequence of levels of residual blocks, each level half the size of the one
before; the up path reverses it. Every output of the down path, resampled ones included, is a skip
connection to the up path:

    h_0 = conv(z),  h_{k+1} = block_k(h_k, e),  g = block([g, h_k], e) with k decreasing.

The embedding `e = silu(W_2 silu(W_1 sinusoid(t)) + table[label])` enters every block; attention
follows the blocks at some resolutions. The caller chooses what `t` is (an index, a function of
the log-SNR).
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim_pl.checks import check_at_least, check_one_of
from ddim_pl.networks.guidance_input import (
    check_guidance,
    check_guidance_range,
    guidance_input,
    read_guidance_range,
)
from ddim_pl.networks.sinusoid import sinusoidal_embedding

__all__ = ["UNet"]

Resample = Literal["conv", "block"]
Initialisation = Literal["xavier", "lecun", "torch"]

# That of every GroupNorm in the code of both papers; torch's default is 1e-5.
_EPS = 1e-6
# Standard deviation of the standard normal law cut at -2 and 2, by which flax divides, as does
# `jax.nn.initializers.variance_scaling`.
_STD_OF_CUT_NORMAL = 0.87962566103423978


class UNet(nn.Module):
    """U-Net with a time embedding and an optional class embedding.

    The defaults are the CIFAR-10 network of [DDPM], appendix B. That of Salimans & Ho
    (2022) has `channels=256, multipliers=(1, 1, 1), num_blocks=3, attention=(8, 16), dropout=0.2,
    scale_shift=True, resample="block", initialisation="lecun"`; theirs for LSUN at 128x128 also
    needs `embedding_width=768, head_width=64`, see `configs/lsun_bedroom/teacher.yaml`.

    Args:
        image_size: Height and width of the images; a multiple of
            `patch_size * 2 ** (len(multipliers) - 1)`.
        in_channels: Channels of the input.
        out_channels: Channels of the output; as many as `in_channels` if None.
        channels: Base width, and width of the sinusoidal embedding; even, at least 4.
        multipliers: Width of each level in units of `channels`, from the finest level down.
        num_blocks: Residual blocks of a level on the down path; the up path has one more.
        attention: Resolutions with attention after every block. The middle always has attention.
        num_heads: Attention heads; divides the width of every level. 1 if neither this nor
            `head_width` is given.
        head_width: Channels of an attention head instead of their number, so that wider levels
            have more heads; divides the width of every level with attention and of the middle.
        dropout: Probability in [0, 1) of dropping an activation in every residual block.
        num_classes: Number of classes; None for a network without labels.
        null_class: Whether there is one class more, number `num_classes`, for no label: what
            guidance needs, see `ddim_pl.guidance`.
        guidance_range: The lowest and the highest weight of guidance that the network takes as an
            input, 1 among them, see `ddim_pl.training.GuidanceDistillation`, which gives it to its
            student; None for a network without that input.
        scale_shift: Whether the embedding scales and shifts a block's second norm (FiLM; Salimans
            & Ho) or is added before it (Ho et al.).
        resample: "conv" resamples with a convolution (Ho et al.); "block" within a residual
            block, by average pooling and nearest neighbours (Salimans & Ho).
        groups: Groups of every GroupNorm; divides the width of every level.
        embedding_width: Width of the time embedding that enters the blocks, after the sinusoidal
            one; `4 * channels` if None.
        initialisation: How weights are drawn. "xavier" is that of the code of [DDPM], uniform with
            variance 1 / fan_avg; "lecun" that of [PD], a normal law cut at two standard deviations
            with variance 1 / fan_in; both have zero biases, and zeros in the last layer of every
            residual branch and of the network. "torch" is PyTorch's own, as in the code of [DDIM].

        patch_size: Side of the patches of pixels that are one position of the finest level, with
            their pixels as its channels. With 2 every level has a quarter of the positions, and
            takes a quarter of the operations.

    Attributes:
        init_args: The constructor's arguments as plain data, for checkpoints.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        *,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 2,
        attention: Sequence[int] = (16,),
        num_heads: int | None = None,
        head_width: int | None = None,
        dropout: float = 0.1,
        num_classes: int | None = None,
        null_class: bool = False,
        scale_shift: bool = False,
        resample: Resample = "conv",
        groups: int = 32,
        embedding_width: int | None = None,
        initialisation: Initialisation = "xavier",
        patch_size: int = 1,
        guidance_range: Sequence[float] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _ARGUMENTS}
        weights = None if guidance_range is None else read_guidance_range(guidance_range)
        lists = {"multipliers": list(multipliers), "attention": list(attention)}
        super().__init__()
        self.init_args: dict[str, Any] = {**given, **lists, "guidance_range": weights}
        _check_arguments(self.init_args)
        self.image_size: Final = image_size
        self.in_channels: Final = in_channels
        self.out_channels: Final = in_channels if out_channels is None else out_channels
        self.num_classes: Final = num_classes
        self.null_class: Final = null_class
        self.patch_size: Final = patch_size
        self.guidance_range: Final = weights
        self._build(channels, multipliers, groups)

    def _build(self, channels: int, multipliers: Sequence[int], groups: int) -> None:
        """Create and initialise the layers; their order fixes the random numbers they get."""
        emb_width = self.init_args["embedding_width"] or 4 * channels
        self.time_in = nn.Linear(channels, emb_width)
        self.time_out = nn.Linear(emb_width, emb_width)
        classes = self.num_classes and self.num_classes + self.null_class
        self.class_table = nn.Embedding(classes, emb_width) if classes else None

        resolutions = _resolutions(self.init_args)
        levels = [
            (channels * multiplier, resolution)
            for multiplier, resolution in zip(multipliers, resolutions, strict=True)
        ]
        pixels = self.patch_size**2
        self.conv_in = nn.Conv2d(pixels * self.in_channels, channels, 3, padding=1)
        self.down, kept = self._down_path(channels, levels)
        width = kept[-1]
        self.middle = nn.ModuleList(
            [
                Stage(self._block(width, width), self._attention(width)),
                self._block(width, width),
            ]
        )
        self.up = self._up_path(levels, kept)
        self.norm_out = GroupNorm(groups, levels[0][0], eps=_EPS)
        self.conv_out = nn.Conv2d(levels[0][0], pixels * self.out_channels, 3, padding=1)
        draw = _DRAWS[self.init_args["initialisation"]]
        if draw is not None:
            self.apply(partial(_initialise, draw=draw))
        self.guidance_in = guidance_input(self.init_args, channels, emb_width)

    def _down_path(
        self, channels: int, levels: list[tuple[int, int]]
    ) -> tuple[nn.ModuleList, list[int]]:
        """Return the down path and the widths of its skip connections.

        Args:
            channels: Width of the first skip connection.
            levels: Width and resolution of each level, the finest first.
        """
        down, kept = nn.ModuleList(), [channels]
        for width, resolution in levels:
            if resolution < levels[0][1]:
                down.append(self._halve(kept[-1]))
                kept.append(kept[-1])
            for _ in range(self.init_args["num_blocks"]):
                down.append(self._stage(kept[-1], width, resolution))
                kept.append(width)
        return down, kept

    def _up_path(self, levels: list[tuple[int, int]], kept: list[int]) -> nn.ModuleList:
        """Return the up path, which takes the skip connections of widths `kept` from the last."""
        up, below, skips = nn.ModuleList(), kept[-1], reversed(kept)
        for width, resolution in reversed(levels):
            for _ in range(self.init_args["num_blocks"] + 1):
                up.append(self._stage(below + next(skips), width, resolution))
                below = width
            if resolution < levels[0][1]:
                up.append(self._double(width))
        return up

    def _stage(self, in_width: int, width: int, resolution: int) -> "Stage":
        attends = resolution in self.init_args["attention"]
        block = self._block(in_width, width)
        return Stage(block, self._attention(width) if attends else nn.Identity())

    def _halve(self, width: int) -> nn.Module:
        if self.init_args["resample"] == "block":
            return self._block(width, width, nn.AvgPool2d(2))
        return Downsample(width)

    def _double(self, width: int) -> nn.Module:
        if self.init_args["resample"] == "block":
            return self._block(width, width, nn.Upsample(scale_factor=2))
        return Upsample(width)

    def _block(
        self, in_width: int, width: int, resample: nn.Module | None = None
    ) -> "ResidualBlock":
        chosen = {name: self.init_args[name] for name in ("dropout", "scale_shift", "groups")}
        emb_width = self.time_in.out_features
        return ResidualBlock(in_width, width, resample, emb_width=emb_width, **chosen)

    def _attention(self, width: int) -> "SelfAttention":
        args = self.init_args
        num_heads = width // args["head_width"] if args["head_width"] else args["num_heads"] or 1
        return SelfAttention(width, num_heads=num_heads, groups=args["groups"])

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Map images, each with its time, to images of the same size.

        Args:
            z: Images, (B, in_channels, image_size, image_size).
            t: Times, (B,), in about [0, 1000].
            label: Classes in 0..num_classes - 1, or num_classes for the null class, (B,) int64;
                None if the network has no classes.
            guidance: Weights of guidance, (B,); None if the network has no `guidance_range`.

        Returns:
            (B, out_channels, image_size, image_size).

        Raises:
            ValueError: If a shape is wrong, or a label is missing or unexpected.
        """
        shape = (self.in_channels, self.image_size, self.image_size)
        check_inputs(z, t, label, shape, self.num_classes)
        check_guidance(guidance, self.guidance_range, z)
        emb = sinusoidal_embedding(t, self.time_in.in_features).to(self.time_in.weight.dtype)
        emb = self.time_out(F.silu(self.time_in(emb)))
        if self.class_table is not None:
            emb = emb + self.class_table(label)
        if self.guidance_in is not None and guidance is not None:
            emb = emb + self.guidance_in(guidance)
        emb = F.silu(emb)  # once here instead of in every block

        if self.patch_size > 1:
            z = F.pixel_unshuffle(z, self.patch_size)
        kept = [self.conv_in(z)]
        for step in self.down:
            kept.append(step(kept[-1], emb))
        h = kept[-1]
        for step in self.middle:
            h = step(h, emb)
        for step in self.up:
            if isinstance(step, Stage):  # a resampling step has no skip connection
                h = torch.cat([h, kept.pop()], dim=1)
            h = step(h, emb)
        output = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(output, self.patch_size) if self.patch_size > 1 else output


def check_null_class(null_class: bool, num_classes: int | None) -> None:
    """Check that only a network with classes has a null class.

    Raises:
        ValueError: If another has.
    """
    if null_class and num_classes is None:
        raise ValueError(
            "null_class must be False for a network without classes, got True: give num_classes"
        )


def check_inputs(
    z: Tensor,
    t: Tensor,
    label: Tensor | None,
    shape: tuple[int, int, int],
    num_classes: int | None,
) -> None:
    """Check the shapes of what a network is fed; to check values would wait for the device.

    Args:
        z: States `(B, C, H, W)`.
        t: Times `(B,)`.
        label: Classes `(B,)`, if the network has some.
        shape: `(C, H, W)` of the network.
        num_classes: Of the network.

    Raises:
        ValueError: If a shape is another, or labels are missing or given in vain.
    """
    if z.ndim != 4 or z.shape[1:] != shape:
        raise ValueError(f"z must have shape (B, *{shape}), got {tuple(z.shape)}")
    if (label is None) != (num_classes is None):
        raise ValueError(
            "label must be given if and only if the network has classes, got "
            f"{'none' if label is None else 'labels'} and num_classes={num_classes}"
        )
    for name, given in (("t", t), ("label", label)):
        if given is not None and given.shape != z.shape[:1]:
            raise ValueError(
                f"{name} must have shape ({z.shape[0]},), got {tuple(given.shape)}: give one per "
                "image"
            )


class GroupNorm(nn.GroupNorm):
    """As PyTorch's, but not by its slow kernel.

    On a CPU that takes four times as long for small bfloat16 images whose channels are last, as it
    takes in float32 with the conversions (PyTorch 2.15).
    """

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        small = h.shape[2:].numel() < 1024
        slow = h.dtype == torch.bfloat16 and h.device.type == "cpu" and small
        if not slow:
            return super().forward(h)
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(h.float(), self.num_groups, weight, bias, self.eps).to(h.dtype)


class Stage(nn.Module):
    """A residual block, then attention or nothing."""

    def __init__(self, block: "ResidualBlock", attention: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """Map (B, C, H, W) and the embedding (B, E) to (B, C', H, W)."""
        return self.attention(self.block(h, emb))


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut; the embedding enters between the convolutions.

    With `resample`, the inputs of the first convolution and of the shortcut are resampled
    ([PD], after BigGAN).
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        resample: nn.Module | None = None,
        *,
        emb_width: int,
        dropout: float,
        scale_shift: bool,
        groups: int,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(groups, in_width, eps=_EPS)
        self.resample = nn.Identity() if resample is None else resample
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1)
        self.emb_proj = nn.Linear(emb_width, 2 * width if scale_shift else width)
        self.norm2 = GroupNorm(groups, width, eps=_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Identity() if in_width == width else nn.Conv2d(in_width, width, 1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """Map (B, C, H, W) and the embedding (B, E) to (B, C', H', W')."""
        residual = self.conv1(self.resample(F.silu(self.norm1(h))))
        projected = self.emb_proj(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = projected.chunk(2, dim=1)
            residual = self.norm2(residual) * (1 + scale) + shift
        else:
            residual = self.norm2(residual + projected)
        residual = self.conv2(self.dropout(F.silu(residual)))
        return self.shortcut(self.resample(h)) + residual


class SelfAttention(nn.Module):
    """Self-attention over the pixels, added to its input."""

    def __init__(self, width: int, *, num_heads: int, groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm(groups, width, eps=_EPS)
        # The paper's 1x1 convolutions, as linear maps of pixels: the fused kernels need the
        # channels of a pixel to be contiguous in memory.
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        pixels = self.norm(h).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, HW, C / heads)
            for part in self.qkv(pixels).chunk(3, dim=2)
        )
        mixed = attend(q, k, v).transpose(1, 2).flatten(2)
        return h + self.proj(mixed).transpose(1, 2).unflatten(2, h.shape[2:])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention softmax(q k^T / sqrt(D)) v of (B, heads, N, D), by the fastest way there is.

    On a CPU the gradient of PyTorch's fused kernel takes two to six times as long in bfloat16 as
    that of the products by themselves (PyTorch 2.15).
    """
    if not (q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.float().softmax(-1).to(v.dtype) @ v


class Downsample(nn.Module):
    """Halve height and width with a strided convolution ([DDPM])."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H / 2, W / 2); the embedding is not used."""
        # TensorFlow's "same" padding, as in the paper's weights: right and bottom only.
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by nearest neighbours, then convolve ([DDPM])."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, 2 H, 2 W); the embedding is not used."""
        return self.conv(F.interpolate(h, scale_factor=2))


def _xavier(weight: Tensor) -> None:
    """Draw uniform weights of variance 1 / fan_avg."""
    nn.init.xavier_uniform_(weight)


def _lecun(weight: Tensor) -> None:
    """Draw weights of variance 1 / fan_in from a normal law cut at two standard deviations."""
    std = weight[0].numel() ** -0.5 / _STD_OF_CUT_NORMAL
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


_DRAWS: dict[Initialisation, Callable[[Tensor], None] | None] = {
    "xavier": _xavier,
    "lecun": _lecun,
    "torch": None,
}


@torch.no_grad()
def _initialise(module: nn.Module, draw: Callable[[Tensor], None]) -> None:
    """Initialise as the code of [DDPM] or [PD] does; for `Module.apply`, children come first.

    Biases are zero. The last layer of every residual branch and of the network is zero (1e-10 in
    the code of [DDPM]), so that all blocks start as the identity. The class table, which [DDPM]
    does not have, keeps torch's unit normal; in the code of [PD] it is a layer with one-hot input.
    """
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        draw(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding) and draw is _lecun:
        draw(module.weight.T)
    elif isinstance(module, ResidualBlock):
        nn.init.zeros_(module.conv2.weight)
    elif isinstance(module, SelfAttention):
        for weight in module.qkv.weight.chunk(3):  # three layers in one: their own fans
            draw(weight)
        nn.init.zeros_(module.proj.weight)
    elif isinstance(module, UNet):
        nn.init.zeros_(module.conv_out.weight)


_ARGUMENTS = set(inspect.signature(UNet.__init__).parameters) - {"self"}


def _check_arguments(args: dict[str, Any]) -> None:
    """Check the constructor's arguments, each alone and then together."""
    _check_ranges(args)
    _check_resolutions(args)
    _check_widths(args)


def _check_ranges(args: dict[str, Any]) -> None:
    """Check every argument that has a range of its own."""
    counts = ["image_size", "in_channels", "out_channels", "num_blocks", "num_heads", "head_width"]
    counts += ["num_classes", "groups", "embedding_width", "patch_size"]
    check_at_least(1, **{name: args[name] for name in counts})
    if args["channels"] < 4 or args["channels"] % 2:
        raise ValueError(
            f"channels must be even and at least 4, got {args['channels']}: the time embedding "
            "has as many sines as cosines"
        )
    if not args["multipliers"] or min(args["multipliers"]) < 1:
        raise ValueError(
            f"multipliers must be one or more positive integers, got {args['multipliers']}: "
            "give one per level, such as [1, 2, 2, 2]"
        )
    if not 0 <= args["dropout"] < 1:
        raise ValueError(f"dropout must be in [0, 1), got {args['dropout']}: 0 turns it off")
    check_null_class(args["null_class"], args["num_classes"])
    check_guidance_range(args["guidance_range"], args["num_classes"])
    check_one_of(Resample, resample=args["resample"])
    check_one_of(Initialisation, initialisation=args["initialisation"])


def _resolutions(args: dict[str, Any]) -> list[int]:
    """Height and width of each level, the finest first."""
    finest = args["image_size"] // args["patch_size"]
    return [finest >> level for level in range(len(args["multipliers"]))]


def _check_resolutions(args: dict[str, Any]) -> None:
    """Check that the image can be halved between levels, and that levels with attention exist."""
    levels = len(args["multipliers"])
    image_size, patch_size = args["image_size"], args["patch_size"]
    factor = patch_size * 2 ** (levels - 1)
    if image_size % factor:
        patches = f" and patch_size={patch_size}" if patch_size > 1 else ""
        most = ""
        if image_size % patch_size == 0:
            finest = image_size // patch_size
            # 1 + how often 2 divides it.
            most = f", or at most {(finest & -finest).bit_length()} multipliers"
        raise ValueError(
            f"image_size must be a multiple of {factor} for {levels} multipliers{patches}, got "
            f"{image_size}: use {factor * math.ceil(image_size / factor)}{most}"
        )
    resolutions = _resolutions(args)
    absent = [resolution for resolution in args["attention"] if resolution not in resolutions]
    if absent:
        raise ValueError(
            f"attention must be resolutions of the network, got {absent}: choose from "
            f"{resolutions}"
        )


def _check_widths(args: dict[str, Any]) -> None:
    """Check that groups and heads divide the width of every level."""
    widths = [args["channels"] * multiplier for multiplier in (1, *args["multipliers"])]
    attended = [
        width
        for width, resolution in zip(widths[1:], _resolutions(args), strict=True)
        if resolution in args["attention"]
    ]
    if args["num_heads"] is not None and args["head_width"] is not None:
        raise ValueError(
            f"num_heads must be left out where head_width is given, got {args['num_heads']} and "
            f"{args['head_width']}: a level has as many heads as its width holds"
        )
    for name, those in (
        ("groups", widths),
        ("num_heads", widths),
        ("head_width", [*attended, widths[-1]]),
    ):
        bad = [width for width in those if width % (args[name] or 1)]
        if bad:
            raise ValueError(
                f"{name} must divide the width of every level"
                f"{' with attention' if name == 'head_width' else ''}, got {args[name]} and "
                f"{bad[0]}: choose a divisor of {math.gcd(*those)}"
            )
