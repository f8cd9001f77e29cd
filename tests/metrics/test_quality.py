import numpy as np
import pytest
import scipy.linalg
import torch
from inceptions import random_inception
from torch import nn
from torch.nn import functional as F
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.kid import KernelInceptionDistance

from ddim_pl.data.base import shared_batches
from ddim_pl.data.digits import digits_arrays
from ddim_pl.metrics.digits import DigitsFeatures
from ddim_pl.metrics.inception import InceptionFeatures
from ddim_pl.metrics.manifold import density_coverage, nearest_radii, precision_recall
from ddim_pl.metrics.quality import KID_SUBSETS, NUMBERS, SampleQuality

ALL = tuple(NUMBERS)
KEYS = (
    *("digits_fd", "digits_kid", "digits_kid_std", "digits_score", "digits_score_std"),
    *("digits_precision", "digits_recall", "digits_density", "digits_coverage"),
)


def digits(start, stop, noise=0, seed=0):
    """Digits as uint8 images, which noise makes worse."""
    images = digits_arrays()[0][start:stop]
    generator = torch.Generator().manual_seed(seed)
    shift = (noise * torch.randn(images.shape, generator=generator)).round()
    return (images + shift).clamp(0, 255).to(torch.uint8)


def measured(quality, real, fake, batch_size=100):
    for images in real.split(batch_size):
        quality.update(images, real=True)
    for images in fake.split(batch_size):
        quality.update(images, real=False)
    return quality.compute()


@pytest.fixture(scope="module")
def real():
    return digits(0, 700)


@pytest.fixture(scope="module")
def fake():
    return digits(700, 1400, noise=30)


@pytest.fixture(scope="module")
def values(real, fake):
    return measured(SampleQuality(DigitsFeatures(), ALL), real, fake)


@pytest.fixture(scope="module")
def features(real, fake):
    extractor = DigitsFeatures()
    return extractor(real).double(), extractor(fake).double(), extractor.logits(fake).double()


