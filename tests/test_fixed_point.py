"""Solvers on maps whose fixed points are known, and on one that never settles."""

import pytest
import torch
from torch import Tensor

from ddim_pl.fixed_point import Anderson, FixedPoint, Picard, mixing_weights

MIXINGS = ["sample", "block", "triangular"]


def affine(batch: int = 3, blocks: int = 6, width: int = 4, seed: int = 0):
    """Maps `z -> A z + b`, `A` strictly block triangular, of each sample; their fixed points."""
    generator = torch.Generator().manual_seed(seed)
    n = blocks * width
    a = torch.randn(batch, n, n, generator=generator, dtype=torch.float64) / n**0.5
    block = torch.arange(n) // width
    a = a * (block[:, None] > block[None, :])
    b = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - a, b)

    def f(z: Tensor) -> Tensor:
        flat = z.flatten(1)
        return (torch.einsum("bij,bj->bi", a[: len(z)], flat) + b[: len(z)]).reshape(z.shape)

    return f, exact.reshape(batch, blocks, width)


def contraction(batch: int = 4, n: int = 30, seed: int = 0):
    """Full affine contractions, each sample with a rate of its own."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(batch, n, n, generator=generator, dtype=torch.float64)
    a = a + a.mT  # symmetric, so that the norm is the rate of convergence
    rate = torch.linspace(0.5, 0.95, batch, dtype=torch.float64)
    a = a / torch.linalg.matrix_norm(a, 2)[:, None, None] * rate[:, None, None]
    b = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - a, b)

    def f(z: Tensor) -> Tensor:
        return (torch.einsum("bij,bj->bi", a, z[:, 0]) + b)[:, None]

    return f, exact[:, None]


def integral(steps: int = 100, width: int = 3):
    """Euler steps of `y' = M y` as one strictly triangular map, `M` with eigenvalues of 4 to 8."""
    m = torch.diag(torch.linspace(-8, -4, width, dtype=torch.float64)) + 1
    exact = [torch.ones(1, width, dtype=torch.float64)]
    for _ in range(steps):
        exact.append(exact[-1] + exact[-1] @ m / steps)

    def f(y: Tensor) -> Tensor:
        before = torch.cat([exact[0][:, None].expand(len(y), 1, width), y[:, :-1]], 1)
        return exact[0] + (before @ m / steps).cumsum(1)

    return f, torch.stack(exact[1:], 1)


def solvers(**arguments):
    return [
        Picard(**arguments),
        Picard(damping=0.8, **arguments),
        *(Anderson(mixing=mixing, **arguments) for mixing in MIXINGS),
        Anderson(mixing="sample", damping=0.7, memory=3, **arguments),
    ]


@pytest.mark.parametrize("solver", solvers(tolerance=1e-10, max_sweeps=1000), ids=str)
def test_every_solver_finds_the_fixed_point(solver):
    f, exact = contraction()
    found = solver(f, torch.zeros_like(exact))
    assert found.converged.all()
    # A residual of 1e-10 is an error of at most 1e-10 / (1 - 0.95) of the solution's norm.
    error = (found.z - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert (error < 2e-9).all(), error


def test_picard_is_exact_after_as_many_sweeps_as_rows():
    f, exact = affine(blocks=6)
    found = Picard(tolerance=0, max_sweeps=6)(f, torch.randn_like(exact))
    torch.testing.assert_close(found.z, exact, rtol=1e-12, atol=1e-12)
    early = Picard(tolerance=0, max_sweeps=5)(f, torch.randn_like(exact))
    assert (early.z - exact).abs().max() > 1e-6
    torch.testing.assert_close(early.z[:, :5], exact[:, :5], rtol=1e-12, atol=1e-12)


def test_triangular_mixing_makes_one_more_row_exact_in_each_sweep():
    """To the regularisation, 1e-8, that lets inexact iterates have a share."""
    f, exact = affine(blocks=6)
    for sweeps in range(1, 7):
        found = Anderson(tolerance=0, max_sweeps=sweeps)(f, torch.zeros_like(exact))
        rows = slice(0, sweeps)
        torch.testing.assert_close(found.z[:, rows], exact[:, rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_anderson_takes_fewer_sweeps_than_picard(mixing):
    f, exact = integral() if mixing == "triangular" else contraction()
    zero = torch.zeros_like(exact)
    plain = Picard(tolerance=1e-8, max_sweeps=1000)(f, zero)
    mixed = Anderson(tolerance=1e-8, max_sweeps=1000, mixing=mixing)(f, zero)
    assert (mixed.sweeps <= plain.sweeps).all()
    assert mixed.sweeps.max() < 0.6 * plain.sweeps.max()


def test_memory_of_one_is_picard():
    f, exact = affine()
    zero = torch.zeros_like(exact)
    plain = Picard(tolerance=1e-6, damping=0.6)(f, zero)
    mixed = Anderson(tolerance=1e-6, damping=0.6, memory=1)(f, zero)
    torch.testing.assert_close(mixed.z, plain.z, rtol=1e-12, atol=1e-12)
    assert torch.equal(mixed.sweeps, plain.sweeps)


@pytest.mark.parametrize("solver", solvers(tolerance=1e-6, max_sweeps=300), ids=str)
def test_a_sample_does_not_depend_on_its_batch(solver):
    f, exact = contraction()
    together = solver(f, torch.zeros_like(exact))
    assert len(set(together.sweeps.tolist())) > 1  # some converge before others
    for i in range(len(exact)):
        # The others begin elsewhere.
        start = torch.full_like(exact, 3.0)
        start[i] = 0
        other = solver(f, start)
        assert torch.equal(other.z[i], together.z[i])
        assert other.sweeps[i] == together.sweeps[i]


def test_residuals_are_recorded_until_a_sample_has_converged():
    f, exact = contraction()
    found = Picard(tolerance=1e-4, max_sweeps=500)(f, torch.zeros_like(exact))
    assert found.residuals.shape == (int(found.sweeps.max()), len(exact))
    recorded = found.residuals.isfinite()
    assert torch.equal(recorded.sum(0), found.sweeps)
    z = torch.zeros_like(exact)
    for k in range(3):
        image = f(z)
        expected = (image - z).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)
        torch.testing.assert_close(found.residuals[k], expected)
        z = image


def test_without_convergence_the_image_of_least_residual_is_returned():
    """A rotation that grows: every sweep is worse than the one before."""
    turn = torch.tensor([[0.0, -1.5], [1.5, 0.0]], dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return z @ turn.T + 1

    start = torch.tensor([[[0.3, 0.1]]], dtype=torch.float64)
    found = Picard(tolerance=1e-9, max_sweeps=7)(f, start)
    assert not found.converged.any()
    best = int(found.residuals[:, 0].argmin())
    z = start
    for _ in range(best + 1):
        z = f(z)
    torch.testing.assert_close(found.z, z)
    # Anderson solves it: two dimensions, two differences.
    solved = Anderson(tolerance=1e-9, max_sweeps=7, mixing="sample")(f, start)
    assert solved.converged.all()
    torch.testing.assert_close(f(solved.z), solved.z, rtol=1e-7, atol=1e-7)


def test_a_start_at_the_fixed_point_takes_one_sweep():
    f, exact = affine()
    found = Anderson(tolerance=1e-9)(f, exact)
    assert isinstance(found, FixedPoint)
    assert found.sweeps.tolist() == [1, 1, 1]


def test_weights_minimise_the_mixed_residual():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(2, 3, 10, generator=generator, dtype=torch.float64)
    weights = mixing_weights(g @ g.mT, 0.0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, dtype=torch.float64))

    def size(w: Tensor) -> Tensor:
        return torch.einsum("bm,bmd->bd", w, g).norm(dim=1)

    for direction in ([1.0, -1, 0], [0, 1, -1], [1, 1, -2]):
        step = 1e-4 * torch.tensor(direction, dtype=torch.float64)
        assert (size(weights) < size(weights + step)).all()
        assert (size(weights) < size(weights - step)).all()


def test_singular_systems_are_regularised_and_hopeless_ones_take_the_newest():
    same = torch.ones(1, 3, 3, dtype=torch.float64)  # three times one residual
    torch.testing.assert_close(
        mixing_weights(same, 0.0),
        torch.full((1, 3), 1 / 3, dtype=torch.float64),
        atol=0.01,
        rtol=0,
    )
    for hopeless in (torch.zeros(1, 3, 3), torch.full((1, 3, 3), torch.nan)):
        assert mixing_weights(hopeless.double(), 1e-8).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Picard, {"tolerance": -1.0}, "tolerance must be at least 0, got -1"),
        (Picard, {"max_sweeps": 0}, "max_sweeps must be at least 1, got 0"),
        (Picard, {"damping": 0.0}, r"damping must lie in \(0, 1\], got 0"),
        (Picard, {"damping": 1.1}, r"damping must lie in \(0, 1\], got 1.1"),
        (Anderson, {"memory": 0}, "memory must be at least 1, got 0"),
        (Anderson, {"mixing": "row"}, "mixing must be one of .* got 'row'"),
        (Anderson, {"regularisation": -1e-3}, "regularisation must be at least 0, got -0.001"),
        (Anderson, {"tolerance": float("nan")}, "tolerance must be at least 0, got nan"),
    ],
)
def test_wrong_arguments_are_errors(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Anderson(mixing="block")], ids=str)
def test_what_is_not_a_number_has_not_converged_and_is_recovered_from(solver):
    """A triangular map, whose first image of a row depends on the rows before it alone."""
    f, exact = integral(steps=20)
    exact = exact.expand(3, -1, -1)
    start = torch.zeros_like(exact)
    start[0, 2] = torch.nan
    first = type(solver)(max_sweeps=1)(f, start)
    assert first.converged.tolist() == [False] * 3
    assert first.residuals[0, 0] == torch.inf
    found = solver(f, start)
    assert found.converged.all()
    assert (found.z - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
def test_nothing_has_a_fixed_point_too(solver):
    found = solver(lambda z: z, torch.zeros(0, 3, 4))
    assert found.z.shape == (0, 3, 4)
    assert found.converged.shape == found.sweeps.shape == (0,)
