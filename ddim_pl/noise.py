"""Random numbers that depend on a seed and on nothing else; and the laws of a state's noise.

Every image owns a generator, seeded by (seed, index), so that an image is the same whatever the
batch it is drawn in and however many devices share the work. Every training step owns a generator
seeded by (seed, step, rank), so that a resumed run draws what an unbroken one would have drawn.

A law of noise is standardised: a state is `z_t = alpha_t x + sigma_t eps` with eps of mean 0 and
variance 1, Gaussian or Gamma (Nachmani et al. 2021). To add one, write a frozen dataclass here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ddim_pl import gamma_scores

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


def float64(values: Tensor) -> Tensor:
    """In float64, on the same device unless that is Apple's, which has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _check_count(generators: Sequence[torch.Generator], shape: Sequence[int]) -> None:
    if len(generators) != shape[0]:
        raise ValueError(
            f"generator must hold one generator per image, got {len(generators)} for a batch of "
            f"{shape[0]}"
        )


class Scales(Protocol):
    """Scales of a level, float64 of shape `()` or `(B,)`: a `ddim_pl.schedules.Level`."""

    @property
    def alpha(self) -> Tensor:
        """Scale of the image."""

    @property
    def sigma(self) -> Tensor:
        """Scale of the noise."""


class Noise(ABC):
    """A law of standardised noise: mean 0 and variance 1, independent dimensions, at every level.

    Subclasses are frozen dataclasses.
    """

    @property
    def is_gaussian(self) -> bool:
        """Whether the law is the normal one at every level, for which all samplers are made."""
        return False

    @abstractmethod
    def draw(
        self, shape: Sequence[int], level: Scales, generator: Generators | None, like: Tensor
    ) -> Tensor:
        """Standardised noise `(B, ...)` of a level; other arguments and errors as for `randn`."""

    @abstractmethod
    def log_density(self, eps: Tensor, level: Scales) -> Tensor:
        """Logarithm of the density at each entry of standardised noise `(B, ...)`, float64."""

    @abstractmethod
    def transport(self, eps: Tensor, t: Scales, s: Scales) -> Tensor:
        """Noise of level `s` that holds the same quantiles as the noise `eps` of level `t`.

        It is increasing in every entry of eps, and its own inverse with the levels exchanged.

        Args:
            eps: Standardised noise, `(B, ...)`.
            t: Level whose law it has.
            s: Level whose law it shall have, noisier or cleaner.
        """


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """Standard normal noise at every level (Ho et al. 2020)."""

    @property
    def is_gaussian(self) -> bool:
        """It is."""
        return True

    def draw(
        self, shape: Sequence[int], level: Scales, generator: Generators | None, like: Tensor
    ) -> Tensor:
        """As `randn`."""
        return randn(shape, generator, like)

    def log_density(self, eps: Tensor, level: Scales) -> Tensor:
        """`-(eps^2 + log(2 pi)) / 2`."""
        return -(float64(eps).square() + math.log(2 * math.pi)) / 2

    def transport(self, eps: Tensor, t: Scales, s: Scales) -> Tensor:
        """The noise itself: the law is the same at every level."""
        return eps


@dataclass(frozen=True)
class GammaNoise(Noise):
    """Centred Gamma noise, skewed to large values (Nachmani et al. 2021, section 4.2).

    `sigma_t eps = G_t - K_t theta_t` with `G_t ~ Gamma(K_t, theta_t)`, `theta_t = alpha_t theta_0`
    and `K_t = (1 / abar_t - 1) / theta_0^2`, at any real level. The variance `K_t theta_t^2` is
    `sigma_t^2`, and the skewness `2 / sqrt(K_t)`: strong at clean levels, hardly any at noisy
    ones, and none anywhere as theta_0 tends to 0. The process is Markovian: its step from s to t
    adds independent Gamma noise of shape `K_t - K_s`.

    Args:
        theta_0: Scale, positive; the paper has 0.001.

    Raises:
        ValueError: If `theta_0` is not positive.
    """

    theta_0: float = 0.001

    def __post_init__(self) -> None:
        if not 0 < self.theta_0 < math.inf:
            raise ValueError(
                f"theta_0 must be positive, got {self.theta_0}: the paper has 0.001, and 0 is "
                "GaussianNoise"
            )

    def concentration(self, level: Scales) -> Tensor:
        """Shape `K_t = (sigma_t / (alpha_t theta_0))^2`, float64 of the level's shape.

        At most 1e20, where the law is normal to ten digits: pure noise would have no end.
        """
        return (level.sigma / (level.alpha * self.theta_0)).square().clamp(max=1e20)

    def draw(
        self, shape: Sequence[int], level: Scales, generator: Generators | None, like: Tensor
    ) -> Tensor:
        """Standardised noise `(B, ...)`; drawn and centred in float64, then cast.

        K theta is about 1e5 where the deviation is 1, beyond float32.
        """
        return standardised_gamma(shape, self.concentration(level), generator, like)

    def log_density(self, eps: Tensor, level: Scales) -> Tensor:
        """See `ddim_pl.gamma_scores.log_density`; -inf below the support, `-sqrt(K_t)`."""
        eps = float64(eps)
        return gamma_scores.log_density(eps, _expand(self.concentration(level), eps))

    def transport(self, eps: Tensor, t: Scales, s: Scales) -> Tensor:
        """`F_{K_s}^{-1}(F_{K_t}(eps))`, by way of normal scores, in float64 and then cast.

        Below the support the edge's quantile is taken. Where one of the levels holds no noise at
        all, no quantile is defined and the noise stays as it is: encoding begins there, with what
        the network says of the first noise.
        """
        wide = float64(eps)
        k_t, k_s = (_expand(self.concentration(each), wide) for each in (t, s))
        noisy = (k_t > 0) & (k_s > 0)
        k_t, k_s = (torch.where(noisy, k, 1.0) for k in (k_t, k_s))
        moved = gamma_scores.from_normal_score(gamma_scores.normal_score(wide, k_t), k_s)
        return torch.where(noisy, moved, wide).to(eps)


