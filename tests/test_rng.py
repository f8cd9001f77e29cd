"""Random numbers that are determined by a seed and an index."""

import pytest
import torch

from ddim_pl.noise import latents
from ddim_pl.rng import (
    derive_seed,
    image_generators,
    image_noise,
    randn,
    replayed,
    share_generators,
    share_noise,
    standard_gamma,
    step_generators,
    uniform,
)

SHAPE = (3, 4, 4)
SOURCES = ["generators", "philox"]


def test_what_is_drawn_in_a_replay_is_drawn_once_more() -> None:
    torch.manual_seed(3)
    before = torch.rand(2)
    with replayed(torch.device("cpu")):
        first = torch.rand(4)
    assert torch.equal(torch.rand(4), first)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(6), torch.cat([before, first]))


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


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("draw", [randn, uniform])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_state_does_not_change_the_picture(dtype, draw, source) -> None:
    like = torch.empty(0, dtype=dtype)
    noise = draw((2, *SHAPE), image_noise(source, 1, range(2)), like)
    assert noise.dtype == dtype
    single = draw((2, *SHAPE), image_noise(source, 1, range(2)), torch.empty(0))
    assert torch.equal(noise, single.to(dtype))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_generators_is_an_error(count, source) -> None:
    message = rf"one generator per image, got {count} for a batch of 2"
    for draw in (randn, uniform):
        with pytest.raises(ValueError, match=message):
            draw((2, *SHAPE), image_noise(source, 0, range(count)), torch.empty(0))
    with pytest.raises(ValueError, match=message):
        standard_gamma(torch.ones(2, 4), image_noise(source, 0, range(count)))


def test_a_source_gives_what_it_says() -> None:
    """Generators to the bit as before there was a choice; indices as numbers or as a tensor."""
    like = torch.empty(0)
    chosen = [image_noise("generators", 3, i) for i in ([4, 9], torch.tensor([4, 9]))]
    for generators in chosen:
        before = randn((2, *SHAPE), image_generators(3, [4, 9]), like)
        assert torch.equal(randn((2, *SHAPE), generators, like), before)
    a, b = (image_noise("philox", 3, i) for i in ([4, 9], torch.tensor([4, 9])))
    assert torch.equal(randn((2, *SHAPE), a, like), randn((2, *SHAPE), b, like))
    assert (randn((2, *SHAPE), a, like) != before).any()


@pytest.mark.parametrize(
    ("source", "indices", "message"),
    [
        (
            "mersenne",
            [0],
            r"noise_source must be one of \('generators', 'philox'\), got 'mersenne'",
        ),
        ("philox", [3, -1], r"indices must lie in \[0, 2\^32\), got -1 to 3"),
        ("philox", [2**32], r"indices must lie in \[0, 2\^32\)"),
    ],
)
def test_wrong_arguments_are_errors(source, indices, message) -> None:
    with pytest.raises(ValueError, match=message):
        image_noise(source, 0, indices)


@pytest.mark.parametrize("counts", [(0, 5), (5, 0), (1, 1), (40, 60)])
def test_sources_share_noise_as_their_images_do(counts: tuple[int, int]) -> None:
    """Against the numbers themselves; seed 2^32 + 2 has the generators of seed 2."""

    def rows(source, seed, count):
        z, _ = latents(seed, range(count), (4,), noise_source=source)
        return set(map(tuple, z.tolist()))

    for source in SOURCES:
        for other in (2, 3, 2**32 + 2):
            shared = bool(rows(source, 2, counts[0]) & rows(source, other, counts[1]))
            assert share_noise(source, 2, counts[0], other, counts[1]) == shared


def test_one_generator_serves_a_batch() -> None:
    like = torch.empty(0, dtype=torch.float64)
    a, b = (randn((2, 3), torch.Generator().manual_seed(1), like) for _ in range(2))
    assert a.dtype == torch.float64
    assert torch.equal(a, b)


def test_one_generator_draws_the_same_in_every_dtype() -> None:
    draws = [
        randn((3, 5), torch.Generator().manual_seed(0), torch.empty(0, dtype=dtype)).float()
        for dtype in (torch.float32, torch.float64)
    ]
    assert torch.equal(*draws)


def test_given_generators_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    for source in SOURCES:
        latents(0, range(3), SHAPE, noise_source=source)
    randn((2, 3), torch.Generator(), torch.empty(0))
    step_generators(0, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_has_two_independent_generators_that_its_seed_fixes() -> None:
    device = torch.device("cpu")
    one, again, other = (step_generators(seed, device) for seed in (4, 4, 5))
    seeds = {g.initial_seed() for g in (*one, *other)}
    assert len(seeds) == 4
    assert [g.initial_seed() for g in one] == [g.initial_seed() for g in again]
