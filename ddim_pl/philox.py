"""Random numbers of images without a state: Philox 4x32-10 ([Philox]).

Philox maps a counter of four words of 32 bits, under a key of two, to four random words; for each
key the map is one to one. The key is (seed, image) and the counter (block, draw, attempt, rest of
the seed), so that a number is a function of seed, image, draw and place in the image alone,
and no two images of any seeds share one. Words are held in int64, which every device has.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddim_pl.scales import float64

Words = tuple[Tensor, Tensor, Tensor, Tensor]

_MASK = 2**32 - 1
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> Words:
    """Philox 4x32 with ten rounds ([Philox], section 4), elementwise.

    Args:
        counter: Four tensors of words, int64 in [0, 2^32), which broadcast to each other.
        key: Two such tensors.

    Returns:
        Four tensors of random words, likewise.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a product of 64 bits.

    `(m - 2^32) w` fits into int64, which `m w` does not, and has the same low word.
    """
    product = word * (multiplier - 2**32)
    return (product >> 32) + word, product & _MASK


def _box_muller(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers of two words; at most 6.8 in size.

    The logarithm is of a number in (0, 1], never of 0.
    """
    radius = (-2 * ((a.to(dtype) + 0.5) * 2**-32).log()).sqrt()
    angle = b.to(dtype) * (2 * math.pi * 2**-32)
    return radius * angle.cos(), radius * angle.sin()


def normals(seed: Tensor, images: Tensor, draw: Tensor, blocks: Tensor) -> Tensor:
    """Standard normal numbers `(B, 4 N)` of images, float32, by the method of Box and Muller.

    Args:
        seed: Low and high word of the seed, `(2,)` int64.
        images: Their indices, `(B,)` int64.
        draw: Number of the draw, `()` int64.
        blocks: 0, 1, ..., N - 1. An argument, because `torch.compile` computes with an `arange`
            within the function in 32 bits, which overflow (PyTorch 2.15 on a CPU).
    """
    w0, w1, w2, w3 = _image_words(seed, images, draw, blocks)
    pairs = (*_box_muller(w0, w1, torch.float32), *_box_muller(w2, w3, torch.float32))
    return torch.stack(pairs, -1).flatten(1)


def uniforms(seed: Tensor, images: Tensor, draw: Tensor, blocks: Tensor) -> Tensor:
    """Uniform numbers `(B, 4 N)` in [0, 1), float32: the upper 24 bits of words; see `normals`."""
    words = torch.stack(_image_words(seed, images, draw, blocks), -1).flatten(1)
    return (words >> 8).to(torch.float32) * 2**-24


def _image_words(seed: Tensor, images: Tensor, draw: Tensor, blocks: Tensor) -> Words:
    counter = blocks[None], draw, torch.zeros_like(draw), seed[1]
    return philox4x32(counter, (seed[0], images[:, None]))


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)


class ImageNoise:
    """The random numbers of some images, drawn on the device of their indices.

    Each draw takes the next number of the draw, as a generator its next state: what is drawn
    depends on seed, index, the draws before and the place in the image, and on nothing else of
    the batch. On two devices, and compiled or not, numbers are the same up to rounding.

    Args:
        seed: In [0, 2^64).
        indices: Of the images, `(B,)` int64 in [0, 2^32).
        compile: Draw by one compiled kernel in place of some 190 operations.

    Raises:
        ValueError: If `seed` is out of range.
    """

    def __init__(self, seed: int, indices: Tensor, *, compile: bool = False) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must lie in [0, 2^64), got {seed}: small numbers are usual")
        self.seed, self.indices, self.compile = seed, indices, compile
        self._num_draws = 0

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers `(B, ...)`, float32."""
        return self._draw(normals, shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform numbers `(B, ...)` in [0, 1), float32."""
        return self._draw(uniforms, shape)

    def gamma(self, concentration: Tensor) -> Tensor:
        """Numbers `(B, ...)` from `Gamma(K, 1)`, float64, for shapes K `(B, ...)`, at least 0.

        By rejection ([MarsagliaTsang]), one block of Philox for each attempt, whose number is in
        the counter. More than 95% of attempts succeed.
        """
        shape = tuple(concentration.shape)
        k = float64(concentration).reshape(len(self), math.prod(shape[1:]))
        k = k if self.indices.device.type == "mps" else k.to(self.indices.device)
        images = self.indices.to(k.device)[:, None].expand_as(k).flatten()
        places = torch.arange(k.shape[1], device=k.device).expand_as(k).flatten()
        (low, high), draw = self._next(k.device)
        k = k.flatten()
        found, missing = torch.zeros_like(k), torch.arange(len(k), device=k.device)
        attempt = torch.zeros_like(draw)
        while len(missing):
            counter = places[missing], draw, attempt, high
            values, accepted = _try_gamma(k[missing], philox4x32(counter, (low, images[missing])))
            found[missing[accepted]] = values[accepted]
            missing = missing[~accepted]
            attempt = attempt + 1
        return found.reshape(shape)

    def _draw(self, function: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        count = math.prod(shape[1:])
        blocks = torch.arange(-(-count // 4), device=self.indices.device)
        seed, draw = self._next(self.indices.device)
        draw_all = _compiled(function) if self.compile else function
        return draw_all(seed, self.indices, draw, blocks)[:, :count].reshape(tuple(shape))

    def _next(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Words of the seed, and the number of this draw."""
        # Filled on the device: a copy from the host would wait.
        words = (self.seed & _MASK, self.seed >> 32, self._num_draws)
        low, high, draw = (torch.full((), word, device=device) for word in words)
        self._num_draws += 1
        return torch.stack([low, high]), draw


def _try_gamma(k: Tensor, words: Words) -> tuple[Tensor, Tensor]:
    """Candidates from `Gamma(K, 1)`, float64 like K, and which of them are accepted.

    For K below 1 it is `G U^(1 / K)` with G from `Gamma(K + 1, 1)` and a uniform U.
    """
    small = k < 1
    d = torch.where(small, k + 1, k) - 1 / 3
    x, _ = _box_muller(words[0], words[1], torch.float64)
    u, boost = ((word.double() + 0.5) * 2**-32 for word in words[2:])
    v = (1 + x / (9 * d).sqrt()) ** 3
    accepted = (v > 0) & (u.log() < x.square() / 2 + d * (1 - v + v.clamp(min=1e-300).log()))
    return d * v * torch.where(small, boost.log() / k, 0).exp(), accepted
