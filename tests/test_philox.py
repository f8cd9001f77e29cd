"""Philox against Random123's vectors and Python's integers; the laws of its numbers."""

import math

import pytest
import torch
from scipy import stats

from ddim_pl.philox import ImageNoise, normals, philox4x32, uniforms

MASK = 2**32 - 1

# `kat_vectors` of Random123, the three lines of philox4x32 with ten rounds: counter, key, result.
VECTORS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def in_python(counter, key):
    """The function in integers without bounds."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK, (a >> 32) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return tuple(c)


def tensors(words):
    return [torch.tensor(word) for word in words]


def noise(seed=0, indices=range(4), draws=0, **arguments):
    """The noise of images from which some draws were taken already."""
    made = ImageNoise(seed, torch.tensor(list(indices), dtype=torch.int64), **arguments)
    for _ in range(draws):
        made.uniform((len(made), 1))
    return made


# Words


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_words_are_those_of_random123(counter, key, expected):
    assert tuple(map(int, philox4x32(tensors(counter), tensors(key)))) == expected
    assert in_python(counter, key) == expected


def test_random_words_are_those_of_integers_without_bounds():
    generator = torch.Generator().manual_seed(0)
    given = torch.randint(0, 2**32, (6, 200), generator=generator)
    found = torch.stack(philox4x32(given[:4].unbind(), given[4:].unbind()))
    expected = [in_python(column[:4], column[4:]) for column in given.T.tolist()]
    assert found.T.tolist() == [list(each) for each in expected]


@pytest.mark.parametrize(("seed", "index", "draw"), [(0, 0, 0), (7, 3, 2), (2**40 + 5, MASK, 1)])
def test_numbers_are_those_of_their_counter_and_key(seed, index, draw):
    """The layout, which files rest on: block, draw, attempt 0, rest of the seed; seed, image."""
    key = (seed & MASK, index)
    words = [in_python((block, draw, 0, seed >> 32), key) for block in range(3)]
    expected = [(word >> 8) / 2**24 for block in words for word in block][:10]
    assert noise(seed, [index], draw).uniform((1, 2, 5)).flatten().tolist() == expected
    expected = []
    for block in words:
        for a, b in (block[:2], block[2:]):
            radius = math.sqrt(-2 * math.log((a + 0.5) / 2**32))
            angle = 2 * math.pi * b / 2**32
            expected += [radius * math.cos(angle), radius * math.sin(angle)]
    found = noise(seed, [index], draw).normal((1, 2, 5)).flatten()
    torch.testing.assert_close(found, torch.tensor(expected[:10]), rtol=0, atol=3e-6)


@pytest.mark.parametrize("word", [0, 1, MASK - 1, MASK])
def test_every_word_gives_a_finite_number(word, monkeypatch):
    """The logarithm is never of 0, and a uniform number never 1."""
    words = tuple(torch.full((1, 1), word) for _ in range(4))
    monkeypatch.setattr("ddim_pl.philox.philox4x32", lambda counter, key: words)
    assert noise(indices=[0]).normal((1, 4)).isfinite().all()
    assert (noise(indices=[0]).uniform((1, 4)) < 1).all()


# Laws, each of a million numbers with seed 0: a test at the level 1e-4, which is passed or failed
# for good.

MILLION = (100, 10_000)


def test_normals_are_normal():
    z = noise(indices=range(100)).normal(MILLION).double().flatten()
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4
    n, moments = len(z), {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}
    for order, (mean, variance) in moments.items():
        error = (z**order).mean() - mean
        assert error.abs() < 4 * math.sqrt(variance / n), order
    # Beyond four deviations, the tails: 63 are expected.
    assert 35 < (z.abs() > 4).sum() < 95


def test_uniforms_are_uniform():
    u = noise(indices=range(100)).uniform(MILLION).double().flatten()
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4
    assert u.min() >= 0
    assert u.max() < 1


@pytest.mark.parametrize("k", [1e-2, 0.3, 1.0, 2.5, 1e6])
def test_gammas_have_their_law(k):
    g = noise(indices=range(20)).gamma(torch.full((20, 5000), k)).flatten()
    assert g.dtype == torch.float64
    assert stats.kstest(g.numpy(), "gamma", args=(k,)).pvalue > 1e-4


def test_gammas_of_one_batch_have_each_its_shape():
    """A shape of 0 gives 0, and one beyond float64's whole numbers is still around its mean."""
    k = torch.tensor([0.0, 1e-3, 1.0, 1e20], dtype=torch.float64).expand(4, 4)
    g = noise().gamma(k)
    assert (g[:, 0] == 0).all()
    assert (g[:, 1:3] >= 0).all()
    assert ((g[:, 3] - 1e20) / 1e10).abs().max() < 6
    assert ((g[:, 3] - 1e20) / 1e10).std() > 0.1


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


