"""From a photograph of any shape to a square of a given size."""

from dataclasses import dataclass
from typing import Literal

from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from ddim_pl.checks import check_one_of

Resample = Literal["bilinear", "bicubic", "lanczos", "box"]


@dataclass(frozen=True)
class Squaring:
    """How the central square of an image is resized, bit for bit as by torchvision.

    The shorter side is resized to `image_size`, then the centre is cropped, by whole pixels:
    torchvision's `Resize` and `CenterCrop`, which are what the code of [DDIM] loads LSUN with. An
    image whose shorter side has that size is only cropped.

    Args:
        resample: Filter to resize with, antialiased. [DDIM] and [PD] have "bilinear"; "box" is the
            mean of an area.
        crop_first: Whether the square is cropped before it is resized, as in the code of [PD].
            Otherwise the longer side is rounded to whole pixels in between, which stretches the
            image by less than a pixel.

    Raises:
        ValueError: If the filter is unknown.
    """

    resample: Resample = "bilinear"
    crop_first: bool = False

    def __post_init__(self) -> None:
        check_one_of(Resample, resample=self.resample)

    def __call__(self, image: Image.Image, image_size: int) -> Image.Image:
        """Return the square of `image_size` by `image_size` pixels."""
        if self.crop_first:
            image = center_crop(image, min(image.size))
        image = resize(image, image_size, InterpolationMode(self.resample), antialias=True)
        return center_crop(image, image_size)
