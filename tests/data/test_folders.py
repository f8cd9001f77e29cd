"""What a folder of images is said to hold, and what is refused."""

import os

import pytest
import torch
from PIL import Image

from ddim_pl.data.folders import EXTENSIONS, class_names, find_images
from ddim_pl.data.image_folder import ImageFolderDataModule, decode


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


@pytest.fixture
def classes(tmp_path):
    """Two classes of four images, in a folder below `tmp_path`."""
    root = tmp_path / "root"
    for name in ("cat", "dog"):
        for number in range(4):
            write(root / name / f"{number}.png")
    return root


def count(root):
    data = ImageFolderDataModule(str(root), 8)
    data.setup()
    return len(data.train_set), data.num_classes


def test_all_endings_of_known_formats_are_read(tmp_path):
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".gif": "GIF", ".tif": "TIFF"}
    for ending in EXTENSIONS:
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"a{ending}", kinds.get(ending))
    assert count(tmp_path) == (len(EXTENSIONS), 1)
    red = torch.tensor([255, 0, 0])
    for path in find_images(tmp_path):
        pixels = decode(path, 8, 3, None)
        # JPEG and WebP lose a little; a PGM file is gray.
        tolerance = 255 if path.suffix == ".pgm" else 3
        assert (pixels[:, 4, 4].int() - red).abs().max() <= tolerance, path


@pytest.mark.parametrize("target", ["..", ".", "../dog", "../.."])
def test_a_link_that_would_count_images_twice_is_refused(classes, target):
    (classes / "cat" / "again").symlink_to(target, target_is_directory=True)
    with pytest.raises(ValueError, match=r"must not lead to .* count twice: remove the link"):
        count(classes)


def test_a_link_to_another_place_is_followed(classes, tmp_path):
    write(tmp_path / "elsewhere" / "0.png")
    (classes / "emu").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert count(classes) == (9, 3)


def test_what_is_read_and_skipped_is_said(classes, caplog):
    for name in ("notes.txt", "list.txt", ".hidden.png", "bare"):
        (classes / "cat" / name).write_text("no image")
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        assert count(classes) == (8, 2)
    assert "root: 8 images, 4 other files skipped: " in caplog.text
    for part in (".txt (2)", "hidden (1)", "no ending (1)"):
        assert part in caplog.text
    assert "2 classes, numbered in this order: cat (4), dog (4)" in caplog.text


def test_images_of_an_unknown_ending_are_a_warning(classes):
    Image.new("RGB", (8, 8)).save(classes / "cat" / "5.tga")
    with pytest.warns(UserWarning, match=r"may be images but are skipped .* \.tga \(1\); convert"):
        count(classes)


def test_an_image_beside_the_classes_is_refused(classes):
    write(classes / "9.png")
    with pytest.raises(ValueError, match=r"got 1 beside them, 9\.png first: move all"):
        count(classes)


def test_a_class_without_images_is_refused_as_the_labels_after_it_would_move(classes):
    (classes / "cow").mkdir()
    (classes / ".cache").mkdir()
    with pytest.raises(ValueError, match=r"cow must hold images, .*: remove the folder or fill"):
        count(classes)


def test_splits_are_no_classes(classes, tmp_path):
    classes.rename(tmp_path / "train")
    write(tmp_path / "val" / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"root must hold one split, .* with train, val: give"):
        count(tmp_path)
    assert count(tmp_path / "train") == (8, 2)


def test_images_in_one_folder_have_no_classes(classes):
    assert class_names(classes / "cat", find_images(classes / "cat")) == []


def test_a_folder_that_may_not_be_read_is_named(classes, monkeypatch):
    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    original = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)  # the tests may run as a user who may read all
    with pytest.raises(ValueError, match=r"dog cannot be read \(Permission denied\): change"):
        count(classes)


@pytest.mark.parametrize("ending", ["gif", "png", "tif", "webp"])
def test_a_file_of_several_images_is_refused(tmp_path, ending):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"0.{ending}", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"0\.\w+ cannot be read \(it holds several images: wr"):
        count(tmp_path)


def test_the_preview_in_a_photograph_is_no_second_image(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "0.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert count(tmp_path) == (1, 1)
