"""Densities of the backward steps of Gamma diffusion, and their divergences by integration.

With the true x a step has one law, with an estimate of x another, of which the support begins
elsewhere. Where the first reaches below the second, the divergence is infinite; there is no closed
formula for the finite values either. Here they are integrated numerically. In `d`, the distance of
the logarithm (Gamma) or the logit (Beta) from its mode, both densities are log-concave and
analytic, so that the trapezoidal rule converges exponentially; its nodes lie at `sinh` distances
from the mode, since the tails of small shapes are long.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ddim_pl.noise.gamma import GammaNoise
from ddim_pl.noise.gamma_quantiles import log_density as log_gamma_density
from ddim_pl.noise.gamma_quantiles import log_gamma_star
from ddim_pl.noise.gamma_steps import report_kept, thinning_shapes
from ddim_pl.prediction import Prediction
from ddim_pl.scales import Scales, expand_like, float64, to_device, unsqueeze_like
from ddim_pl.transitions import transition_variance

NODES = 128
"""Nodes of the rule. The error is below 1e-6, but up to 3 % where a mixture has its kink, at the
edge of a small shape."""

DROP = 45.0
"""Where the log-density is this far below its mode, it is cut off."""

LEAST = 1e-300
"""What is taken for 0 in a logarithm or a quotient."""


class Rule(NamedTuple):
    """Nodes of an expectation for each image, float64 `(B, NODES)` each.

    Attributes:
        d: Logarithms or logits, from their mode.
        weight: Weights, which sum to 1.
        log_density: Logarithm of the normalised density of d.
    """

    d: Tensor
    weight: Tensor
    log_density: Tensor

    def over(self, like: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The nodes one after the other, broadcast to a batch `(B, ...)`."""
        for node in zip(*(each.unbind(1) for each in self), strict=True):
            d, weight, log_density = (unsqueeze_like(each, like) for each in node)
            yield d, weight, log_density


def gamma_rule(shape: Tensor) -> Rule:
    """Nodes for `Gamma(shape, 1)`, in `d = log(G / shape)`, of density `exp(shape (d - e^d))`.

    Args:
        shape: Shapes, float64 `()` or `(B,)`.
    """
    k = shape.reshape(-1, 1)
    return _rule(lambda d: -k * _half_square(d), k.rsqrt(), 1 + 1 / k)


def beta_rule(a: Tensor, b: Tensor) -> Rule:
    """Nodes for `Beta(a, b)`, in `d = logit(B) - log(a / b)`.

    Args:
        a: First shapes, float64 `()` or `(B,)`.
        b: Second shapes, float64 `()` or `(B,)`.
    """
    a, b = a.reshape(-1, 1), b.reshape(-1, 1)
    r = a / (a + b)

    def log_density(d: Tensor) -> Tensor:
        # The logarithm of (1 - r) + r e^d, which is r d to first order.
        near = torch.log1p(r * torch.expm1(d.clamp(max=1)))
        far = torch.logaddexp(torch.log1p(-r), d + r.log())
        return a * d - (a + b) * torch.where(d < 1, near, far)

    return _rule(log_density, (1 / a + 1 / b).sqrt(), 1 + 1 / a + 1 / b)


def report_log_density(
    z_s: Tensor, prediction: Prediction, c: Tensor, noise: GammaNoise, t: Scales, s: Scales
) -> Tensor:
    """Log-density `(B, ...)` of the step `report_step` at `z_s` ([Report], eq. 19 and 29).

    `z_s - C z_t - D x + c k theta_t ~ Gamma(k, c theta_t)` with `k = K_t - K_s`. The report prints
    `C x + D z_t`, where its step has `C z_t + D x`, and the shape `K_t` of all noise up to t where
    the step adds noise of shape `k`; both are corrected here. With the true x this is
    `q(z_s | z_t, x)`, with the estimate the model's `p(z_s | z_t)`.

    Args:
        z_s: States at `s`, `(B, ...)`.
        prediction: x and its noise at `t`, each `(B, ...)`.
        c: Scale of the fresh noise, above 0, `()`.
        noise: Law of the noise.
        t: Scales of the state.
        s: Scales at a cleaner level.

    Returns:
        Natural logarithms, float64; -inf outside the support.
    """
    x, eps = (float64(each) for each in prediction)
    mean = expand_like(s.alpha, x) * x + expand_like(report_kept(c, t, s), x) * eps
    std = c * transition_variance(t, s).sqrt()
    _, fresh = thinning_shapes(noise, t, s)
    standard = (float64(z_s) - mean) / to_device(std, mean)
    return log_gamma_density(standard, to_device(fresh, mean)) - std.log()


