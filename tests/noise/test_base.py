"""Laws of noise."""

import inspect

import pytest
import torch
from noise_draws import SHAPE

from ddim_pl import noise as noise_module
from ddim_pl.noise import GammaNoise, GaussianNoise, Noise, latents
from ddim_pl.rng import (
    randn,
)
from ddim_pl.samplers.gamma import default_sampler
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule


def test_a_law_that_depends_on_the_level_asks_for_it() -> None:
    with pytest.raises(ValueError, match=r"scales must be given for GammaNoise\(theta_0=0.001\)"):
        latents(0, range(2), SHAPE, noise=GammaNoise())


def test_gaussian_noise_is_what_randn_draws() -> None:
    """So that models of Gaussian noise draw what they always did."""
    noise, level = GaussianNoise(), LinearSchedule()(300.0)
    like = torch.empty(0)
    one = noise.draw((2, 5), level, torch.Generator().manual_seed(0), like)
    assert torch.equal(one, randn((2, 5), torch.Generator().manual_seed(0), like))
    z, _ = latents(4, range(3), SHAPE, noise=noise, scales=level)
    assert torch.equal(z, latents(4, range(3), SHAPE)[0])
    assert noise.transport(z, level, LinearSchedule()(5.0)) is z
    expected = torch.distributions.Normal(0, 1).log_prob(z.double())
    torch.testing.assert_close(noise.log_density(z, level), expected)


LAWS = [
    kind
    for _, kind in inspect.getmembers(noise_module, inspect.isclass)
    if issubclass(kind, Noise) and not inspect.isabstract(kind)
]


every_law = pytest.mark.parametrize("kind", LAWS)


def test_the_walk_finds_the_laws_of_noise() -> None:
    assert {GammaNoise, GaussianNoise} <= set(LAWS)


@every_law
@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
def test_a_law_of_noise_is_standardised_and_moves_between_levels(
    kind: type[Noise], schedule: NoiseSchedule
) -> None:
    """20,000 draws, seed 0: moments within 5 standard errors, those of a kurtosis below 9."""
    law = kind()
    assert kind() == law
    assert kind.__doc__
    assert law.is_gaussian == isinstance(law, GaussianNoise)
    like = torch.empty(0, dtype=torch.float64)
    t, s = schedule(900.0), schedule(100.0)
    for level in (t, s):
        eps = law.draw((20_000,), level, torch.Generator().manual_seed(0), like)
        assert abs(eps.mean()) < 5 / 20_000**0.5
        assert abs(eps.var() - 1) < 5 * (8 / 20_000) ** 0.5
        assert law.log_density(eps, level).isfinite().all()
    moved = law.transport(eps, s, t)
    assert (moved[eps.argsort()].diff() >= 0).all()
    torch.testing.assert_close(law.transport(moved, t, s), eps, rtol=0, atol=1e-8)


@every_law
def test_a_law_of_noise_has_a_sampler_that_encodes(kind: type[Noise]) -> None:
    sampler = default_sampler(kind())
    assert sampler.encodes
    assert sampler.noise == kind()
