import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from ddim_pl.metrics.manifold import density_coverage, nearest_radii, precision_recall


def normal(n, dim, seed, dtype=torch.float32):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distances(a, b):
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))


def balls(points, k):
    """Distance of each point to its k-th nearest among the others, one point at a time."""
    radii = []
    for i in range(len(points)):
        others = np.delete(points, i, axis=0)
        radii.append(np.sort(distances(points[i : i + 1], others)[0])[k - 1])
    return np.array(radii)


def within(points, set_, k):
    """Kynkaanniemi et al. 2019, eq. 1: is a point in a closed ball around one of the set?"""
    radii = balls(set_, k)
    return np.array([any(distances(p[None], set_)[0] <= radii) for p in points])


def naive_precision_recall(real, fake, k):
    return within(fake, real, k).mean(), within(real, fake, k).mean()


def naive_density_coverage(real, fake, k):
    """Naeem et al. 2020, with open balls."""
    radii, total, covered = balls(real, k), 0, 0
    for i in range(len(real)):
        inside = distances(real[i : i + 1], fake)[0] < radii[i]
        total += inside.sum()
        covered += inside.any()
    return total / (k * len(fake)), covered / len(real)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_real", "num_fake", "k"), [(60, 45, 3), (31, 70, 5), (12, 12, 1)])
def test_the_papers_definitions(num_real, num_fake, k, dtype):
    real = normal(num_real, 6, 1, dtype)
    fake = 1.1 * normal(num_fake, 6, 2, dtype) + 0.3
    a, b = real.double().numpy(), fake.double().numpy()
    radii = nearest_radii(real, k)
    assert radii.dtype == torch.float64
    np.testing.assert_allclose(radii, balls(a, k), rtol=1e-12)
    pairs = [
        (precision_recall(real, fake, k), naive_precision_recall(a, b, k)),
        (density_coverage(real, fake, k), naive_density_coverage(a, b, k)),
    ]
    for values, expected in pairs:
        assert 0 < expected[0] < 2  # says something
        np.testing.assert_allclose(values, expected, rtol=1e-14)


def test_ties_and_copies_on_a_grid():
    # Many equal distances, zero radii (k copies) and points that both sets have.
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 4, (50, 3), generator=generator).float()
    fake = torch.randint(1, 5, (40, 3), generator=generator).float()
    a, b = real.double().numpy(), fake.double().numpy()
    for k in (1, 3, 5):
        np.testing.assert_allclose(nearest_radii(real, k), balls(a, k), rtol=1e-12)
        np.testing.assert_allclose(
            precision_recall(real, fake, k), naive_precision_recall(a, b, k), rtol=1e-14
        )
        np.testing.assert_allclose(
            density_coverage(real, fake, k), naive_density_coverage(a, b, k), rtol=1e-14
        )


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_set_and_itself(offset):
    real = normal(300, 32, 0) + offset
    for chunk_size in (64, 2048):
        precision, recall = precision_recall(real, real.clone(), chunk_size=chunk_size)
        density, coverage = density_coverage(real, real.clone(), chunk_size=chunk_size)
        assert (precision, recall, density, coverage) == (1, 1, 1, 1)


def test_copies_have_empty_balls():
    copies = normal(1, 8, 0).repeat(6, 1)
    assert nearest_radii(copies, 5).eq(0).all()
    # Closed balls hold their centre, open ones of radius 0 hold nothing.
    assert precision_recall(copies, copies, 5) == (1, 1)
    assert density_coverage(copies, copies, 5) == (0, 0)


def test_far_apart_there_is_nothing_of_either():
    real, fake = normal(100, 5, 0), normal(80, 5, 1) + 100
    assert precision_recall(real, fake) == (0, 0)
    assert density_coverage(real, fake) == (0, 0)


def test_a_dropped_mode_lowers_recall_and_coverage_but_not_precision():
    left, right = normal(200, 4, 0), normal(200, 4, 1) + 50
    real = torch.cat([left, right])
    fake = normal(400, 4, 2)
    whole = torch.cat([normal(200, 4, 2), normal(200, 4, 3) + 50])
    (precision, recall), (full_precision, full_recall) = (
        precision_recall(real, samples) for samples in (fake, whole)
    )
    assert precision == pytest.approx(float(full_precision), abs=0.05)
    assert recall <= 0.5 < 0.8 < full_recall
    assert density_coverage(real, fake)[1] <= 0.5 < 0.8 < density_coverage(real, whole)[1]


