"""Random numbers that depend on a seed and on nothing else.

Every image owns a generator, seeded by (seed, index), so that an image is the same whatever the
batch it is drawn in and however many devices share the work. Every training step owns a generator
seeded by (seed, step, rank), so that a resumed run draws what an unbroken one would have drawn.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddim_pl.scales import float64

Generators = torch.Generator | Sequence[torch.Generator]

_FACTOR = 2654435769  # 2^32 times the golden ratio's fraction, see `image_generators`


def derive_seed(*words: int) -> int:
    """Mix integers, each at least 0, into one 32-bit seed (NumPy's SeedSequence).

    32 bits, because PyTorch's CPU generator ignores the rest of a seed. The number of words is one
    of them, because SeedSequence takes (1,) and (1, 0) for the same.

    >>> derive_seed(0, 1) != derive_seed(1, 0)
    True
    """
    return int(np.random.SeedSequence([len(words), *words]).generate_state(1)[0])


class StepGenerators(NamedTuple):
    """Sources of one training step's noise.

    Attributes:
        host: On the CPU, for the few numbers that schedules need there.
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


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator per image, that of image `i` seeded by `2654435769 seed + i` mod 2^32.

    Images of one seed never share a generator. The factor is 2^32 times the golden ratio's
    fraction, which keeps the starts of two seeds at least 2^32 / (sqrt(5) d) apart, d being their
    difference: with seeds below 38,000, no two have one of their first 50,000 images in common.
    """
    return [torch.Generator().manual_seed((_FACTOR * seed + int(i)) % 2**32) for i in indices]


def share_generators(seed_a: int, count_a: int, seed_b: int, count_b: int) -> bool:
    """Whether two seeds have a generator in common among their first images.

    Images `i < count_a` and `j < count_b` have the same one where `i - j` is the distance of the
    seeds' starts mod 2^32, see `image_generators`.

    >>> share_generators(0, 10, 0, 1), share_generators(0, 50_000, 1, 50_000)
    (True, False)
    >>> start = 2654435769  # of seed 1, before which lies all that seed 0 has up to there
    >>> share_generators(0, start, 1, 1), share_generators(0, start + 1, 1, 1)
    (False, True)
    """
    distance = _FACTOR * (seed_b - seed_a) % 2**32
    return min(count_a, count_b) > 0 and (distance < count_a or 2**32 - distance < count_b)


def randn(shape: Sequence[int], generator: Generators | None, like: Tensor) -> Tensor:
    """Standard normal noise in the dtype and on the device of `like`.

    Args:
        shape: `(B, ...)`.
        generator: One generator for the batch, one for each of the B images, or None for the
            global one. Numbers are drawn on the generator's own device.
        like: Tensor that gives dtype and device.

    Raises:
        ValueError: If the number of generators is not B.
    """
    # Drawn in float32 always, so that the dtype of the state does not change the picture.
    if generator is None or isinstance(generator, torch.Generator):
        device = like.device if generator is None else generator.device
        noise = torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32)
        return noise.to(like)
    _check_count(generator, shape)
    device = generator[0].device if generator else like.device
    noise = torch.empty(tuple(shape), device=device, dtype=torch.float32)
    for row, source in zip(noise, generator, strict=True):
        row.normal_(generator=source)
    return noise.to(like)


def uniform(shape: Sequence[int], generator: Generators, like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), `(B, ...)`; arguments and errors as for `randn`."""
    if isinstance(generator, torch.Generator):
        return torch.rand(tuple(shape), generator=generator, device=generator.device).to(like)
    _check_count(generator, shape)
    rows = [torch.rand(tuple(shape[1:]), generator=g, device=g.device) for g in generator]
    return torch.stack(rows).to(like)


def standard_gamma(concentration: Tensor, generator: Generators | None) -> Tensor:
    """Draws `(B, ...)` of `Gamma(K, 1)` in float64 for shapes K `(B, ...)`.

    Args:
        concentration: Shapes K, at least 0.
        generator: As for `randn`. The draws lie on its device, or on the CPU if that device has no
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
    if not generator:
        return float64(concentration)
    sources = [_with_float64(each) for each in generator]
    rows = concentration.double().to(sources[0].device)
    pairs = zip(rows, sources, strict=True)
    return torch.stack([torch._standard_gamma(row, generator=source) for row, source in pairs])


def _with_float64(generator: torch.Generator) -> torch.Generator:
    """The generator, or where its device has no float64, one on the CPU that it seeds."""
    if generator.device.type != "mps":
        return generator
    seed = torch.randint(2**31, (1,), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))


def _check_count(generators: Sequence[torch.Generator], shape: Sequence[int]) -> None:
    if len(generators) != shape[0]:
        raise ValueError(
            f"generator must hold one generator per image, got {len(generators)} for a batch of "
            f"{shape[0]}"
        )


def gaussian_latents(
    seed: int, indices: Iterable[int], shape: Sequence[int]
) -> tuple[Tensor, list[torch.Generator]]:
    """Gaussian start noise `(B, *shape)` in float32 of the images `indices`, and their generators.

    The generators come back because a stochastic sampler goes on drawing from them.
    """
    generators = image_generators(seed, indices)
    return randn((len(generators), *shape), generators, torch.empty(0)), generators
