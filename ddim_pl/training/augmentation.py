"""Augmentation that does not leak into what is drawn ([EDM], appendix F.2; [ADA]).

Images are changed at random, and the network is told how; images are drawn with its labels at 0,
which stand for images as they are. An image is mirrored, turned upside down, scaled by
`2^(0.2 a)`, rotated, stretched by `2^(0.2 b)` along one direction and shrunk across, and shifted
by an eighth of its size times a normal number. What is no mirroring is made in one resampling: a
pixel `p` of the result is the pixel `G p` of the image, both counted from the centre, with

    G = scale^-1 rotation^-1 stretch^-1 shift^-1.

Against aliasing it is sampled at twice the resolution, to which an orthogonal wavelet's low-pass
filter leads and from which it leads back, so that what is not changed comes out as it was.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddim_pl.scales import to_device, unsqueeze_like

NUM_LABELS = 9
"""Numbers that tell a network of a change."""

SCALE, SHIFT = 0.2, 0.125
"""Standard deviations: of the binary logarithm of a scale, and of a shift in units of the size."""

# Low-pass filter of the wavelet "sym6" (Daubechies 1992, table 6.3).
FILTER = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
# Pixels around the result that its filter reads, and of padding on either side of the filter.
_HALO, _PADDING = len(FILTER) // 4, len(FILTER) // 2 - 1


class Change(NamedTuple):
    """What is done to B images; 0 everywhere does nothing.

    Attributes:
        mirror: Whether left and right are exchanged, `(B,)`, 0 or 1.
        flip: Whether top and bottom are.
        scale: `a`, where images become `2^(0.2 a)` times as large.
        angle: Of the rotation, in radians.
        stretch: `b`, where they become `2^(0.2 b)` times as long in a direction.
        direction: The angle of that direction.
        shift: To the right and down, `(B, 2)` in units of an eighth of the size.
    """

    mirror: Tensor
    flip: Tensor
    scale: Tensor
    angle: Tensor
    stretch: Tensor
    direction: Tensor
    shift: Tensor

    @property
    def labels(self) -> Tensor:
        """What a network is told, `(B, NUM_LABELS)`, in the order of the authors' code."""
        turned = self.angle.cos() - 1, self.angle.sin()
        along = self.stretch * self.direction.cos(), self.stretch * self.direction.sin()
        columns = self.mirror, self.flip, self.scale, *turned, *along, *self.shift.T
        return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the images in training, for a network with `num_augment_labels=9`.

    Args:
        probability: Of each change but the mirroring, which is done to every second image; in
            (0, 1]. [EDM], table 7, has 0.12 for CIFAR-10 and 0.15 at 64x64.

    Raises:
        ValueError: If the probability is out of range.
    """

    probability: float

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise ValueError(
                f"augment_probability must lie in [0, 1], got {self.probability}: EDM has 0.12, "
                "and 0 leaves images as they are"
            )

    def __call__(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Changed images `(B, C, H, W)` and their labels `(B, 9)`, both in the dtype of `x`.

        Args:
            x: Images.
            generator: Source of randomness, on the CPU.
        """
        drawn = self.draw(len(x), generator)
        return change_images(x, drawn), to_device(drawn.labels.to(x.dtype), x)

    def draw(self, count: int, generator: torch.Generator) -> Change:
        """Changes of `count` images, float64 on the CPU."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=generator, dtype=torch.float64)

        def normal(*shape: int) -> Tensor:
            return torch.randn(count, *shape, generator=generator, dtype=torch.float64)

        def at_times(values: Tensor, probability: float = self.probability) -> Tensor:
            return values * unsqueeze_like((uniform() < probability).double(), values)

        def angle() -> Tensor:
            return (uniform() * 2 - 1) * math.pi

        return Change(
            mirror=(uniform() < 0.5).double(),
            flip=at_times((uniform() < 0.5).double()),
            scale=at_times(normal()),
            angle=at_times(angle()),
            stretch=at_times(normal()),
            direction=at_times(angle(), 0.5),
            shift=at_times(normal(2)),
        )


def change_images(x: Tensor, change: Change) -> Tensor:
    """Images `(B, C, H, W)` after a change; beyond their borders they are mirrored.

    The padding is as wide as the farthest corner of the batch asks, but no wider than the image;
    beyond it is 0, as in the authors' code.
    """
    flipped = torch.where(unsqueeze_like(change.mirror, x) > 0, x.flip(3), x)
    flipped = torch.where(unsqueeze_like(change.flip, x) > 0, flipped.flip(2), flipped)
    size = x.shape[3], x.shape[2]
    matrix = _matrix(change, size)
    left, right, top, bottom = _margins(matrix, size)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        fine = F.pad(flipped.float(), (left, right, top, bottom), mode="reflect")
        fine = _double(_double(fine, 3), 2)
        centre = _shift(torch.tensor([(left - right) / 2, (top - bottom) / 2]))
        # Pixel k becomes pixel 2 k, half a pixel beside the middle of 2 k and 2 k + 1.
        half = _shift(torch.tensor([-0.5, -0.5]))
        matrix = half @ _scale(2.0, 2.0) @ centre @ matrix @ _scale(0.5, 0.5) @ half.inverse()
        shape = [2 * (each + 2 * _HALO) for each in size]
        # As torch has it, from -1 to 1 in both images.
        into = _scale(2 / fine.shape[3], 2 / fine.shape[2])
        theta = (into @ matrix @ _scale(shape[0] / 2, shape[1] / 2))[:, :2]
        whole = [*x.shape[:2], shape[1], shape[0]]
        grid = F.affine_grid(to_device(theta.float(), x), whole, align_corners=False)
        fine = F.grid_sample(fine, grid, align_corners=False)
        coarse = _halve(_halve(fine, 3), 2)
    return coarse[:, :, _HALO:-_HALO, _HALO:-_HALO].to(x.dtype)


def _matrix(change: Change, size: tuple[int, int]) -> Tensor:
    """`G`, `(B, 3, 3)`, in pixels from the centre."""
    scale, stretch = (torch.exp2(SCALE * each) for each in (change.scale, change.stretch))
    shift = change.shift * SHIFT * torch.tensor(size)
    matrix = _scale(1 / scale, 1 / scale) @ _rotation(change.angle) @ _rotation(-change.direction)
    return matrix @ _scale(1 / stretch, stretch) @ _rotation(change.direction) @ _shift(-shift)


def _margins(matrix: Tensor, size: tuple[int, int]) -> list[int]:
    """Pixels that the images need on the left, right, top and bottom."""
    width, height = size
    x, y = (width - 1) / 2, (height - 1) / 2
    corners = torch.tensor([[-x, x, x, -x], [-y, -y, y, y], [1.0] * 4], dtype=torch.float64)
    found = (matrix @ corners)[:, :2].transpose(0, 1).flatten(1)
    ends = torch.stack([-found.amin(1), found.amax(1)], dim=1)
    centre, most = torch.tensor([[x], [y]]), torch.tensor([[width - 1], [height - 1]])
    margins = (ends - centre + 2 * _HALO).clamp(min=0).minimum(most)
    return [int(each) for each in margins.ceil().flatten()]


def _double(images: Tensor, axis: int) -> Tensor:
    """Twice as many pixels along an axis."""
    return F.conv_transpose2d(images, **_filter(images, axis))


def _halve(images: Tensor, axis: int) -> Tensor:
    """Half as many pixels along an axis."""
    return F.conv2d(images, **_filter(images, axis))


def _filter(images: Tensor, axis: int) -> dict[str, Any]:
    """Arguments of a convolution of each channel along an axis."""
    channels, taps = images.shape[1], images.new_tensor(FILTER)
    kernel, stride, padding = taps[:, None], (2, 1), (_PADDING, 0)
    if axis == 3:
        kernel, stride, padding = kernel.T, stride[::-1], padding[::-1]
    weight = kernel.expand(channels, 1, -1, -1)
    return {"weight": weight, "stride": stride, "padding": padding, "groups": channels}


def _rows(*rows: tuple[float | Tensor, ...]) -> Tensor:
    """Matrices `(..., 3, 3)` with the last row (0, 0, 1)."""
    entries = [torch.as_tensor(each, dtype=torch.float64) for row in rows for each in row]
    entries += [torch.tensor(each, dtype=torch.float64) for each in (0.0, 0.0, 1.0)]
    return torch.stack(torch.broadcast_tensors(*entries), dim=-1).unflatten(-1, (3, 3))


def _scale(x: float | Tensor, y: float | Tensor) -> Tensor:
    return _rows((x, 0.0, 0.0), (0.0, y, 0.0))


def _rotation(angle: Tensor) -> Tensor:
    return _rows((angle.cos(), -angle.sin(), 0.0), (angle.sin(), angle.cos(), 0.0))


def _shift(shift: Tensor) -> Tensor:
    return _rows((1.0, 0.0, shift[..., 0]), (0.0, 1.0, shift[..., 1]))