def test_samples_that_stray_lower_precision_and_density_but_not_recall():
    real = normal(400, 4, 0)
    fake = torch.cat([normal(400, 4, 1), normal(400, 4, 2) + 50])
    precision, recall = precision_recall(real, fake)
    density, coverage = density_coverage(real, fake)
    assert precision < 0.5 < 0.8 < recall
    assert density < 0.6 < 0.8 < coverage


def test_of_one_distribution_density_is_1_and_coverage_as_expected():
    # Naeem et al. 2020, lemma 2.
    n, m, k = 300, 400, 5
    values = torch.tensor(
        [
            density_coverage(normal(n, 8, 2 * seed), normal(m, 8, 2 * seed + 1), k)
            for seed in range(20)
        ]
    )
    density, coverage = values.mean(0)
    numbers = torch.arange(1, k + 1, dtype=torch.float64)
    expected = 1 - ((n - numbers) / (n + m - numbers)).prod()
    assert density == pytest.approx(1, abs=0.03)
    assert coverage == pytest.approx(float(expected), abs=0.01)


@pytest.mark.parametrize("chunk_size", [3, 7, 50, 60, 1000])
def test_the_size_of_a_chunk_changes_nothing(chunk_size):
    real, fake = normal(60, 6, 1), normal(50, 6, 2)
    torch.testing.assert_close(
        nearest_radii(real, 3, chunk_size=chunk_size), nearest_radii(real, 3), rtol=1e-12, atol=0
    )
    assert precision_recall(real, fake, chunk_size=chunk_size) == precision_recall(real, fake)
    assert density_coverage(real, fake, chunk_size=chunk_size) == density_coverage(real, fake)


def test_known_radii_of_the_real_features_are_taken():
    real, fake = normal(60, 6, 1), normal(50, 6, 2)
    radii = nearest_radii(real, 4)
    assert precision_recall(real, fake, 4, real_radii=radii) == precision_recall(real, fake, 4)
    assert density_coverage(real, fake, 4, real_radii=radii) == density_coverage(real, fake, 4)
    assert precision_recall(real, fake, 4, real_radii=torch.zeros(60))[0] == 0


def test_precision_and_recall_are_those_of_torch_fidelity():
    real, fake = normal(500, 64, 1), 0.9 * normal(400, 64, 2) + 0.02
    theirs = prc_features_to_metric(fake.double(), real.double(), verbose=False)
    precision, recall = precision_recall(real, fake)
    assert 0.05 < recall < 0.95
    assert (float(precision), float(recall)) == pytest.approx(
        (theirs["precision"], theirs["recall"]), abs=1e-6
    )


@pytest.mark.parametrize("k", [0, -1, 4, 5])
def test_the_neighbour_must_exist(k):
    four, many = normal(4, 3, 0), normal(9, 3, 1)
    message = rf"k must be at least 1 and below the number of features, 4, got {k}"
    with pytest.raises(ValueError, match=message):
        nearest_radii(four, k)
    with pytest.raises(ValueError, match=message):
        precision_recall(four, many, k)
    with pytest.raises(ValueError, match=message):
        density_coverage(four, many, k)
    if k > 0:
        with pytest.raises(ValueError, match=message):
            precision_recall(many, four, k)
        density_coverage(many, four, k)  # has no balls around generated features


def test_what_is_no_pair_of_feature_sets_is_refused():
    features = normal(9, 3, 0)
    for function in (precision_recall, density_coverage):
        with pytest.raises(
            ValueError, match="real and fake must have the same width, got 3 and 4"
        ):
            function(features, normal(9, 4, 0))
        with pytest.raises(
            ValueError, match=r"fake must be .*, got torch\.int64 of shape \(9, 3\)"
        ):
            function(features, features.long())
        with pytest.raises(
            ValueError, match=r"real must be .*, got torch\.float32 of shape \(3,\)"
        ):
            function(features[0], features)
        with pytest.raises(
            ValueError, match=r"fake must be .*, got torch\.float32 of shape \(0, 3\)"
        ):
            function(features, features[:0])
        with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
            function(features, features, chunk_size=0)
