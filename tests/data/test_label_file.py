from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_pl.data.image_folder import ImageFolderDataModule

NAMES = ["a/1.png", "a/2.png", "b c/3.png", "4.png"]
ORDER = ["4.png", "a/1.png", "a/2.png", "b c/3.png"]
"""Of the paths."""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for value, name in enumerate(NAMES):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(path)
    return tmp_path / "images"


def module(images: Path, text: str | bytes, **arguments: Any) -> ImageFolderDataModule:
    file = images.parent / "labels.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    data = ImageFolderDataModule(str(images), 4, channels=1, labels=str(file), **arguments)
    data.prepare_data()
    data.setup()
    return data


def labels(data: ImageFolderDataModule) -> dict[str, int]:
    """The label of each image, which is found by its value."""
    everything = torch.arange(4)
    values = data.train_set.images(everything)[:, 0, 0, 0].tolist()
    found = data.train_set.labels(everything).tolist()
    return {NAMES[value]: label for value, label in zip(values, found, strict=True)}


@pytest.mark.parametrize(
    "text",
    [
        "a/1.png 2\na/2.png  0\nb c/3.png 1\n4.png 2\n",
        "4.png,2\n\nb c/3.png, 1\r\na/2.png,00\na/1.png,2",
        "\ufeff./a/1.png\t2\n./a/2.png\t0\n./b c/3.png\t1\n./4.png\t2\n",
    ],
    ids=["blanks", "commas", "tabs"],
)
def test_numbers_are_the_labels(images: Path, text: str) -> None:
    data = module(images, text)
    assert labels(data) == {"a/1.png": 2, "a/2.png": 0, "b c/3.png": 1, "4.png": 2}
    assert data.num_classes == 3


def test_only_ends_of_lines_end_lines(images: Path) -> None:
    (images / "4.png").rename(images / "4\u2028\x0c.png")
    data = module(images, "a/1.png 0\na/2.png 0\nb c/3.png 0\n4\u2028\x0c.png 1\n")
    assert data.train_set.labels(torch.arange(4)).sum() == 1


def test_names_are_numbered_in_alphabetical_order(
    images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        data = module(images, "a/1.png dog\na/2.png cat\nb c/3.png n01440764\n4.png cat\n")
    assert labels(data) == {"a/1.png": 1, "a/2.png": 0, "b c/3.png": 2, "4.png": 0}
    assert data.num_classes == 3
    assert "3 classes, numbered in this order: cat (2), dog (1), n01440764 (1)" in caplog.text


def test_val_labels_have_the_classes_of_labels(images: Path, tmp_path: Path) -> None:
    val = tmp_path / "val"
    val.mkdir()
    (images / "4.png").rename(val / "4.png")
    (tmp_path / "val.txt").write_text("4.png dog\n")
    text = "a/1.png dog\na/2.png cat\nb c/3.png cow\n"
    more = {"val_root": str(val), "val_labels": str(tmp_path / "val.txt")}
    data = module(images, text, **more)
    assert data.val_set.labels(torch.arange(1)).tolist() == [2]
    assert data.val_set.num_classes == data.num_classes == 3
    (tmp_path / "val.txt").write_text("\n4.png horse\n")
    with pytest.raises(
        ValueError,
        match=r"val\.txt, line 2, must end in a class .*\(cat, cow, dog\), got 'horse': correct",
    ):
        module(images, text, **more)


def test_a_number_without_images_is_warned_of(images: Path) -> None:
    with pytest.warns(UserWarning, match=r"gives no image the labels 0, though .*subtract 1"):
        data = module(images, "a/1.png 1\na/2.png 2\nb c/3.png 3\n4.png 3\n")
    assert data.num_classes == 4


GOOD = "a/1.png 2\na/2.png 0\nb c/3.png 1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD, r"must have a line for each of the 4 images in .*, got none for 1, 4\.png first"),
        (GOOD + "5.png 1\n", r"line 4, must begin with the name of an image .*got '5\.png': corr"),
        (GOOD + "a/1.png 1\n", r"line 4, must name an image once, got 'a/1\.png' again: remove"),
        (GOOD + "4.png\n", r"line 4, must be the name of an image and its class, .*got '4\.png'"),
        (GOOD + "4.png,\n", r"line 4, must be the name of an image and its class"),
        (GOOD + "4.png cat\n", r"numbers alone or as names alone, got '2' in line 1 and 'cat' in"),
        ("file,label\n" + GOOD, r"got 'label' in line 1 and '2' in line 2: .*remove a heading"),
        (GOOD + "4.png -1\n", r"line 4, must end in a whole number from 0 or a name, got '-1'"),
        (GOOD + "4.png 1.5\n", r"line 4, must end in a whole number from 0 or a name, got '1\.5'"),
        (GOOD + "4.png 1000000\n", "must give classes below 1000000, got 1000000: number the cla"),
        (
            GOOD + f"4.png {'9' * 5000}\n",
            r"line 4, must end in a whole number from 0 .*got '9{40}'",
        ),
        ("", "must have a line for each of the 4 images"),
        (b"\xff\xfe\x00", r"labels must be a text file in UTF-8.*labels\.txt"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    images: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        module(images, text)
    assert "labels.txt" in str(caught.value)


def test_a_missing_file_is_named(images: Path) -> None:
    with pytest.raises(ValueError, match=r"labels must be a text file .*nowhere\.txt"):
        ImageFolderDataModule(str(images), 4, labels="nowhere.txt").setup()


@pytest.mark.parametrize(
    "arguments",
    [{"val_labels": "v"}, {"labels": "l", "val_root": "r"}, {"val_root": "r", "val_labels": "v"}],
    ids=str,
)
def test_two_folders_need_two_files(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="val_labels must be given with labels and val_root"):
        ImageFolderDataModule("anywhere", 4, **arguments)


def test_classes_of_subfolders_stay_where_no_file_is_given(images: Path) -> None:
    (images / "4.png").unlink()
    data = ImageFolderDataModule(str(images), 4)
    data.setup()
    assert data.train_set.labels(torch.arange(3)).tolist() == [0, 0, 1]
