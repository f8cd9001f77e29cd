"""Transitions between two levels, as pure functions.

`t` holds the scales of the state, `s` those of the level that a step leads to. All coefficients
are computed in float64.
"""

from typing import Literal

import torch
from torch import Tensor

from ddim_pl.prediction import Prediction
from ddim_pl.scales import Scales, add_scaled, combine, expand_like, float64

Variance = Literal["small", "large"]


def q_sample(x: Tensor, eps: Tensor, t: Scales) -> Tensor:
    """Noisy state `alpha_t x + sigma_t eps`, `(B, ...)` ([DDPM], eq. 4)."""
    return combine(t.alpha, x, t.sigma, eps)


def transition_variance(t: Scales, s: Scales) -> Tensor:
    """Variance `1 - alpha_t^2 / alpha_s^2` of the forward transition from `s` to `t > s`.

    Computed as `sigma_t^2 - (alpha_t sigma_s / alpha_s)^2`, which is accurate also where both
    levels have little noise.
    """
    return (t.sigma - t.alpha / s.alpha * s.sigma) * (t.sigma + t.alpha / s.alpha * s.sigma)


def ddim_noise_scale(t: Scales, s: Scales, eta: float) -> Tensor:
    """Scale `c` of the fresh noise in a DDIM step ([DDIM], eq. 16)."""
    if eta == 0:
        return torch.zeros_like(t.alpha)
    return eta * s.sigma / t.sigma * transition_variance(t, s).sqrt()


