"""Parquet files as the Hub has them."""

import io
import json
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.inference import check_loads_in_inference_mode
from ddim_pl.data import image_folder
from ddim_pl.data.huggingface import HuggingFaceDataModule

SIZE = 8
COUNTS = {"train": 7, "test": 3}


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image(number)).save(buffer, "PNG")
    return buffer.getvalue()


def stack(numbers: Any) -> torch.Tensor:
    return torch.from_numpy(np.stack([image(number).transpose(2, 0, 1) for number in numbers]))


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)


@pytest.fixture(autouse=True)
def library(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    if "no_library" in request.fixturenames:
        return None
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # do not wait for the network
    return datasets


def write(folder: Path, kind: str = "classes", column: str = "image", **more: Any) -> Path:
    """A folder of two splits, images 0 to 6 and 100 to 102, labels 2, 1, 0, 2, ..."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    kinds = {
        "classes": datasets.ClassLabel(names=["a", "b", "c", "d"]),
        "numbers": datasets.Value("int64"),
        "names": datasets.Value("string"),
    }
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, count in COUNTS.items():
        labels: list[Any] = [(2 - number) % 3 for number in range(count)]
        if kind == "names":
            labels = [["cow", "cat", "bat"][label] for label in labels]
        first = 0 if split == "train" else 100
        values = {
            column: [{"bytes": png(first + n), "path": f"{n}.png"} for n in range(count)],
            "label": labels,
        }
        features = datasets.Features({column: datasets.Image(), "label": kinds[kind]})
        values, features = more.get("change", lambda *both: both)(values, features)
        table = pyarrow.table(values, schema=features.arrow_schema)
        parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def module(folder: Path, **arguments: Any) -> HuggingFaceDataModule:
    data = HuggingFaceDataModule(str(folder), SIZE, **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("limit", [0, image_folder.MEMORY_LIMIT], ids=["files", "memory"])
@pytest.mark.parametrize(
    ("kind", "labels", "num_classes"),
    [
        ("classes", [2, 1, 0, 2, 1, 0, 2], 4),
        ("numbers", [2, 1, 0, 2, 1, 0, 2], 3),
        ("names", [0, 1, 2, 0, 1, 2, 0], 3),
    ],
)
def test_a_folder_of_parquet_is_read_by_its_splits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    labels: list[int],
    num_classes: int,
    limit: int,
) -> None:
    monkeypatch.setattr(image_folder, "MEMORY_LIMIT", limit)
    data = module(write(tmp_path / "set", kind), val_split="test")
    everything = torch.arange(7)
    torch.testing.assert_close(data.train_set.images(everything), stack(range(7)))
    torch.testing.assert_close(data.val_set.images(torch.arange(3)), stack(range(100, 103)))
    assert data.train_set.labels(everything).tolist() == labels
    assert data.val_set.labels(torch.arange(3)).tolist() == labels[:3]
    assert data.num_classes == data.val_set.num_classes == num_classes


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("classes", ("a", "b", "c", "d")),
        ("names", ("bat", "cat", "cow")),
        ("numbers", ("0", "1", "2")),
    ],
)
def test_classes_have_names(tmp_path: Path, kind: str, names: tuple[str, ...]) -> None:
    folder = write(tmp_path / "set", kind)
    assert module(folder).class_names == names
    assert module(folder, label_column=None).class_names == ()


def test_a_part_of_a_split_is_a_split(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", column="img")
    data = module(folder, split="train[2:5]", val_split="train[5:]", label_column=None)
    torch.testing.assert_close(data.train_set.images(torch.arange(3)), stack([2, 3, 4]))
    torch.testing.assert_close(data.val_set.images(torch.arange(2)), stack([5, 6]))
    assert data.num_classes == 1
    assert module(folder).val_set is not None


def test_workers_read_what_the_main_process_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folder, "MEMORY_LIMIT", 0)
    folder = write(tmp_path / "set")
    alone, helped = module(folder, batch_size=2), module(folder, batch_size=2, num_workers=2)
    batches = list(alone.train_dataloader())
    for one, two in zip(batches, helped.train_dataloader(), strict=True):
        torch.testing.assert_close(one, two)
    images = torch.cat([batch.images for batch in batches]).unique(dim=0)
    assert len(images) == 6


def test_columns_of_bytes_and_paths_are_images_too(tmp_path: Path) -> None:
    import datasets

    for number in (0, 100):
        (tmp_path / f"{number}.png").write_bytes(png(number))

    def to_bytes(values: Any, features: Any) -> Any:
        raw = [each["bytes"] for each in values["image"]]
        return {**values, "image": raw}, datasets.Features(
            {**features, "image": datasets.Value("binary")}
        )

    def to_paths(values: Any, features: Any) -> Any:
        first = 0 if len(values["image"]) == 7 else 100
        places = [{"bytes": None, "path": str(tmp_path / f"{first}.png")}] * len(values["image"])
        return {**values, "image": places}, features

    data = module(write(tmp_path / "bytes", change=to_bytes))
    torch.testing.assert_close(data.train_set.images(torch.arange(7)), stack(range(7)))
    data = module(write(tmp_path / "paths", change=to_paths))
    torch.testing.assert_close(data.train_set.images(torch.arange(7)), stack([0] * 7))

    def to_names(values: Any, features: Any) -> Any:
        places = [{"bytes": None, "path": "beside.png"}] * len(values["image"])
        return {**values, "image": places}, features

    folder = write(tmp_path / "names", change=to_names)
    (folder / "beside.png").write_bytes(png(3))
    data = module(folder)
    torch.testing.assert_close(data.train_set.images(torch.arange(7)), stack([3] * 7))


def test_decoded_images_are_kept_until_the_files_change(tmp_path: Path) -> None:
    folder, cache = write(tmp_path / "set"), str(tmp_path / "maps")
    module(folder, cache=cache, val_split="test")
    data = HuggingFaceDataModule(str(folder), SIZE, cache=cache, val_split="test")
    data.setup()  # made already
    torch.testing.assert_close(data.val_set.images(torch.arange(3)), stack(range(100, 103)))

    def darker(values: Any, features: Any) -> Any:
        return {**values, "image": values["image"][::-1]}, features

    write(folder, change=darker)
    with pytest.raises(ValueError, match="those there are of other files"):
        HuggingFaceDataModule(str(folder), SIZE, cache=cache).setup()
    data = module(folder, cache=cache)
    torch.testing.assert_close(data.train_set.images(torch.arange(7)), stack(range(6, -1, -1)))


def test_wrong_columns_and_splits_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    for arguments, message in (
        ({"image_column": "img"}, r"image_column .*got img: give one of image \(.*image, label\)"),
        ({"label_column": "class"}, r"label_column must be .*got 'class': give one of image, lab"),
        ({"split": "dev"}, r"has no split 'dev' that can be read .*Unknown split"),
        ({"config": "other"}, r"has no split 'train' .*'other' not found"),
    ):
        with pytest.raises(ValueError, match=message):
            module(folder, **arguments)


def test_a_label_that_is_missing_or_unknown_is_named_with_its_row(tmp_path: Path) -> None:
    def without(values: Any, features: Any) -> Any:
        return {**values, "label": [None, *values["label"][1:]]}, features

    def negative(values: Any, features: Any) -> Any:
        return {**values, "label": [*values["label"][:-1], -1]}, features

    def other(values: Any, features: Any) -> Any:
        short = len(values["label"]) == 3
        return {**values, "label": ["dog" if short else "cat"] * len(values["label"])}, features

    with pytest.raises(ValueError, match=r"train, row 0, must hold a class .*got None"):
        module(write(tmp_path / "a", change=without))
    with pytest.raises(ValueError, match=r"train, row 6, must hold a class .*got -1"):
        module(write(tmp_path / "b", "numbers", change=negative))
    with pytest.raises(ValueError, match=r"test, row 0, must hold a class .*got 'dog'"):
        module(write(tmp_path / "c", "names", change=other), val_split="test")


def test_a_row_without_an_image_and_a_broken_image_are_named(tmp_path: Path) -> None:
    def absent(values: Any, features: Any) -> Any:
        return {**values, "image": [*values["image"][:-1], None]}, features

    def broken(values: Any, features: Any) -> Any:
        half = {"bytes": png(0)[:60], "path": None}
        return {**values, "image": [*values["image"][:-1], half]}, features

    with pytest.raises(ValueError, match=r"train, row 6, must hold an image in the column image"):
        module(write(tmp_path / "a", change=absent))
    with pytest.raises(ValueError, match=r"train, row 6 cannot be read"):
        module(write(tmp_path / "b", change=broken))


def test_paths_without_bytes_are_named_before_anything_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `to_parquet` writes them; what the error says embeds them."""
    import datasets

    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    monkeypatch.chdir(tmp_path)
    paths = {"image": ["0.png", "1.png", "2.png"], "label": [0, 1, 0]}
    dataset = datasets.Dataset.from_dict(paths).cast_column("image", datasets.Image())
    file = tmp_path / "set" / "train.parquet"
    file.parent.mkdir()
    dataset.to_parquet(file)
    caplog.clear()
    with pytest.raises(
        ValueError, match=r"row 0, must hold the bytes .* got a path alone"
    ) as error:
        module(file.parent)
    assert "images, " not in caplog.text
    code = str(error.value).partition("in it, ")[2].partition(", or put")[0]
    eval(code, {"dataset": dataset, "datasets": datasets, "FILE": file})
    assert torch.equal(module(file.parent).train_set.images(torch.arange(3)), stack(range(3)))
    dataset.to_parquet(file)
    for number in range(3):
        (file.parent / f"{number}.png").write_bytes(png(number + 5))
    assert torch.equal(module(file.parent).train_set.images(torch.arange(3)), stack(range(5, 8)))


@pytest.mark.parametrize("shown", [True, False])
def test_the_library_draws_no_bars(
    tmp_path: Path, library: Any, capfd: pytest.CaptureFixture, shown: bool
) -> None:
    (library.enable_progress_bars if shown else library.disable_progress_bars)()
    folder = write(tmp_path / "set")
    capfd.readouterr()
    try:
        module(folder)
        assert capfd.readouterr().err == ""
        assert library.are_progress_bars_disabled() != shown  # as it was
    finally:
        library.enable_progress_bars()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    file = folder / "data" / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet cannot be read .*again"):
        module(folder)


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"source must hold Parquet files, got .*empty"):
        module(tmp_path / "empty")
    for source in (
        "./nowhere",
        "a/b/c",
        "parquet",
        "csv",
        "hf://datasets/a",
        "buckets/a",
        "https://a/b.parquet",
    ):
        with pytest.raises(ValueError, match="source must be a folder of Parquet files or a name"):
            HuggingFaceDataModule(source, SIZE).setup()


