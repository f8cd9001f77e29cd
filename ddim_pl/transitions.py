"""The pure steps between two levels. Each formula stands here once.

`t` is the level a state is at, `s` the level it goes to. All coefficients are formed in float64.
"""

from typing import Literal

import torch
from torch import Tensor

from ddim_pl.prediction import Prediction
from ddim_pl.scales import Scales, expand_like, float64, to_device

Variance = Literal["small", "large"]


def q_sample(x: Tensor, eps: Tensor, t: Scales) -> Tensor:
    """Noisy state `alpha_t x + sigma_t eps`, `(B, ...)` (Ho et al. 2020, eq. 4)."""
    return expand_like(t.alpha, x) * x + expand_like(t.sigma, x) * eps


def transition_variance(t: Scales, s: Scales) -> Tensor:
    """Variance `1 - alpha_t^2 / alpha_s^2` of the forward transition from `s` to `t > s`.

    Formed as `sigma_t^2 - (alpha_t sigma_s / alpha_s)^2`, which stays exact where both levels hold
    little noise.
    """
    return (t.sigma - t.alpha / s.alpha * s.sigma) * (t.sigma + t.alpha / s.alpha * s.sigma)


def ddim_noise_scale(t: Scales, s: Scales, eta: float) -> Tensor:
    """Scale `c` of the fresh noise in a DDIM step (Song et al. 2021, eq. 16)."""
    if eta == 0:
        return torch.zeros_like(t.alpha)
    return eta * s.sigma / t.sigma * transition_variance(t, s).sqrt()


