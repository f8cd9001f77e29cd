"""Stochastic steps of Gamma diffusion. The eps of the estimates must be Gamma noise."""

import torch
from torch import Tensor

from ddim_pl.noise.gamma import GammaNoise
from ddim_pl.prediction import Prediction
from ddim_pl.scales import Scales, expand_like, float64, to_device
from ddim_pl.transitions import ddim_step, transition_variance


def thinning_step(
    prediction: Prediction, beta: Tensor, noise: GammaNoise, t: Scales, s: Scales
) -> Tensor:
    """Sample of the posterior `q(z_s | z_t, x)` of Gamma diffusion, `(B, ...)`, for `s < t`.

    If `G ~ Gamma(K_t, 1)` and `B ~ Beta(K_s, K_t - K_s)` are independent, `B G ~ Gamma(K_s, 1)`.
    So `z_s = alpha_s x + theta_s (B G - K_s)` with `G = K_t + sqrt(K_t) eps`. With the
    standardised B and `r = K_s / K_t` that is `alpha_s x + sigma_s eps_s`,

        eps_s = sqrt(r) eps + sqrt(1 - r) G / sqrt(K_t (K_t + 1)) beta,

    which has no differences of large numbers and tends to the posterior of DDPM as K grows. For an
    estimated eps below the support, G is 0.

    Args:
        prediction: Estimates at `t`, each `(B, ...)`.
        beta: Standardised noise from `Beta(K_s, K_t - K_s)`, `(B, ...)`, see `thinning_shapes`.
        noise: Law of the noise.
        t: Scales of the state.
        s: Scales at a cleaner level.
    """
    x, eps = prediction
    wide = float64(eps)
    root = to_device(expand_like(noise.concentration(t).sqrt(), wide), wide)
    wide = torch.maximum(wide, -root)
    r = (s.sigma / t.sigma * (t.alpha / s.alpha)).square()
    fresh = transition_variance(t, s).sqrt() / t.sigma
    spread = (root + wide) / (root.square() + 1).sqrt() * float64(beta)
    eps_s = expand_like(r.sqrt(), wide) * wide + expand_like(fresh, wide) * spread
    return ddim_step(Prediction(x, eps_s.to(eps)), t, s)


def thinning_shapes(noise: GammaNoise, t: Scales, s: Scales) -> tuple[Tensor, Tensor]:
    """Shapes `(K_s, K_t - K_s)` of the noise at `s` and of the transition from `s` to `t`."""
    k_t = noise.concentration(t)
    share = transition_variance(t, s) / t.sigma**2
    return k_t * (s.sigma / t.sigma * (t.alpha / s.alpha)).square(), k_t * share


def report_step(prediction: Prediction, fresh: Tensor, c: Tensor, t: Scales, s: Scales) -> Tensor:
    """Gamma-DDIM step `C z_t + D x + c (g - E g)`, `(B, ...)` ([Report], eq. 18).

    `C = (alpha_s - c alpha_t) / (alpha_t (1 + alpha_s))`, `D = (alpha_s^2 + c alpha_t) / (1 +
    alpha_s)` and `g ~ Gamma(K_t - K_s, theta_t)`. As `C alpha_t + D = alpha_s` it keeps the mean.
    The variance becomes `C^2 sigma_t^2 + c^2 (1 - alpha_t^2 / alpha_s^2)`, which is not
    `sigma_s^2`: the derivation equates variables that are equal in law only, and whose shapes
    double at every step. It keeps the law only for `K_t = 2 K_s` and `c = alpha_s / alpha_t`,
    where C is 0 and all noise is fresh; docs/gamma.md has the proof.

    Args:
        prediction: Estimates at `t`, each `(B, ...)`.
        fresh: Standardised Gamma noise of shape `K_t - K_s`, `(B, ...)`.
        c: Scale of the fresh noise, `sigma_t` in [Report], `()`; DDIM's is `ddim_noise_scale`.
        t: Scales of the state.
        s: Scales at a cleaner level.
    """
    x, eps = prediction
    kept, std = report_kept(c, t, s), c * transition_variance(t, s).sqrt()
    return expand_like(s.alpha, x) * x + expand_like(kept, x) * eps + expand_like(std, x) * fresh


def report_kept(c: Tensor, t: Scales, s: Scales) -> Tensor:
    """Factor `C sigma_t` of the standardised noise in `report_step`."""
    return (s.alpha - c * t.alpha) / (t.alpha * (1 + s.alpha)) * t.sigma
