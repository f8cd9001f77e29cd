"""Random numbers that depend on a seed and an index, and on nothing else."""

import math

import pytest
import torch
from scipy import stats

from ddim_pl.noise import GammaNoise, GaussianNoise, latents
from ddim_pl.noise.gamma import standardised_beta, standardised_gamma
from ddim_pl.noise.gamma_quantiles import normal_score
from ddim_pl.rng import (
    derive_seed,
    image_generators,
    randn,
    share_generators,
    standard_gamma,
    step_generators,
)
from ddim_pl.scales import Scales
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule

SHAPE = (3, 4, 4)


def test_a_derived_seed_depends_on_every_word_and_on_their_order() -> None:
    words = [(0, 1), (1, 0), (0, 0), (1, 1), (2, 1), (1, 2), (2**40, 3), (2**40 + 1, 3)]
    seeds = [derive_seed(*w) for w in words]
    assert len(set(seeds)) == len(words)
    assert seeds == [derive_seed(*w) for w in words]
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_zero_is_a_word_too() -> None:
    """NumPy's SeedSequence pads with zeros, and so takes `(s,)` and `(s, 0)` for the same."""
    assert len({derive_seed(5), derive_seed(5, 0), derive_seed(5, 0, 0)}) == 3


def test_a_hundred_thousand_images_have_a_hundred_thousand_generators() -> None:
    """Distinct in the 32 bits that PyTorch's CPU generator reads."""
    seeds: set[int] = set()
    for start in range(0, 100_000, 10_000):  # in parts: a generator weighs 5 kB
        part = image_generators(7, range(start, start + 10_000))
        seeds.update(g.initial_seed() % 2**32 for g in part)
    assert len(seeds) == 100_000


def first_generator(seed: int) -> int:
    return image_generators(seed, [0])[0].initial_seed()


def nearest(count: int) -> int:
    """Smallest distance between first generators of seeds < count, on the circle of 32 bits."""
    first = sorted(first_generator(seed) for seed in range(count))
    gaps = [b - a for a, b in zip(first, [*first[1:], first[0] + 2**32], strict=True)]
    return min(gaps)


def test_image_generators_are_consecutive() -> None:
    """What `nearest` rests on."""
    seeds = [g.initial_seed() for g in image_generators(3, [0, 1, 10, 99_999])]
    assert [(seed - seeds[0]) % 2**32 for seed in seeds] == [0, 1, 10, 99_999]


def test_a_hundred_seeds_share_none_of_a_hundred_thousand_images() -> None:
    assert nearest(100) >= 100_000


def test_a_thousand_seeds_share_none_of_fifty_thousand_images() -> None:
    """50,000 is a Frechet distance's worth; seeds are small numbers in practice."""
    assert nearest(1000) >= 50_000


@pytest.mark.parametrize("seeds", [(0, 0), (2, 2), (0, 5), (5, 0), (2, 2 + 2**32)])
def test_ranges_that_share_a_generator_are_told_by_its_seed(seeds: tuple[int, int]) -> None:
    """Against the sets themselves, of few images; ranges that meet end to end are given too."""

    def starts(seed: int, count: int) -> set[int]:
        return {g.initial_seed() for g in image_generators(seed, range(count))}

    a, b = seeds
    for counts in [(0, 3), (3, 0), (1, 1), (1, 40), (40, 1), (40, 40)]:
        shared = bool(starts(a, counts[0]) & starts(b, counts[1]))
        assert share_generators(a, counts[0], b, counts[1]) == shared
    distance = (first_generator(b) - first_generator(a)) % 2**32
    assert not share_generators(a, distance, b, 1)
    assert share_generators(a, distance + 1, b, 1)
    assert share_generators(b, 2**32 - distance + 1, a, 1)
    assert not share_generators(b, (2**32 - distance) % 2**32, a, 1)


def test_different_seeds_or_indices_give_different_latents() -> None:
    z = torch.cat([latents(seed, range(50), SHAPE)[0] for seed in range(10)])
    assert len(z.flatten(1).unique(dim=0)) == 500


def test_latents_are_the_same_for_any_batch_split_and_order() -> None:
    whole, _ = latents(5, range(64), SHAPE)
    for size in (1, 7, 64):
        parts = [latents(5, range(i, min(i + size, 64)), SHAPE)[0] for i in range(0, 64, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(latents(5, [9, 3], SHAPE)[0], whole[[9, 3]])
    assert whole.dtype == torch.float32


def test_latents_are_standard_normal_and_independent_between_neighbours() -> None:
    """Their generators have neighbouring seeds. Seed 0, 5,000 images; 4 standard errors."""
    z = latents(0, range(5000), SHAPE)[0].flatten(1).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z[1:] * z[:-1]).mean()) < 4 / math.sqrt(n)
    # The first number of each image, where a poorly mixed seed would show.
    first = z[:, 0]
    assert abs(first.mean()) < 4 / math.sqrt(5000)
    assert abs(first.var() - 1) < 4 * math.sqrt(2 / 5000)
    assert abs((first[1:] * first[:-1]).mean()) < 4 / math.sqrt(5000)


