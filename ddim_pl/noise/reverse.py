"""The models whose variational bound is computed: steps, and their divergences from the posterior.

For each law of noise: the divergence `L_T` of the last state from the prior, and `L_{t-1}` of the
posterior of a step from the model's step, which has the estimate in place of x. See
`ddim_pl.likelihood.variational_bound`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddim_pl.checks import check_one_of
from ddim_pl.noise.base import GaussianNoise, Noise
from ddim_pl.noise.gamma import GammaNoise
from ddim_pl.noise.gamma_divergences import prior_divergence, thinning_divergence
from ddim_pl.scales import Scales, float64, to_device
from ddim_pl.transitions import Variance


@dataclass(frozen=True)
class GaussianReverse:
    """Gaussian steps and their divergences, see `variational_bound`.

    Args:
        variance: That of the steps.

    Raises:
        ValueError: If it is unknown.
    """

    variance: Variance = "small"
    noise = GaussianNoise()

    def __post_init__(self) -> None:
        check_one_of(Variance, variance=self.variance)

    def prior(self, x: Tensor, t: Scales) -> Tensor:
        """`L_T` in nats, `(B,)`."""
        squares = sum_images(float64(x).square())
        return (squares * t.alpha**2 - x[0].numel() * (t.alpha**2 + 2 * t.sigma.log())) / 2

    def constant(self, scales: Scales) -> Tensor:
        """What all terms have in each dimension whatever the estimate, in nats, `()`."""
        if self.variance == "small":
            return torch.zeros((), dtype=torch.float64)
        ratio = (scales.sigma[:-1] / scales.sigma[1:]).square()
        return (ratio - 1 - ratio.log()).sum() / 2

    def term(self, eps: Tensor, error: Tensor, t: Scales, s: Scales, factor: Tensor) -> Tensor:
        """The part of `L_{t-1}` that depends on the estimate, times the factor, `(B,)`."""
        weight = (s.snr - t.snr) / 2
        if self.variance == "large":
            weight = weight * (s.sigma / t.sigma).square()
        square = sum_images(float64(error).square())
        return to_device(weight * factor, square) * square


@dataclass(frozen=True)
class GammaReverse:
    """Gamma steps, of which a share is Gaussian, and their divergences.

    Args:
        noise: Law of the noise.
        gaussian_share: As in `variational_bound`.

    Raises:
        ValueError: If the share does not lie in (0, 1].
    """

    noise: GammaNoise
    gaussian_share: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.gaussian_share <= 1:
            raise ValueError(
                f"gaussian_share must lie in (0, 1], got {self.gaussian_share}: without one the "
                "bound is infinite, 0.001 is usual"
            )

    def prior(self, x: Tensor, t: Scales) -> Tensor:
        """`L_T` in nats, `(B,)`."""
        share = self.gaussian_share
        return sum_images(prior_divergence(x, self.noise, t, gaussian_share=share))

    def constant(self, scales: Scales) -> Tensor:
        """0: the terms are not split."""
        return torch.zeros((), dtype=torch.float64)

    def term(self, eps: Tensor, error: Tensor, t: Scales, s: Scales, factor: Tensor) -> Tensor:
        """`L_{t-1}` times the factor, `(B,)`."""
        share = self.gaussian_share
        nats = thinning_divergence(eps, error, self.noise, t, s, gaussian_share=share)
        return sum_images(nats) * to_device(factor, nats)


def reverse_model(
    noise: Noise | None, variance: Variance, gaussian_share: float | None
) -> GaussianReverse | GammaReverse:
    """The model's steps for a law of noise, see `variational_bound`.

    Args:
        noise: Law of the noise; by default Gaussian.
        variance: Variance of Gaussian steps.
        gaussian_share: Share of the Gaussian in Gamma steps; by default 0.001.

    Raises:
        ValueError: If an argument has no effect with the noise, or is out of range.
    """
    if noise is None or noise.is_gaussian:
        if gaussian_share is not None:
            raise ValueError(
                f"gaussian_share must be None for Gaussian noise, got {gaussian_share}: all of "
                "each step is Gaussian"
            )
        return GaussianReverse(variance)
    if not isinstance(noise, GammaNoise):
        raise ValueError(f"noise must be Gaussian or Gamma for the bound, got {noise}")
    if variance != "small":
        raise ValueError(
            f"variance must be 'small' for {noise}, got {variance!r}: its steps have no other"
        )
    return GammaReverse(noise) if gaussian_share is None else GammaReverse(noise, gaussian_share)


def sum_images(values: Tensor) -> Tensor:
    """Sum over each image, `(B,)`."""
    return values.flatten(1).sum(1)
