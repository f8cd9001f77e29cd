"""`main.py measure`: how far two sets of images are from each other, without a model."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from tqdm.auto import tqdm

import ddim_pl
from ddim_pl.checks import check_at_least
from ddim_pl.damage import sealed
from ddim_pl.evaluation.measure import resize_of, weights_of
from ddim_pl.evaluation.sides import Side, open_side
from ddim_pl.evaluation.tables import write_text
from ddim_pl.files import check_writable
from ddim_pl.metrics.inception import InceptionFeatures
from ddim_pl.metrics.missing import otherwise
from ddim_pl.metrics.quality import OF_FEATURES, SampleQuality, check_metrics


def measure(
    a: str,
    b: str,
    *,
    features: Callable[[], nn.Module] | None = None,
    weights: str | None = None,
    metrics: Sequence[str] = ("fd",),
    batch_size: int = 50,
    device: str | None = None,
    seed: int = 0,
    output: str | None = None,
) -> None:
    """Measure the distance of two sets of images or of their statistics, without a model.

    Prints JSON: the numbers, and the extractor, its weights, its resize, precision and how many
    images of which size they are of; of "kid" also how many subsets of how many images. Of a
    single subset there is no deviation.

    Args:
        a: The generated side: a folder of images, an NPZ of images `arr_0`, or an NPZ of
            statistics `mu` and `sigma` as of pytorch-fid, EDM and `main.py stats`.
        b: The real side, likewise. Of a reference batch of guided-diffusion the Fréchet distance
            takes the statistics, other metrics the images.
        features: Feature extractor; by default Inception-v3.
        weights: File of its weights, in place of a download.
        metrics: Metrics of `ddim_pl.metrics.quality.SampleQuality`. All but "fd" need images.
        batch_size: Images that pass through the extractor at once.
        device: Such as "cpu" or "cuda"; by default a GPU if there is one.
        seed: Of the subsets and splits of "kid" and "inception_score".
        output: JSON file to write as well.

    Raises:
        ValueError: If a side cannot be read, is of another extractor, or lacks the images that a
            metric needs.
    """
    check_metrics(metrics)
    if set(metrics) == {"inception_score"}:
        raise ValueError("metrics must have one that compares a and b, got inception_score alone")
    check_at_least(1, batch_size=batch_size)
    check_at_least(0, seed=seed)
    if output is not None:
        _check_output(output)
    sides = {True: open_side("b", b), False: open_side("a", a)}
    for real, side in sides.items():
        _check_images(side, metrics, real=real)
        if features is None:
            _check_of_inception(side)
    extractor = make_extractor(features, weights)
    quality = SampleQuality(extractor, metrics, seed=seed)
    num_real, num_samples = _checked_counts(quality, sides)
    digest = weights_of(extractor)
    for side in sides.values():
        _check_side(quality, side, digest)
    quality.to(device_of(device))
    quality.warn_of_few(num_samples, num_real)
    tell_of_gray(quality, *sides.values())
    for real, side in sides.items():
        add_side(quality, side, batch_size, real=real)
    numbers = {name: float(value) for name, value in quality.compute().items()}
    text = json.dumps(sealed(_content(quality, sides, digest, numbers)), indent=1)
    if output is not None:
        write_text(Path(output), text)
    print(text)


def make_extractor(features: Callable[..., nn.Module] | None, weights: str | None) -> nn.Module:
    """Make the extractor, with the file of its weights if there is one.

    Raises:
        ValueError: If it takes no weights, or they cannot be read.
    """
    with otherwise("give its path as --weights, or another extractor as --features"):
        return _made(features or InceptionFeatures, weights)


def _made(make: Callable[..., nn.Module], weights: str | None) -> nn.Module:
    if weights is None:
        return make()
    for name in ("weights_path", "weights"):
        try:
            return make(**{name: weights})
        except TypeError as error:
            if f"unexpected keyword argument '{name}'" not in str(error):
                raise
    raise ValueError(
        f"weights must be left out for an extractor without weights or weights_path, got {weights}"
    )


def device_of(device: str | None) -> torch.device:
    """The device of this name; by default a GPU if there is one.

    Raises:
        ValueError: If there is none of this name.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, dtype=torch.float64, device=found)  # the sums need them
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that works, got {device!r} ({reason})") from error
    return found


