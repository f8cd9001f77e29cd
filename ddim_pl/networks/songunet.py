"""The U-Net of [SDE] as [EDM] have it: DDPM++ and NCSN++.

As in `UNet`, a way down and a way up of residual blocks, and every output of the way down is a
skip connection:

    h_0 = conv(z),  h_{k+1} = block_k(h_k, e),  g = block([g, h_k], e) with k decreasing.

What differs: levels are resampled within blocks, by a filter; every sum is scaled by sqrt(1/2); on
the way up only the last block of a level attends; and in NCSN++ the image joins the way down at
every level, filtered to its size. The embedding `e` is of the logarithm of the noise, by sines of
geometric frequencies (DDPM++) or of random ones (NCSN++), to which the class is added.
"""

import inspect
import math
from collections.abc import Callable, Sequence
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
from ddim_pl.networks.unet import (
    GroupNorm,
    SelfAttention,
    check_inputs,
    check_null_class,
)

__all__ = ["SongUNet"]

Embedding = Literal["positional", "fourier"]
Encoder = Literal["standard", "residual"]

_EPS = 1e-6
_HALF = math.sqrt(0.5)
# Most groups of a norm, and fewest channels in one.
_MOST_GROUPS, _FEWEST_CHANNELS = 32, 4


class SongUNet(nn.Module):
    """U-Net of [EDM], section 5 and appendix F, for 32x32 and 64x64 images.

    The defaults are DDPM++ for CIFAR-10. NCSN++ has `embedding="fourier", time_width=256,
    encoder="residual", resample_filter=(1, 3, 3, 1)`; at 64x64 both have `multipliers=(1, 2, 2,
    2)`.

    Args:
        image_size: Height and width of the images; a multiple of `2 ** (len(multipliers) - 1)`.
        in_channels: Channels of the input.
        out_channels: Channels of the output; as many as `in_channels` if None.
        channels: Base width; a multiple of 4.
        multipliers: Width of each level in units of `channels`, from the finest level down.
        num_blocks: Residual blocks of a level on the way down; the way up has one more.
        attention: Resolutions with attention, after every block on the way down and after the last
            on the way up. The middle always has attention.
        dropout: Probability in [0, 1) of dropping an activation in every residual block.
        num_classes: Number of classes; None for a network without labels.
        null_class: Whether number `num_classes` is the null class, for no label: a one-hot label
            of zeros, which takes no weights.
        num_augment_labels: Numbers that tell how an image was changed in training, 9 for
            `ddim_pl.training.augmentation`; None for a network that is not told.
        embedding: "positional" (DDPM++) or "fourier" (NCSN++), of frequencies drawn once.
        time_width: Width of that embedding, even, at least 4; `channels` if None.
        embedding_width: Width of the embedding that enters the blocks; `4 * channels` if None.
        encoder: "standard" (DDPM++), or "residual" (NCSN++): the image joins at every level.
        resample_filter: Filter along each axis, of even length: (1, 1) is the mean of two pixels
            and nearest neighbours, (1, 3, 3, 1) a tent.
        guidance_range: The lowest and the highest weight of guidance that the network takes as an
            input, 1 among them, see `UNet`; None for a network without that input.

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
        multipliers: Sequence[int] = (2, 2, 2),
        num_blocks: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.13,
        num_classes: int | None = None,
        null_class: bool = False,
        num_augment_labels: int | None = None,
        embedding: Embedding = "positional",
        time_width: int | None = None,
        embedding_width: int | None = None,
        encoder: Encoder = "standard",
        resample_filter: Sequence[float] = (1, 1),
        guidance_range: Sequence[float] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _ARGUMENTS}
        lists = {name: [*given[name]] for name in ("multipliers", "attention", "resample_filter")}
        weights = None if guidance_range is None else read_guidance_range(guidance_range)
        super().__init__()
        self.init_args: dict[str, Any] = {**given, **lists, "guidance_range": weights}
        _check_arguments(self.init_args)
        self.image_size: Final = image_size
        self.guidance_range: Final = weights
        self.in_channels: Final = in_channels
        self.out_channels: Final = in_channels if out_channels is None else out_channels
        self.num_classes: Final = num_classes
        self.null_class: Final = null_class
        self.num_augment_labels: Final = num_augment_labels
        time_width, emb_width = time_width or channels, embedding_width or 4 * channels
        self._build_embedding(time_width, emb_width)
        self._build(channels, [channels * each for each in multipliers], emb_width)
        self.apply(_initialise)
        self.guidance_in = guidance_input(self.init_args, time_width, time_width)

    def _build_embedding(self, width: int, emb_width: int) -> None:
        """Create what embeds the time, the class and the augmentation."""
        is_fourier = self.init_args["embedding"] == "fourier"
        self.time: nn.Module = FourierEmbedding(width) if is_fourier else Sinusoid(width)
        self.class_in = _linear(self.num_classes, width)
        self.augment_in = _linear(self.num_augment_labels, width, bias=False)
        self.emb_in = nn.Linear(width, emb_width)
        self.emb_out = nn.Linear(emb_width, emb_width)

    def _build(self, channels: int, widths: list[int], emb_width: int) -> None:
        """Create the two ways and the middle.

        Args:
            channels: Width of the first skip connection.
            widths: Width of each level, the finest first.
            emb_width: Width of the embedding.
        """
        args = self.init_args
        taps, dropout = args["resample_filter"], args["dropout"]
        attends = [self.image_size >> level in args["attention"] for level in range(len(widths))]

        def block(before: int, after: int, attention: bool = False, scale: float = 1) -> Block:
            resample = None if scale == 1 else _resampling(taps, up=scale > 1)
            return Block(before, after, emb_width, dropout, attention, resample)

        self.conv_in = nn.Conv2d(self.in_channels, channels, 3, padding=1)
        self.down, self.joins, kept = nn.ModuleList(), nn.ModuleList(), [channels]
        of_image = self.in_channels
        for level, width in enumerate(widths):
            if level > 0:
                self.down.append(block(kept[-1], kept[-1], scale=1 / 2))
                kept.append(kept[-1])
                if args["encoder"] == "residual":
                    self.joins.append(Join(of_image, kept[-1], taps))
                    of_image = kept[-1]
            for _ in range(args["num_blocks"]):
                self.down.append(block(kept[-1], width, attends[level]))
                kept.append(width)
        below = kept[-1]
        self.middle = nn.ModuleList([block(below, below, True), block(below, below)])
        self.up = nn.ModuleList()
        for level, width in reversed([*enumerate(widths)]):
            if level < len(widths) - 1:
                self.up.append(block(below, below, scale=2))
            for i in range(args["num_blocks"] + 1):
                is_last = i == args["num_blocks"]
                self.up.append(block(below + kept.pop(), width, is_last and attends[level]))
                below = width
        self.norm_out = _norm(below)
        self.conv_out = nn.Conv2d(below, self.out_channels, 3, padding=1)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        augment: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Map images, each with its time, to images of the same size.

        Args:
            z: Images of variance about 1, (B, in_channels, image_size, image_size).
            t: Times, (B,); in EDM a quarter of the logarithm of the noise.
            label: Classes in 0..num_classes - 1, or num_classes for the null class, (B,) int64;
                None if the network has no classes.
            augment: How the images were changed, (B, num_augment_labels); None, as zeros, for
                images as they are.
            guidance: Weights of guidance, (B,); None if the network has no `guidance_range`.

        Returns:
            (B, out_channels, image_size, image_size).

        Raises:
            ValueError: If a shape is wrong, or a label is missing or unexpected.
        """
        shape = (self.in_channels, self.image_size, self.image_size)
        check_inputs(z, t, label, shape, self.num_classes)
        check_guidance(guidance, self.guidance_range, z)
        emb = self._embedding(t, label, self._told(z, augment), guidance)
        kept, image, joins = [self.conv_in(z)], z, iter(self.joins)
        for block in self.down:
            h = block(kept[-1], emb)
            if self.joins and block.resample is not None:
                h = image = (h + next(joins)(image)) * _HALF
            kept.append(h)
        h = kept[-1]
        for block in self.middle:
            h = block(h, emb)
        for block in self.up:
            if block.resample is None:  # a resampling block has no skip connection
                h = torch.cat([h, kept.pop()], dim=1)
            h = block(h, emb)
        output: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return output

    def _told(self, z: Tensor, augment: Tensor | None) -> Tensor | None:
        """Labels of augmentation, (B, num_augment_labels), if the network has some."""
        if self.num_augment_labels is None and augment is None:
            return None
        shape = len(z), self.num_augment_labels or 0
        if augment is not None and augment.shape != shape:
            raise ValueError(
                f"augment must have shape {shape}, as num_augment_labels says, got "
                f"{tuple(augment.shape)}"
            )
        # Zeros reach the weights too: to DDP all take part.
        return z.new_zeros(shape) if augment is None else augment

    def _embedding(
        self,
        t: Tensor,
        label: Tensor | None,
        augment: Tensor | None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """What enters the blocks, (B, E)."""
        emb = self.time(t).to(self.emb_in.weight.dtype)
        if self.class_in is not None and label is not None:
            table = self.class_in.weight.T
            if self.null_class:
                table = F.pad(table, (0, 0, 0, 1))
            # That of one-hot labels of variance 1.
            rows = F.embedding(label, table) * math.sqrt(self.class_in.in_features)
            emb = emb + (rows + self.class_in.bias)
        if self.augment_in is not None and augment is not None:
            emb = emb + self.augment_in(augment.to(emb.dtype))
        if self.guidance_in is not None and guidance is not None:
            emb = emb + self.guidance_in(guidance)
        return F.silu(self.emb_out(F.silu(self.emb_in(emb))))


class Block(nn.Module):
    """Two convolutions and a shortcut, then attention or nothing; sums are scaled by sqrt(1/2)."""

    def __init__(
        self,
        in_width: int,
        width: int,
        emb_width: int,
        dropout: float,
        attends: bool,
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = _norm(in_width)
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1)
        self.emb_proj = nn.Linear(emb_width, width)
        self.norm2 = _norm(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        projects = resample is not None or in_width != width
        self.shortcut = nn.Conv2d(in_width, width, 1) if projects else nn.Identity()
        self.attention = (
            SelfAttention(width, num_heads=1, groups=_groups(width)) if attends else None
        )

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """Map (B, C, H, W) and the embedding (B, E) to (B, C', H', W')."""
        residual = F.silu(self.norm1(h))
        if self.resample is not None:
            h, residual = self.resample(h), self.resample(residual)
        residual = self.conv1(residual) + self.emb_proj(emb)[:, :, None, None]
        residual = self.conv2(self.dropout(F.silu(self.norm2(residual))))
        h = (self.shortcut(h) + residual) * _HALF
        return h if self.attention is None else self.attention(h) * _HALF


class Resample(nn.Module):
    """Half or double height and width by a separable filter of even length.

    Args:
        taps: The filter along each axis; its sum does not matter.
        up: Whether to double.
        padding: Zeros around the image; by default as many as keep the size exact.
    """

    def __init__(self, taps: Sequence[float], *, up: bool, padding: int | None = None) -> None:
        super().__init__()
        along = torch.tensor([float(tap) for tap in taps])
        # Between two pixels lie zeros: what is missing in the sum.
        gain = 4 if up else 1
        kernel = gain * along[:, None] * along / along.sum().square()
        self.register_buffer("kernel", kernel, persistent=False)
        self.up, self.padding = up, (len(taps) - 1) // 2 if padding is None else padding

    kernel: Tensor

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H / 2, W / 2) or (B, C, 2 H, 2 W)."""
        width = h.shape[1]
        kernel = self.kernel.to(h.dtype).expand(width, 1, -1, -1)
        resampled = F.conv_transpose2d if self.up else F.conv2d
        return resampled(h, kernel, stride=2, padding=self.padding, groups=width)


class Join(nn.Module):
    """The image, or its last join, as a summand of the next level: convolved, then halved."""

    def __init__(self, in_width: int, width: int, taps: Sequence[float]) -> None:
        super().__init__()
        # All zeros lie around the convolution: its outer values are filtered too.
        self.padding = 1 + (len(taps) - 1) // 2
        self.conv = nn.Conv2d(in_width, width, 3)
        self.halve = Resample(taps, up=False, padding=0)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / 2, W / 2)."""
        assert self.conv.bias is not None
        convolved = F.conv2d(image, self.conv.weight, padding=self.padding)
        return self.halve(convolved) + self.conv.bias[:, None, None]


class Sinusoid(nn.Module):
    """`sinusoidal_embedding` of this width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        """Map times (B,) to (B, width)."""
        return sinusoidal_embedding(t, self.width)


class FourierEmbedding(nn.Module):
    """Sines, then cosines, of random frequencies of standard deviation 16 ([SDE], their code)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 16 * torch.randn(width // 2))

    frequencies: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FourierEmbedding":
        """Move to another device, but keep the precision: an angle is a product of hundreds."""
        kept = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = kept.to(self.frequencies.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        """Map times (B,) to (B, width), float32 or, for float64 times, float64."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        angles = t[:, None] * (2 * math.pi * self.frequencies.to(t.dtype))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def _groups(width: int) -> int:
    return min(_MOST_GROUPS, width // _FEWEST_CHANNELS)


def _resampling(taps: Sequence[float], *, up: bool) -> nn.Module:
    if [*taps] != [1, 1]:
        return Resample(taps, up=up)
    return nn.Upsample(scale_factor=2) if up else nn.AvgPool2d(2)


def _norm(width: int) -> GroupNorm:
    if width % _groups(width):
        raise ValueError(
            f"channels must give widths that {_MOST_GROUPS} groups divide, got a width of "
            f"{width}: use a multiple of 32, or narrow levels"
        )
    return GroupNorm(_groups(width), width, eps=_EPS)


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """Initialise as the code of [EDM]; for `Module.apply`, children come first.

    Uniform weights of variance 1 / fan_avg and zero biases, but almost zeros in the last layer of
    every residual branch and of the network.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, SelfAttention):
        module.qkv.weight *= math.sqrt(0.2)
        module.proj.weight *= 1e-5
    elif isinstance(module, Block):
        module.conv2.weight *= 1e-5
    elif isinstance(module, SongUNet):
        module.conv_out.weight *= 1e-5


_ARGUMENTS = set(inspect.signature(SongUNet.__init__).parameters) - {"self"}


def _linear(before: int | None, after: int, *, bias: bool = True) -> nn.Linear | None:
    return nn.Linear(before, after, bias=bias) if before else None


def _check_arguments(args: dict[str, Any]) -> None:
    """Check the constructor's arguments, each alone and then together."""
    counts = ["image_size", "in_channels", "out_channels", "num_blocks", "num_classes"]
    counts += ["num_augment_labels"]
    check_at_least(1, **{name: args[name] for name in [*counts, "embedding_width"]})
    check_null_class(args["null_class"], args["num_classes"])
    check_guidance_range(args["guidance_range"], args["num_classes"])
    check_one_of(Embedding, embedding=args["embedding"])
    check_one_of(Encoder, encoder=args["encoder"])
    if args["channels"] < 4 or args["channels"] % 4:
        raise ValueError(
            f"channels must be a multiple of 4, got {args['channels']}: a group of a norm has at "
            "least 4 channels"
        )
    time_width = args["time_width"]
    if time_width is not None and (time_width < 4 or time_width % 2):
        raise ValueError(
            f"time_width must be even and at least 4, got {time_width}: the embedding has as many "
            "sines as cosines"
        )
    if not 0 <= args["dropout"] < 1:
        raise ValueError(f"dropout must be in [0, 1), got {args['dropout']}: 0 turns it off")
    taps = args["resample_filter"]
    if not taps or len(taps) % 2 or sum(taps) <= 0:
        raise ValueError(
            f"resample_filter must have an even length and a positive sum, got {taps}: EDM has "
            "[1, 1] and [1, 3, 3, 1]"
        )
    _check_levels(args)


def _check_levels(args: dict[str, Any]) -> None:
    """Check that the image can be halved, levels with attention exist, and groups divide."""
    multipliers, size = args["multipliers"], args["image_size"]
    if not multipliers or min(multipliers) < 1:
        raise ValueError(
            f"multipliers must be one or more positive integers, got {multipliers}: give one per "
            "level, such as [2, 2, 2]"
        )
    factor = 2 ** (len(multipliers) - 1)
    if size % factor:
        raise ValueError(
            f"image_size must be a multiple of {factor} for {len(multipliers)} multipliers, got "
            f"{size}: use {factor * math.ceil(size / factor)}, or fewer multipliers"
        )
    resolutions = [size >> level for level in range(len(multipliers))]
    absent = [each for each in args["attention"] if each not in resolutions]
    if absent:
        raise ValueError(
            f"attention must be resolutions of the network, got {absent}: choose from "
            f"{resolutions}"
        )
