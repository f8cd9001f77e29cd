import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid

from ddim_pl.metrics.frechet import FrechetDistanceSums, covariance_root, frechet_distance

D = 40


def features(count, seed, decay=1.0):
    """Correlated features whose variances fall by `decay` a dimension."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x = torch.randn(count, D, generator=generator, dtype=torch.float64)
    return x * decay ** torch.arange(D) @ mix + 0.1 * seed


def sqrtm_distance(a, b):
    """As in torch-fidelity, which takes the real part of scipy's root."""
    root = torch.from_numpy(scipy.linalg.sqrtm((a.T.cov() @ b.T.cov()).numpy()).real)
    return (a.mean(0) - b.mean(0)).square().sum() + torch.trace(a.T.cov() + b.T.cov() - 2 * root)


def ours(a, b):
    return frechet_distance(a.mean(0), covariance_root(a.T.cov()), b.mean(0), b.T.cov())


@pytest.mark.parametrize("decay", [1.0, 0.8])
@pytest.mark.parametrize(("n", "m"), [(500, 300), (300, 500)])
def test_distance_is_that_of_scipy_and_torchmetrics(n, m, decay):
    a, b = features(n, 1, decay), features(m, 2, decay)
    found = ours(a, b)
    rounding = 1e-8 if decay == 1 else 1e-6  # roots of what is nearly singular are rounded more
    assert float(found) == pytest.approx(float(sqrtm_distance(a, b)), rel=rounding)
    theirs = _compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert float(found) == pytest.approx(float(theirs), rel=rounding)
    assert float(ours(b, a)) == pytest.approx(float(found), rel=rounding)


@pytest.mark.parametrize(("n", "m"), [(20, 500), (500, 20), (15, 20), (2, 2)])
def test_distance_of_singular_covariances(n, m):
    a, b = features(n, 1), features(m, 2)
    # The nuclear norm of a product of roots, which squares nothing.
    x, y = ((part - part.mean(0)) / (len(part) - 1) ** 0.5 for part in (a, b))
    cross = torch.linalg.svdvals(x @ y.T).sum()
    exact = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum()
    exact = exact - 2 * cross
    assert float(ours(a, b)) == pytest.approx(float(exact), rel=1e-6)
    theirs = _compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert float(ours(a, b)) == pytest.approx(float(theirs), rel=1e-6)


def test_distance_of_gaussians_on_the_axes_has_a_closed_form():
    a, b = torch.tensor([1.0, 4.0, 0.0]).double(), torch.tensor([9.0, 1.0, 2.0]).double()
    found = frechet_distance(
        torch.zeros(3).double(), covariance_root(a.diag()), torch.ones(3).double(), b.diag()
    )
    assert float(found) == pytest.approx(3 + float((a.sqrt() - b.sqrt()).square().sum()))


def test_distance_to_itself_is_zero():
    a = features(300, 1)
    assert abs(float(ours(a, a))) < 1e-9 * float(a.T.cov().trace())


def metric(kind):
    identity = nn.Identity()
    identity.num_features = torch.tensor(D)
    return kind(identity, reset_real_features=False)


def test_the_metric_follows_its_real_side_and_is_torchmetrics(monkeypatch):
    made = []

    def counted(covariance):
        made.append(covariance)
        return covariance_root(covariance)

    monkeypatch.setattr("ddim_pl.metrics.frechet.covariance_root", counted)
    mine, theirs = metric(FrechetDistanceSums), metric(FrechetInceptionDistance)
    for seed, count in enumerate((90, 80)):
        for each in (mine, theirs):
            each.reset()
            each.update(features(count, 1), real=True)
        mine.forget_root()
        for other in (2, 3):
            for each in (mine, theirs):
                each.reset()
                each.update(features(70, other), real=False)
            assert float(mine.compute()) == pytest.approx(float(theirs.compute()), rel=1e-8)
        assert len(made) == seed + 1


def test_one_image_is_too_few():
    mine = metric(FrechetDistanceSums)
    mine.update(features(5, 1), real=True)
    mine.update(features(1, 1), real=False)
    with pytest.raises(RuntimeError, match="More than one sample"):
        mine.compute()


def test_given_moments_stand_in_for_a_side_and_stay():
    a, b = features(90, 1), features(70, 2)
    expected = float(ours(a, b))
    mine = metric(FrechetDistanceSums)
    mine.update(b, real=False)
    mine.give(a.mean(0), a.T.cov(), real=True)
    assert float(mine.compute()) == pytest.approx(expected, rel=1e-8)
    mine.reset()
    mine.update(features(60, 3), real=False)
    assert float(mine.compute()) == pytest.approx(float(ours(a, features(60, 3))), rel=1e-8)
    both = metric(FrechetDistanceSums)
    both.give(a.mean(0), a.T.cov(), real=True)
    both.give(b.mean(0), b.T.cov(), real=False)
    with pytest.warns(UserWarning, match="called before"):
        assert float(both.compute()) == pytest.approx(expected, rel=1e-6)
    both.give(b.mean(0), b.T.cov(), real=True)
    with pytest.warns(UserWarning, match="called before"):
        assert abs(float(both.compute())) < 1e-4
