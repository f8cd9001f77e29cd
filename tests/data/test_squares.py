"""Squares are torchvision's to the bit, and crops move no pixel."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from ddim_pl.data.squares import Squaring

FILTERS: tuple[Any, ...] = ("bilinear", "bicubic", "lanczos", "box")
SIZES = [(341, 256), (256, 343), (300, 300), (431, 257), (90, 101)]


def noise(width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(noise(width, height))


@pytest.mark.parametrize("crop_first", [False, True])
@pytest.mark.parametrize("resample", FILTERS)
def test_a_photograph_of_4_to_3_is_cropped_whole(resample: Any, crop_first: bool) -> None:
    """The crop that was here lay on half pixels: it kept 76 % of pixel differences."""
    found = np.array(Squaring(resample, crop_first)(picture(341, 256), 256))
    np.testing.assert_array_equal(found, noise(341, 256)[:, 42 : 42 + 256])
    expected = np.array(CenterCrop(256)(picture(341, 256)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("resample", FILTERS)
def test_squares_are_those_of_torchvision(resample: Any, size: tuple[int, int]) -> None:
    mode = InterpolationMode(resample)
    after = Compose([Resize(128, mode), CenterCrop(128)])
    before = Compose([CenterCrop(min(size)), Resize(128, mode)])
    for crop_first, theirs in ((False, after), (True, before)):
        found = Squaring(resample, crop_first)(picture(*size), 128)
        assert found.size == (128, 128)
        np.testing.assert_array_equal(np.array(found), np.array(theirs(picture(*size))))


def triangles(size: int, smaller: int) -> NDArray[np.float64]:
    """The matrix of antialiased bilinear reduction: triangles as wide as two new pixels."""
    scale = size / smaller
    centres = (np.arange(smaller) + 0.5) * scale
    distance = np.abs(np.arange(size) + 0.5 - centres[:, None]) / scale
    weights = np.clip(1 - distance, 0, None)
    return weights / weights.sum(1, keepdims=True)


def test_bilinear_is_antialiased() -> None:
    """A reduction by points instead of areas would be 30 grey levels away."""
    rows, columns = triangles(256, 100), triangles(256, 100)
    expected = np.einsum("ih,hwc,jw->ijc", rows, noise(256, 256).astype(np.float64), columns)
    found = np.array(Squaring()(picture(256, 256), 100))
    # Pillow rounds after each of the two directions.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.01)


def test_box_is_the_mean_of_an_area() -> None:
    expected = noise(64, 64).reshape(16, 4, 16, 4, 3).mean((1, 3))
    found = np.array(Squaring("box")(picture(64, 64), 16))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.01)


def test_tensorflows_crop_of_a_4_to_3_photograph_is_the_same() -> None:
    """[PD]'s loader begins at `width // 2 - height // 2`."""
    width, height = 341, 256
    left = width // 2 - height // 2
    cropped = Image.fromarray(noise(width, height)[:, left : left + height])
    expected = np.array(cropped.resize((128, 128), Image.Resampling.BILINEAR))
    found = np.array(Squaring(crop_first=True)(picture(width, height), 128))
    np.testing.assert_array_equal(found, expected)


def test_an_unknown_filter_is_refused() -> None:
    unknown: Any = "nearest"
    with pytest.raises(ValueError, match=r"resample must be one of \('bilinear', .*got 'nearest'"):
        Squaring(unknown)
    assert repr(Squaring()) == "Squaring(resample='bilinear', crop_first=False)"  # names the data
