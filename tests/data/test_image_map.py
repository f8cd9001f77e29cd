"""Decoded images in one file: those of decoding, made once, and whole or not there."""

import errno
import multiprocessing
import os
import pickle
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_pl.data import image_folder, image_map
from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.data.image_map import MappedImages

SIZE = 8
COUNT = 7
DECODE = image_folder.decode


def write(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path):
    for number in range(COUNT):
        write(tmp_path / "root" / "ab"[number % 2] / f"{number}.png", number)
    return tmp_path / "root"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "maps"


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that have been decoded; images are written one by one."""
    names = []

    def decode(path, *arguments, **keywords):
        names.append(path.name)
        return DECODE(path, *arguments, **keywords)

    monkeypatch.setattr(image_folder, "decode", decode)
    monkeypatch.setattr(image_map, "BLOCK_BYTES", 1)
    monkeypatch.setattr(image_map, "RECORDED_EVERY", 0.0)
    return names


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(image_map, "rank_zero_info", lines.append)
    return lines


def module(root, cache=None, size=SIZE, **arguments):
    cache = None if cache is None else str(cache)
    return ImageFolderDataModule(str(root), size, cache=cache, **arguments)


def ready(*arguments, **keywords):
    data = module(*arguments, **keywords)
    data.prepare_data()
    data.setup("fit")
    return data


def pixels(data):
    return data.train_set.images(torch.arange(len(data.train_set)))


def files(cache):
    return sorted(each.suffixes[-1] for each in cache.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [{}, {"channels": 1}, {"resample": "box", "crop_first": True}, {"size": 5}],
    ids=str,
)
@pytest.mark.parametrize("block", [1, 2**26])
def test_images_are_those_of_decoding(root, cache, monkeypatch, arguments, block):
    monkeypatch.setattr(image_map, "BLOCK_BYTES", block)
    plain, mapped = ready(root, **arguments), ready(root, cache, **arguments)
    assert isinstance(mapped.train_set, MappedImages)
    assert mapped.shape == plain.shape
    assert mapped.num_classes == 2
    for indices in (torch.arange(COUNT), torch.tensor([5, 0, 5, 3]), torch.tensor([6])):
        found = mapped.train_set.images(indices)
        torch.testing.assert_close(found, plain.train_set.images(indices), rtol=0, atol=0)
        found += 1  # the caller's own, not the file's
        assert torch.equal(mapped.train_set.labels(indices), plain.train_set.labels(indices))
    assert torch.equal(pixels(mapped), pixels(plain))
    assert torch.equal(pixels(ready(root, cache, **arguments)), pixels(plain))
    assert files(cache) == [".json", ".npy"]


def test_images_are_mapped_and_not_read(root, cache):
    source = ready(root, cache).train_set
    assert isinstance(source._pixels.base, np.memmap)
    assert not source._pixels.flags.writeable
    # Neither are they copied to a process that is not forked.
    assert len(pickle.dumps(source)) < COUNT * 3 * SIZE**2
    assert torch.equal(
        pickle.loads(pickle.dumps(source)).images(torch.arange(COUNT)),
        source.images(torch.arange(COUNT)),
    )


@pytest.mark.parametrize("way", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_the_same(root, cache, way):
    alone, helped = ready(root, batch_size=2), ready(root, cache, batch_size=2, num_workers=1)
    loader = helped.train_dataloader()
    loader.multiprocessing_context = way
    for one, two in zip(alone.train_dataloader(), loader, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_a_map_is_made_once(root, cache, decoded, said):
    first = ready(root, cache)
    assert sorted(decoded) == [f"{number}.png" for number in range(COUNT)]
    first.prepare_data()  # as Lightning does after the command line
    second = ready(root, cache)
    assert len(decoded) == COUNT
    assert len(said) == 1
    assert second.train_set.digest() == first.train_set.digest()
    # A folder of another name that holds the same files has a map of its own.
    shutil.copytree(root, root.with_name("copy"))
    ready(root.with_name("copy"), cache)
    ready(root, cache)
    assert len(decoded) == 2 * COUNT


def test_training_and_validation_images_have_a_map_each(root, cache, tmp_path):
    write(tmp_path / "[val]" / "b" / "9.png", 9)
    data = ready(root, cache, val_root=str(tmp_path / "[val]"))
    expected = ready(root, val_root=str(tmp_path / "[val]")).val_set
    assert torch.equal(data.val_set.images(torch.arange(1)), expected.images(torch.arange(1)))
    assert data.val_set.labels(torch.arange(1)).tolist() == [1]
    assert files(cache) == [".json", ".json", ".npy", ".npy"]
    os.utime(tmp_path / "[val]" / "b" / "9.png", (1, 1))
    ready(root, cache, val_root=str(tmp_path / "[val]"))
    assert files(cache) == [".json", ".json", ".npy", ".npy"]


@pytest.mark.parametrize(
    ("change", "arguments", "reason"),
    [
        (lambda root: write(root / "a" / "0.png", 99), {}, "other files, or of files that have"),
        (lambda root: os.utime(root / "a" / "0.png", (1, 1)), {}, "other files, or of files"),
        (lambda root: write(root / "a" / "new.png", 99), {}, "other files"),
        (lambda root: (root / "a" / "0.png").rename(root / "a" / "8.png"), {}, "other files"),
        (lambda root: None, {"size": 5}, "those there are of image_size 8, not 5"),
        (lambda root: None, {"resample": "box"}, "of squaring .*bilinear.*, not .*box"),
        (lambda root: None, {"crop_first": True}, "crop_first=False.*, not .*crop_first=True"),
        (lambda root: None, {"channels": 1}, "of channels 3, not 1"),
    ],
)
def test_a_map_of_something_else_is_made_again(root, cache, said, change, arguments, reason):
    before = ready(root, cache)
    old = pixels(before)
    change(root)
    with pytest.raises(ValueError, match=rf"cache must hold .*{reason}.*: call prepare_data\(\)"):
        module(root, cache, **arguments).setup("fit")
    found = ready(root, cache, **arguments)
    assert torch.equal(pixels(found), pixels(ready(root, **arguments)))
    assert len(said) == 2
    assert re.search(reason, said[1])
    assert files(cache) == [".json", ".npy"]
    assert torch.equal(pixels(before), old)  # a run that goes on


@pytest.mark.parametrize("damage", ["header", "no header", "cut", "gone", "other array"])
def test_a_damaged_map_is_made_again(root, cache, said, damage):
    expected = pixels(ready(root, cache))
    (header,), (content,) = cache.glob("*.json"), cache.glob("*.npy")
    match damage:
        case "header":
            header.write_text(header.read_text().replace("7", "8", 1))
        case "no header":
            header.unlink()
        case "cut":
            content.write_bytes(content.read_bytes()[:-1])
        case "gone":
            content.unlink()
        case "other array":
            np.save(content, np.zeros((COUNT, 3, SIZE, SIZE), dtype=np.float32))
    assert torch.equal(pixels(ready(root, cache)), expected)
    assert "damaged" in said[1] or damage == "no header"
    assert files(cache) == [".json", ".npy"]


def stop_at(name, monkeypatch, error=KeyboardInterrupt):
    go_on = image_folder.decode

    def decode(path, *arguments, **keywords):
        if path.name == name:
            raise error
        return go_on(path, *arguments, **keywords)

    monkeypatch.setattr(image_folder, "decode", decode)
    return go_on


@pytest.mark.parametrize("change", ["none", "the files", "a shorter part", "a damaged record"])
def test_what_was_stopped_goes_on(root, cache, monkeypatch, decoded, said, change):
    go_on = stop_at("5.png", monkeypatch)  # the sixth: a/0, a/2, a/4, a/6, b/1, b/3, b/5
    stopped = len(os.listdir(root / "a")) + 2
    with pytest.raises(KeyboardInterrupt):
        module(root, cache).prepare_data()
    assert files(cache) == [".json", ".part"]
    with pytest.raises(ValueError, match=r"cache must hold .*no whole set is there"):
        module(root, cache).setup("fit")
    monkeypatch.setattr(image_folder, "decode", go_on)
    (part,), (record,) = cache.glob("*.part"), cache.glob("*.part.json")
    if change == "the files":
        write(root / "a" / "0.png", 99)
    elif change == "a shorter part":
        os.truncate(part, part.stat().st_size - 1)
    elif change == "a damaged record":
        record.write_text(record.read_text().replace("6", "7"))
    else:  # what was not yet known to be on the disk
        with part.open("ab") as file:
            file.write(b"x" * 1000)
    decoded.clear()
    found = ready(root, cache)
    assert len(decoded) == (COUNT - stopped if change == "none" else COUNT)
    assert (f"first {stopped} are there already" in said[1]) == (change == "none")
    assert torch.equal(pixels(found), pixels(ready(root)))
    assert files(cache) == [".json", ".npy"]


def test_a_file_that_cannot_be_decoded_is_the_same_error(root, cache):
    broken = root / "b" / "3.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"3\.png cannot be read") as plain:
        ready(root)
    with pytest.raises(ValueError, match=r"3\.png cannot be read") as mapped:
        ready(root, cache)
    assert str(mapped.value) == str(plain.value)
    assert not list(cache.iterdir())
    with pytest.raises(ValueError, match="must have 8x8 pixels, got 17x13"):
        ready(root, cache, resize=False)
    assert not list(cache.iterdir())
    (root / "a" / "gone.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"gone\.png cannot be read .*: replace or remove it"):
        ready(root, cache)


def test_labels_are_checked_before_the_work(root, cache, tmp_path, decoded):
    write(tmp_path / "val" / "c" / "9.png")
    with pytest.raises(ValueError, match="must lie in a subfolder named like a training class"):
        ready(root, cache, val_root=str(tmp_path / "val"))
    write(root / "beside.png")
    decoded.clear()
    with pytest.raises(ValueError, match="must hold its images in subfolders"):
        ready(root, cache)
    assert not decoded


def test_a_disk_without_room_is_named_before_the_work(root, cache, monkeypatch, decoded):
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(
        image_map.shutil, "disk_usage", lambda _: usage._replace(free=COUNT * 3 * SIZE**2 - 1)
    )
    message = r"cache must be in a folder with 1\.3 kB of free space for the 7 .*maps with 1\.3 kB"
    with pytest.raises(ValueError, match=message):
        module(root, cache).prepare_data()
    assert not decoded
    assert not list(cache.iterdir())
    usage = usage._replace(free=COUNT * 3 * SIZE**2)
    monkeypatch.setattr(image_map.shutil, "disk_usage", lambda _: usage)
    ready(root, cache)
    # What it takes the place of makes room.
    usage = usage._replace(free=0)
    os.utime(root / "a" / "0.png", (1, 1))
    ready(root, cache)
    assert len(decoded) == 2 * COUNT


def test_a_full_disk_keeps_what_is_decoded(root, cache, monkeypatch, decoded):
    calls = []

    def sync(handle):
        calls.append(handle)
        if len(calls) == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(image_map.os, "fsync", sync)
        with pytest.raises(OSError, match=r"cache cannot be written .*\(no space is left\): make"):
            module(root, cache).prepare_data()
    before = len(decoded)
    assert 1 < before < COUNT
    found = ready(root, cache)
    assert len(decoded) <= COUNT + 1
    assert torch.equal(pixels(found), pixels(ready(root)))


def test_a_folder_that_cannot_be_written_to_is_named(root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cache must be in a folder that can be written to, got"):
        module(root, tmp_path / "file").prepare_data()


def make_and_log(folder):
    """What one of several runs does that begin at once."""

    def decode(path, *arguments, **keywords):
        with (folder / "log").open("a") as log:
            log.write(f"{path.name}\n")
        time.sleep(0.1)  # until the others have begun
        return DECODE(path, *arguments, **keywords)

    image_folder.decode = decode
    return pixels(ready(folder / "root", folder / "maps")).numpy()


def test_runs_that_begin_at_once_make_one_map(root, cache, tmp_path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.map(make_and_log, [tmp_path] * 3, chunksize=1)
    expected = pixels(ready(root)).numpy()
    for each in found:
        np.testing.assert_array_equal(each, expected)
    names = (tmp_path / "log").read_text().split()
    assert sorted(names) == [f"{number}.png" for number in range(COUNT)]
    assert files(cache) == [".json", ".npy"]


def test_the_home_folder_may_be_a_tilde(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ready(root, "~/maps")
    assert files(Path(tmp_path, "maps")) == [".json", ".npy"]
