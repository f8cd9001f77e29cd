"""Two checkouts take turns, each in a process with its own package."""

import sys
from functools import partial

import between
import pytest
from measuring import ROOT, command


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["between.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        between.main()
    assert f"other must be a checkout of this package, got {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["between", "measuring"])
def test_too_few_rounds_for_quartiles_are_refused(script, tmp_path, monkeypatch, capsys):
    arguments = [str(ROOT)] if script == "between" else ["--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments, "--rounds", "1"])
    stages = partial(command, {}, "", name="try", device="cpu", threads=1)
    with pytest.raises(SystemExit):
        (between.main if script == "between" else stages)()
    assert "rounds must be at least 2, got 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
