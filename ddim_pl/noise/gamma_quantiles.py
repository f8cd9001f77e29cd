"""Standardised Gamma distributions of any shape, and their quantiles as normal scores.

`eps = (G - K) / sqrt(K)` with `G ~ Gamma(K, 1)` has mean 0 and variance 1. Its normal score is the
number `y` with `Phi(y) = F_K(G)`: it represents the quantile accurately in both tails, and tends
to `eps` as K grows. `lambda = G / K = 1 + eps / sqrt(K)`, and `eta` has the sign of `lambda - 1`
and `eta^2 / 2 = lambda - 1 - log(lambda)`. In these terms the density is

    p(eps) = exp(-K eta^2 / 2) / (sqrt(2 pi) lambda Gamma*(K)),

`Gamma*(K) = Gamma(K) / (sqrt(2 pi / K) (K / e)^K)`. Everything is float64 and elementwise; shapes
K are positive, from 1e-3 to 1e20 at least, and broadcast to the values.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

LARGE = 100.0
"""Least shape for Temme's expansion of the scores; below it the incomplete Gamma function."""

LEAST = 1e-290
"""Least probability and least Gamma variable that are distinguished from 0."""

Series = list[Fraction]


def _expansion(order: int) -> tuple[list[float], ...]:
    """Taylor coefficients in eta of `c_1, c_2, c_3` in `y / sqrt(K) = eta + sum c_n / K^n`.

    From the logarithm of the derivative of `F_K(G) = Phi(y)`, in powers of 1 / K ([Temme]):

        c_1 = log((lambda - 1) / eta) / eta
        c_2 = (c_1' + 1/12 - c_1^2 / 2) / eta
        c_3 = (c_2' - c_1'^2 / 2 - c_1 c_2) / eta.
    """

    def product(a: Series, b: Series) -> Series:
        return [sum((a[i] * b[n - i] for i in range(n + 1)), Fraction(0)) for n in range(order)]

    def derivative(a: Series) -> Series:
        return [n * a[n] for n in range(1, order)] + [Fraction(0)]

    def over_eta(a: Series) -> Series:
        assert a[0] == 0
        return [*a[1:], Fraction(0)]

    # lambda - 1 = sum m_n eta^n, from (lambda - 1) dlambda/deta = lambda eta.
    m = [Fraction(0), Fraction(1)]
    for n in range(2, order + 1):
        inner = sum((m[i] * m[n + 1 - i] for i in range(2, n)), Fraction(0))
        m.append((m[n - 1] * Fraction(2, n + 1) - inner) / 2)
    ratio = m[1:]
    log = [Fraction(0)]
    for n in range(1, order):  # n ratio_n = sum_i i log_i ratio_{n - i}
        rest = sum((i * log[i] * ratio[n - i] for i in range(1, n)), Fraction(0))
        log.append(ratio[n] - rest / n)
    c1 = over_eta(log)
    half = product(c1, c1)
    twelfth = [Fraction(1, 12)] + [Fraction(0)] * (order - 1)
    d1 = derivative(c1)
    c2 = over_eta([d + k - h / 2 for d, k, h in zip(d1, twelfth, half, strict=True)])
    terms = zip(derivative(c2), product(d1, d1), product(c1, c2), strict=True)
    c3 = over_eta([d - h / 2 - p for d, h, p in terms])
    # Each division and each derivative invalidates the last coefficient.
    return tuple([float(v) for v in c[: order - lost]] for c, lost in ((c1, 1), (c2, 3), (c3, 5)))


# The series converge for |eta| < 2 sqrt(pi) and are used to 1, with error 1 / 3.5^29.
TAYLOR = _expansion(30)


def log_density(eps: Tensor, shape: Tensor) -> Tensor:
    """Logarithm of the density of standardised Gamma noise, float64; -inf outside its support.

    Args:
        eps: Standardised noise, any shape.
        shape: Shapes K, broadcastable to it.
    """
    eps, shape = torch.broadcast_tensors(eps.double(), shape.double())
    mu = eps / shape.sqrt()
    inside = mu > -1
    u = torch.log1p(torch.where(inside, mu, 0))
    value = -shape * _eta(u).square() / 2 - u - log_gamma_star(shape) - math.log(2 * math.pi) / 2
    return torch.where(inside, value, -math.inf)


def log_gamma_star(shape: Tensor) -> Tensor:
    """`log Gamma*(K)`, float64 of any shape; by Stirling's series where K is large."""
    k = shape.clamp(max=10)
    exact = torch.lgamma(k) - (k - 0.5) * k.log() + k - math.log(2 * math.pi) / 2
    w = 1 / shape.clamp(min=10)
    series = w * _polynomial([1 / 12, -1 / 360, 1 / 1260, -1 / 1680], w.square())
    return torch.where(shape < 10, exact, series)


def normal_score(eps: Tensor, shape: Tensor) -> Tensor:
    """Scores `y` with `Phi(y) = F_K(K + sqrt(K) eps)`, float64; increasing in `eps`.

    Values below the support have the score of its edge. The error is below 1e-8; beyond +-36,
    where a tail of a shape below `LARGE` has less probability than `LEAST`, some hundredths.

    Args:
        eps: Standardised noise, any shape.
        shape: Shapes K, broadcastable to it.
    """
    eps, shape = torch.broadcast_tensors(eps.double(), shape.double())
    return _score(_bounded(torch.log1p((eps / shape.sqrt()).clamp(min=-1)), shape), shape)


