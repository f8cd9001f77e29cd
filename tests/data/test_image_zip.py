"""Archives as EDM's `dataset_tool.py` writes them."""

import io
import json
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from data.inference import check_loads_in_inference_mode
from ddim_pl.data import image_folder
from ddim_pl.data.image_zip import ImageZipDataModule, ZipImages

SIZE = 8
NAMES = [f"0000{number // 4}/img0000000{number}.png" for number in (3, 0, 6, 2, 5, 1, 4)]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="png", compress_level=0, optimize=False)
    return buffer.getvalue()


def image(name: str, size: int = SIZE) -> np.ndarray:
    rng = np.random.default_rng(list(name.encode()))
    return rng.integers(0, 256, (size, size, 3), dtype=np.uint8)


def write(path: Path, labels: Any = "given", compression: int = zipfile.ZIP_STORED) -> Path:
    """As `open_dest` of `dataset_tool.py`: a stored archive, images first, then the labels."""
    if labels == "given":
        labels = [[name, NAMES.index(name) % 3] for name in NAMES]
    with zipfile.ZipFile(path, mode="w", compression=compression) as archive:
        for name in NAMES:
            archive.writestr(name, png(image(name)))
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def module(path: Path, **arguments: Any) -> ImageZipDataModule:
    data = ImageZipDataModule(str(path), SIZE, **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def as_in_edm(path: Path) -> tuple[np.ndarray, list[int]]:
    """Images and labels in the order of `ImageFolderDataset` of EDM's training/dataset.py."""
    with zipfile.ZipFile(path) as archive:
        all_names = set(archive.namelist())
        PIL.Image.init()
        names = sorted(
            name for name in all_names if Path(name).suffix.lower() in PIL.Image.EXTENSION
        )
        images = []
        for name in names:
            with archive.open(name) as file:
                images.append(np.array(PIL.Image.open(file)).transpose(2, 0, 1))
        labels = dict(json.loads(archive.read("dataset.json"))["labels"])
    return np.stack(images), [labels[name.replace("\\", "/")] for name in names]


@pytest.fixture(params=["in memory", "from files"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "from files":
        monkeypatch.setattr(image_folder, "MEMORY_LIMIT", 0)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_images_and_labels_are_those_of_edms_code(tmp_path: Path, compression: int) -> None:
    path = write(tmp_path / "edm.zip", compression=compression)
    data = module(path)
    images, labels = as_in_edm(path)
    everything = torch.arange(len(NAMES))
    found = data.train_set.images(everything)
    torch.testing.assert_close(found, torch.from_numpy(images), rtol=0, atol=0)
    assert data.train_set.labels(everything).tolist() == labels
    assert (data.shape, data.num_classes) == ((3, SIZE, SIZE), 3)
    assert data.val_set is data.train_set
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edm.zip"]  # nothing unpacked


@pytest.mark.usefixtures("memory")
def test_workers_read_what_the_main_process_reads(tmp_path: Path) -> None:
    path = write(tmp_path / "edm.zip")
    alone, helped = module(path, batch_size=2), module(path, batch_size=2, num_workers=2)
    for one, two in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        torch.testing.assert_close(one, two)


def test_an_archive_is_read_in_a_process_that_is_not_forked(tmp_path: Path) -> None:
    images = ZipImages(write(tmp_path / "edm.zip"))
    copy = pickle.loads(pickle.dumps(images))
    del images
    assert copy[0].content == png(image(min(NAMES)))


def test_decoded_images_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "edm.zip")
    plain = module(path)
    module(path, cache=str(tmp_path / "maps"))

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(image_folder, "decode", again)
    mapped = module(path, cache=str(tmp_path / "maps"))
    everything = torch.arange(len(NAMES))
    torch.testing.assert_close(
        plain.train_set.images(everything), mapped.train_set.images(everything), rtol=0, atol=0
    )
    path.rename(tmp_path / "old.zip")
    monkeypatch.undo()
    write(path, compression=zipfile.ZIP_DEFLATED)  # of another size
    with pytest.raises(ValueError, match="those there are of other files"):
        ImageZipDataModule(str(path), SIZE, cache=str(tmp_path / "maps")).setup()


def test_other_pixels_of_the_same_size_and_time_are_noticed(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "edm.zip"), str(tmp_path / "maps")
    module(path, cache=cache)
    found = path.stat()
    with zipfile.ZipFile(path, "w") as archive:
        for name in NAMES:
            archive.writestr(name, png(255 - image(name)))
        labels = [[name, NAMES.index(name) % 3] for name in NAMES]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    assert path.stat().st_size == found.st_size
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    with pytest.raises(ValueError, match="those there are of other files"):
        ImageZipDataModule(str(path), SIZE, cache=cache).setup()


def test_the_digest_is_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "MEMORY_LIMIT", 0)
    first = module(write(tmp_path / "a.zip")).train_set.digest()
    assert first == module(write(tmp_path / "b.zip")).train_set.digest()
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for name in NAMES:
            archive.writestr(name, png(255 - image(name)))
    assert first != module(tmp_path / "c.zip", labels=False).train_set.digest()


@pytest.mark.parametrize("labels", [None, "left out", "unused"])
def test_without_labels_there_is_one_class(tmp_path: Path, labels: str | None) -> None:
    path = write(tmp_path / "edm.zip", labels=None)
    if labels == "left out":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("1.png", png(image("1")))
        with pytest.raises(ValueError, match=r"edm\.zip must hold dataset\.json .*labels: false"):
            module(path)
    if labels == "unused":
        write(path, labels="nonsense")
    data = module(path, labels=labels is None)
    assert data.num_classes == 1
    assert not data.train_set.labels(torch.arange(1)).any()


def test_val_root_has_the_classes_of_root(tmp_path: Path) -> None:
    root = write(tmp_path / "train.zip")
    val = write(tmp_path / "val.zip", labels=[[name, 1] for name in NAMES])
    data = module(root, val_root=str(val))
    assert data.val_set.num_classes == 3
    assert data.val_set.labels(torch.arange(7)).tolist() == [1] * 7
    write(val, labels=[[name, 3] for name in NAMES])
    with pytest.raises(ValueError, match=r"val_root must hold classes below 3.*got 3 in .*val\.z"):
        module(root, val_root=str(val))


@pytest.mark.parametrize("unlabelled", ["root", "val_root"])
def test_both_archives_have_labels_or_none(tmp_path: Path, unlabelled: str) -> None:
    roots = {name: write(tmp_path / f"{name}.zip") for name in ("root", "val_root")}
    write(roots[unlabelled], labels=None)
    message = rf"val_root must give the classes .*got {0 if unlabelled == 'val_root' else 3} clas"
    with pytest.raises(ValueError, match=message):
        module(roots["root"], val_root=str(roots["val_root"]))
    data = module(roots["root"], val_root=str(roots["val_root"]), labels=False)
    assert data.num_classes == data.val_set.num_classes == 1


def test_a_run_says_what_it_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "edm.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "")
        archive.mkdir("folder.png")
    assert len(module(path).train_set) == len(NAMES)
    assert "edm.zip: 7 images, 3 classes, 2 other files skipped" in caplog.text
    module(write(path, labels=None))
    assert "edm.zip: 7 images, no classes\n" in caplog.text


def test_a_class_without_images_is_warned_of(tmp_path: Path) -> None:
    path = write(tmp_path / "edm.zip", labels=[[name, 2] for name in NAMES])
    with pytest.warns(UserWarning, match=r"dataset\.json, gives no image the labels 0, 1, though"):
        assert module(path).num_classes == 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([*([name, 0] for name in NAMES), ["0.png", 1]], r"got 1 more, 0\.png first: .*not compl"),
        ([*([name, 0] for name in NAMES), [NAMES[0], 1]], f"{NAMES[0]} stands twice"),
        (
            [[name, 10**12] for name in NAMES],
            r"must give classes below 1000000, got 1000000000000",
        ),
        ([[name, 0] for name in NAMES[1:]], "got None for 00000/img00000003.png"),
        ([[name, 0.5] for name in NAMES], "got 0.5 for 00000/img00000000.png"),
        ([[name, [0.0, 1.0]] for name in NAMES], r"got \[0.0, 1.0\] for 00000/img00000000.png"),
        ([[name, -1] for name in NAMES], "got -1 for"),
        ({"a": 1}, r"edm\.zip, dataset\.json, must hold labels as \[name, class\]"),
        (7, r"dataset\.json, must hold labels as \[name, class\].*labels: false"),
    ],
)
def test_wrong_labels_are_named(tmp_path: Path, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(write(tmp_path / "edm.zip", labels=labels))


@pytest.mark.usefixtures("memory")
def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "edm.zip")
    content = bytearray(path.read_bytes())
    content[content.find(png(image(NAMES[2]))) + 100] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=rf"edm\.zip, {NAMES[2]}, cannot be read .*checksum"):
        module(path)


