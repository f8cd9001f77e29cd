"""Three ways to the same command line."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("place", [ROOT / "main.py", ROOT / "ddim_pl" / "__main__.py"])
def test_a_script_runs_the_command_line(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(place), "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(place), run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("ddim_pl ")