def standardised_gamma(
    shape: Sequence[int], concentration: Tensor, generator: Generators | None, like: Tensor
) -> Tensor:
    """Draws `(B, ...)` of `(G - K) / sqrt(K)`, `G ~ Gamma(K, 1)`, in the dtype of `like`.

    Args:
        shape: `(B, ...)`.
        concentration: Shapes K, `()` or `(B,)`; where K is 0 the draws are 0.
        generator: As for `randn`.
        like: Tensor that gives dtype and device.
    """
    k = concentration.reshape(-1, *(1,) * (len(shape) - 1)).expand(tuple(shape))
    gamma = standard_gamma(k, generator)
    k = k.to(gamma)
    return torch.where(k > 0, (gamma - k) / k.sqrt(), 0).to(like)


def standardised_beta(
    shape: Sequence[int], a: Tensor, b: Tensor, generator: Generators | None, like: Tensor
) -> Tensor:
    """Draws `(B, ...)` of `Beta(a, b)`, less its mean and over its deviation, dtype of `like`.

    `B = G_a / (G_a + G_b)` with independent `G_a ~ Gamma(a, 1)` and `G_b ~ Gamma(b, 1)`. Centred,
    it is `(b G_a - a G_b) / ((a + b) (G_a + G_b))`.

    Args:
        shape: `(B, ...)`.
        a: First shapes, `()` or `(B,)`; where one of the shapes is 0 the draws are 0.
        b: Second shapes, `()` or `(B,)`.
        generator: As for `randn`.
        like: Tensor that gives dtype and device.
    """
    trailing = (1,) * (len(shape) - 1)
    a, b = (k.reshape(-1, *trailing).expand(tuple(shape)) for k in (a, b))
    gamma_a, gamma_b = standard_gamma(a, generator), standard_gamma(b, generator)
    a, b = a.to(gamma_a), b.to(gamma_a)
    centred = (b * gamma_a - a * gamma_b) / ((a + b) * (gamma_a + gamma_b))
    deviation = (a / (a + b) * (b / (a + b)) / (a + b + 1)).sqrt()
    return torch.where(deviation > 0, centred / deviation, 0).to(like)


def _expand(concentration: Tensor, like: Tensor) -> Tensor:
    """Shapes `()` or `(B,)` for a batch `(B, ...)` in float64."""
    k = concentration.to(like.device)
    return k.reshape(-1, *(1,) * (like.ndim - 1)) if k.ndim else k


def latents(
    seed: int,
    indices: Iterable[int],
    shape: Sequence[int],
    *,
    noise: Noise | None = None,
    level: Scales | None = None,
) -> tuple[Tensor, list[torch.Generator]]:
    """Start noise `(B, *shape)` in float32 of the images `indices`, and their generators.

    The generators come back because a stochastic sampler goes on drawing from them.

    Args:
        seed: Seed of the images, see `image_generators`.
        indices: Which images, B numbers.
        shape: `(C, H, W)`.
        noise: Law of the noise; by default Gaussian.
        level: Level that sampling starts at; needed if the law is not Gaussian.

    Raises:
        ValueError: If a level is needed and none is given.
    """
    generators = image_generators(seed, indices)
    size, empty = (len(generators), *shape), torch.empty(0)
    if noise is None or level is None:
        if noise is not None and not noise.is_gaussian:
            raise ValueError(f"level must be given for {noise}: its law is another at each level")
        return randn(size, generators, empty), generators
    return noise.draw(size, level, generators, empty), generators