def test_a_format_of_the_library_is_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path / "set"))  # which the library would read
    with pytest.raises(ValueError, match=r"source must be a folder .* got 'parquet'"):
        HuggingFaceDataModule("parquet", SIZE).setup()


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "place", ["http://127.0.0.1:{port}/x.parquet", "{other}/*/*.parquet", "../other/**"]
)
def test_a_folder_that_names_other_files_is_refused(tmp_path: Path, name: str, place: str) -> None:
    folder, other = write(tmp_path / "set"), write(tmp_path / "other")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        place = place.format(port=server.getsockname()[1], other=other)
        text = json.dumps(
            {
                "configs": [
                    {"config_name": "default", "data_files": [{"split": "train", "path": place}]}
                ]
            }
        )
        (folder / name).write_text(f"---\n{text}\n---\n" if name == "README.md" else text)
        with pytest.raises(ValueError, match="must name files of its folder alone, got") as caught:
            module(folder)
        with pytest.raises(BlockingIOError):  # nobody has connected
            server.accept()
    assert name in str(caught.value)
    good = text.replace(place, "data/test-*")
    (folder / name).write_text(f"---\n{good}\n---\n" if name == "README.md" else good)
    assert len(module(folder).train_set) == COUNTS["test"]
    (folder / name).write_text("---\na: [\n---\n")
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        module(folder)


