import hashlib
import io
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CelebA
from torchvision.transforms import functional

from data.inference import check_loads_in_inference_mode
from ddim_pl.data import celeba, image_folder
from ddim_pl.data.celeba import ARCHIVE, IMAGES, PARTITION, CelebADataModule
from ddim_pl.data.image_folder import decode
from ddim_pl.data.squares import Squaring
from ddim_pl.images import write_png

# As in the real partition, a name and the number of its split: train, valid, test.
SPLITS = {"000001.jpg": 0, "000002.jpg": 0, "000003.jpg": 1, "000004.jpg": 2, "000005.jpg": 0}
WIDTH, HEIGHT = 178, 218


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=100, subsampling=0)
    return buffer.getvalue()


def photograph(name: str) -> bytes:
    rng = np.random.default_rng(int(name[:6]))
    return jpeg(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def as_published(photographs: dict[str, bytes]) -> dict[str, bytes]:
    """The contents of the two files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in photographs.items():
            archive.writestr(f"{IMAGES}/{name}", content)
    rows = "".join(f"{name} {split}\n" for name, split in SPLITS.items())
    return {ARCHIVE: buffer.getvalue(), PARTITION: rows.encode()}


def trust(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torchvision expect the MD5 sums of these files."""
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    known = [(file_id, sums.get(name, md5), name) for file_id, md5, name in CelebA.file_list]
    monkeypatch.setattr(CelebA, "file_list", known)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    contents = as_published({name: photograph(name) for name in SPLITS})
    trust(contents, monkeypatch)
    return contents


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download=refuse))


def put(root: Path, files: dict[str, bytes]) -> Path:
    folder = root / "celeba"
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def prepared(root: Path, **arguments: Any) -> CelebADataModule:
    data = CelebADataModule(str(root), **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def as_in_the_ddim_code(name: str, image_size: int) -> Tensor:
    with Image.open(io.BytesIO(photograph(name))) as image:
        face = functional.crop(image, top=121 - 64, left=89 - 64, height=128, width=128)
        return functional.pil_to_tensor(functional.resize(face, image_size))


@pytest.mark.parametrize("download", [True, False])
def test_files_in_root_are_unpacked_and_split_without_a_network(
    tmp_path: Path, files: dict[str, bytes], download: bool
) -> None:
    folder = put(tmp_path, files)
    data = prepared(tmp_path, download=download)
    assert data.shape == (3, 64, 64)
    assert data.num_classes == 1
    assert data.flip
    assert (len(data.train_set), len(data.val_set)) == (3, 1)
    assert data.train_set.labels(torch.arange(3)).tolist() == [0, 0, 0]
    # The unpacked archive is no longer needed.
    (folder / ARCHIVE).unlink()
    assert len(prepared(tmp_path, download=download).train_set) == 3


@pytest.mark.parametrize("limit", [0, image_folder.MEMORY_LIMIT], ids=["files", "memory"])
@pytest.mark.parametrize("image_size", [64, 128])
def test_images_are_those_of_the_ddim_code(
    tmp_path: Path,
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    image_size: int,
) -> None:
    monkeypatch.setattr(image_folder, "MEMORY_LIMIT", limit)
    put(tmp_path, files)
    data = prepared(tmp_path, image_size=image_size)
    for source, split in ((data.train_set, 0), (data.val_set, 1)):
        names = [name for name, number in SPLITS.items() if number == split]
        expected = torch.stack([as_in_the_ddim_code(name, image_size) for name in names])
        found = source.images(torch.arange(len(source)))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_decoded_images_are_kept_for_both_splits(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, files)
    plain = prepared(tmp_path)
    prepared(tmp_path, cache=str(tmp_path / "maps"))

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(image_folder, "decode", again)
    mapped = prepared(tmp_path, cache=str(tmp_path / "maps"))
    for one, two in ((plain.train_set, mapped.train_set), (plain.val_set, mapped.val_set)):
        everything = torch.arange(len(one))
        torch.testing.assert_close(one.images(everything), two.images(everything), rtol=0, atol=0)
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "maps").glob("*.npy"))
    assert [name.rpartition("-")[0] for name in names] == ["celeba-train", "celeba-valid"]