def ddim_step(
    prediction: Prediction, t: Scales, s: Scales, *, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """One DDIM step `alpha_s x + sqrt(sigma_s^2 - c^2) eps + c noise` ([DDIM], eq. 12).

    With `eta = 0` the levels may rise (encoding) as well as fall.

    Args:
        prediction: Estimates at `t`, each `(B, ...)`.
        t: Scales of the state.
        s: Scales at the level to go to.
        eta: 0 is deterministic; 1 is the DDPM posterior in distribution.
        noise: Standard noise `(B, ...)`; required if `eta > 0`.
    """
    x, eps = prediction
    if eta == 0:
        return combine(s.alpha, x, s.sigma, eps)
    assert noise is not None, "a stochastic step needs noise"
    c = ddim_noise_scale(t, s, eta)
    kept = (s.sigma**2 - c**2).clamp(min=0).sqrt()  # negative only by rounding
    return add_scaled(combine(s.alpha, x, kept, eps), c, noise)


def two_step_target(x_t: Tensor, x_mid: Tensor, t: Scales, mid: Scales, s: Scales) -> Tensor:
    """The x with which one DDIM step from `t` to `s` equals two steps over `mid`, `(B, ...)`.

    `(z_s - sigma_s / sigma_t z_t) / (alpha_s - sigma_s / sigma_t alpha_t)` ([PD], appendix G).
    There `z_t` cancels: it is a weighted mean of the two steps' estimates, which is accurate also
    for short steps.

    Args:
        x_t: Estimates of the clean image at `t`, `(B, ...)`.
        x_mid: Estimates at `mid`, after the first step, `(B, ...)`.
        t: Scales at the noisiest level.
        mid: Scales at the level between.
        s: Scales at the cleanest level.
    """

    def gain(t: Scales, s: Scales) -> Tensor:
        """Factor of x in a step from t to s."""
        return s.alpha - s.sigma / t.sigma * t.alpha

    weight = gain(mid, s) / gain(t, s)
    return expand_like(weight, x_mid) * x_mid + expand_like(1 - weight, x_t) * x_t


def ddim_chain(z: Tensor, x: Tensor, scales: Scales) -> Tensor:
    """All states of a deterministic DDIM chain, given the estimates at each, `(B, S, ...)`.

    A step `alpha_s x + sigma_s (z - alpha_t x) / sigma_t` adds `(rho_s - rho_t) x` to `z / sigma`,
    with `rho = alpha / sigma`. So the state after k steps is

        z_k = sigma_k (z_0 / sigma_0 + sum_{j < k} (rho_{j+1} - rho_j) x_j),

    which is [DEQ], eq. 9, with estimates of x in place of eps. All coefficients of this form are
    positive, so that it is accurate at the noisy end, where alpha almost vanishes, and it also
    holds for clipped estimates.

    Args:
        z: Start states, `(B, ...)`.
        x: Estimates of the clean image at all levels but the last, `(B, S, ...)`.
        scales: Scales at falling levels, `(S + 1,)` or `(B, S + 1)`; only the last sigma may be 0.
    """
    alpha, sigma = (each if each.ndim == 2 else each[None] for each in scales)
    noisy = sigma > 0
    rho = alpha / torch.where(noisy, sigma, 1)
    gain = torch.where(noisy[:, 1:], rho[:, 1:] - rho[:, :-1], 0)
    scaled = expand_like(1 / sigma[:, :1], x) * z[:, None] + (expand_like(gain, x) * x).cumsum(1)
    states = expand_like(sigma[:, 1:], x) * scaled
    if noisy.all():
        return states
    # At sigma = 0 the state is alpha x of the last estimate.
    return states + expand_like(torch.where(noisy, 0, alpha)[:, 1:], x) * x


def implied_x(z: Tensor, z_s: Tensor, t: Scales, s: Scales) -> Tensor:
    """The x with which one deterministic DDIM step leads from `z` at `t` to `z_s`, `(B, ...)`.

    `(z_s - sigma_s / sigma_t z) / (alpha_s - sigma_s / sigma_t alpha_t)` ([PD], appendix G), in
    float64, since for close levels it is a quotient of small differences.
    """
    ratio = s.sigma / t.sigma
    wide, wide_s = float64(z), float64(z_s)
    numerator = wide_s - expand_like(ratio, wide) * wide
    return (numerator / expand_like(s.alpha - ratio * t.alpha, numerator)).to(z)


def ddim_forward(
    z: Tensor, x: Tensor, s: Scales, t: Scales, *, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean `(B, ...)` and standard deviation of DDIM's forward step `q(z_t | z_s, x)`, `t > s`.

    `N(alpha_t x + sqrt(sigma_s^2 - c^2) sigma_t / sigma_s^2 (z_s - alpha_s x), (c sigma_t /
    sigma_s)^2 I)` with `c` of `ddim_noise_scale`, by Bayes' rule from the backward step and both
    marginals ([DDIM], section 3.1; [Report], eq. 14, has another root). It depends on x, so the
    forward process is not Markovian, except for `eta = 1`, where it is that of DDPM.

    Args:
        z: States at `s`, `(B, ...)`.
        x: Clean images, `(B, ...)`.
        s: Scales of the state; sigma must not be 0.
        t: Scales at a noisier level.
        eta: As in `ddim_step`.
    """
    c = ddim_noise_scale(t, s, eta)
    kept = (s.sigma**2 - c**2).clamp(min=0).sqrt() * t.sigma / s.sigma**2
    mean = expand_like(t.alpha, x) * x + expand_like(kept, x) * (z - expand_like(s.alpha, x) * x)
    return mean, c * t.sigma / s.sigma


def ode_step(prediction: Prediction, eps: Tensor, t: Scales, s: Scales) -> Tensor:
    """Euler step `y_s = y_t + (r_s - r_t) eps` of the probability-flow ODE ([DDIM], eq. 13).

    With `y = z / alpha` and `r = sigma / alpha`. It is the DDIM step, up or down, along any noise,
    not only the estimate at `t`; x is adjusted so that both still explain the state.

    Args:
        prediction: Estimates at `t`, each `(B, ...)`, which determine the state.
        eps: Noise of the step, `(B, ...)`.
        t: Scales of the state.
        s: Scales at the level to go to.
    """
    x = prediction.x + expand_like(t.sigma / t.alpha, eps) * (prediction.eps - eps)
    return ddim_step(Prediction(x, eps), t, s)


def forward_step(z: Tensor, noise: Tensor, s: Scales, t: Scales) -> Tensor:
    """Noisier state from `q(z_t | z_s)`, `(B, ...)`, for `t > s` ([DDPM], eq. 2).

    Args:
        z: States at `s`, `(B, ...)`.
        noise: Standard noise, `(B, ...)`.
        s: Scales of the state.
        t: Scales at a noisier level.
    """
    std = transition_variance(t, s).sqrt()
    return expand_like(t.alpha / s.alpha, z) * z + expand_like(std, z) * noise


def posterior(
    z: Tensor, x: Tensor, t: Scales, s: Scales, *, variance: Variance = "small"
) -> tuple[Tensor, Tensor]:
    """Mean `(B, ...)` and standard deviation of `q(z_s | z_t, x)` for `s < t`.

    Args:
        z: States at `t`, `(B, ...)`.
        x: Clean images, `(B, ...)`.
        t: Scales of the state.
        s: Scales at a cleaner level.
        variance: "small" is the variance of the posterior; "large" is that of the forward
            transition ([DDPM], section 3.2), "sigma-hat" in [DDIM].
    """
    var_ts = transition_variance(t, s)
    mean = expand_like(t.alpha / s.alpha * (s.sigma / t.sigma) ** 2, z) * z + (
        expand_like(s.alpha * var_ts / t.sigma**2, z) * x
    )
    std = var_ts.sqrt() if variance == "large" else s.sigma / t.sigma * var_ts.sqrt()
    return mean, std