def test_the_generators_of_latents_go_on_after_them() -> None:
    z, generators = latents(5, range(3), SHAPE)
    fresh = image_generators(5, range(3))
    assert torch.equal(randn(z.shape, fresh, z), z)
    more = randn(z.shape, generators, z)
    assert torch.equal(randn(z.shape, fresh, z), more)
    assert not torch.equal(more, z)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_state_does_not_change_the_picture(dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype)
    noise = randn((2, *SHAPE), image_generators(1, range(2)), like)
    assert noise.dtype == dtype
    single = randn((2, *SHAPE), image_generators(1, range(2)), torch.empty(0))
    assert torch.equal(noise, single.to(dtype))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_generators_is_an_error(count: int) -> None:
    with pytest.raises(
        ValueError, match=rf"one generator per image, got {count} for a batch of 2"
    ):
        randn((2, *SHAPE), image_generators(0, range(count)), torch.empty(0))


def test_one_generator_serves_a_batch() -> None:
    like = torch.empty(0, dtype=torch.float64)
    a, b = (randn((2, 3), torch.Generator().manual_seed(1), like) for _ in range(2))
    assert a.dtype == torch.float64
    assert torch.equal(a, b)


def test_given_generators_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    latents(0, range(3), SHAPE)
    randn((2, 3), torch.Generator(), torch.empty(0))
    step_generators(0, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_has_two_independent_generators_that_its_seed_fixes() -> None:
    device = torch.device("cpu")
    one, again, other = (step_generators(seed, device) for seed in (4, 4, 5))
    seeds = {g.initial_seed() for g in (*one, *other)}
    assert len(seeds) == 4
    assert [g.initial_seed() for g in one] == [g.initial_seed() for g in again]


def test_one_generator_draws_the_same_in_every_dtype() -> None:
    draws = [
        randn((3, 5), torch.Generator().manual_seed(0), torch.empty(0, dtype=dtype)).float()
        for dtype in (torch.float32, torch.float64)
    ]
    assert torch.equal(*draws)


def test_no_images_make_an_empty_batch() -> None:
    z, generators = latents(0, [], (1, 8, 8))
    assert z.shape == (0, 1, 8, 8)
    assert generators == []


# The laws of the noise

EMPTY64 = torch.empty(0, dtype=torch.float64)


def level_of(shape: float, theta_0: float = 0.001) -> Scales:
    """The level whose Gamma noise has this shape K: `sigma / alpha = theta_0 sqrt(K)`."""
    ratio = torch.tensor(theta_0 * math.sqrt(shape), dtype=torch.float64)
    alpha = 1 / (1 + ratio**2).sqrt()
    return Scales(alpha, ratio * alpha)


def test_shapes_are_the_sums_of_the_papers() -> None:
    """`k_t = beta_t / (abar_t theta_0^2)`, Nachmani et al. 2021, with the report's slip mended."""
    schedule, noise = LinearSchedule(), GammaNoise(0.01)
    betas = schedule.betas()
    k = betas / ((1 - betas).cumprod(0) * 0.01**2)
    found = noise.concentration(schedule(torch.arange(1, 1001)))
    torch.testing.assert_close(found, k.cumsum(0), rtol=1e-10, atol=0)
    assert noise.concentration(schedule(0.0)) == 0
    assert (
        noise.concentration(Scales(torch.tensor(0.0).double(), torch.tensor(1.0).double())) == 1e20
    )


@pytest.mark.parametrize("shape", [1e-2, 0.1, 1.0, 30.0, 1e3, 1e5, 1e8, 1e12, 5e14])
def test_gamma_draws_have_their_law(shape: float) -> None:
    """100,000 draws, seed 0. The third moment tells a Gamma variable from a normal one.

    Normal scores of the draws are standard normal: Kolmogorov and Smirnov at 1 %; where K is so
    small that most draws are 0 to all digits, only the moments, with 5 of their standard errors.
    """
    n = 100_000
    generator = torch.Generator().manual_seed(0)
    eps = GammaNoise().draw((n,), level_of(shape), generator, EMPTY64)
    assert eps.isfinite().all()
    assert abs(eps.mean()) < 5 / math.sqrt(n)
    kurtosis = 3 + 6 / shape
    assert abs(eps.var() - 1) < 5 * math.sqrt((kurtosis - 1) / n)
    if shape < 1:
        return
    skewness = 2 / math.sqrt(shape)
    spread = 15 + 200 / shape + 500 / shape**2  # bounds the variance of eps^3
    assert abs(eps.pow(3).mean() - skewness) < 5 * math.sqrt(spread / n)
    scores = normal_score(eps, torch.tensor(shape))
    assert stats.kstest(scores.numpy(), "norm").pvalue > 0.01


def test_the_largest_shapes_are_drawn_and_centred_without_steps() -> None:
    """K theta is 1e9 deviations from 0 at K = 1e18; float32 would leave a few hundred values."""
    for shape in (1e12, 1e15, 1e18):
        eps = standardised_gamma(
            (10_000,), torch.tensor(shape).double(), torch.Generator().manual_seed(0), EMPTY64
        )
        assert len(eps.unique()) > 9_900
        assert abs(eps.var() - 1) < 5 * math.sqrt(2 / 10_000)


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.5), (2.0, 5.0), (1e5, 3e5), (1e12, 1e9)])
def test_standardised_beta_draws_have_their_law(a: float, b: float) -> None:
    """100,000 draws, seed 1; Kolmogorov and Smirnov at 1 %. Of large shapes the law is normal."""
    generator = torch.Generator().manual_seed(1)
    shapes = torch.tensor(a).double(), torch.tensor(b).double()
    beta = standardised_beta((100_000,), *shapes, generator, EMPTY64)
    if a + b > 1e4:
        assert stats.kstest(beta.numpy(), "norm").pvalue > 0.01
        return
    mean, std = stats.beta.stats(a, b)[0], stats.beta.std(a, b)
    assert stats.kstest(mean + std * beta.numpy(), stats.beta(a, b).cdf).pvalue > 0.01


