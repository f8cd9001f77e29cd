"""Random numbers that are determined by a seed.

Every image has a generator, seeded by (seed, index), or a key of Philox, so that it does not
depend on its batch or on the number of devices. Every training step has generators, seeded by
(seed, step, rank), so that a resumed run draws the same numbers as an uninterrupted one.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddim_pl.checks import check_one_of
from ddim_pl.philox import ImageNoise
from ddim_pl.scales import float64

NoiseSource = Literal["generators", "philox"]
"""Where the noise of images comes from: a CPU generator for each, or `ddim_pl.philox`."""

Generators = torch.Generator | Sequence[torch.Generator] | ImageNoise

_FACTOR = 2654435769  # 2^32 times the golden ratio's fraction, see `image_generators`


def derive_seed(*words: int) -> int:
    """Mix integers, each at least 0, into one 32-bit seed (NumPy's SeedSequence).

    32 bits, because PyTorch's CPU generator ignores the rest of a seed. The number of words is
    mixed in, because SeedSequence does not distinguish (1,) and (1, 0).

    >>> derive_seed(0, 1) != derive_seed(1, 0)
    True
    """
    return int(np.random.SeedSequence([len(words), *words]).generate_state(1)[0])


class StepGenerators(NamedTuple):
    """Generators of one training step.

    Attributes:
        host: On the CPU, for the levels.
        device: On the training device, for noise of the size of the images.
    """

    host: torch.Generator
    device: torch.Generator


def step_generators(seed: int, device: torch.device) -> StepGenerators:
    """Generators of a step from its seed, see `derive_seed`."""
    return StepGenerators(
        torch.Generator().manual_seed(derive_seed(seed, 0)),
        torch.Generator(device).manual_seed(derive_seed(seed, 1)),
    )


def seed_default_generators(seed: int, device: torch.device) -> None:
    """Seed the global generators of the CPU and of a device, as `torch.manual_seed` does.

    That seeds those of every device there is, which takes a hundred times as long.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    elif device.type == "cuda":
        torch.default_generator.manual_seed(seed)
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def replayed(device: torch.device) -> Iterator[None]:
    """Draw in here what will be drawn once more afterwards, from the global generator of a device.

    Two passes of a network so have the same dropout.
    """
    home: Any = torch if device.type == "cpu" else getattr(torch, device.type)
    state = home.get_rng_state()
    yield
    home.set_rng_state(state)


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator per image, that of image `i` seeded by `2654435769 seed + i` mod 2^32.

    Images of one seed never share a generator. The factor is 2^32 times the fractional part of the
    golden ratio, which keeps the first images of two seeds that differ by d at least 2^32 /
    (sqrt(5) d) apart: seeds below 38,000 share none of their first 50,000 images.
    """
    return [torch.Generator().manual_seed((_FACTOR * seed + int(i)) % 2**32) for i in indices]


def share_generators(seed_a: int, count_a: int, seed_b: int, count_b: int) -> bool:
    """Whether two seeds share a generator among their first images.

    Images `i < count_a` and `j < count_b` share one if `i - j` is the distance of the seeds' first
    generators mod 2^32, see `image_generators`.

    >>> share_generators(0, 10, 0, 1), share_generators(0, 50_000, 1, 50_000)
    (True, False)
    >>> start = 2654435769  # the generator of image 0 of seed 1
    >>> share_generators(0, start, 1, 1), share_generators(0, start + 1, 1, 1)
    (False, True)
    """
    distance = _FACTOR * (seed_b - seed_a) % 2**32
    return min(count_a, count_b) > 0 and (distance < count_a or 2**32 - distance < count_b)


def image_noise(
    source: NoiseSource,
    seed: int,
    indices: Iterable[int] | Tensor,
    *,
    device: torch.device | str = "cpu",
    compile: bool = False,
) -> list[torch.Generator] | ImageNoise:
    """What the noise of some images is drawn from.

    Args:
        source: "generators", see `image_generators`, or "philox", see `ImageNoise`.
        seed: Seed of the images.
        indices: Of the B images; a tensor is int64 `(B,)`.
        device: Where "philox" draws; the generators draw on the CPU.
        compile: As in `ImageNoise`.

    Raises:
        ValueError: If the source is unknown, or for "philox" seed or indices are out of range.
    """
    check_one_of(NoiseSource, noise_source=source)
    if source == "generators":
        numbers = indices.tolist() if isinstance(indices, Tensor) else indices
        return image_generators(seed, numbers)
    if not isinstance(indices, Tensor):
        given = [int(i) for i in indices]
        if given and not 0 <= min(given) <= max(given) < 2**32:
            raise ValueError(
                f"indices must lie in [0, 2^32), got {min(given)} to {max(given)}: count the "
                "images from 0"
            )
        indices = torch.tensor(given, dtype=torch.int64)
    return ImageNoise(seed, indices.to(device), compile=compile)


def share_noise(source: NoiseSource, seed_a: int, count_a: int, seed_b: int, count_b: int) -> bool:
    """Whether the first images of two seeds share noise; with "philox", only those of one seed.

    >>> share_noise("philox", 0, 2**31, 1, 2**31), share_noise("philox", 3, 1, 3, 1)
    (False, True)
    """
    if source == "generators":
        return share_generators(seed_a, count_a, seed_b, count_b)
    return seed_a == seed_b and min(count_a, count_b) > 0


def randn(shape: Sequence[int], generator: Generators | None, like: Tensor) -> Tensor:
    """Standard normal noise in the dtype and on the device of `like`.

    Args:
        shape: `(B, ...)`.
        generator: One generator for the batch, one per image, an `ImageNoise`, or None for the
            global one. Numbers are drawn on its device.
        like: Tensor of the dtype and device of the result.

    Raises:
        ValueError: If the number of generators is not B.
    """
    # Always drawn in float32, so that the noise does not depend on the dtype of the state.
    if generator is None or isinstance(generator, torch.Generator):
        device = like.device if generator is None else generator.device
        noise = torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32)
        return noise.to(like)
    _check_count(generator, shape)
    if isinstance(generator, ImageNoise):
        return generator.normal(shape).to(like)
    device = generator[0].device if generator else like.device
    noise = torch.empty(tuple(shape), device=device, dtype=torch.float32)
    for row, source in zip(noise, generator, strict=True):
        row.normal_(generator=source)
    return noise.to(like)


def uniform(shape: Sequence[int], generator: Generators | None, like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), `(B, ...)`; arguments and errors as for `randn`."""
    if generator is None or isinstance(generator, torch.Generator):
        device = like.device if generator is None else generator.device
        return torch.rand(tuple(shape), generator=generator, device=device).to(like)
    _check_count(generator, shape)
    if isinstance(generator, ImageNoise):
        return generator.uniform(shape).to(like)
    rows = [torch.rand(tuple(shape[1:]), generator=g, device=g.device) for g in generator]
    return torch.stack(rows).to(like)


def standard_gamma(concentration: Tensor, generator: Generators | None) -> Tensor:
    """Random numbers `(B, ...)` from `Gamma(K, 1)` in float64 for shapes K `(B, ...)`.

    Args:
        concentration: Shapes K, at least 0.
        generator: As for `randn`. The result is on its device, or on the CPU if that device has no
            float64.

    Raises:
        ValueError: If the number of generators is not B.
    """
    if generator is None:
        return torch._standard_gamma(float64(concentration))
    if isinstance(generator, torch.Generator):
        source = _with_float64(generator)
        return torch._standard_gamma(concentration.double().to(source.device), generator=source)
    _check_count(generator, concentration.shape)
    if isinstance(generator, ImageNoise):
        return generator.gamma(concentration)
    if not generator:
        return float64(concentration)
    sources = [_with_float64(each) for each in generator]
    rows = concentration.double().to(sources[0].device)
    pairs = zip(rows, sources, strict=True)
    return torch.stack([torch._standard_gamma(row, generator=source) for row, source in pairs])


def _with_float64(generator: torch.Generator) -> torch.Generator:
    """The generator, or a CPU generator that it seeds if its device has no float64."""
    if generator.device.type != "mps":
        return generator
    seed = torch.randint(2**31, (1,), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))


def _check_count(generators: Sequence[torch.Generator] | ImageNoise, shape: Sequence[int]) -> None:
    if len(generators) != shape[0]:
        raise ValueError(
            f"generator must hold one generator per image, got {len(generators)} for a batch of "
            f"{shape[0]}: see ddim_pl.rng.image_generators"
        )


def gaussian_latents(
    seed: int,
    indices: Iterable[int] | Tensor,
    shape: Sequence[int],
    *,
    noise_source: NoiseSource = "generators",
    device: torch.device | str = "cpu",
    compile: bool = False,
) -> tuple[Tensor, list[torch.Generator] | ImageNoise]:
    """Gaussian start noise `(B, *shape)` in float32 of the images `indices`, and their generators.

    The generators are returned because a stochastic sampler draws from them next. Other arguments
    and errors are those of `image_noise`; the noise is on `device` from either source.
    """
    generators = image_noise(noise_source, seed, indices, device=device, compile=compile)
    return randn((len(generators), *shape), generators, torch.empty(0, device=device)), generators
