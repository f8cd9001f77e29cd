"""Gamma noise ([Gamma])."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim_pl.noise import gamma_quantiles
from ddim_pl.noise.base import Noise
from ddim_pl.rng import Generators, standard_gamma
from ddim_pl.scales import Scales, expand_like, float64, to_device


@dataclass(frozen=True)
class GammaNoise(Noise):
    """Centred Gamma noise, which is skewed to large values ([Gamma], section 4.2).

    `sigma_t eps = G_t - K_t theta_t` with `G_t ~ Gamma(K_t, theta_t)`, `theta_t = alpha_t theta_0`
    and `K_t = (1 / abar_t - 1) / theta_0^2`, at any real level. The variance `K_t theta_t^2` is
    `sigma_t^2`, and the skewness `2 / sqrt(K_t)`, large at clean levels and small at noisy ones.
    As theta_0 tends to 0 the noise becomes Gaussian. The process is Markovian: the step from s to
    t adds independent Gamma noise of shape `K_t - K_s`.

    Args:
        theta_0: Scale, positive; the paper has 0.001.

    Raises:
        ValueError: If `theta_0` is not positive.
    """

    theta_0: float = 0.001

    def __post_init__(self) -> None:
        if not 0 < self.theta_0 < math.inf:
            raise ValueError(
                f"theta_0 must be positive, got {self.theta_0}: the paper has 0.001, the limit 0 "
                "is GaussianNoise"
            )

    def concentration(self, scales: Scales) -> Tensor:
        """Shape `K_t = (sigma_t / (alpha_t theta_0))^2`, float64 of the scales' shape.

        At most 1e20, where the law is normal to ten digits; at alpha = 0 it would be infinite.
        """
        return (scales.sigma / (scales.alpha * self.theta_0)).square().clamp(max=1e20)

    def draw(
        self, shape: Sequence[int], scales: Scales, generator: Generators | None, like: Tensor
    ) -> Tensor:
        """Standardised noise `(B, ...)`, drawn and centred in float64, then cast.

        K theta is about 1e5 standard deviations, too much for float32.
        """
        return standardised_gamma(shape, self.concentration(scales), generator, like)

    def log_density(self, eps: Tensor, scales: Scales) -> Tensor:
        """See `gamma_quantiles.log_density`; -inf below `-sqrt(K_t)`, outside the support."""
        eps = float64(eps)
        return gamma_quantiles.log_density(eps, self._concentration_like(eps, scales))

    def transport(self, eps: Tensor, t: Scales, s: Scales) -> Tensor:
        """`F_{K_s}^{-1}(F_{K_t}(eps))` by way of normal scores, in float64, then cast.

        Below the support it is the quantile of the edge. If one of the levels has no noise, the
        quantile is undefined and eps is returned unchanged: encoding starts there, with the
        network's estimate of the noise.
        """
        wide = float64(eps)
        k_t, k_s = (self._concentration_like(wide, each) for each in (t, s))
        noisy = (k_t > 0) & (k_s > 0)
        k_t, k_s = (torch.where(noisy, k, 1.0) for k in (k_t, k_s))
        moved = gamma_quantiles.from_normal_score(gamma_quantiles.normal_score(wide, k_t), k_s)
        return torch.where(noisy, moved, wide).to(eps)

    def _concentration_like(self, eps: Tensor, scales: Scales) -> Tensor:
        return to_device(expand_like(self.concentration(scales), eps), eps)


def standardised_gamma(
    shape: Sequence[int], concentration: Tensor, generator: Generators | None, like: Tensor
) -> Tensor:
    """Random numbers `(B, ...)`: `(G - K) / sqrt(K)` with `G ~ Gamma(K, 1)`, in `like`'s dtype.

    Args:
        shape: `(B, ...)`.
        concentration: Shapes K, `()` or `(B,)`; where K is 0 the result is 0.
        generator: As for `randn`.
        like: Tensor of the dtype and device of the result.
    """
    k = concentration.reshape(-1, *(1,) * (len(shape) - 1)).expand(tuple(shape))
    gamma = standard_gamma(k, generator)
    k = k.to(gamma)
    return torch.where(k > 0, (gamma - k) / k.sqrt(), 0).to(like)


def standardised_beta(
    shape: Sequence[int], a: Tensor, b: Tensor, generator: Generators | None, like: Tensor
) -> Tensor:
    """Random numbers `(B, ...)` from the standardised `Beta(a, b)`, in the dtype of `like`.

    `B = G_a / (G_a + G_b)` with independent `G_a ~ Gamma(a, 1)` and `G_b ~ Gamma(b, 1)`. Centred,
    it is `(b G_a - a G_b) / ((a + b) (G_a + G_b))`.

    Args:
        shape: `(B, ...)`.
        a: First shapes, `()` or `(B,)`; where a shape is 0 the result is 0.
        b: Second shapes, `()` or `(B,)`.
        generator: As for `randn`.
        like: Tensor of the dtype and device of the result.
    """
    trailing = (1,) * (len(shape) - 1)
    a, b = (k.reshape(-1, *trailing).expand(tuple(shape)) for k in (a, b))
    gamma_a, gamma_b = standard_gamma(a, generator), standard_gamma(b, generator)
    a, b = a.to(gamma_a), b.to(gamma_a)
    centred = (b * gamma_a - a * gamma_b) / ((a + b) * (gamma_a + gamma_b))
    deviation = (a / (a + b) * (b / (a + b)) / (a + b + 1)).sqrt()
    return torch.where(deviation > 0, centred / deviation, 0).to(like)