def test_draws_of_no_noise_are_zero() -> None:
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert (GammaNoise().draw((4, 3), Scales(one, zero), None, EMPTY64) == 0).all()
    for a, b in ((zero, one), (one, zero), (zero, zero)):
        assert (standardised_beta((4, 3), a, b, torch.Generator(), EMPTY64) == 0).all()


def test_each_image_may_have_a_level_of_its_own() -> None:
    t = torch.tensor([1.0, 300.0, 1000.0])
    generators = image_generators(0, range(3))
    together = GammaNoise().draw((3, 2, 2), LinearSchedule()(t), generators, EMPTY64)
    for i in range(3):
        alone = GammaNoise().draw(
            (1, 2, 2), LinearSchedule()(t[i]), image_generators(0, [i]), EMPTY64
        )
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("theta_0", [1e-5, 0.001, 0.1])
@pytest.mark.parametrize("size", [1, 7])
def test_gamma_latents_are_the_same_for_any_batch_split(theta_0: float, size: int) -> None:
    law = {"noise": GammaNoise(theta_0), "scales": CosineLogSNRSchedule()(1000.0)}
    whole, _ = latents(5, range(64), SHAPE, **law)
    parts = [latents(5, range(i, min(i + size, 64)), SHAPE, **law)[0] for i in range(0, 64, size)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.dtype == torch.float32
    assert len(whole.flatten(1).unique(dim=0)) == 64


def test_gamma_draws_leave_the_global_generator_alone_and_go_on() -> None:
    before = torch.get_rng_state()
    noise, level = GammaNoise(), LinearSchedule()(300.0)
    z, generators = latents(0, range(3), SHAPE, noise=noise, scales=level)
    more = noise.draw(z.shape, level, generators, z)
    assert not torch.equal(more, z)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_does_not_change_gamma_noise(dtype: torch.dtype) -> None:
    level = LinearSchedule()(300.0)
    draws = [
        GammaNoise().draw((2, 5), level, torch.Generator().manual_seed(0), like)
        for like in (torch.empty(0, dtype=dtype), EMPTY64)
    ]
    assert draws[0].dtype == dtype
    assert torch.equal(draws[0], draws[1].to(dtype))


def test_no_images_make_an_empty_gamma_batch() -> None:
    z, _ = latents(0, [], SHAPE, noise=GammaNoise(), scales=LinearSchedule()(1000.0))
    assert z.shape == (0, *SHAPE)


def test_a_wrong_number_of_generators_is_an_error_for_gamma_too() -> None:
    with pytest.raises(ValueError, match="one generator per image, got 3 for a batch of 2"):
        standard_gamma(torch.ones(2, 4), image_generators(0, range(3)))


@pytest.mark.parametrize("theta_0", [0.0, -0.001, math.nan, math.inf])
def test_theta_0_must_be_positive(theta_0: float) -> None:
    with pytest.raises(ValueError, match=r"theta_0 must be positive, got .*the paper has 0.001"):
        GammaNoise(theta_0)


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


@pytest.mark.parametrize("theta_0", [0.001, 0.1])
def test_transport_is_its_own_inverse_and_keeps_clean_noise(theta_0: float) -> None:
    noise, schedule = GammaNoise(theta_0), LinearSchedule()
    t, s = schedule(800.0), schedule(60.0)
    eps = noise.draw((1000,), t, torch.Generator().manual_seed(0), EMPTY64)
    moved = noise.transport(eps, t, s)
    torch.testing.assert_close(noise.transport(moved, s, t), eps, rtol=0, atol=1e-9)
    clean = schedule(0.0)
    assert torch.equal(noise.transport(eps, t, clean), eps)
    assert torch.equal(noise.transport(eps, clean, t), eps)
