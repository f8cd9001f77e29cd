"""Statistics of the real images, kept for later runs."""

import math
import os
import socket
import time
import warnings
from pathlib import Path

import pytest
import torch
from command_runs import trainer
from safetensors.torch import load_file, save_file
from tiny import some_ddpm

from ddim_pl.data.base import ImageDataModule, TensorImages
from ddim_pl.data.digits import digits_arrays
from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.evaluation.measure import MeasureSettings, measure
from ddim_pl.evaluation.worker import on_every_worker
from ddim_pl.images import write_png
from ddim_pl.metrics.digits import DigitsFeatures
from ddim_pl.metrics.quality import SampleQuality


class Counting(DigitsFeatures):
    seen = 0

    def forward(self, images):
        type(self).seen += len(images)
        return super().forward(images)


class Spoiled(Counting):
    def __call__(self, images):
        return super().__call__(images) * math.nan


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


def measured(folder, data, extractor=Counting, *, devices=1, **settings):
    """The numbers, and how many real images the extractor saw in this process."""
    found = []
    arguments = {"num_samples": 40, "batch_size": 40, **settings}

    def work(worker):
        Counting.seen = Twice.seen = 0
        data.setup()
        given = MeasureSettings(extractor, **arguments)
        found.append(measure(worker, given, data, "").values)
        drawn = len(worker.share(range(arguments["num_samples"])))
        found.append(extractor.seen - drawn)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*singular covariance")
        on_every_worker(trainer(folder, devices=devices), same_ddpm(), work)
    return found


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


def test_features_that_are_not_finite_now_do_not_pass_for_those_kept(cache, images, tmp_path):
    measured(tmp_path, Images(images))
    with (
        pytest.warns(UserWarning, match="whose code must have changed"),
        pytest.raises(torch.linalg.LinAlgError),
    ):
        measured(tmp_path, Images(images), Spoiled)


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


def test_a_cache_that_cannot_be_looked_at_is_a_warning(cache, images, tmp_path, monkeypatch):
    """An error of one process would leave the others waiting for its answer."""
    monkeypatch.setenv("DDIM_PL_CACHE", str(tmp_path / (300 * "n")))
    with pytest.warns(UserWarning, match="cannot be kept in .* set DDIM_PL_CACHE to a folder"):
        found, _ = measured(tmp_path, Images(images))
    assert found == measured(tmp_path, Images(images), cache=False)[0]


# ---- several processes ------------------------------------------------------------------------

SHARED = {"num_samples": 41, "batch_size": 16}
NUM_REAL = 101


def in_processes(runs, folder, count):
    """What `runs(rank, count, folder)` returns in each of the processes, joined as by torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = runs, count, port, str(folder)
    processes = torch.multiprocessing.spawn(one_of, arguments, nprocs=count, join=False)
    end = time.monotonic() + 240
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < end, "the processes wait for one another"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def one_of(rank, runs, count, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.save(runs(rank, count, Path(folder)), f"{folder}/{rank}.pt")


def runs_of_two(rank, count, folder):
    """Of each run the numbers, the real images seen, this rank's warnings and the kept file."""
    found = {}

    def run(name, place, **settings):
        os.environ["DDIM_PL_CACHE"] = str(folder / place)
        data = Images(digits_arrays()[0][:NUM_REAL])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values, seen = measured(folder, data, devices=count, **SHARED, **settings)
        texts = [str(each.message) for each in caught]
        found[name] = {
            "values": {key: float(value) for key, value in values.items()},
            "seen": seen,
            "again": sum("are made again" in text for text in texts),
            "files": stamps(folder / place),
        }
        torch.distributed.barrier()

    own = f"cache-{rank}"  # the first reads and writes, no other
    run("nothing kept", own, cache=False)
    run("made", own)
    run("read", own)
    if rank == 0:
        (file,) = (folder / own / "real-statistics").iterdir()
        damage(file)
    run("damaged", own)
    # Each looks into the folder of the other: the first finds nothing, the second the file.
    run("seen by the second alone", f"cache-{1 - rank}")
    run("seen by both", "cache-0")
    run("kid", "cache-2", metrics=("fd", "kid"))
    return found


def stamps(cache):
    """Names of all files of a cache, with what changes when one is written again."""
    files = [path for path in cache.rglob("*") if path.is_file()]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.mark.slow
def test_two_processes_measure_what_one_does_and_the_first_decides_what_is_read(tmp_path):
    first, second = in_processes(runs_of_two, tmp_path, 2)
    seen = {name: (first[name]["seen"], second[name]["seen"]) for name in first}
    assert seen == {
        "nothing kept": (51, 50),
        "made": (51 + 8, 50),
        "read": (8, 0),
        "damaged": (51 + 8, 50),
        "seen by the second alone": (51 + 8, 50),
        "seen by both": (8, 0),
        "kid": (51, 50),
    }
    distances = {run["values"]["digits_fd"] for each in (first, second) for run in each.values()}
    assert len(distances) == 1
    assert first["kid"]["values"] == second["kid"]["values"]
    one, _ = measured(
        tmp_path,
        Images(digits_arrays()[0][:NUM_REAL]),
        cache=False,
        metrics=("fd", "kid"),
        **SHARED,
    )
    assert first["kid"]["values"] == pytest.approx(
        {name: float(value) for name, value in one.items()}, rel=1e-5
    )
    # The first wrote a file where there was none that is whole; no other wrote any.
    files = {name: run["files"] for name, run in first.items()}
    assert not files["nothing kept"]
    assert not files["kid"]
    assert len(files["made"]) == 1
    assert files["read"] == files["made"]
    assert files["damaged"].keys() == files["made"].keys()
    assert files["damaged"] != files["made"]
    assert files["seen by both"] == files["damaged"]
    assert not any(second[name]["files"] for name in ("made", "read", "damaged"))
    again = [(run["again"], second[name]["again"]) for name, run in first.items()]
    assert again == [(name == "damaged", 0) for name in first]


def runs_of_three(rank, count, folder):
    """The distance, twice, of two real images: the third process has none."""
    found = []

    def work(worker):
        data = Images(digits_arrays()[0][:2])
        data.setup()
        settings = MeasureSettings(DigitsFeatures, **SHARED)
        for _ in range(2):
            found.append(float(measure(worker, settings, data, "").values["digits_fd"]))

    os.environ["DDIM_PL_CACHE"] = str(folder / "cache")
    warnings.filterwarnings("ignore")
    on_every_worker(trainer(folder, devices=count), same_ddpm(), work)
    return found


@pytest.mark.slow
def test_a_process_without_real_images_does_not_look_for_them_again(tmp_path):
    """It would wait for an answer of the others."""
    found = in_processes(runs_of_three, tmp_path, 3)
    assert len({value for values in found for value in values}) == 1
