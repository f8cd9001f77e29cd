import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets.utils
from torchvision.datasets import CIFAR10

from data.inference import check_loads_in_inference_mode
from ddim_pl.data.cifar10 import CIFAR10DataModule

PER_FILE = 3
TRAIN_FILES = [f"data_batch_{number}" for number in range(1, 6)]


def pixels(file_number: int) -> np.ndarray:
    rng = np.random.default_rng(file_number)
    return rng.integers(0, 256, (PER_FILE, 3 * 32 * 32), dtype=np.uint8)


def labels(file_number: int) -> list[int]:
    return [(file_number + number) % 10 for number in range(PER_FILE)]


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small archive in CIFAR-10's format, with the MD5 sums that torchvision expects."""
    names = [*TRAIN_FILES, "test_batch"]
    contents: dict[str, Any] = {
        name: {"data": pixels(number), "labels": labels(number)}
        for number, name in enumerate(names)
    }
    contents["batches.meta"] = {"label_names": [str(number) for number in range(10)]}
    files = {name: pickle.dumps(content) for name, content in contents.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    sums = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in TRAIN_FILES])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = CIFAR10.meta | {"md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(buffer.getvalue()).hexdigest())
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets.utils.urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("download", [True, False])
def test_an_archive_in_root_is_unpacked_without_a_network(
    tmp_path: Path, archive: bytes, download: bool
) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive)
    data = CIFAR10DataModule(str(tmp_path), download)
    data.prepare_data()
    data.setup("fit")
    assert data.shape == (3, 32, 32)
    assert data.num_classes == 10
    assert data.flip
    expected = np.concatenate([pixels(number) for number in range(5)]).reshape(-1, 3, 32, 32)
    everything = torch.arange(5 * PER_FILE)
    torch.testing.assert_close(data.train_set.images(everything), torch.from_numpy(expected))
    expected_labels = [label for number in range(5) for label in labels(number)]
    assert data.train_set.labels(everything).tolist() == expected_labels
    (batch,) = data.val_dataloader()
    torch.testing.assert_close(batch.images, torch.from_numpy(pixels(5).reshape(-1, 3, 32, 32)))
    assert batch.labels.tolist() == labels(5)


@pytest.mark.parametrize("download", [True, False])
def test_without_a_network_the_error_names_the_archive_and_its_place(
    tmp_path: Path, download: bool
) -> None:
    data = CIFAR10DataModule(str(tmp_path), download)
    for attempt in (data.prepare_data, data.setup):
        with pytest.raises(FileNotFoundError, match=r"cifar-10-python\.tar\.gz") as caught:
            attempt()
        assert str(tmp_path) in str(caught.value)
        assert ("download: true" in str(caught.value)) == (not download)


def test_a_partial_archive_is_never_used(tmp_path: Path, archive: bytes) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(archive[:-10])
    for download in (True, False):
        with pytest.raises(FileNotFoundError, match="root must hold a complete CIFAR-10"):
            CIFAR10DataModule(str(tmp_path), download).prepare_data()
    path.write_bytes(archive)
    CIFAR10DataModule(str(tmp_path)).prepare_data()


def test_a_command_loads_images_in_its_inference_mode(tmp_path: Path, archive: bytes) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive)
    check_loads_in_inference_mode(lambda: CIFAR10DataModule(str(tmp_path)))
