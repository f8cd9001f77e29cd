"""The models of the bound: their terms against torch, the bound of Gamma noise against paths."""

import math
from itertools import pairwise

import pytest
import torch
from exact import ExactGaussian
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddim_pl.likelihood import log_discretised, variational_bound
from ddim_pl.noise import GammaNoise, GaussianNoise
from ddim_pl.noise.base import Noise
from ddim_pl.noise.gamma import standardised_beta
from ddim_pl.noise.gamma_divergences import thinning_log_density
from ddim_pl.noise.gamma_steps import thinning_shapes, thinning_step
from ddim_pl.noise.reverse import GammaReverse, GaussianReverse, reverse_model
from ddim_pl.prediction import Prediction
from ddim_pl.scales import Scales
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule
from ddim_pl.transitions import Variance, posterior


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
def test_a_gaussian_term_is_the_divergence_of_its_two_steps(
    schedule: NoiseSchedule, variance: Variance
) -> None:
    """[DDPM]'s script: q has the posterior's variance, the model the one of its name."""
    x, xhat, z = (torch.full((1, 1), value).double() for value in (0.1, -0.2, 0.4))
    for high, low in [(1000, 999), (500, 300), (2, 1)]:
        levels = torch.tensor([low, high], dtype=torch.float64)
        scales = schedule(levels)
        s, t = (Scales(scales.alpha[i], scales.sigma[i]) for i in (0, 1))
        model = GaussianReverse(variance)
        one = torch.ones((), dtype=torch.float64)
        found = model.term(x, xhat - x, t, s, one) + model.constant(scales)
        mean_q, std_q = posterior(z, x, t, s)
        mean_p, std_p = posterior(z, xhat, t, s, variance=variance)
        wanted = kl_divergence(Normal(mean_q, std_q), Normal(mean_p, std_p))[0]
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)


def test_the_gamma_model_sums_over_images_and_weights_its_terms() -> None:
    schedule, model = LinearSchedule(), GammaReverse(GammaNoise(0.05), 0.01)
    t, s = schedule(500.0), schedule(400.0)
    eps = torch.zeros(2, 3, 4, dtype=torch.float64)
    error = torch.full_like(eps, 0.1)
    whole = model.term(eps, error, t, s, torch.tensor([1.0, 2.5], dtype=torch.float64))
    single = model.term(eps[:1, :1, :1], error[:1, :1, :1], t, s, torch.ones(()).double())
    torch.testing.assert_close(whole, single * torch.tensor([12.0, 30.0], dtype=torch.float64))
    assert model.prior(error, schedule(1000.0)).shape == (2,)
    assert model.constant(schedule(torch.arange(1.0, 5.0))) == 0


def test_each_law_has_its_model() -> None:
    assert reverse_model(None, "large", None) == GaussianReverse("large")
    assert reverse_model(GaussianNoise(), "small", None) == GaussianReverse()
    noise = GammaNoise(0.02)
    assert reverse_model(noise, "small", None) == GammaReverse(noise, 1e-3)
    assert reverse_model(noise, "small", 1.0) == GammaReverse(noise, 1.0)