def first_log_density(x: Tensor, z: Tensor, noise: GammaNoise, t: Scales) -> Tensor:
    """Log-density `(B, ...)` of `p(x | z)` at the first level ([Report], after eq. 19).

    `x = z / alpha - theta_0 (G - K)` with `G ~ Gamma(K, 1)`, which is the posterior of x if all x
    are equally likely. [Report] has the noise with the other sign, the mirror image, which is
    skewed to the wrong side. It depends on no estimate.

    Args:
        x: Clean images, `(B, ...)`.
        z: States at `t`, `(B, ...)`.
        noise: Law of the noise.
        t: Scales of the first level.

    Returns:
        Natural logarithms, float64; -inf outside the support.
    """
    wide = float64(x)
    eps = (float64(z) - expand_like(t.alpha, wide) * wide) / expand_like(t.sigma, wide)
    return noise.log_density(eps, t) + to_device((t.alpha / t.sigma).log(), eps)


def thinning_log_density(
    z_s: Tensor, prediction: Prediction, noise: GammaNoise, t: Scales, s: Scales
) -> Tensor:
    """Log-density `(B, ...)` of `thinning_step` at `z_s`: that of a scaled Beta variable.

    `z_s = alpha_s x + theta_s (B G - K_s)` with `B ~ Beta(K_s, K_t - K_s)` and the Gamma variable
    `G = K_t + sqrt(K_t) eps`, which must be positive. With the true x it is the process's
    posterior.

    Args:
        z_s: States at `s`, `(B, ...)`.
        prediction: x and its noise at `t`, each `(B, ...)`.
        noise: Law of the noise.
        t: Scales of the state.
        s: Scales at a cleaner level.

    Returns:
        Natural logarithms, float64; -inf outside the support.
    """
    x, eps = (float64(each) for each in prediction)
    a, b = (to_device(each, x) for each in thinning_shapes(noise, t, s))
    theta = to_device(s.alpha * noise.theta_0, x)
    g = a + b + (a + b).sqrt() * eps
    share = ((float64(z_s) - expand_like(s.alpha, x) * x) / theta + a) / g
    inside = (share > 0) & (share < 1) & (g > 0)
    r = a / (a + b)
    safe = torch.where(inside, share, r)
    # Without differences of large logarithms of Gamma(K).
    star = log_gamma_star(a + b) - log_gamma_star(a) - log_gamma_star(b)
    norm = (a * (1 - r) / (2 * math.pi)).log() / 2 + star
    value = (a * (safe / r).log() + b * ((1 - safe) / (1 - r)).log()) + norm
    value = value - safe.log() - torch.log1p(-safe) - g.abs().log() - theta.log()
    return torch.where(inside, value, -math.inf)