def test_a_folder_of_other_formats_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "set") / "data"
    (data / "test-00000-of-00001.parquet").unlink()
    (data / "train-00000-of-00001.parquet").rename(data / "train.parquet")
    for number in range(3):
        (data / f"train-{number}.csv").write_text("image,label\na.png,0\n")
    with pytest.raises(ValueError, match=r"source must hold Parquet files alone, .*train-0\.csv"):
        module(data.parent)


def test_memory_of_the_library_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Any
) -> None:
    monkeypatch.setattr(library.config, "IN_MEMORY_MAX_SIZE", 10**9)
    monkeypatch.setattr(image_folder, "MEMORY_LIMIT", 0)
    data = module(write(tmp_path / "set"))
    torch.testing.assert_close(data.train_set.images(torch.arange(7)), stack(range(7)))


def test_numbers_of_classes_are_looked_at(tmp_path: Path) -> None:
    def times(factor: int) -> Any:
        return lambda values, features: (
            {**values, "label": [factor * label for label in values["label"]]},
            features,
        )

    with pytest.warns(
        UserWarning, match=r"train, column label, gives no image the labels 1, 3, t"
    ):
        assert module(write(tmp_path / "a", "numbers", change=times(2))).num_classes == 5
    with pytest.raises(ValueError, match=r"column label, must give classes below 1000000, got 20"):
        module(write(tmp_path / "b", "numbers", change=times(10**9)))


