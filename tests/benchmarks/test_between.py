"""Two checkouts take turns, each in a process with its own package."""

import sys

import between
import pytest
from measuring import ROOT


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["between.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        between.main()
    assert f"other must be a checkout of this package, got {tmp_path}" in capsys.readouterr().err


@pytest.mark.slow
def test_each_process_has_the_package_of_its_checkout(tmp_path, monkeypatch, capsys):
    """The other one is broken then, which no process of this one would notice."""
    for name in ("ddim_pl", "callbacks", "configs"):
        (tmp_path / name).mkdir()
        for each in (ROOT / name).iterdir():
            (tmp_path / name / each.name).symlink_to(each)
    case = ["--case", "loop, eta 0", "--tiny", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["between.py", str(tmp_path), *case])
    between.main()
    assert "| loop, eta 0 |" in capsys.readouterr().out
    (tmp_path / "ddim_pl" / "timesteps.py").unlink()
    (tmp_path / "ddim_pl" / "timesteps.py").write_text("raise ImportError('the other one')\n")
    with pytest.raises(RuntimeError, match="has ended"):
        between.main()