def ddim_step(
    prediction: Prediction, t: Scales, s: Scales, *, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """One DDIM step `alpha_s x + sqrt(sigma_s^2 - c^2) eps + c noise` (Song et al. 2021, eq. 12).

    With `eta = 0` the levels may rise (encoding) as well as fall.

    Args:
        prediction: Estimates at level `t`, each `(B, ...)`.
        t: Level of the state.
        s: Level to go to.
        eta: 0 is deterministic; 1 has exactly the law of the DDPM posterior.
        noise: Standard noise `(B, ...)`; needed only if `eta > 0`.
    """
    x, eps = prediction
    if eta == 0:
        return expand_like(s.alpha, x) * x + expand_like(s.sigma, x) * eps
    assert noise is not None, "a stochastic step needs noise"
    c = ddim_noise_scale(t, s, eta)
    kept = (s.sigma**2 - c**2).clamp(min=0).sqrt()  # rounding alone can make it negative
    return expand_like(s.alpha, x) * x + expand_like(kept, x) * eps + expand_like(c, x) * noise


def two_step_target(x_t: Tensor, x_mid: Tensor, t: Scales, mid: Scales, s: Scales) -> Tensor:
    """The x with which one DDIM step from `t` to `s` lands where two over `mid` do, `(B, ...)`.

    Salimans & Ho 2022, appendix G: `(z_s - sigma_s / sigma_t z_t) / (alpha_s - sigma_s / sigma_t
    alpha_t)`. Written out, `z_t` cancels and a weighted mean of the two steps' estimates is left,
    which does not lose digits however short the steps are.

    Args:
        x_t: Estimates of the clean image at level `t`, `(B, ...)`.
        x_mid: Estimates at level `mid`, where the first step led, `(B, ...)`.
        t: Noisiest level.
        mid: Level between.
        s: Cleanest level.
    """

    def gain(t: Scales, s: Scales) -> Tensor:
        """What a step from t to s adds to the state for each unit of x."""
        return s.alpha - s.sigma / t.sigma * t.alpha

    weight = gain(mid, s) / gain(t, s)
    return expand_like(weight, x_mid) * x_mid + expand_like(1 - weight, x_t) * x_t


def ddim_chain(z: Tensor, x: Tensor, levels: Scales) -> Tensor:
    """All states of a deterministic DDIM chain from the estimates made on the way, `(B, S, ...)`.

    A step `alpha_s x + sigma_s (z - alpha_t x) / sigma_t` adds `(rho_s - rho_t) x` to `z / sigma`,
    with `rho = alpha / sigma`. So the state after k steps is

        z_k = sigma_k (z_0 / sigma_0 + sum_{j < k} (rho_{j+1} - rho_j) x_j),

    which Pokle et al. 2022, eq. 9, write with estimates of eps. All terms of this form have the
    same sign: it neither loses digits at the noisy end, where alpha almost vanishes, nor is it
    wrong if the estimates are clipped.

    Args:
        z: Start states at the first level, `(B, ...)`.
        x: Estimates of the clean image at all levels but the last, `(B, S, ...)`.
        levels: The falling levels, `(S + 1,)` or `(B, S + 1)`; the last alone may be without
            noise.
    """
    alpha, sigma = (each if each.ndim == 2 else each[None] for each in levels)
    noisy = sigma > 0
    rho = alpha / torch.where(noisy, sigma, 1)
    gain = torch.where(noisy[:, 1:], rho[:, 1:] - rho[:, :-1], 0)
    scaled = _rows(1 / sigma[:, :1], x) * z[:, None] + (_rows(gain, x) * x).cumsum(1)
    states = _rows(sigma[:, 1:], x) * scaled
    if noisy.all():
        return states
    # Without noise the state is the last estimate: sigma rho = alpha, and the rest vanishes.
    return states + _rows(torch.where(noisy, 0, alpha)[:, 1:], x) * x


def implied_x(z: Tensor, z_s: Tensor, t: Scales, s: Scales) -> Tensor:
    """The x with which one deterministic DDIM step leads from `z` at level t to `z_s`, `(B, ...)`.

    `(z_s - sigma_s / sigma_t z) / (alpha_s - sigma_s / sigma_t alpha_t)` (Salimans & Ho 2022,
    appendix G), in float64, since close levels make it a quotient of small differences.
    """
    ratio = s.sigma / t.sigma
    wide, wide_s = float64(z), float64(z_s)
    numerator = wide_s - expand_like(ratio, wide) * wide
    return (numerator / expand_like(s.alpha - ratio * t.alpha, numerator)).to(z)


def _rows(coefficient: Tensor, like: Tensor) -> Tensor:
    """Make float64 coefficients `(1 or B, S)` multiply `(B, S, ...)`."""
    there = to_device(coefficient.to(like.dtype), like)
    return there.reshape(*there.shape, *(1,) * (like.ndim - 2))


def ddim_forward(
    z: Tensor, x: Tensor, s: Scales, t: Scales, *, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean `(B, ...)` and standard deviation of DDIM's forward step `q(z_t | z_s, x)`, `t > s`.

    `N(alpha_t x + sqrt(sigma_s^2 - c^2) sigma_t / sigma_s^2 (z_s - alpha_s x), (c sigma_t /
    sigma_s)^2 I)` with `c` of `ddim_noise_scale`: Bayes' rule on the backward step and both
    marginals (Song et al. 2021, section 3.1; the report's eq. 14 has another root). It depends on
    x, so the forward process is not Markovian, but for `eta = 1`, where it is that of DDPM.

    Args:
        z: States at level `s`, `(B, ...)`.
        x: Clean images, `(B, ...)`.
        s: Level of the state; it must hold some noise.
        t: Noisier level.
        eta: As in `ddim_step`.
    """
    c = ddim_noise_scale(t, s, eta)
    kept = (s.sigma**2 - c**2).clamp(min=0).sqrt() * t.sigma / s.sigma**2
    mean = expand_like(t.alpha, x) * x + expand_like(kept, x) * (z - expand_like(s.alpha, x) * x)
    return mean, c * t.sigma / s.sigma


def ode_step(prediction: Prediction, eps: Tensor, t: Scales, s: Scales) -> Tensor:
    """Straight step `y_s = y_t + (r_s - r_t) eps` of the flow (Song et al. 2021, eq. 13).

    With `y = z / alpha` and `r = sigma / alpha`. It is the DDIM step, up or down, along a noise
    that need not be the one estimated at `t`; x moves with it, so that both still explain the
    state.

    Args:
        prediction: Estimates at level `t`, each `(B, ...)`, which stand for the state.
        eps: Noise to go along, `(B, ...)`.
        t: Level of the state.
        s: Level to go to.
    """
    x = prediction.x + expand_like(t.sigma / t.alpha, eps) * (prediction.eps - eps)
    return ddim_step(Prediction(x, eps), t, s)


def forward_step(z: Tensor, noise: Tensor, s: Scales, t: Scales) -> Tensor:
    """Noisier state from `q(z_t | z_s)`, `(B, ...)`, for `t > s` (Ho et al. 2020, eq. 2).

    Args:
        z: States at level `s`, `(B, ...)`.
        noise: Standard noise, `(B, ...)`.
        s: Level of the state.
        t: Noisier level.
    """
    std = transition_variance(t, s).sqrt()
    return expand_like(t.alpha / s.alpha, z) * z + expand_like(std, z) * noise


def posterior(
    z: Tensor, x: Tensor, t: Scales, s: Scales, *, variance: Variance = "small"
) -> tuple[Tensor, Tensor]:
    """Mean `(B, ...)` and standard deviation of `q(z_s | z_t, x)` for `s < t`.

    Args:
        z: States at level `t`, `(B, ...)`.
        x: Clean images, `(B, ...)`.
        t: Level of the state.
        s: Cleaner level.
        variance: "small" is the posterior's own variance; "large" is that of the forward
            transition (Ho et al. 2020, section 3.2), the "sigma-hat" of Song et al. 2021.
    """
    var_ts = transition_variance(t, s)
    mean = expand_like(t.alpha / s.alpha * (s.sigma / t.sigma) ** 2, z) * z + (
        expand_like(s.alpha * var_ts / t.sigma**2, z) * x
    )
    std = var_ts.sqrt() if variance == "large" else s.sigma / t.sigma * var_ts.sqrt()
    return mean, std
