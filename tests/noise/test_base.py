"""Every law of noise, found by walking the package, and the latents drawn from it."""

import inspect
import math

import pytest
import torch
from exact import ExactMixture

from ddim_pl import noise as noise_module
from ddim_pl.noise import GammaNoise, GaussianNoise, Noise, latents
from ddim_pl.prediction import Prediction, eps_from_x
from ddim_pl.rng import image_noise, randn
from ddim_pl.samplers.gamma import default_sampler
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule

SHAPE = (3, 4, 4)
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
    for scales in (t, s):
        eps = law.draw((20_000,), scales, torch.Generator().manual_seed(0), like)
        assert abs(eps.mean()) < 5 / 20_000**0.5
        assert abs(eps.var() - 1) < 5 * (8 / 20_000) ** 0.5
        assert law.log_density(eps, scales).isfinite().all()
    moved = law.transport(eps, s, t)
    assert (moved[eps.argsort()].diff() >= 0).all()
    torch.testing.assert_close(law.transport(moved, t, s), eps, rtol=0, atol=1e-8)


@every_law
def test_a_law_of_noise_has_a_sampler_that_encodes(kind: type[Noise]) -> None:
    sampler = default_sampler(kind())
    assert sampler.encodes
    assert sampler.noise == kind()


@pytest.mark.parametrize("source", ["generators", "philox"])
def test_different_seeds_or_indices_give_different_latents(source) -> None:
    z = torch.cat([latents(seed, range(50), SHAPE, noise_source=source)[0] for seed in range(10)])
    assert len(z.flatten(1).unique(dim=0)) == 500


@pytest.mark.parametrize("source", ["generators", "philox"])
@pytest.mark.parametrize("noise", [None, GammaNoise(0.5)])
def test_latents_are_the_same_for_any_batch_split_and_order(source, noise) -> None:
    def drawn(indices):
        law = {"noise": noise, "scales": LinearSchedule()(400.0)}
        return latents(5, indices, SHAPE, noise_source=source, **law)[0]

    whole = drawn(range(64))
    for size in (1, 7, 64):
        parts = [drawn(range(i, min(i + size, 64))) for i in range(0, 64, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(drawn([9, 3]), whole[[9, 3]])
    assert whole.dtype == torch.float32


@pytest.mark.parametrize("source", ["generators", "philox"])
def test_latents_are_standard_normal_and_independent_between_neighbours(source) -> None:
    """Their generators have neighbouring seeds. Seed 0, 5,000 images; 4 standard errors."""
    z = latents(0, range(5000), SHAPE, noise_source=source)[0].flatten(1).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z[1:] * z[:-1]).mean()) < 4 / math.sqrt(n)
    # The first number of each image, where a poorly mixed seed would show.
    first = z[:, 0]
    assert abs(first.mean()) < 4 / math.sqrt(5000)
    assert abs(first.var() - 1) < 4 * math.sqrt(2 / 5000)
    assert abs((first[1:] * first[:-1]).mean()) < 4 / math.sqrt(5000)


@pytest.mark.parametrize("source", ["generators", "philox"])
def test_the_generators_of_latents_go_on_after_them(source) -> None:
    z, generators = latents(5, range(3), SHAPE, noise_source=source)
    fresh = image_noise(source, 5, range(3))
    assert torch.equal(randn(z.shape, fresh, z), z)
    more = randn(z.shape, generators, z)
    assert torch.equal(randn(z.shape, fresh, z), more)
    assert not torch.equal(more, z)


def test_no_images_make_an_empty_batch() -> None:
    z, generators = latents(0, [], (1, 8, 8))
    assert z.shape == (0, 1, 8, 8)
    assert generators == []


def test_a_law_that_depends_on_the_level_asks_for_it() -> None:
    with pytest.raises(ValueError, match=r"scales must be given for GammaNoise\(theta_0=0.001\)"):
        latents(0, range(2), SHAPE, noise=GammaNoise())


def test_gaussian_noise_is_what_randn_draws() -> None:
    """So that models of Gaussian noise draw what they always did."""
    noise, scales = GaussianNoise(), LinearSchedule()(300.0)
    like = torch.empty(0)
    one = noise.draw((2, 5), scales, torch.Generator().manual_seed(0), like)
    assert torch.equal(one, randn((2, 5), torch.Generator().manual_seed(0), like))
    z, _ = latents(4, range(3), SHAPE, noise=noise, scales=scales)
    assert torch.equal(z, latents(4, range(3), SHAPE)[0])
    assert noise.transport(z, scales, LinearSchedule()(5.0)) is z
    expected = torch.distributions.Normal(0, 1).log_prob(z.double())
    torch.testing.assert_close(noise.log_density(z, scales), expected)


@every_law
@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
def test_one_step_with_the_two_step_target_equals_two_of_the_teacher(
    kind: type[Noise], schedule: NoiseSchedule
) -> None:
    law, teacher = kind(), ExactMixture(schedule)
    t, middle, s = (
        torch.tensor(v).double() for v in ([1000, 400, 2], [900, 300, 1], [800, 200, 0])
    )
    high, mid, low = schedule(t), schedule(middle), schedule.step_end(s)
    z = law.draw((3, 50), high, torch.Generator().manual_seed(0), torch.empty(0).double())
    z_mid = law.step(teacher(z, t), high, mid)
    expected = law.step(teacher(z_mid, middle), mid, low)
    x = law.two_step_target(teacher(z, t), teacher, z, t, middle, s)
    found = law.step(Prediction(x, eps_from_x(high, z, x)), high, low)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
