"""`main.py stats`: mean and covariance of images' features, to be measured against."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor, nn
from tqdm.auto import tqdm

from ddim_pl.checks import check_at_least
from ddim_pl.commands.measure import (
    becomes_gray,
    channels_of,
    device_of,
    make_extractor,
    tell_of_gray,
)
from ddim_pl.data.base import ImageDataModule
from ddim_pl.evaluation.measure import resize_of, weights_of
from ddim_pl.evaluation.sides import Side, open_side
from ddim_pl.files import check_writable
from ddim_pl.metrics.frechet import moments
from ddim_pl.metrics.quality import SampleQuality
from ddim_pl.metrics.statistics import FeatureStatistics


def stats(
    output: str,
    *,
    images: str | None = None,
    data: ImageDataModule | None = None,
    features: Callable[[], nn.Module] | None = None,
    weights: str | None = None,
    batch_size: int = 50,
    device: str | None = None,
) -> None:
    """Write the statistics of images' features as an NPZ file, to be measured against.

    It has `mu` and `sigma` as pytorch-fid and EDM read them, and says of which extractor, weights,
    resize and how many images.

    Args:
        output: File to write, ending in .npz; there must be none of this name.
        images: A folder of images, or an NPZ of images `arr_0`.
        data: A data module in place of that, whose training images are taken, none mirrored.
        features: Feature extractor; by default Inception-v3.
        weights: File of its weights, in place of a download.
        batch_size: Images that pass through the extractor at once.
        device: Such as "cpu" or "cuda"; by default a GPU if there is one.

    Raises:
        ValueError: If the images cannot be read, there are not both or none of `images` and
            `data`, or the file exists.
    """
    check_at_least(1, batch_size=batch_size)
    _check_file(output)
    if (images is None) == (data is None):
        raise ValueError(
            f"images or data must be given, one of the two, got images {images} and data "
            f"{type(data).__name__ if data is not None else None}"
        )
    side = None if images is None else _side_with_images(images)
    extractor = make_extractor(features, weights)
    quality = SampleQuality(extractor)
    count, shape, batches = _source(quality, side, data, batch_size)
    quality.check_num_real(count, "the number of images")
    quality.check_shape(shape)
    quality.to(device_of(device))
    quality.warn_of_few(num_real=count)
    tell_of_gray(quality, side)
    for each in tqdm(batches, total=-(-count // batch_size), desc="features", leave=False):
        quality.update(each, real=True)
    sums = quality.real_sums()
    mean, covariance = moments(sums["sum"], sums["outer"], sums["count"])
    FeatureStatistics(
        mean.cpu(),
        covariance.cpu(),
        num_images=count,
        extractor=quality.extractor.name,
        weights=weights_of(extractor),
        resize=resize_of(quality.extractor) or "none",
        images=_preparation(quality, side, data),
    ).write(Path(output))
    print(f"{output}: {len(mean)} features {quality.extractor.name} of {count} images")


def _preparation(quality: SampleQuality, side: Side | None, data: ImageDataModule | None) -> str:
    """What was done with the images before the extractor."""
    if side is not None and becomes_gray(quality, side):
        return "converted to gray"
    return (data.preparation if data is not None else "") or "as they are"


def _side_with_images(images: str) -> Side:
    side = open_side("images", images)
    if side.size is None:
        raise ValueError(f"images must be images, got statistics in {images}")
    return side


def _source(
    quality: SampleQuality, side: Side | None, data: ImageDataModule | None, batch_size: int
) -> tuple[int, tuple[int, int, int], Iterator[Tensor]]:
    """Number, shape and batches of the images."""
    if side is not None:
        assert side.size is not None
        channels = channels_of(quality)
        return side.num_images, (channels, *side.size), side.batches(batch_size, channels)
    assert data is not None
    data.prepare_data()
    data.setup("fit")
    return data.num_reference, data.shape, data.reference_images(0, 1, batch_size)


def _check_file(output: str) -> None:
    if not output.endswith(".npz"):
        raise ValueError(f"output must end in .npz, got {output!r}")
    if Path(output).exists():
        raise ValueError(f"output must be a new file, got {output!r}, which exists: give another")
    check_writable("output", Path(output).parent)
