"""Small archives laid out as ImageNet's."""

import hashlib
import io
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.inference import check_loads_in_inference_mode
from ddim_pl.data import imagenet
from ddim_pl.data.imagenet import ImageNetDataModule

CLASSES = ["n01440764", "n01443537"]
TRAIN = {"n01440764": (20, 17), "n01443537": (12, 15)}
VAL = ["n01443537", "n01440764", "n01443537"]


def jpeg(name: str, size: tuple[int, int] = (20, 17)) -> bytes:
    rng = np.random.default_rng(list(name.encode()))
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=100, subsampling=0)
    return buffer.getvalue()


def tar(files: dict[str, bytes], mode: Any = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def development_kit() -> bytes:
    """`meta.mat` with two classes and a node above them, and the classes of the validation set."""
    io_of_scipy = pytest.importorskip("scipy.io")
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    rows = [(1, CLASSES[0], "tench", "", 0), (2, CLASSES[1], "goldfish", "", 0)]
    rows.append((3, "n00000000", "fish", "", 2))
    synsets = np.array(rows, dtype=[(field, object) for field in fields])
    meta = io.BytesIO()
    io_of_scipy.savemat(meta, {"synsets": synsets})
    truth = "".join(f"{CLASSES.index(each) + 1}\n" for each in VAL)
    place = "ILSVRC2012_devkit_t12/data"
    files = {
        f"{place}/meta.mat": meta.getvalue(),
        f"{place}/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    return tar(files, "w:gz")


@pytest.fixture
def archives(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    train = {
        f"{name}.tar": tar({f"{name}_{side}.JPEG": jpeg(f"{name}{side}") for side in sides})
        for name, sides in TRAIN.items()
    }
    val = {f"ILSVRC2012_val_{n + 1:08}.JPEG": jpeg(f"val{n}") for n in range(len(VAL))}
    contents = {"train": tar(train), "val": tar(val), "devkit": development_kit()}
    for kind, content in contents.items():
        known = (imagenet.ARCHIVE_META[kind][0], hashlib.md5(content).hexdigest())
        monkeypatch.setitem(imagenet.ARCHIVE_META, kind, known)
    return {imagenet.ARCHIVE_META[kind][0]: content for kind, content in contents.items()}


def put(root: Path, archives: dict[str, bytes]) -> None:
    root.mkdir(exist_ok=True)
    for name, content in archives.items():
        (root / name).write_bytes(content)


def prepared(root: Path, **arguments: Any) -> ImageNetDataModule:
    data = ImageNetDataModule(str(root), 8, **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def as_in_edm(content: bytes, size: int) -> Tensor:
    """`center_crop` of the dataset_tool.py of EDM, but for an odd rest."""
    pixels = np.array(Image.open(io.BytesIO(content)))
    crop = min(pixels.shape[:2])
    top, left = ((side - crop) // 2 for side in pixels.shape[:2])
    # Where the rest is odd, torchvision takes the even one of the two nearest.
    left += (pixels.shape[1] - crop) % 4 == 3
    square = Image.fromarray(pixels[top : top + crop, left : left + crop])
    reduced = np.array(square.resize((size, size), Image.Resampling.LANCZOS))
    return torch.from_numpy(reduced).permute(2, 0, 1)


def test_archives_in_root_are_unpacked(tmp_path: Path, archives: dict[str, bytes]) -> None:
    put(tmp_path, archives)
    data = prepared(tmp_path)
    assert data.shape == (3, 8, 8)
    assert data.num_classes == 2
    assert data.train_set.labels(torch.arange(4)).tolist() == [0, 0, 1, 1]
    # In the order of folders, then of names.
    assert data.val_set.labels(torch.arange(3)).tolist() == [0, 1, 1]
    found = data.val_set.images(torch.arange(3))
    expected = torch.stack([as_in_edm(jpeg(f"val{number}"), 8) for number in (1, 0, 2)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # The unpacked archives are no longer needed, nor is anything else left.
    for name in archives:
        (tmp_path / name).unlink()
    assert len(prepared(tmp_path).train_set) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"train", "val", "meta.bin"}


def test_reduced_images_stay_as_they_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "train" / "n01440764" / "1.png")
    data = prepared(tmp_path)
    found = data.train_set.images(torch.arange(1))[0]
    torch.testing.assert_close(found, torch.from_numpy(pixels).permute(2, 0, 1))
    assert data.val_set is data.train_set


def test_what_is_missing_is_named_with_its_place(
    tmp_path: Path, archives: dict[str, bytes]
) -> None:
    data = ImageNetDataModule(str(tmp_path))
    for attempt in (data.prepare_data, data.setup):
        with pytest.raises(FileNotFoundError, match=r"root must hold a folder train") as caught:
            attempt()
        assert "ILSVRC2012_img_train.tar (MD5 " in str(caught.value)
        assert str(tmp_path) in str(caught.value)
    put(tmp_path, archives)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"folder val .*devkit_t12\.tar\.gz is missing"):
        ImageNetDataModule(str(tmp_path)).prepare_data()


def test_a_partial_archive_is_never_used(tmp_path: Path, archives: dict[str, bytes]) -> None:
    put(tmp_path, archives)
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"part")
    with pytest.raises(FileNotFoundError, match=r"img_train\.tar is damaged"):
        ImageNetDataModule(str(tmp_path)).prepare_data()


def test_unpacking_that_is_interrupted_leaves_nothing(
    tmp_path: Path, archives: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, archives)

    def interrupted(root: Path, folder: str) -> None:
        (root / folder).mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "parse_train_archive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ImageNetDataModule(str(tmp_path)).prepare_data()
    assert {path.name for path in tmp_path.iterdir()} == set(archives)
    assert len(prepared(tmp_path).train_set) == 4


def test_what_begins_at_once_is_unpacked_once(
    tmp_path: Path, archives: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two nodes that have the folder on one disk."""
    put(tmp_path, archives)
    calls: list[str] = []
    original = imagenet.parse_train_archive

    def slow(root: Path, folder: str) -> None:
        calls.append(folder)
        other.start()
        other.join(0.5)  # it waits
        assert other.is_alive()
        original(root, folder=folder)

    monkeypatch.setattr(imagenet, "parse_train_archive", slow)
    errors: list[BaseException] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: errors.append(args.exc_value))
    other = threading.Thread(target=ImageNetDataModule(str(tmp_path)).prepare_data)
    ImageNetDataModule(str(tmp_path)).prepare_data()
    other.join()
    assert not errors
    assert len(calls) == 1
    assert not list(tmp_path.glob(".*"))


def test_without_scipy_the_error_names_the_command(
    tmp_path: Path, archives: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, archives)
    monkeypatch.setattr(imagenet, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"scipy.*pip install 'ddim_pl\[scipy\]'"):
        ImageNetDataModule(str(tmp_path)).prepare_data()


def test_flat_folders_are_refused_where_they_differ(tmp_path: Path) -> None:
    for place in ("train/a/1.png", "val/b/1.png"):
        (tmp_path / place).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    with pytest.raises(ValueError, match=r"val/b/1\.png must lie in a subfolder named like a tr"):
        prepared(tmp_path)


def test_a_command_loads_images_in_its_inference_mode(
    tmp_path: Path, archives: dict[str, bytes]
) -> None:
    put(tmp_path, archives)
    check_loads_in_inference_mode(lambda: ImageNetDataModule(str(tmp_path), 8))