def add_side(quality: SampleQuality, side: Side, batch_size: int, *, real: bool) -> None:
    """Add the images of a side, where they are needed, and its statistics."""
    if side.statistics is not None and "fd" in quality.metrics:
        moments = side.statistics.mean, side.statistics.covariance
        quality.set_moments(*moments, real=real)
        if not _uses_images(quality.metrics, real=real):
            return
    channels = channels_of(quality)
    batches = side.batches(batch_size, channels)
    total = -(-side.num_images // batch_size)
    for images in tqdm(batches, total=total, desc=side.source, leave=False):
        quality.update(images, real=real)


def channels_of(quality: SampleQuality) -> int:
    """Channels that the extractor wants: 1 of one for gray images, else 3."""
    return 1 if getattr(quality.extractor, "image_shape", (3,))[0] == 1 else 3


def becomes_gray(quality: SampleQuality, side: Side) -> bool:
    """Whether image files with colours are read as gray, for an extractor that takes gray ones."""
    return side.paths is not None and not side.is_gray and channels_of(quality) == 1


def tell_of_gray(quality: SampleQuality, *sides: Side | None) -> None:
    """Say which sides' images are converted to gray, if any are."""
    for side in sides:
        if side is not None and becomes_gray(quality, side):
            rank_zero_warn(
                f"the images of {side.source} have three channels and are converted to gray, "
                f"since the extractor {quality.extractor.name!r} takes gray images"
            )


def _recorded(quality: SampleQuality, side: Side) -> dict[str, Any]:
    """What a side is and whether its colours were used."""
    gray = {"converted": "to gray"} if becomes_gray(quality, side) else {}
    return {**side.record(), **gray}


def _check_of_inception(side: Side) -> None:
    """Check statistics, before the weights of Inception are asked for or downloaded."""
    given = side.statistics
    if given is None:
        return
    named = (given.extractor or InceptionFeatures.name).startswith(InceptionFeatures.name)
    if not (named and len(given.mean) == InceptionFeatures.num_features):
        raise ValueError(
            "features must be the extractor of the statistics, got Inception-v3 (the default) and "
            f"{side.source} of {given.known_as}: give --features"
        )


def _uses_images(metrics: Sequence[str], *, real: bool) -> bool:
    """Whether a metric other than "fd" looks at the images of a side."""
    return bool(set(metrics) & {*OF_FEATURES, *(() if real else ("inception_score",))})


def _check_images(side: Side, metrics: Sequence[str], *, real: bool) -> None:
    if side.size is not None or not _uses_images(metrics, real=real):
        return
    raise ValueError(
        f"metrics must be fd alone where a side is statistics without images, as {side.source} "
        f"is, got {', '.join(metrics)}: leave the others out, or give images"
    )


def _count_of(quality: SampleQuality, side: Side, *, real: bool) -> int | None:
    """How many images the numbers are of; None if a file of statistics does not say."""
    if side.statistics is not None and not _uses_images(quality.metrics, real=real):
        return side.statistics.num_images or None
    return side.num_images


def _checked_counts(
    quality: SampleQuality, sides: dict[bool, Side]
) -> tuple[int | None, int | None]:
    """The numbers of images of b and a."""
    b, a = (_count_of(quality, sides[real], real=real) for real in (True, False))
    if b is not None:
        quality.check_num_real(b, "the number of images of b")
    if a is not None:
        quality.check_num_samples(a, "the number of images of a")
    return b, a


def _check_side(quality: SampleQuality, side: Side, digest: str) -> None:
    if side.statistics is not None:
        extractor = quality.extractor
        side.statistics.check(extractor.name, extractor.num_features, digest)
    if side.size is not None:
        quality.check_shape((channels_of(quality), *side.size))


def _check_output(output: str) -> None:
    if not output.endswith(".json"):
        raise ValueError(f"output must end in .json, got {output!r}")
    check_writable("output", Path(output).parent)


def _content(
    quality: SampleQuality, sides: dict[bool, Side], digest: str, numbers: dict[str, float]
) -> dict[str, Any]:
    subsets = quality.kid_subsets
    return {
        **numbers,
        **({"kid_subsets": {"count": subsets[0], "size": subsets[1]}} if subsets else {}),
        "a": _recorded(quality, sides[False]),
        "b": _recorded(quality, sides[True]),
        "extractor": quality.extractor.name,
        "weights": digest,
        "resize": resize_of(quality.extractor) or "none",
        "precision": "features in float32, statistics in float64",
        "seed": quality.seed,
        "device": quality.device.type,
        "torch": torch.__version__,
        "ddim_pl": ddim_pl.__version__,
    }