class Other(Noise):
    """A law that has no bound."""

    def draw(self, shape, scales, generator, like):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def log_density(self, eps: Tensor, scales: Scales) -> Tensor:
        raise NotImplementedError

    def transport(self, eps: Tensor, t: Scales, s: Scales) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("noise", "variance", "share", "message"),
    [
        (None, "middle", None, "variance must be one of .*got 'middle'"),
        (None, "small", 0.1, "gaussian_share must be None for Gaussian noise, got 0.1"),
        (GammaNoise(), "large", None, "variance must be 'small' for GammaNoise.*got 'large'"),
        (GammaNoise(), "small", 0.0, r"gaussian_share must lie in \(0, 1\], got 0.0.*infinite"),
        (GammaNoise(), "small", 1.5, r"gaussian_share must lie in \(0, 1\], got 1.5"),
        (GammaNoise(), "small", math.nan, r"gaussian_share must lie in \(0, 1\], got nan"),
        (Other(), "small", None, "noise must be Gaussian or Gamma for the bound"),
    ],
)
def test_settings_without_effect_are_refused(
    noise: Noise | None, variance: Variance, share: float | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        reverse_model(noise, variance, share)


GRID = torch.arange(256, dtype=torch.float64) / 127.5 - 1
GAMMA_LEVELS = torch.tensor([150.0, 300.0, 600.0, 1000.0], dtype=torch.float64)


@pytest.mark.parametrize("num_terms", [None, 2])
@pytest.mark.parametrize("share", [1e-3, 1.0])
def test_the_gamma_bound_is_that_of_sampled_paths(num_terms: int | None, share: float) -> None:
    """[Report], eq. 20: `log q - log p` along paths of the posterior, drawn step by step."""
    noise, count = GammaNoise(0.1), 20_000 if num_terms is None else 3_000
    x = GRID[[60, 128, 200]].repeat(count, 1)
    model = ExactGaussian(LinearSchedule(), 0.1, 0.4)
    bound = variational_bound(
        model,
        x,
        generator=torch.Generator().manual_seed(0),
        levels=GAMMA_LEVELS,
        noise=noise,
        gaussian_share=share,
        num_terms=num_terms,
    )
    generator = torch.Generator().manual_seed(1)
    t = model.schedule(1000.0)
    eps = noise.draw(x.shape, t, generator, x)
    z = t.alpha * x + t.sigma * eps

    def mixture(gauss: Tensor, gamma: Tensor) -> Tensor:
        rest = math.log1p(-share) if share < 1 else -math.inf
        return torch.logaddexp(gauss + math.log(share), gamma + rest)

    prior = noise.log_density(eps, t) - t.sigma.log()
    prior = prior - mixture(Normal(0, 1).log_prob(z), noise.log_density(z, t))
    steps = torch.zeros_like(x)
    for high, low in pairwise(GAMMA_LEVELS.flip(0)):
        t, s = model.schedule(high), model.schedule(low)
        shapes = thinning_shapes(noise, t, s)
        true, guess = Prediction(x, (z - t.alpha * x) / t.sigma), model(z, high)
        beta = standardised_beta(x.shape, *shapes, generator, x)
        z_s = thinning_step(true, beta, noise, t, s)
        gauss = Normal(*posterior(z, guess.x, t, s)).log_prob(z_s)
        log_p = mixture(gauss, thinning_log_density(z_s, guess, noise, t, s))
        steps += thinning_log_density(z_s, true, noise, t, s) - log_p
        z = z_s
    s = model.schedule(GAMMA_LEVELS[0])
    decoder = -log_discretised(x, model(z, GAMMA_LEVELS[0]).x, s.sigma)
    for found, drawn in zip(bound, (prior, steps, decoder), strict=True):
        drawn = drawn.mean(1) / math.log(2)
        error = ((found.var() + drawn.var()) / count).sqrt()
        assert abs(found.mean() - drawn.mean()) < 5 * error + 2e-3 * drawn.mean().abs()


def test_the_gamma_bound_tends_to_the_gaussian_one() -> None:
    """With 20,000 draws of noise of each law."""
    model = ExactGaussian(LinearSchedule(), 0.1, 0.4)
    x = GRID[[60, 128, 200]].repeat(20_000, 1)
    totals = []
    for noise in (GammaNoise(1e-4), None):
        generator = torch.Generator().manual_seed(0)
        bound = variational_bound(model, x, generator=generator, levels=GAMMA_LEVELS, noise=noise)
        totals.append(bound.total)
    error = ((totals[0].var() + totals[1].var()) / len(x)).sqrt()
    assert abs(totals[0].mean() - totals[1].mean()) < 4 * error