def test_an_image_that_lies_there_twice_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "edm.zip")
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(path, "a") as archive,
    ):
        archive.writestr(NAMES[0], png(image("other")))
    with pytest.raises(
        ValueError, match=rf"edm\.zip must hold each image once, got {NAMES[0]} tw"
    ):
        module(path)


def changed_member(path: Path, offset: int, value: bytes) -> None:
    """Change bytes of the first image in the list of members."""
    content = path.read_bytes()
    begin = content.index(b"PK\x01\x02") + offset
    path.write_bytes(content[:begin] + value + content[begin + len(value) :])


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (6, b"\xff", "root must be a zip archive of images, got .*version"),
        (
            20,
            b"\0\0\0\x7f",
            r"must lie in the archive's \d+ bytes, got 21307\d+ from 0 on: the ar",
        ),
        (42, b"\0\0\0\x7f", r"must lie in the archive's \d+ bytes, got \d+ from 21307\d+ on: the"),
        (46, b"9", "its own header names it '00000/img00000003.png'"),
    ],
    ids=["version", "size", "place", "name"],
)
def test_a_damaged_list_of_members_is_noticed(
    tmp_path: Path, offset: int, value: bytes, message: str
) -> None:
    path = write(tmp_path / "edm.zip")
    changed_member(path, offset, value)
    with pytest.raises(ValueError, match=message) as caught:
        module(path, labels=False)
    assert "edm.zip" in str(caught.value)