def from_normal_score(score: Tensor, shape: Tensor) -> Tensor:
    """Standardised Gamma noise of these normal scores, float64: the inverse of `normal_score`.

    Newton's method in `u = log(lambda)`, of which the score is a convex function, so that it
    converges from any start.

    Args:
        score: Normal scores, any shape.
        shape: Shapes K, broadcastable to them.
    """
    y, shape = torch.broadcast_tensors(score.double(), shape.double())
    u, low, high = _start(y, shape)
    for _ in range(3):  # enough for shapes from 3 on
        u = _newton(u, low, high, y, shape)
    small = shape < 3
    if small.any():
        parts = [each[small] for each in (u, low, high, y, shape)]
        for _ in range(12):
            before, parts[0] = parts[0], _newton(parts[0], *parts[1:])
            if ((parts[0] - before).abs() < 1e-9).all():  # the next change is 1e-18
                break
        u = u.masked_scatter(small, parts[0])
    return torch.expm1(u) * shape.sqrt()


def _newton(u: Tensor, low: Tensor, high: Tensor, y: Tensor, shape: Tensor) -> Tensor:
    found = _score(u, shape)
    log_slope = (found.square() - shape * _eta(u).square()) / 2 - log_gamma_star(shape)
    u = u - (found - y) / (shape.sqrt() * log_slope.exp())
    return torch.minimum(torch.maximum(u, low), high)


def _start(y: Tensor, shape: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cube-root approximation of [WilsonHilferty], and lower and upper bounds of the root."""
    cube = 1 - 1 / (9 * shape) + y / (3 * shape.sqrt())
    # P(K, G) <= G^K / Gamma(K + 1), with equality in the limit of small G.
    low = (torch.special.log_ndtr(y) + torch.lgamma(shape + 1)) / shape - shape.log()
    low = _bounded(torch.where(shape < LARGE, low, -math.inf), shape)
    # P(G > K + sqrt(2 K v) + v) <= exp(-v) ([LaurentMassart]).
    v = -torch.special.log_ndtr(-y) / shape
    high = torch.maximum(_bounded(torch.log1p((2 * v).sqrt() + v), shape), low)
    return torch.minimum(torch.maximum(3 * cube.clamp(min=1e-3).log(), low), high), low, high


def _bounded(u: Tensor, shape: Tensor) -> Tensor:
    """Clamp u so that `G = K exp(u)` and its tails do not leave the range of float64."""
    return torch.maximum(u, math.log(LEAST) - shape.log()).clamp(max=300)


def _score(u: Tensor, shape: Tensor) -> Tensor:
    """Normal scores from `u = log(lambda)`."""
    large = shape >= LARGE
    score = _score_large(u, shape.clamp(min=LARGE))
    if large.all():
        return score
    small = ~large
    return score.masked_scatter(small, _score_small(u[small], shape[small]))


def _score_small(u: Tensor, shape: Tensor) -> Tensor:
    gamma = shape * u.exp()
    below = torch.special.gammainc(shape, gamma)
    above = torch.special.gammaincc(shape, gamma)
    score = torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above))
    beyond = torch.minimum(below, above) < LEAST
    if not beyond.any():
        return score
    u, root = u[beyond], shape[beyond].sqrt()
    eta = _eta(u)
    return score.masked_scatter(beyond, root * eta + _closed(u, eta)[0] / root)


def _score_large(u: Tensor, shape: Tensor) -> Tensor:
    """Temme's expansion, whose next term is below 1e-8 from `LARGE` on."""
    eta = _eta(u)
    inner = eta.clamp(-1, 1)
    terms = [_polynomial(c, inner) for c in TAYLOR]
    outer = eta.abs() > 1
    if outer.any():
        closed = _closed(u[outer], eta[outer])
        terms = [t.masked_scatter(outer, c) for t, c in zip(terms, closed, strict=True)]
    c1, c2, c3 = terms
    return shape.sqrt() * (eta + (c1 + (c2 + c3 / shape) / shape) / shape)


def _closed(u: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of `_expansion` in closed form, 0 / 0 at eta = 0."""
    mu, lam = torch.expm1(u), u.exp()
    d_mu = lam * eta / mu
    dd_mu = (d_mu * eta + lam - d_mu.square()) / mu
    slope = d_mu / mu
    log = (mu / eta).log()
    d_log = slope - 1 / eta
    dd_log = dd_mu / mu - slope.square() + 1 / eta.square()
    c1 = log / eta
    d_c1 = (d_log - c1) / eta
    dd_c1 = (dd_log - 2 * d_c1) / eta
    c2 = (d_c1 + 1 / 12 - c1.square() / 2) / eta
    d_c2 = (dd_c1 - c1 * d_c1 - c2) / eta
    c3 = (d_c2 - d_c1.square() / 2 - c1 * c2) / eta
    return c1, c2, c3


def _eta(u: Tensor) -> Tensor:
    """`sign(u) sqrt(2 (exp(u) - 1 - u))`; by its series for small u."""
    near = u.clamp(-0.5, 0.5)
    # 2 (exp(u) - 1 - u) / u^2 = sum 2 u^n / (n + 2)!
    series = _polynomial([2 / math.factorial(n + 2) for n in range(14)], near)
    far = 2 * (torch.expm1(u) - u) / torch.where(u == 0, 1, u.square())
    return u * torch.where(u.abs() < 0.5, series, far).sqrt()


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Horner's rule; the constant term comes first."""
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value.mul_(x).add_(c)
    return value
