"""Lists of very many files, kept in the user's cache."""

import os
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddim_pl.data import folders, image_folder, image_list
from ddim_pl.data.folders import class_names, find_images, labels_of
from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.data.image_list import CheckedFiles, ImageList, kept_list, place_of
from ddim_pl.files import cache_folder

WALK = os.walk
PARTS = st.lists(st.text("ab-. é/\udc80\U0001f600", min_size=1), min_size=1)


class Clock:
    """The clock of who lists folders, whose own times cannot be set."""

    ahead = 60

    def time_ns(self):
        return time.time_ns() + self.ahead * 10**9


@pytest.fixture
def clock(monkeypatch):
    """A minute later, so that all folders have been still for a while."""
    monkeypatch.setattr(folders, "time", made := Clock())
    return made


@pytest.fixture
def root(tmp_path, monkeypatch, clock):
    """Five images, and another file, in folders that have been still for a while."""
    monkeypatch.setattr(folders, "KEPT_FROM", 1)
    root = tmp_path / "root"
    for name in ("b/1.png", "b/0.png", "a/0.jpg", "a/deep/2.png", "b-c/7.png", "b/x.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


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
def test_a_change_of_names_is_noticed(root, walks, clock, change):
    find_images(root)
    change(root)
    clock.ahead = 0
    found = find_images(root)
    assert walks == [root] * 2
    assert list(found) == walked(root)
    # The folder changed just now: another change at the same tick of its clock would be missed.
    find_images(root)
    assert walks == [root] * 3
    clock.ahead = 60
    assert list(find_images(root)) == list(find_images(root)) == walked(root)
    assert walks == [root] * 4


def test_a_change_is_noticed_where_the_times_of_folders_are_set_back(root, walks):
    """As by who unpacks a second archive, of other images, into the same folders."""
    for folder, _, _ in WALK(root):
        os.utime(folder, (1000, 1000))
    find_images(root)
    (root / "a" / "new.png").touch()
    os.utime(root / "a", (1000, 1000))
    assert list(find_images(root)) == walked(root)
    assert walks == [root] * 2


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


def test_digests_are_those_of_the_names(tmp_path):
    def digest(*names, root="root"):
        return ImageList.of(tmp_path / root, names, {}, {}).digest()

    assert digest("a", "bc") == digest("bc", "a") == digest("a", "bc", root="other")
    assert len({digest("a", "bc"), digest("ab", "c"), digest("a"), digest()}) == 4


def test_stamps_are_sizes_and_times_in_order(root, monkeypatch):
    monkeypatch.setattr(image_list, "STATED_AT_ONCE", 2)
    (root / "b" / "0.png").write_text("four")
    os.utime(root / "b" / "0.png", ns=(5, 1234567890123456789))
    found = find_images(root)
    expected = [(path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    assert list(map(tuple, found.stamps().tolist())) == expected
    assert (4, 1234567890123456789) in expected
    (root / "b" / "0.png").unlink()
    assert [-1, -1] in found.stamps().tolist()
    assert ImageList.of(root, [], {}, {}).stamps().shape == (0, 2)


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A folder of images as if they were too many for memory."""
    monkeypatch.setattr(image_folder, "MEMORY_LIMIT", 0)
    for number in range(4):
        path = tmp_path / "photographs" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
        os.utime(path, (1000, 1000))
    return tmp_path / "photographs"


@pytest.fixture
def looked_at(monkeypatch):
    """Names of the files whose headers have been looked at."""
    names = []
    check = image_folder.check_header

    def check_header(path, *arguments, **keywords):
        names.append(path.name)
        check(path, *arguments, **keywords)

    monkeypatch.setattr(image_folder, "check_header", check_header)
    return names


def start(root, **arguments):
    data = ImageFolderDataModule(str(root), 8, **arguments)
    data.prepare_data()
    data.setup("fit")


def test_headers_are_looked_at_once(photographs, looked_at):
    start(photographs)
    assert sorted(looked_at) == [f"{number}.png" for number in range(4)]
    start(photographs)
    ImageFolderDataModule(str(photographs), 16).setup("fit")  # the size does not matter to them
    assert len(looked_at) == 4
    # Without resizing it does.
    for _ in range(2):
        with pytest.raises(ValueError, match="must have 8x8 pixels, got 9x9"):
            start(photographs, resize=False)
    assert len(looked_at) > 4


def test_several_checks_are_kept(photographs, looked_at):
    for _ in range(3):
        start(photographs)
        data = ImageFolderDataModule(str(photographs), 9, resize=False)
        data.setup("fit")
    assert len(looked_at) == 8


@pytest.mark.parametrize("change", ["time", "size", "new", "gone", "renamed", "broken"])
def test_changed_files_are_looked_at_again(photographs, looked_at, change):
    start(photographs)
    first = photographs / "0.png"
    match change:
        case "time":
            os.utime(first, (2000, 2000))
        case "size":
            first.write_bytes(first.read_bytes() + b"x")
            os.utime(first, (1000, 1000))
        case "new":
            (photographs / "4.png").write_bytes(first.read_bytes())
        case "gone":
            first.unlink()
        case "renamed":
            first.rename(photographs / "5.png")
        case "broken":
            first.write_bytes(first.read_bytes()[:20])
    looked_at.clear()
    if change == "broken":
        for _ in range(2):
            with pytest.raises(ValueError, match=r"0\.png cannot be read"):
                start(photographs)
        return
    start(photographs)
    assert len(set(looked_at)) == len(list(photographs.iterdir()))
    for path in photographs.iterdir():
        os.utime(path, (1000, 1000))
    start(photographs)
    looked_at.clear()
    start(photographs)
    assert not looked_at


def test_files_that_have_just_changed_may_change_again(photographs, looked_at):
    (photographs / "3.png").touch()
    start(photographs)
    looked_at.clear()
    start(photographs)
    assert len(set(looked_at)) == 4


@pytest.mark.parametrize("damage", ["flip", "empty", "other", "none"])
def test_a_damaged_mark_is_made_again(photographs, looked_at, damage):
    start(photographs)
    (place,) = cache_folder().rglob("*.checked.json")
    text = place.read_text()
    ruined = {"flip": text.replace("9", "8"), "empty": "", "other": '{"passed": 3}'}
    place.write_text(ruined.get(damage, text))
    looked_at.clear()
    start(photographs)
    assert len(looked_at) == (0 if damage == "none" else 4)
    assert place.read_text() == text


def test_checks_that_cannot_be_kept_are_made_by_each_process(
    photographs, looked_at, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DDIM_PL_CACHE", str(tmp_path / "file"))
    start(photographs)
    looked_at.clear()
    start(photographs)
    assert set(looked_at) == {f"{number}.png" for number in range(4)}


def test_lists_of_one_folder_have_marks_of_their_own(photographs):
    one, two = (ImageList.of(photographs, [name], {}, {}) for name in ("0.png", "1.png"))
    CheckedFiles(one).keep("a check")
    assert CheckedFiles(one).passed("a check")
    assert not CheckedFiles(one).passed("another check")
    assert not CheckedFiles(two).passed("a check")
    CheckedFiles(two).keep("another check")
    assert CheckedFiles(one).passed("a check")