def test_neighbours_are_uncorrelated():
    """Images, draws, seeds and places; a coefficient of n pairs deviates by 1 / sqrt(n)."""
    source = noise(indices=range(100))
    z, later = source.normal(MILLION), source.normal(MILLION)
    other = noise(1, range(100)).normal(MILLION)
    pairs = {"images": (z[1:], z[:-1]), "draws": (z, later), "seeds": (z, other)}
    pairs |= {f"places {d}": (z[:, d:], z[:, :-d]) for d in (1, 2, 3, 4)}
    for name, (a, b) in pairs.items():
        for f in (lambda v: v, torch.square):
            assert abs(correlation(f(a), f(b))) < 4.5 / math.sqrt(a.numel()), name


# What a number depends on


@pytest.mark.parametrize("kind", ["normal", "uniform", "gamma"])
def test_numbers_depend_on_seed_image_draw_and_place_alone(kind):
    def drawn(seed=3, indices=range(9), draws=2, size=30):
        source = noise(seed, indices, draws)
        count = len(source)
        if kind == "gamma":
            # Each place its shape, whatever the others are.
            return source.gamma(torch.linspace(0.1, 9, 30)[:size].double().expand(count, size))
        return getattr(source, kind)((count, size))

    whole = drawn()
    assert torch.equal(drawn(indices=[7, 2]), whole[[7, 2]])
    assert torch.equal(torch.cat([drawn(indices=[i]) for i in range(9)]), whole)
    assert torch.equal(drawn(size=13), whole[:, :13])
    for other in (
        drawn(seed=4),
        drawn(draws=3),
        drawn(seed=3 + 2**32),
        drawn(indices=range(9, 18)),
    ):
        assert (other != whole).all()


def test_each_call_is_one_draw_of_any_kind():
    first = noise()
    calls = [first.normal((4, 3)), first.gamma(torch.ones(4, 3)), first.uniform((4, 7))]
    assert torch.equal(calls[0], noise().normal((4, 3)))
    assert torch.equal(calls[1], noise(draws=1).gamma(torch.ones(4, 3)))
    assert torch.equal(calls[2], noise(draws=2).uniform((4, 7)))


def test_seeds_and_images_share_no_number():
    """Seeds that differ in either word, and images that would exchange roles with them."""
    rows = [(s, i) for s in (0, 1, 2, 2**32, 2**32 + 1) for i in (0, 1, 2, MASK)]
    numbers = torch.cat([noise(s, [i]).normal((1, 4)) for s, i in rows]).tolist()
    assert len({tuple(row) for row in numbers}) == len(rows)


def test_no_images_have_no_numbers():
    empty = noise(indices=[])
    assert empty.normal((0, 3, 4)).shape == (0, 3, 4)
    assert empty.gamma(torch.ones(0, 3, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_does_not_fit_is_an_error(seed):
    with pytest.raises(ValueError, match=rf"seed must lie in \[0, 2\^64\), got {seed}"):
        noise(seed)


def test_nothing_is_read_from_the_device():
    """On the meta device a tensor has no values, so that whatever reads one fails."""
    source = ImageNoise(0, torch.arange(3, device="meta"))
    assert source.normal((3, 5)).device.type == "meta"
    assert source.uniform((3, 5)).device.type == "meta"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_compiled_it_draws_the_same(kind):
    """One graph for batches and images of any size, with values that overflow 32 bits."""
    for indices, size in [(range(3), 20), (range(5, 12), 70), ([MASK], 9)]:
        draws = [
            getattr(noise(2**33 + 1, indices, 0, compile=compiled), kind)((len(indices), size))
            for compiled in (False, True)
        ]
        torch.testing.assert_close(*draws, rtol=0, atol=3e-6)


def test_the_functions_are_one_graph():
    """Nothing in them breaks off a graph, whatever compiles it."""
    seed, images, draw, blocks = (
        torch.tensor([3, 0]),
        torch.arange(4),
        torch.tensor(1),
        torch.arange(5),
    )
    for function in (normals, uniforms):
        traced = torch.compile(function, fullgraph=True, backend="eager")
        expected = function(seed, images, draw, blocks)
        assert torch.equal(traced(seed, images, draw, blocks), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_numbers_of_the_cpu():
    indices = torch.arange(8)
    for kind in ("normal", "uniform"):
        drawn = [
            getattr(ImageNoise(5, indices.to(device)), kind)((8, 3, 32, 32)).cpu()
            for device in ("cpu", "cuda")
        ]
        torch.testing.assert_close(*drawn, rtol=0, atol=3e-6)