def test_a_photograph_given_to_a_command_is_cut_as_in_training(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    put(tmp_path, files)
    data = prepared(tmp_path)
    (name,) = [name for name, number in SPLITS.items() if number == 1]
    path = tmp_path / "celeba" / IMAGES / name
    (expected,) = data.val_set.images(torch.arange(1))
    found = decode(path, 64, 3, data.squaring)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(decode(path, 64, 3, Squaring()), expected)
    # What is no aligned photograph is taken as it is.
    write_png(expected, tmp_path / "face.png")
    found = decode(tmp_path / "face.png", 64, 3, data.squaring)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_marked_square_is_cut_out_to_the_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[57:185, 25:153] = 255
    files = as_published(dict.fromkeys(SPLITS, jpeg(pixels)))
    trust(files, monkeypatch)
    put(tmp_path, files)
    (image,) = prepared(tmp_path, image_size=128).val_set.images(torch.arange(1))
    # A row or column outside the square would be black, up to JPEG errors.
    assert image.shape == (3, 128, 128)
    assert image.min() > 250


def test_what_is_missing_is_downloaded(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {file_id: files.get(name) for file_id, _, name in CelebA.file_list}
    fetched = []

    def download(*, id: str, output: str, **_: Any) -> None:
        content = contents[id]
        assert content is not None, "no more than the two files are needed"
        Path(output).write_bytes(content)
        fetched.append(Path(output).name)

    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download=download))
    for _ in range(2):
        assert len(prepared(tmp_path).train_set) == 3
    assert sorted(fetched) == sorted([ARCHIVE, PARTITION])


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("download", [True, False])
def test_without_a_network_the_error_names_the_files_and_their_place(
    tmp_path: Path, download: bool
) -> None:
    data = CelebADataModule(str(tmp_path), download)
    for attempt in (data.prepare_data, data.setup):
        with pytest.raises(FileNotFoundError) as caught:
            attempt()
        message = str(caught.value)
        for expected in (ARCHIVE, PARTITION, str(tmp_path / "celeba"), celeba.HOME):
            assert expected in message
        assert ("download: true" in message) == (not download)


@pytest.mark.usefixtures("files")
def test_without_gdown_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(FileNotFoundError, match=r"'gdown' is required.*put img_align_celeba\.zip"):
        CelebADataModule(str(tmp_path)).prepare_data()


@pytest.mark.parametrize("name", [ARCHIVE, PARTITION])
def test_a_partial_file_is_never_used(tmp_path: Path, files: dict[str, bytes], name: str) -> None:
    folder = put(tmp_path, files | {name: files[name][:-10]})
    for download in (True, False):
        with pytest.raises(FileNotFoundError, match="root must hold a complete CelebA"):
            CelebADataModule(str(tmp_path), download).prepare_data()
    put(tmp_path, files)
    assert len(prepared(tmp_path).train_set) == 3
    assert {path.name for path in folder.iterdir()} == {ARCHIVE, PARTITION, IMAGES}


def test_unpacking_that_is_interrupted_leaves_nothing(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(tmp_path, files)

    def interrupted(_: Path, target: str) -> None:
        Path(target, IMAGES).mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(celeba, "extract_archive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            CelebADataModule(str(tmp_path)).prepare_data()
    assert {path.name for path in folder.iterdir()} == {ARCHIVE, PARTITION}
    assert len(prepared(tmp_path).train_set) == 3


def test_missing_and_small_images_are_named(tmp_path: Path, files: dict[str, bytes]) -> None:
    images = put(tmp_path, files) / IMAGES
    prepared(tmp_path)
    (images / "000002.jpg").write_bytes(jpeg(np.zeros((HEIGHT, 100, 3), dtype=np.uint8)))
    with pytest.raises(
        ValueError, match=r"000002\.jpg must have columns 25 to 153 .*got 100x218 p"
    ):
        prepared(tmp_path)
    (images / "000002.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"must hold 5 images, got 1 fewer, 000002\.jpg first: r"
    ):
        prepared(tmp_path)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        CelebADataModule(image_size=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        CelebADataModule(batch_size=0)


def test_a_command_loads_images_in_its_inference_mode(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    put(tmp_path, files)
    check_loads_in_inference_mode(lambda: CelebADataModule(str(tmp_path), image_size=8))
