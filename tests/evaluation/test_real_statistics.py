"""Statistics of the real images, kept for later runs."""

import os
import warnings

import pytest
import torch
from command_runs import trainer
from safetensors.torch import load_file, save_file
from tiny import some_ddpm

from ddim_pl.data.base import ImageDataModule, TensorImages
from ddim_pl.data.digits import digits_arrays
from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.evaluation.measure import MeasureSettings, measure
from ddim_pl.evaluation.worker import Worker, on_every_worker
from ddim_pl.images import write_png
from ddim_pl.metrics.digits import DigitsFeatures
from ddim_pl.metrics.quality import SampleQuality


class Counting(DigitsFeatures):
    seen = 0

    def forward(self, images):
        type(self).seen += len(images)
        return super().forward(images)


class Twice(Counting):
    """The same weights in other code."""

    def forward(self, images):
        return 2 * super().forward(images)


class Changed(Counting):
    """The same code with other weights."""

    def __init__(self):
        super().__init__()
        self.classifier.trunk[0].bias[0] += 1


class Images(ImageDataModule):
    def __init__(self, images, **kwargs):
        super().__init__(**kwargs)
        self.given = images

    def load(self, train):
        return TensorImages(self.given, torch.zeros(len(self.given), dtype=torch.int64), 1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDIM_PL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "real-statistics"


@pytest.fixture
def images():
    return digits_arrays()[0][:100].clone()


def same_ddpm():
    torch.manual_seed(0)
    return some_ddpm(num_steps=1)


def measured(folder, data, extractor=Counting, **settings):
    """The numbers, and how many real images the extractor saw."""
    found = []
    arguments = {"num_samples": 40, "batch_size": 40, **settings}

    def work(worker):
        Counting.seen = Twice.seen = 0
        data.setup()
        given = MeasureSettings(extractor, **arguments)
        found.append(measure(worker, given, data, "").values)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*singular covariance")
        on_every_worker(trainer(folder), same_ddpm(), work)
    return found[0], extractor.seen - arguments["num_samples"]


def test_a_second_run_reads_no_real_images_and_has_the_same_bits(cache, images, tmp_path):
    none, seen = measured(tmp_path, Images(images), cache=False)
    assert seen == 100
    assert not cache.exists()
    first, seen = measured(tmp_path, Images(images))
    assert seen == 100 + 8
    (file,) = cache.iterdir()
    sums = load_file(file)
    features = DigitsFeatures()(images).double()
    torch.testing.assert_close(sums["sum"], features.sum(0))
    torch.testing.assert_close(sums["outer"], features.T @ features)
    assert sums["count"] == 100
    second, seen = measured(tmp_path, Images(images))
    assert seen == 8
    assert none == first == second  # dicts of tensors, bit for bit


def test_sums_are_kept_beside_the_inception_score_but_not_beside_single_features(
    cache, images, tmp_path
):
    for metrics, kept in ((("fd", "kid"), 0), (("inception_score",), 0), (("kid",), 0)):
        measured(tmp_path, Images(images), metrics=metrics)
        assert cache.exists() == kept
    both = [measured(tmp_path, Images(images), metrics=("fd", "inception_score")) for _ in (1, 2)]
    assert both[0][0] == both[1][0]
    assert [seen for _, seen in both] == [108, 8]


def test_what_the_sums_depend_on_makes_another_file(cache, images, tmp_path):
    def number_of_files(images, **settings):
        measured(tmp_path, Images(images), **settings)
        return len(list(cache.iterdir()))

    assert number_of_files(images) == 1
    assert number_of_files(images, num_samples=50) == 1  # not on the other side
    assert number_of_files(images, batch_size=41) == 2
    assert number_of_files(images[:99]) == 3
    images[5, 0, 0, 0] += 1
    assert number_of_files(images) == 4
    assert number_of_files(images, extractor=Changed) == 5


def test_the_digest_of_files_is_of_names_sizes_times_and_how_they_are_decoded(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("ddim_pl.data.image_folder.MEMORY_LIMIT", 0)
    for index in range(3):
        write_png(digits_arrays()[0][index], tmp_path / "images" / f"{index}.png")
    root = str(tmp_path / "images")

    def digest(**settings):
        data = ImageFolderDataModule(root, **{"image_size": 8, "channels": 1, **settings})
        data.setup()
        return data.reference_digest()

    first = digest()
    assert digest() == first
    found = {first, digest(image_size=4), digest(resample="box"), digest(channels=3)}
    found |= {digest(crop_first=True), digest(resize=False)}
    assert len(found) == 6
    times = os.stat(tmp_path / "images" / "0.png").st_mtime_ns
    os.utime(tmp_path / "images" / "0.png", ns=(times, times + 1))
    later = digest()
    (tmp_path / "images" / "1.png").rename(tmp_path / "images" / "4.png")
    assert len({*found, later, digest()}) == 8


def test_images_without_a_digest_are_not_kept(cache, images, tmp_path, monkeypatch):
    monkeypatch.setattr(TensorImages, "digest", lambda self: None)
    _, seen = measured(tmp_path, Images(images))
    assert seen == 100
    assert not cache.exists()


def damage(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def unseal(file):
    save_file(load_file(file), file)


def of_another_width(file):
    from ddim_pl.damage import seal_of

    sums = {**load_file(file), "sum": torch.zeros(3, dtype=torch.float64)}
    save_file(sums, file, metadata=seal_of(sums))


@pytest.mark.parametrize("ruin", [damage, cut, unseal, of_another_width])
def test_a_damaged_or_foreign_file_is_made_again(cache, images, tmp_path, ruin):
    first, _ = measured(tmp_path, Images(images))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    ruin(file)
    with pytest.warns(UserWarning, match="statistics of the real images are made again"):
        second, seen = measured(tmp_path, Images(images))
    assert seen == 108
    assert second == first
    assert file.read_bytes() == whole


def test_an_extractor_whose_code_changed_is_noticed(cache, images, tmp_path):
    measured(tmp_path, Images(images))
    with pytest.warns(UserWarning, match="whose code must have changed"):
        found, _ = measured(tmp_path, Images(images), Twice)
    expected, _ = measured(tmp_path, Images(images), Twice, cache=False)
    assert found == expected


def test_a_cache_that_cannot_be_written_is_a_warning(cache, images, tmp_path):
    cache.parent.write_text("a file in the place of the folder")
    with pytest.warns(UserWarning, match="set DDIM_PL_CACHE to a folder"):
        found, _ = measured(tmp_path, Images(images))
    assert found == measured(tmp_path, Images(images), cache=False)[0]


def test_a_run_that_ends_early_keeps_nothing(cache, images, tmp_path, monkeypatch):
    update, calls = SampleQuality.update, []

    def stopped(self, images, real):
        calls.append(real)
        if len(calls) == 3:
            raise KeyboardInterrupt
        update(self, images, real)

    monkeypatch.setattr(SampleQuality, "update", stopped)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        measured(tmp_path, Images(images))
    assert calls == [True] * 3
    assert not cache.exists()


class Spawned(Worker):
    """A worker in a process that no trainer started."""

    def __init__(self, rank):
        self.rank, self.world_size, self.is_first = rank, 2, rank == 0
        self.shows_progress, self.model = False, same_ddpm()

    def broadcast(self, value):
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    def all_reduce(self, values):
        values = values.clone()
        torch.distributed.all_reduce(values)
        return values

    def precision(self):
        return torch.no_grad()


def measure_share(rank, folder):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    os.environ["DDIM_PL_CACHE"] = f"{folder}/cache-{rank}"  # the first reads and writes, no other
    found = []
    for cache in (False, True, True):
        Counting.seen = 0
        data = Images(digits_arrays()[0][:101])
        data.setup()
        settings = MeasureSettings(Counting, num_samples=41, batch_size=16, cache=cache)
        values = measure(Spawned(rank), settings, data, "").values
        found.append((Counting.seen, values))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_keep_the_sums_of_both(tmp_path):
    torch.multiprocessing.spawn(measure_share, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert [seen for seen, _ in first] == [51 + 21, 51 + 8 + 21, 8 + 21]
    assert [seen for seen, _ in second] == [50 + 20, 50 + 20, 20]
    assert len({float(values["digits_fd"]) for _, values in (*first, *second)}) == 1
    assert not (tmp_path / "cache-1").exists()
    one, _ = measured(
        tmp_path, Images(digits_arrays()[0][:101]), num_samples=41, batch_size=16, cache=False
    )
    assert float(first[0][1]["digits_fd"]) == pytest.approx(float(one["digits_fd"]), rel=1e-5)