def mmd(a, b):
    """Unbiased squared MMD with the kernel (a.b / D + 1)^3: Binkowski et al. 2018, eq. 4."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(a), len(b)
    aa, bb = kernel(a, a), kernel(b, b)
    return (
        (aa.sum() - np.trace(aa)) / (n * (n - 1))
        + (bb.sum() - np.trace(bb)) / (m * (m - 1))
        - 2 * kernel(a, b).mean()
    )


# ---- the numbers ------------------------------------------------------------------------------


def test_names_and_types_of_the_numbers(values):
    # Both sides have 700 images, so that there is one subset, which has no deviation.
    assert tuple(values) == tuple(key for key in KEYS if key != "digits_kid_std")
    for value in values.values():
        assert value.shape == ()
        assert value.dtype == torch.float32


def test_frechet_distance_is_that_of_scipy(values, features):
    a, b, _ = features
    root = torch.from_numpy(scipy.linalg.sqrtm((a.T.cov() @ b.T.cov()).numpy()).real)
    means, covariances = (a.mean(0) - b.mean(0)).square().sum(), a.T.cov() + b.T.cov()
    assert float(values["digits_fd"]) == pytest.approx(
        float(means + torch.trace(covariances - 2 * root)), rel=1e-5
    )


def test_kid_of_one_subset_of_all_is_the_unbiased_mmd(values, features):
    a, b, _ = (part.numpy() for part in features)
    assert float(values["digits_kid"]) == pytest.approx(mmd(a, b), rel=1e-6)
    theirs = kid_features_to_metric(
        *features[:2], kid_subset_size=700, kid_subsets=2, verbose=False
    )
    assert float(values["digits_kid"]) == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-6
    )


def test_kid_of_subsets_is_about_that_of_all(features):
    images = digits(0, 1797)
    quality = SampleQuality(DigitsFeatures(), ["kid"])
    values = measured(quality, images[:1100], images[1100:])
    extractor = DigitsFeatures()
    a, b = (extractor(part).double().numpy() for part in (images[:1100], images[1100:]))
    mean, std = float(values["digits_kid"]), float(values["digits_kid_std"])
    assert quality.kid_subsets == (100, 697)
    assert std > 0
    assert mean == pytest.approx(mmd(a, b), abs=std / 2)


@pytest.mark.filterwarnings("ignore:.*will save all extracted features")
def test_kid_is_torchmetrics_to_the_bit(real, fake):
    theirs = KernelInceptionDistance(nn.Identity(), subsets=KID_SUBSETS, subset_size=300)
    extractor = DigitsFeatures()
    theirs.update(extractor(real).double(), real=True)
    theirs.update(extractor(fake[:300]).double(), real=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = theirs.compute()
    found = measured(SampleQuality(extractor, ["kid"]), real, fake[:300], batch_size=700)
    assert tuple(found.values()) == tuple(each.float() for each in expected)


def test_kid_is_unbiased():
    # Of one distribution it is 0 on average, and so half the time negative.
    generator = torch.Generator().manual_seed(0)
    kids = []
    for _ in range(40):
        images = torch.randint(0, 256, (2, 60, 1, 2, 2), dtype=torch.uint8, generator=generator)
        values = measured(SampleQuality(Pixels(), ["kid"]), *images)
        kids.append(values["pixels_kid"])
    kids = torch.stack(kids)
    assert kids.min() < 0 < kids.max()
    assert kids.mean().abs() < 3 * kids.std() / 40**0.5


def test_inception_score_is_the_exponential_of_the_mean_divergence(values, features):
    logits = features[2]
    generator = torch.Generator().manual_seed(0)
    parts = logits[torch.randperm(700, generator=generator)].numpy().reshape(10, 70, 10)
    scores = []
    for part in parts:
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    assert float(values["digits_score"]) == pytest.approx(np.mean(scores), rel=1e-6)
    assert float(values["digits_score_std"]) == pytest.approx(np.std(scores, ddof=1), rel=1e-5)
    theirs = isc_features_to_metric(logits, shuffle=False)["inception_score_mean"]
    assert float(values["digits_score"]) == pytest.approx(theirs, rel=0.03)


def test_inception_score_of_certain_classes_is_their_number():
    # Also where a probability is less than float32 can tell from 0.
    class Certain(Pixels):
        def features_and_logits(self, images):
            return self(images), 500.0 * F.one_hot(images[:, 0, 0, 0].long() % 4, 5).float()

    images = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    quality = SampleQuality(Certain(), ["inception_score"])
    quality.update(images, real=False)
    assert 3.5 < float(quality.compute()["pixels_score"]) <= 4


def test_the_other_numbers_are_those_of_the_features(values, features):
    a, b, _ = features
    expected = (*precision_recall(a, b, 3), *density_coverage(a, b, 5))
    assert tuple(values.values())[-4:] == pytest.approx([float(x) for x in expected], abs=1e-7)
    assert all(0.05 < float(x) < 0.99 for x in expected)  # says something


def test_noise_makes_the_numbers_worse(values, real):
    better = measured(SampleQuality(DigitsFeatures(), ALL), real, digits(700, 1400))
    for name in ("fd", "kid"):
        assert better[f"digits_{name}"] < values[f"digits_{name}"]
    # Not recall: balls around images that stray are wide.
    for name in ("score", "precision", "density", "coverage"):
        assert better[f"digits_{name}"] > values[f"digits_{name}"]


# ---- one pass ---------------------------------------------------------------------------------


class Pixels(nn.Module):
    """Four pixels as features, without logits."""

    name = "pixels"
    num_features = 4

    def forward(self, images):
        return images.flatten(1).float() / 255


class CountingFeatures(DigitsFeatures):
    def __init__(self):
        super().__init__()
        self.seen = 0
        self.heads = 0
        self.classifier.head.register_forward_hook(self._head)

    def _head(self, module, arguments, logits):
        self.heads += len(logits)

    def forward(self, images):
        self.seen += len(images)
        return super().forward(images)


def test_each_image_is_seen_once_and_the_real_side_stays(real, fake, values, monkeypatch):
    made = []

    def counted(features, k):
        made.append(k)
        return nearest_radii(features, k)

    monkeypatch.setattr("ddim_pl.metrics.quality.nearest_radii", counted)
    extractor = CountingFeatures()
    quality = SampleQuality(extractor, ALL)
    first = measured(quality, real, fake)
    assert quality.num_real == 700
    assert (extractor.seen, extractor.heads) == (1400, 700)
    quality.reset_samples()
    assert quality.num_real == 700
    with pytest.raises(RuntimeError, match="More than one sample"):
        quality.compute()
    others = digits(900, 1300, noise=10)
    quality.update(others, real=False)
    second = quality.compute()
    assert (extractor.seen, extractor.heads) == (1800, 1100)
    assert made == [3, 5]
    fresh = measured(SampleQuality(DigitsFeatures(), ALL), real, others, batch_size=400)
    for key in KEYS:
        assert float(second[key]) == pytest.approx(float(fresh[key]), rel=1e-4)
    assert first == values
    # Once the real side changes, so does what was kept of it.
    quality.update(others, real=True)
    changed = measured(SampleQuality(DigitsFeatures(), ALL), torch.cat([real, others]), others)
    for key, value in quality.compute().items():
        assert float(value) == pytest.approx(float(changed[key]), rel=1e-5)
    assert made[:4] == [3, 5, 3, 5]


def test_a_metric_alone_gives_what_it_gives_among_others(real, fake, values):
    for name in ALL:
        quality = SampleQuality(DigitsFeatures(), [name])
        alone = measured(quality, real, fake)
        assert alone == {key: values[key] for key in quality.keys if key in values}
        assert len(alone) == len(NUMBERS[name]) - (name == "kid")


def test_the_distance_keeps_no_features_and_the_score_needs_no_real_images(real, fake):
    def kept(quality):
        parts = (quality._real, quality._fake, quality._logits)
        return [sum(map(len, rows._parts)) for rows in parts]

    distance = SampleQuality(DigitsFeatures(), ["fd"])
    measured(distance, real, fake)
    assert kept(distance) == [0, 0, 0]
    extractor = CountingFeatures()
    score = SampleQuality(extractor, ["inception_score"])
    assert distance.needs_real
    assert not score.needs_real
    measured(score, real, fake)
    assert extractor.seen == 700
    assert kept(score) == [0, 0, 700]
    both = SampleQuality(DigitsFeatures(), ["fd", "inception_score"])
    assert both.needs_real


def test_given_features_pass_through_torchmetrics_as_they_are(real):
    quality = SampleQuality(DigitsFeatures(), ["fd"])
    quality.update(real, real=True)
    features = DigitsFeatures()(real)
    metric = quality._fd
    assert metric.inception(features) is features
    assert metric.real_features_sum.dtype == torch.float64
    torch.testing.assert_close(metric.real_features_sum, features.double().sum(0))
    assert metric.orig_dtype == torch.float32


# ---- randomness, devices, ranks ---------------------------------------------------------------


def test_the_same_numbers_every_time_and_no_global_randomness(real, fake):
    images = fake[:500]  # subsets of the real ones are then random
    torch.manual_seed(1)
    state, array_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = measured(SampleQuality(DigitsFeatures(), ALL), real, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], array_state)
    torch.manual_seed(2)
    quality = SampleQuality(DigitsFeatures(), ALL)
    assert measured(quality, real, images) == first
    assert quality.compute() == first
    other = measured(SampleQuality(DigitsFeatures(), ALL, seed=1), real, images)
    random = {"digits_kid", "digits_kid_std", "digits_score", "digits_score_std"}
    assert {key for key in KEYS if other[key] != first[key]} == random


def test_neither_batches_nor_moves_change_the_numbers(real, fake, values):
    quality = SampleQuality(DigitsFeatures(), ALL)
    for images in real.split(33):
        quality.update(images, real=True)
    assert quality.to("cpu") is quality
    for images in fake.split(90):
        quality.update(images, real=False)
    for key, value in quality.compute().items():
        assert float(value) == pytest.approx(float(values[key]), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_numbers_on_a_gpu(real, fake, values):
    quality = SampleQuality(DigitsFeatures(), ALL).to("cuda")
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    computed = measured(quality, real, fake)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    quality.to("cpu")
    for key, value in computed.items():
        assert value.device.type == "cuda"
        assert float(value) == pytest.approx(float(values[key]), rel=2e-3)


def measure_share(rank, world_size, folder):
    """One process of a distributed run, on images as the callback shares them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    quality = SampleQuality(DigitsFeatures(), ALL)
    real = digits(0, 101)
    for indices in shared_batches(len(real), 16, rank, world_size):
        quality.update(real[indices], real=True)
    results = []
    for count in (65, 40):
        mine = digits(700, 700 + count, noise=30)[rank::world_size]
        for images in mine.split(16):  # more batches on one rank than on the other
            quality.update(images, real=False)
        results.append(quality.compute())
        quality.reset_samples()
    if rank == 0:  # the other has no image at all
        quality.update(digits(700, 740, noise=30), real=False)
    results.append(quality.compute())
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    torch.multiprocessing.spawn(measure_share, (2, str(tmp_path)), nprocs=2)
    quality = SampleQuality(DigitsFeatures(), ALL)
    quality.update(digits(0, 101), real=True)
    expected = []
    for count in (65, 40):
        quality.update(digits(700, 700 + count, noise=30), real=False)
        expected.append(quality.compute())
        quality.reset_samples()
    expected.append(expected[-1])
    for rank in range(2):
        for ours, theirs in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours:
                assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-5)


