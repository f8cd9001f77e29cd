"""Small files in the real formats: idx (gzipped), pickles in a tar archive, MATLAB."""

import gzip
import hashlib
import io
import os
import pickle
import re
import struct
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets.utils
from PIL import Image
from torchvision.datasets import CIFAR100, MNIST, SVHN, FashionMNIST

from data.inference import check_loads_in_inference_mode
from ddim_pl.data import torchvision_sets
from ddim_pl.data.torchvision_sets import TorchvisionDataModule

COUNTS = {"train": 5, "test": 3}
LABELS = {"train": [3, 0, 9, 1, 7], "test": [2, 9, 0]}
SHAPES = {
    **{"MNIST": (1, 28, 28), "FashionMNIST": (1, 28, 28)},
    **{"CIFAR100": (3, 32, 32), "SVHN": (3, 32, 32)},
}
NAMES = sorted(SHAPES)


def pixels(name: str, split: str) -> np.ndarray:
    rng = np.random.default_rng([len(name), len(split)])
    return rng.integers(0, 256, (COUNTS[split], *SHAPES[name]), dtype=np.uint8)


def idx(values: np.ndarray) -> bytes:
    """A file in MNIST's format: two zero bytes, the type (8 is uint8), the axes, their sizes."""
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return head + values.tobytes()


def mnist_files(name: str) -> dict[str, bytes]:
    found = {}
    for split, short in (("train", "train"), ("test", "t10k")):
        labels = np.array(LABELS[split], dtype=np.uint8)
        found[f"{short}-images-idx3-ubyte.gz"] = gzip.compress(idx(pixels(name, split)[:, 0]))
        found[f"{short}-labels-idx1-ubyte.gz"] = gzip.compress(idx(labels))
    return found


def cifar100_members() -> dict[str, bytes]:
    members: dict[str, Any] = {
        split: {
            "data": pixels("CIFAR100", split).reshape(-1, 3 * 32 * 32),
            "fine_labels": LABELS[split],
            "coarse_labels": [0] * COUNTS[split],
        }
        for split in COUNTS
    }
    members["meta"] = {"fine_label_names": [str(number) for number in range(100)]}
    return {name: pickle.dumps(content) for name, content in members.items()}


