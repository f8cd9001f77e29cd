"""The Gamma law by normal scores, against mpmath and scipy, from K = 1e-2 to 1e12 and beyond."""

import math

import mpmath
import pytest
import torch
from scipy import special, stats

from ddim_pl.noise.gamma_quantiles import LARGE, from_normal_score, log_density, normal_score

SHAPES = [1e-2, 0.3, 1.0, 2.9, 3.1, 30.0, LARGE - 1e-6, LARGE, 1e3, 1e5, 1e8, 1e12, 1e15, 1e20]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def exact_score(eps, shape):
    """To 50 digits; None where eps lies below the support or the tail below 1e-280."""
    with mpmath.workdps(50):
        k = mpmath.mpf(shape)
        gamma = k + mpmath.sqrt(k) * mpmath.mpf(eps)
        if gamma <= 0:
            return None
        below = mpmath.gammainc(k, 0, gamma, regularized=True)
        above = mpmath.gammainc(k, gamma, mpmath.inf, regularized=True)
        tail = min(below, above)
        if tail < mpmath.mpf(10) ** -280:
            return None

        def miss(y):
            return mpmath.log(mpmath.erfc(-y / mpmath.sqrt(2)) / 2) - mpmath.log(tail)

        start = -mpmath.sqrt(-2 * mpmath.log(tail)) if tail < 0.4 else mpmath.mpf(-0.5)
        score = float(mpmath.findroot(miss, start))
        return score if below < above else -score


@pytest.mark.parametrize("shape", [1e-2, 0.3, 1.0, 5.0, 30.0, LARGE - 1e-6, LARGE, 150.0, 500.0])
def test_scores_match_mpmath_in_both_tails(shape):
    """1e-8 is what is promised; PyTorch's incomplete Gamma has 2e-9 between 30 and 100."""
    points = [-20, -9, -5, -3, -1.5, -0.5, -0.1, -0.05, 0.0, 0.01, 0.5, 1, 3, 6, 10, 20, 30]
    known = [(e, y) for e in points if (y := exact_score(e, shape)) is not None]
    assert len(known) >= 8
    eps, expected = tensor(*[e for e, _ in known]), tensor(*[y for _, y in known])
    found = normal_score(eps, tensor(shape))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [0.3, 1.0, 5.0, 30.0, 1e3, 1e5])
def test_quantiles_match_scipy(shape):
    """scipy's inverse itself has some 1e-9 of a deviation at 1e5."""
    y = torch.linspace(-5, 5, 101, dtype=torch.float64)
    lower = special.gammaincinv(shape, stats.norm.cdf(y.numpy()))
    upper = special.gammainccinv(shape, stats.norm.sf(y.numpy()))
    gamma = torch.where(y < 0, torch.from_numpy(lower), torch.from_numpy(upper))
    expected = (gamma - shape) / math.sqrt(shape)
    found = from_normal_score(y, tensor(shape))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_two_maps_are_inverse_and_increasing(shape):
    """Where eps can tell a quantile from the support's edge: K + sqrt(K) eps has 16 digits."""
    y = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    eps = from_normal_score(y, tensor(shape))
    assert eps.isfinite().all()
    assert (eps.diff() >= 0).all()
    told = 1 + eps / math.sqrt(shape) > 1e-7
    assert told[-1]
    back = normal_score(eps, tensor(shape))
    torch.testing.assert_close(back[told], y[told], rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [1e-3, *SHAPES])
def test_nothing_overflows(shape):
    """Whatever an untrained network says, and beyond the support."""
    far = tensor(-1e30, -1e6, -100, -40, -10, 0, 10, 40, 100, 1e6)
    scores = normal_score(far, tensor(shape))
    eps = from_normal_score(far, tensor(shape))
    for values in (scores, eps):
        assert values.isfinite().all(), values
        assert (values.diff() >= 0).all(), values
    # Up to rounding no draw lies below the support.
    assert (eps >= -math.sqrt(shape) * (1 + 1e-12)).all()


def test_the_law_tends_to_the_normal_one():
    """At the rate 1 / sqrt(K), that of its skewness: eps = y + (y^2 - 1) / (3 sqrt(K))."""
    y = torch.linspace(-4, 4, 81, dtype=torch.float64)
    for shape in (1e6, 1e8, 1e10):
        first = y + (y.square() - 1) / (3 * math.sqrt(shape))
        error = (from_normal_score(y, tensor(shape)) - first).abs().max()
        assert error < 10 / shape


@pytest.mark.parametrize("shape", [1e-2, 0.5, 1.0, 9.9, 10.1, 500.0, 1e5])
def test_density_matches_scipy(shape):
    """Up to the 1e-11 K that scipy loses in its difference of large numbers."""
    eps = tensor(-0.99, -0.5, -0.05, 0.0, 0.3, 1.0, 4.0, 30.0)
    eps = eps[eps > -math.sqrt(shape)]
    gamma = shape + math.sqrt(shape) * eps.numpy()
    expected = torch.from_numpy(stats.gamma.logpdf(gamma, shape)) + math.log(shape) / 2
    torch.testing.assert_close(
        log_density(eps, tensor(shape)), expected, rtol=0, atol=1e-11 + 1e-14 * shape
    )
    assert log_density(tensor(-math.sqrt(shape) - 0.1), tensor(shape)) == -math.inf


@pytest.mark.parametrize("shape", [3.0, 99.0, 101.0, 1e12])
def test_density_is_the_slope_of_the_quantiles(shape):
    """`p(eps) deps = phi(y) dy`, by central differences of relative error 1e-7."""
    y, step = tensor(-4, -1, 0, 0.5, 2, 5), 1e-4
    ends = [from_normal_score(y + sign * step, tensor(shape)) for sign in (-1, 1)]
    slope = (ends[1] - ends[0]) / (2 * step)
    expected = -y.square() / 2 - math.log(2 * math.pi) / 2 - slope.log()
    found = log_density(from_normal_score(y, tensor(shape)), tensor(shape))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_shapes_broadcast():
    eps = torch.linspace(-1, 3, 12, dtype=torch.float64).reshape(3, 4)
    shapes = tensor(1.5, 50, 1e6)[:, None]
    together = normal_score(eps, shapes)
    for row, value, shape in zip(together, eps, shapes, strict=True):
        torch.testing.assert_close(row, normal_score(value, shape), rtol=1e-14, atol=1e-14)
