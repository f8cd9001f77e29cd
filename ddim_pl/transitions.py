"""The pure steps between two levels. Each formula stands here once.

`t` is the level a state is at, `s` the level it goes to. All coefficients are formed in float64.
"""

from typing import Literal

import torch
from torch import Tensor

from ddim_pl.prediction import Prediction
from ddim_pl.schedules import Level, expand

Variance = Literal["small", "large"]


def q_sample(x: Tensor, eps: Tensor, t: Level) -> Tensor:
    """Noisy state `alpha_t x + sigma_t eps`, `(B, ...)` (Ho et al. 2020, eq. 4)."""
    return expand(t.alpha, x) * x + expand(t.sigma, x) * eps


def transition_variance(t: Level, s: Level) -> Tensor:
    """Variance `1 - alpha_t^2 / alpha_s^2` of the forward transition from `s` to `t > s`.

    Formed as `sigma_t^2 - (alpha_t sigma_s / alpha_s)^2`, which stays exact where both levels hold
    little noise.
    """
    return (t.sigma - t.alpha / s.alpha * s.sigma) * (t.sigma + t.alpha / s.alpha * s.sigma)


def ddim_noise_scale(t: Level, s: Level, eta: float) -> Tensor:
    """Scale `c` of the fresh noise in a DDIM step (Song et al. 2021, eq. 16)."""
    if eta == 0:
        return torch.zeros_like(t.alpha)
    return eta * s.sigma / t.sigma * transition_variance(t, s).sqrt()


def ddim_step(
    prediction: Prediction, t: Level, s: Level, *, eta: float = 0.0, noise: Tensor | None = None
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
        return expand(s.alpha, x) * x + expand(s.sigma, x) * eps
    assert noise is not None, "a stochastic step needs noise"
    c = ddim_noise_scale(t, s, eta)
    kept = (s.sigma**2 - c**2).clamp(min=0).sqrt()  # rounding alone can make it negative
    return expand(s.alpha, x) * x + expand(kept, x) * eps + expand(c, x) * noise


def posterior(
    z: Tensor, x: Tensor, t: Level, s: Level, *, variance: Variance = "small"
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
    mean = expand(t.alpha / s.alpha * (s.sigma / t.sigma) ** 2, z) * z + (
        expand(s.alpha * var_ts / t.sigma**2, z) * x
    )
    std = var_ts.sqrt() if variance == "large" else s.sigma / t.sigma * var_ts.sqrt()
    return mean, std
