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

Generators = torch.Generator | Sequence[torch.Generator]


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
    return [torch.Generator().manual_seed((2654435769 * seed + int(i)) % 2**32) for i in indices]


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
        return torch.randn(tuple(shape), generator=generator, device=device).to(like)
    if len(generator) != shape[0]:
        raise ValueError(
            f"generator must hold one generator per image, got {len(generator)} for a batch of "
            f"{shape[0]}"
        )
    noise = torch.empty(tuple(shape), device=generator[0].device if generator else like.device)
    for row, source in zip(noise, generator, strict=True):
        row.normal_(generator=source)
    return noise.to(like)


def latents(
    seed: int, indices: Iterable[int], shape: Sequence[int]
) -> tuple[Tensor, list[torch.Generator]]:
    """Start noise `(B, *shape)` in float32 of the images `indices`, and their generators.

    The generators come back because a stochastic sampler goes on drawing from them.
    """
    generators = image_generators(seed, indices)
    empty = torch.empty(0)
    return randn((len(generators), *shape), generators, empty), generators
