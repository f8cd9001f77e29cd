import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ddim_pl.files import cache_folder, new_folder, remove_parts, replacing


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as part:
        part.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_that_could_not_be_written_leaves_the_one_before(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def write():
        with replacing(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_written_is_on_the_disk_before_it_replaces_a_file(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino))
    path = tmp_path / "file.txt"
    with replacing(path) as part:
        part.write_text("whole")
    assert done == [path.stat().st_ino, tmp_path.stat().st_ino]


def test_two_processes_write_the_same_file_each_in_a_temporary_of_its_own(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    with replacing(path) as part:
        part.write_text("first")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with replacing(path) as other:
            other.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_a_file_has_the_mode_that_the_users_mask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file.txt") as part:
            part.write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o640


def test_only_parts_of_processes_that_are_gone_are_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = platform.node()
    kept = {f"b.{here}.{os.getpid()}.part", f"e.elsewhere.{gone.pid}.part", "d.txt"}
    for name in (f"a.{here}.{gone.pid}.part", "c.part", *kept):
        (tmp_path / name).write_text("")
    remove_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_the_cache_is_where_the_environment_says_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("DDIM_PL_CACHE", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mine"
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("DDIM_PL_CACHE")
        else:
            monkeypatch.setenv("DDIM_PL_CACHE", unset)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder() == tmp_path / "xdg" / "ddim_pl"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_folder() == tmp_path / ".cache" / "ddim_pl"


def test_a_user_without_a_home_has_no_cache_and_no_error(monkeypatch):
    """As with a number for a user in a container, of whom the system knows nothing."""

    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "DDIM_PL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    file = cache_folder() / "folder" / "file"
    assert not file.is_file()
    with pytest.raises(NotADirectoryError), replacing(file) as part:
        part.touch()
    monkeypatch.setenv("DDIM_PL_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")


def test_a_new_folder_removes_what_a_killed_process_left_of_it_alone(tmp_path):
    command, node = [sys.executable, "-c", "import os; print(os.getpid())"], platform.node()
    ended, other = (int(subprocess.run(command, capture_output=True).stdout) for _ in range(2))
    names = [f"x.{node}.{ended}.part", f"x.{node}.{os.getppid()}.part", f"y.{node}.{ended}.part"]
    names += ["x.mine.part", f"x.other.{ended}.part"]
    for name in names:
        (tmp_path / name / "new").mkdir(parents=True)
    (tmp_path / f"x.{node}.{os.getpid()}.part").mkdir()
    (tmp_path / f"x.{node}.{other}.part").touch()
    with new_folder(tmp_path / "x") as part:
        (part / "file").touch()
    assert {each.name for each in tmp_path.iterdir()} == {"x", *names[1:]}
    assert [each.name for each in (tmp_path / "x").iterdir()] == ["file"]


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    place = tmp_path / "above" / "folder"
    with new_folder(place) as part:
        (part / "file").write_text("text")
        assert not place.exists()
    assert (place / "file").read_text() == "text"
    assert place.stat().st_mode == tmp_path.joinpath("above").stat().st_mode
    with pytest.raises(FileExistsError), new_folder(place):
        pass
    with pytest.raises(NotADirectoryError), new_folder(tmp_path / "other") as part:
        ((part / "file").touch(), (part / "file" / "below").touch())
    assert [each.name for each in tmp_path.iterdir()] == ["above"]
    assert [each.name for each in place.parent.iterdir()] == ["folder"]