def tar(members: dict[str, bytes], folder: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def mat(split: str) -> bytes:
    """As published: X is (32, 32, 3, N), and the label of the digit 0 is 10."""
    io_of_scipy = pytest.importorskip("scipy.io")
    buffer = io.BytesIO()
    labels = [[label or 10] for label in LABELS[split]]
    images = pixels("SVHN", split).transpose(2, 3, 1, 0)
    io_of_scipy.savemat(buffer, {"X": images, "y": np.array(labels, dtype=np.uint8)})
    return buffer.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def published(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Files by their place in `root`, with the MD5 sums that torchvision expects of them."""
    if name == "SVHN":
        files = {f"{split}_32x32.mat": mat(split) for split in COUNTS}
        known = {
            split: [url, file, md5(files[file])]
            for split, (url, file, _) in SVHN.split_list.items()
            if split in COUNTS
        }
        monkeypatch.setattr(SVHN, "split_list", known)
        return files
    if name == "CIFAR100":
        members = cifar100_members()
        archive = tar(members, CIFAR100.base_folder)
        for split in COUNTS:
            monkeypatch.setattr(CIFAR100, f"{split}_list", [[split, md5(members[split])]])
        monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5(members["meta"])})
        monkeypatch.setattr(CIFAR100, "tgz_md5", md5(archive))
        return {CIFAR100.filename: archive}
    files = mnist_files(name)
    kind = {"MNIST": MNIST, "FashionMNIST": FashionMNIST}[name]
    known = [(file, md5(files[file])) for file, _ in kind.resources]
    monkeypatch.setattr(kind, "resources", known)
    return {f"{name}/raw/{file}": content for file, content in files.items()}


def put(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets.utils.urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_files_in_root_are_read_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, download: bool
) -> None:
    put(tmp_path, published(name, monkeypatch))
    data = TorchvisionDataModule(name, str(tmp_path), download)
    data.prepare_data()
    data.setup("fit")
    assert data.shape == SHAPES[name]
    assert data.num_classes == (100 if name == "CIFAR100" else 10)
    assert not data.flip
    for split, source in (("train", data.train_set), ("test", data.val_set)):
        everything = torch.arange(COUNTS[split])
        assert len(source) == COUNTS[split]
        found = source.images(everything)
        torch.testing.assert_close(found, torch.from_numpy(pixels(name, split)))
        assert source.labels(everything).tolist() == LABELS[split]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_downloaded_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    files = {Path(place).name: content for place, content in published(name, monkeypatch).items()}
    fetched: list[str] = []

    class Response(io.BytesIO):
        def __init__(self, request: Any) -> None:
            self.url = request.full_url
            fetched.append(Path(self.url).name)
            super().__init__(files[fetched[-1]])
            self.length = len(files[fetched[-1]])

    monkeypatch.setattr(torchvision.datasets.utils.urllib.request, "urlopen", Response)
    for _ in range(2):
        data = TorchvisionDataModule(name, str(tmp_path))
        data.prepare_data()
        data.setup("fit")
        assert (len(data.train_set), len(data.val_set)) == (5, 3)
    # torchvision first asks where an address leads to.
    assert sorted(fetched) == sorted([*files, *files])


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_without_a_network_the_error_names_all_files_and_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, download: bool
) -> None:
    files = published(name, monkeypatch)
    data = TorchvisionDataModule(name, str(tmp_path), download)
    for attempt in (data.prepare_data, data.setup):
        with pytest.raises(FileNotFoundError, match="root must hold a complete") as caught:
            attempt()
        message = str(caught.value)
        for place in files:
            assert Path(place).name in message
            assert str((tmp_path / place).parent) in message
        assert "://" in message
        assert len(message) < 600 + 2 * len(str(tmp_path))
        assert ("download: true" in message) == (not download)
        assert ("unpacked" in message) == (name != "SVHN")
    assert not list(tmp_path.iterdir())


def test_only_the_files_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = published("MNIST", monkeypatch)
    left = next(iter(files))
    put(tmp_path, {place: content for place, content in files.items() if place != left})
    with pytest.raises(FileNotFoundError, match=rf"put {re.escape(Path(left).name)} from https"):
        TorchvisionDataModule("MNIST", str(tmp_path)).prepare_data()


@pytest.mark.parametrize("name", NAMES)
def test_a_partial_file_is_never_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    files = published(name, monkeypatch)
    damaged = sorted(files)[-1]
    put(tmp_path, files | {damaged: files[damaged][:-10]})
    for download in (True, False):
        with pytest.raises(FileNotFoundError, match="root must hold a complete"):
            TorchvisionDataModule(name, str(tmp_path), download).prepare_data()
    put(tmp_path, files)
    TorchvisionDataModule(name, str(tmp_path)).prepare_data()


@pytest.mark.parametrize("left", [0, 3, 40])
def test_a_file_of_mnist_that_was_half_unpacked_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    put(tmp_path, published("MNIST", monkeypatch))
    TorchvisionDataModule("MNIST", str(tmp_path)).prepare_data()
    unpacked = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = unpacked.read_bytes()
    unpacked.write_bytes(content[:left])
    with pytest.raises(FileNotFoundError, match=r"damaged file in '.*MNIST/raw' .*: remove the u"):
        TorchvisionDataModule("MNIST", str(tmp_path)).prepare_data()
    unpacked.unlink()
    TorchvisionDataModule("MNIST", str(tmp_path)).prepare_data()
    assert unpacked.read_bytes() == content


def test_padding_is_black_and_the_same_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, published("MNIST", monkeypatch))
    data = TorchvisionDataModule("MNIST", str(tmp_path), pad=2)
    data.prepare_data()
    data.setup("fit")
    assert data.shape == (1, 32, 32)
    expected = np.zeros((5, 1, 32, 32), dtype=np.uint8)
    expected[..., 2:30, 2:30] = pixels("MNIST", "train")
    found = data.train_set.images(torch.arange(5))
    torch.testing.assert_close(found, torch.from_numpy(expected))
    file = Image.fromarray(pixels("MNIST", "train")[0, 0])
    np.testing.assert_array_equal(np.array(data.squaring(file, 32)), expected[0, 0])
    assert data.preparation == "padded by 2"
    with pytest.raises(ValueError, match=r"pad must be less than half of the 4 pixels .* got 2"):
        data.squaring(file, 4)


def test_without_scipy_the_error_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr(torchvision_sets, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"scipy.*pip install 'ddim_pl\[scipy\]'"):
        TorchvisionDataModule("SVHN", str(tmp_path)).prepare_data()


def test_arguments_out_of_range_are_refused() -> None:
    name: Any = "EMNIST"
    with pytest.raises(ValueError, match=r"dataset must be one of \('MNIST', .*got 'EMNIST'"):
        TorchvisionDataModule(name)
    with pytest.raises(ValueError, match="pad must be at least 0, got -1"):
        TorchvisionDataModule("MNIST", pad=-1)


@pytest.mark.parametrize("name", NAMES)
def test_what_begins_at_once_is_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    """As on two nodes that have the folder on one disk."""
    put(tmp_path, published(name, monkeypatch))
    inside: list[int] = []
    original = torchvision_sets._open

    def slow(*args: Any, **kwargs: Any) -> Any:
        inside.append(threading.get_ident())
        time.sleep(0.05)
        return original(*args, **kwargs)

    monkeypatch.setattr(torchvision_sets, "_open", slow)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(torchvision_sets.prepare, name, str(tmp_path), True) for _ in "12"]
        for each in both:
            each.result()
    assert len(inside) == 4
    assert inside[0] == inside[1] != inside[2] == inside[3]
    assert not list(tmp_path.rglob("*.lock"))


def test_a_folder_that_cannot_be_written_to_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, published("MNIST", monkeypatch))
    torchvision_sets.prepare("MNIST", str(tmp_path), False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(torchvision_sets, "alone_in", None)
    torchvision_sets.prepare("MNIST", str(tmp_path), False)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_loads_images_in_its_inference_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    put(tmp_path, published(name, monkeypatch))
    check_loads_in_inference_mode(lambda: TorchvisionDataModule(name, str(tmp_path)))