def report_divergence(error: Tensor, c: Tensor, noise: GammaNoise, t: Scales, s: Scales) -> Tensor:
    """Divergence of [Report]'s eq. 20 for the step of eq. 18, in nats, float64 `(B, ...)`.

    Both laws are `Gamma(k, c theta_t)`, shifted by `D x` and by `D xhat`. With `delta = D (xhat -
    x) / (c theta_t)` it is `E[(k - 1) log(g / (g - delta))] - delta`, infinite for any `xhat > x`;
    for `k > 2` and small errors below x it is about `delta^2 / (2 (k - 2))`.

    Args:
        error: `xhat - x`, `(B, ...)`.
        c: Scale of the fresh noise, above 0, `()`.
        noise: Law of the noise.
        t: Scales of the state, `()`.
        s: Scales at a cleaner level, `()`.
    """
    _, k = thinning_shapes(noise, t, s)
    factor = (s.alpha**2 + c * t.alpha) / ((1 + s.alpha) * c * t.alpha * noise.theta_0)
    delta = float64(error) * factor
    total = torch.zeros_like(delta)
    for d, weight, _ in _on(delta, gamma_rule(k)).over(delta):
        # log(g / (g - delta)) with g = k e^d
        total -= weight * torch.log1p((-delta).clamp(min=0) * (-d).exp() / k)
    return torch.where(delta > 0, torch.inf, (k - 1) * total - delta)


def thinning_divergence(
    eps: Tensor,
    error: Tensor,
    noise: GammaNoise,
    t: Scales,
    s: Scales,
    *,
    gaussian_share: float,
) -> Tensor:
    """Divergence of two steps, with x and with an estimate, in nats, float64 `(B, ...)`.

    `q` is `thinning_step` with the true x, the posterior of the process. The model's step is a
    mixture: with the share w it is DDPM's Gaussian step with the estimate, else `thinning_step`
    with it. From the lower end of q's support, in units of theta_s, a state is `V = B G`, `B ~
    Beta(K_s, K_t - K_s)`, and with `rho = (x - xhat) / (theta_0 G)` and `r = K_s / K_t`

        log(p_thin / q) = (K_s - 1) log(1 + rho / B) - (K_t - 1) log(1 + rho)
        p_gauss = N(G (r - (1 - r) rho), K_s (1 - r))

    where `rho + B > 0`; elsewhere p_thin is 0. Both supports end at the same place, which does not
    depend on x, and q's begins below p_thin's wherever `xhat > x`. So with w = 0 the divergence is
    infinite there. With w = 1 it is `(SNR_s - SNR_t) / 2 (x - xhat)^2` and a term without xhat.
    For theta_0 -> 0 it tends to that of DDPM, with any w.

    Args:
        eps: The true noise at `t`, `(B, ...)`.
        error: `xhat - x`, `(B, ...)`.
        noise: Law of the noise.
        t: Scales of the state, `()` or `(B,)`.
        s: Scales at a cleaner level, as `t`.
        gaussian_share: The share w, from 0 to 1.
    """
    wide = float64(eps)
    a, b = (to_device(each, wide) for each in thinning_shapes(noise, t, s))
    rule = beta_rule(a, b)
    a, b = (unsqueeze_like(each, wide) for each in (a, b))
    g = (a + b) * (1 + wide / (a + b).sqrt()).clamp(min=LEAST)
    rho = -float64(error) / (noise.theta_0 * g)
    total = torch.zeros_like(rho)
    for d, weight, log_density in rule.over(wide):
        u = d + a.log() - b.log()
        log_beta, log_rest = logsigmoid(u), logsigmoid(-u)
        log_thinned = _log_thinned(log_beta, rho, a, b)
        log_q = log_density - log_beta - log_rest - g.log()
        log_gauss = _log_gauss(d, g, rho, a, b) - log_q
        total -= weight * _log_mixture(log_thinned, log_gauss, gaussian_share)
    return torch.where(rho < 0, torch.inf, total) if gaussian_share == 0 else total