# ---- extractors -------------------------------------------------------------------------------


def test_digits_features_and_logits_are_those_of_two_passes(fake):
    extractor = DigitsFeatures()
    features, logits = extractor.features_and_logits(fake)
    assert torch.equal(features, extractor(fake))
    assert torch.equal(logits, extractor.logits(fake))
    assert logits.dtype == torch.float32


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    theirs = random_inception("2048", "logits_unbiased")
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(theirs.state_dict(), path)
    return InceptionFeatures(str(path)), theirs


@pytest.mark.slow
def test_inception_features_and_logits_are_those_of_torch_fidelity(inception):
    ours, theirs = inception
    grey = torch.randint(
        0, 256, (2, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    features, logits = ours.features_and_logits(grey)
    expected = theirs._torch_fidelity_forward(grey.repeat(1, 3, 1, 1))
    assert torch.equal(features, ours(grey))
    torch.testing.assert_close(features, expected[0])
    torch.testing.assert_close(logits, expected[1])
    assert logits.shape == (2, 1008)


@pytest.mark.slow
def test_numbers_of_inception_features_have_their_own_names(inception):
    assert SampleQuality(inception[0], ALL).keys == (
        *("fid", "kid", "kid_std", "inception_score", "inception_score_std"),
        *("precision", "recall", "density", "coverage"),
    )


# ---- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["fd", "fld"], "metrics must be one or more of fd, kid, inception_score, .*, got 'fld'"),
        ([], "metrics must be one or more of fd, .*, got none"),
    ],
)
def test_unknown_metrics_are_refused(metrics, message):
    with pytest.raises(ValueError, match=message):
        SampleQuality(DigitsFeatures(), metrics)