def test_a_run_says_what_it_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module(write(tmp_path / "set"), val_split="test")
    assert "set, train: 7 images, 4 classes" in caplog.text
    assert "set, test: 3 images, 4 classes" in caplog.text


def test_a_split_without_images_is_refused(tmp_path: Path) -> None:
    def none(values: Any, features: Any) -> Any:
        return {name: value[:0] for name, value in values.items()}, features

    with pytest.raises(
        ValueError, match=r"has no split 'train' that can be read \(ArrowInvalid: "
    ):
        module(write(tmp_path / "set", change=none))
    with pytest.raises(ValueError, match=r"has no split 'train\[:0\]' .*corresponds to no data"):
        module(write(tmp_path / "other"), split="train[:0]")


@pytest.mark.parametrize("download", [True, False])
def test_without_a_network_the_error_says_how_to_get_the_files(
    monkeypatch: pytest.MonkeyPatch, library: Any, download: bool
) -> None:
    if not download:  # nothing is asked for, whatever the network
        monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", False)
    data = HuggingFaceDataModule("owner/name", SIZE, download=download)
    with pytest.raises(ValueError, match="is no folder here and cannot be downloaded") as caught:
        data.prepare_data()
    message = str(caught.value)
    assert "hf download owner/name --repo-type dataset --local-dir FOLDER" in message
    assert ("download: true" in message) == (not download)
    assert download == library.config.HF_HUB_OFFLINE


def test_what_was_downloaded_is_read_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Any
) -> None:
    module(write(tmp_path / "name"), val_split="test")
    # Where the library keeps what it has downloaded of owner/name.
    (tmp_path / "cache" / "name").rename(tmp_path / "cache" / "owner___name")
    for path in (tmp_path / "cache" / "owner___name").rglob("*.arrow"):
        assert path.name.startswith("name-")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", False)
    data = HuggingFaceDataModule("owner/name", SIZE, val_split="test", download=False)
    data.prepare_data()
    data.setup()
    torch.testing.assert_close(data.train_set.images(torch.arange(7)), stack(range(7)))
    torch.testing.assert_close(data.val_set.images(torch.arange(3)), stack(range(100, 103)))


@pytest.mark.usefixtures("no_library")
def test_without_the_library_the_error_names_the_command() -> None:
    with pytest.raises(ValueError, match=r"pip install 'ddim_pl\[datasets\]'"):
        HuggingFaceDataModule("owner/name", SIZE).prepare_data()


@pytest.mark.parametrize("limit", [0, image_folder.MEMORY_LIMIT], ids=["files", "memory"])
def test_a_command_loads_images_in_its_inference_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(image_folder, "MEMORY_LIMIT", limit)
    folder = write(tmp_path / "set")
    check_loads_in_inference_mode(
        lambda: HuggingFaceDataModule(str(folder), SIZE, val_split="test")
    )