def test_no_more_is_unpacked_than_the_archive_says(tmp_path: Path) -> None:
    path = tmp_path / "zeros.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(2**24))
    changed_member(path, 24, (100).to_bytes(4, "little"))
    images = ZipImages(path)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"zeros\.zip, 0\.png, cannot be read .*its checksum"):
        images[0]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_what_is_no_archive_of_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("no archive")
    for name in ("text.zip", "nowhere.zip", "."):
        with pytest.raises(ValueError, match="root must be a zip archive of images, got"):
            module(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "latents.zip", "w") as archive:
        archive.writestr("0.npy", b"")
    with pytest.raises(ValueError, match=r"root must hold images, got .*latents.*\.npy"):
        module(tmp_path / "latents.zip")
    write(tmp_path / "lzma.zip", compression=zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match=r"lzma\.zip, .*must be stored or deflated"):
        module(tmp_path / "lzma.zip")


def test_sizes_are_checked_or_changed_as_of_files(tmp_path: Path) -> None:
    path = write(tmp_path / "edm.zip")
    with pytest.raises(ValueError, match=r"edm\.zip, 00000/img00000000\.png must have 4x4 pixels"):
        ImageZipDataModule(str(path), 4, resize=False).setup()
    data = ImageZipDataModule(str(path), 4, channels=1)
    data.setup()
    assert data.shape == (1, 4, 4)


@pytest.mark.usefixtures("memory")
def test_a_command_loads_images_in_its_inference_mode(tmp_path: Path) -> None:
    path = write(tmp_path / "set.zip")
    check_loads_in_inference_mode(lambda: ImageZipDataModule(str(path), SIZE))