def test_a_score_without_logits_is_refused():
    with pytest.raises(
        ValueError, match="without class logits, got the extractor 'pixels': leave it out"
    ):
        SampleQuality(Pixels(), ["inception_score"])


def test_no_more_images_of_a_side_than_features_are_a_warning():
    quality = SampleQuality(DigitsFeatures(), ALL)
    quality.warn_of_few(33, 33)
    with pytest.warns(UserWarning, match="32 samples give a singular covariance of 32 features"):
        quality.warn_of_few(32, 33)
    with pytest.warns(UserWarning, match="8 real images give a singular covariance of 32 feat"):
        quality.warn_of_few(num_real=8)
    SampleQuality(DigitsFeatures(), ["kid"]).warn_of_few(8, 8)


def test_too_few_samples_are_an_error_without_a_warning():
    SampleQuality(DigitsFeatures()).check_num_samples(2)
    with pytest.raises(ValueError, match="num_samples must be at least 2 for fd, got 1: give mo"):
        SampleQuality(DigitsFeatures()).check_num_samples(1)
    others = SampleQuality(DigitsFeatures(), ["kid", "precision_recall"])
    others.check_num_samples(4)
    with pytest.raises(ValueError, match=r"num_samples must be at least 4 for kid, prec.*, got 3"):
        others.check_num_samples(3)
    with pytest.raises(ValueError, match="num_samples must be at least 2 for kid, got 1"):
        SampleQuality(DigitsFeatures(), ["kid"]).check_num_samples(1)


def test_a_score_of_single_images_is_refused():
    quality = SampleQuality(DigitsFeatures(), ["inception_score"])
    quality.check_num_samples(20)
    with pytest.raises(ValueError, match=r"at least 20 for inception_score, got 19"):
        quality.check_num_samples(19)


@pytest.mark.parametrize(("name", "least"), [("kid", 2), ("precision_recall", 4), (ALL[-1], 6)])
def test_too_few_real_images_are_refused(name, least):
    quality = SampleQuality(DigitsFeatures(), [name])
    quality.check_num_real(least)
    with pytest.raises(ValueError, match=rf"real images must be at least {least} for {name}, got"):
        quality.check_num_real(least - 1)
    SampleQuality(DigitsFeatures(), ["inception_score"]).check_num_real(1)  # which uses none


class Flat(DigitsFeatures):
    """An extractor that gives more than it says."""

    def forward(self, images):
        return super().forward(images).repeat(1, 2)


@pytest.mark.parametrize("metric", ["fd", "inception_score"])
def test_images_that_the_extractor_does_not_take_are_refused(metric):
    quality = SampleQuality(DigitsFeatures(), [metric])
    quality.check_shape((1, 8, 8))
    with pytest.raises(ValueError, match=r"uint8 images \(B, 3, 8, 8\) .* 'digits' that fails"):
        quality.check_shape((3, 8, 8))


def test_features_of_another_width_than_said_are_refused():
    with pytest.raises(ValueError, match=r"here \(2, 32\), got \(2, 64\) from .* 'digits'"):
        SampleQuality(Flat()).check_shape((1, 8, 8))


def test_what_is_no_extractor_is_refused():
    with pytest.raises(ValueError, match=r"got Identity with None and None: add them"):
        SampleQuality(nn.Identity())


@pytest.mark.parametrize("name", ALL)
def test_nothing_to_compute_is_an_error(name, real):
    quality = SampleQuality(DigitsFeatures(), [name])
    quality.update(real[:9], real=True)
    quality.update(real[:1], real=False)
    with pytest.raises((RuntimeError, ValueError)):
        quality.compute()