def prior_divergence(x: Tensor, noise: GammaNoise, t: Scales, *, gaussian_share: float) -> Tensor:
    """Divergence of `q(z_t | x)` from the prior, in nats, float64 `(B, ...)`.

    The prior is the law of the latents, standardised noise of level t, and with the share w a
    standard normal, as in `thinning_divergence`.

    Args:
        x: Clean images, `(B, ...)`.
        noise: Law of the noise.
        t: Scales of the last level, `()`.
        gaussian_share: The share w, from 0 to 1.
    """
    wide = float64(x)
    k = to_device(noise.concentration(t), wide)
    total = torch.zeros_like(wide)
    for d, weight, _ in gamma_rule(k).over(wide):
        eps = k.sqrt() * torch.expm1(d)
        z = t.alpha * wide + t.sigma * eps
        log_q = log_gamma_density(eps, k) - t.sigma.log()
        log_gamma = log_gamma_density(z, k) - log_q
        log_gauss = -(z.square() + math.log(2 * math.pi)) / 2 - log_q
        total -= weight * _log_mixture(log_gamma, log_gauss, gaussian_share)
    return total


def _log_thinned(log_beta: Tensor, rho: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`log(p_thin / q)` where the share is beta; -inf outside the support of p_thin."""
    beta = log_beta.exp()
    ratio = rho / beta.clamp(min=LEAST)
    near = torch.log1p(ratio.clamp(-0.5, 0.5))
    moved = torch.where(ratio.abs() < 0.5, near, (rho + beta).clamp(min=LEAST).log() - log_beta)
    inside = (rho + beta > 0) & (rho > -1)
    grown = torch.log1p(torch.where(inside, rho, 0))
    return torch.where(inside, (a - 1) * moved - (a + b - 1) * grown, -torch.inf)


def _log_gauss(d: Tensor, g: Tensor, rho: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Log-density of the Gaussian step at `V = B G`."""
    r = a / (a + b)
    grown = torch.expm1(d.clamp(max=700))
    off = r * (1 - r) * grown / (1 + r * grown)  # B - r
    variance = a * (1 - r)
    square = (g * (off + rho * (1 - r))).square() / variance
    return -(square + variance.log() + math.log(2 * math.pi)) / 2


def _log_mixture(gamma: Tensor, gauss: Tensor, gaussian_share: float) -> Tensor:
    """`log((1 - w) exp(gamma) + w exp(gauss))`."""
    if gaussian_share in (0, 1):
        return gauss if gaussian_share else gamma
    return torch.logaddexp(gamma + math.log1p(-gaussian_share), gauss + math.log(gaussian_share))


def _on(like: Tensor, rule: Rule) -> Rule:
    return Rule(*(to_device(each, like) for each in rule))


def _half_square(d: Tensor) -> Tensor:
    """`expm1(d) - d`, without the loss of digits near 0."""
    small = d.clamp(-0.5, 0.5)
    series = torch.zeros_like(small)
    for n in range(16, 1, -1):
        series = series * small + 1 / math.factorial(n)
    return torch.where(d.abs() < 0.5, series * small.square(), torch.expm1(d) - d)


def _rule(log_density: Callable[[Tensor], Tensor], width: Tensor, reach: Tensor) -> Rule:
    """The trapezoidal rule between the points where the density has fallen by `DROP`.

    Args:
        log_density: Of d, up to a constant, log-concave with its mode at 0.
        width: Standard deviation of its Gaussian approximation, `(B, 1)`.
        reach: Length of its longer tail, `(B, 1)`.
    """
    scale = width.clamp(max=1)
    grid = torch.linspace(-1, 1, 1001, dtype=torch.float64, device=width.device)
    coarse = grid * torch.asinh(2 * DROP * reach / scale)
    inside = log_density(scale * coarse.sinh()) > -DROP
    low = torch.where(inside, coarse, torch.inf).amin(1, keepdim=True)
    high = torch.where(inside, coarse, -torch.inf).amax(1, keepdim=True)
    steps = torch.linspace(0, 1, NODES, dtype=torch.float64, device=width.device)
    v = low + (high - low) * steps
    d = scale * v.sinh()
    value = log_density(d)
    weight = (value + v.cosh().log()).exp()
    total = weight.sum(1, keepdim=True)
    spacing = (high - low) / (NODES - 1) * scale
    return Rule(d, weight / total, value - (total * spacing).log())
