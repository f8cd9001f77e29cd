"""Lists of very many files, kept in the user's cache."""

import os
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddim_pl.data import folders
from ddim_pl.data.folders import class_names, find_images, labels_of
from ddim_pl.data.image_list import ImageList, kept_list, place_of

WALK = os.walk
PARTS = st.lists(st.text("ab-. é/\udc80\U0001f600", min_size=1), min_size=1)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Six images in three folders that have been still for a while."""
    monkeypatch.setattr(folders, "KEPT_FROM", 1)
    root = tmp_path / "root"
    for name in ("b/1.png", "b/0.png", "a/0.jpg", "a/deep/2.png", "b-c/7.png", "b/x.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    settle(root)
    return root


def settle(root, age=60):
    then = time.time() - age
    for folder, _, _ in WALK(root):
        os.utime(folder, (then, then))


def walked(root):
    found = [path for path in root.rglob("*") if path.suffix in (".png", ".jpg")]
    return sorted(found)


@pytest.fixture
def walks(monkeypatch):
    """Folders that have been listed."""
    seen = []
    monkeypatch.setattr(
        folders.os, "walk", lambda root, **kwargs: (seen.append(root), WALK(root, **kwargs))[1]
    )
    return seen


@given(PARTS)
def test_files_are_in_the_order_of_sorted_paths(names):
    root = Path("root")
    names = {str(Path(name.strip("/"))) for name in names} - {"."}
    found = ImageList.of(root, names, {}, {})
    assert list(found) == sorted(root / name for name in names)
    assert [root / name for name in found.names()] == list(found)


def test_a_list_is_a_sequence(root):
    found = find_images(root)
    expected = walked(root)
    assert len(found) == 5
    assert list(found) == expected
    assert [found[i] for i in range(-5, 5)] == expected * 2
    assert found[1:4] == expected[1:4]
    assert found[::-2] == expected[::-2]
    with pytest.raises(IndexError):
        found[5]
    assert expected[3] in found
    assert found.counts == {"a": 2, "b": 2, "b-c": 1}
    assert found.skipped == {".txt": 1}


def test_a_second_process_reads_the_list_and_sees_the_same(root, walks):
    first = find_images(root)
    second = find_images(root)
    assert walks == [root]
    assert list(first) == list(second) == walked(root)
    for name in ("counts", "skipped", "folders"):
        assert dict(getattr(first, name)) == getattr(second, name)
    names = class_names(root, second)
    assert names == ["a", "b", "b-c"]
    assert labels_of(root, second, names).tolist() == [0, 0, 1, 1, 2]
    assert labels_of(root, second, ["b", "x", "b-c", "a"]).tolist() == [3, 3, 0, 0, 2]
    with pytest.raises(ValueError, match=r"b-c/7\.png must lie in a subfolder named like a tr"):
        labels_of(root, second, ["a", "b"])


def test_the_list_is_the_same_from_another_working_folder(root, walks, monkeypatch):
    find_images(root)
    monkeypatch.chdir(root.parent)
    relative = Path("root")
    assert list(find_images(relative)) == walked(relative)
    assert walks == [root]


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "a" / "new.png").touch(),
        lambda root: (root / "a" / "deep" / "2.png").unlink(),
        lambda root: (root / "b" / "1.png").rename(root / "b" / "2.png"),
        lambda root: (root / "b" / "x.txt").unlink(),
        lambda root: (root / "b-c").rename(root / "d"),
        lambda root: (root / "new").mkdir(),
    ],
)
def test_a_change_of_names_is_noticed(root, walks, change):
    find_images(root)
    change(root)
    found = find_images(root)
    assert walks == [root] * 2
    assert list(found) == walked(root)
    # The folder changed just now: another change at the same tick of its clock would be missed.
    find_images(root)
    assert walks == [root] * 3
    settle(root)
    assert list(find_images(root)) == list(find_images(root)) == walked(root)
    assert walks == [root] * 4


def test_a_change_of_the_content_of_a_file_needs_no_new_list(root, walks):
    find_images(root)
    (root / "a" / "0.jpg").write_text("other")
    assert list(find_images(root)) == walked(root)
    assert walks == [root]


@pytest.mark.parametrize("damage", ["cut", "flip", "other", "empty"])
def test_a_damaged_list_is_made_again(root, walks, damage):
    find_images(root)
    place = place_of(root)
    whole = place.read_bytes()
    ruined = {"cut": whole[:-1], "flip": whole[:-9] + b"X" + whole[-8:], "other": b"x"}
    place.write_bytes(ruined.get(damage, b""))
    with pytest.warns(UserWarning, match="is damaged .*are listed again"):
        assert list(find_images(root)) == walked(root)
    assert place.read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(find_images(root)) == walked(root)
    assert walks == [root] * 2


def test_short_lists_are_not_kept(root, monkeypatch):
    monkeypatch.setattr(folders, "KEPT_FROM", 6)
    find_images(root)
    assert not place_of(root).exists()
    monkeypatch.setattr(folders, "KEPT_FROM", 5)
    find_images(root)
    assert kept_list(root, place_of(root)) is not None


def test_a_list_that_cannot_be_kept_is_a_warning(root, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DDIM_PL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept in .*: set DDIM_PL_CACHE to a folder"):
        assert list(find_images(root)) == walked(root)
