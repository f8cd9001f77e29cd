"""Configs by name, from any folder."""

from pathlib import Path

import pytest

from ddim_pl.cli import main
from ddim_pl.shipped import CONFIGS, config_file, config_name, with_shipped_configs

DDPM = str(CONFIGS / "digits" / "ddpm.yaml")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["digits/ddpm", "digits/ddpm.yaml", "configs/digits/ddpm", "configs/digits/ddpm.yaml"]
)
def test_a_shipped_config_is_found_by_its_name(here, name):
    assert config_file(name) == DDPM
    assert config_name(Path(DDPM)) == "digits/ddpm"


def test_a_file_of_that_path_comes_first(here):
    mine = here / "digits" / "ddpm.yaml"
    mine.parent.mkdir()
    mine.touch()
    assert config_file("digits/ddpm.yaml") == "digits/ddpm.yaml"
    assert config_file("digits/ddpm") == DDPM
    assert config_name(mine) == "digits/ddpm.yaml"


@pytest.mark.parametrize(
    "given",
    ["", ".", "digits", "../digits/ddpm", "/digits/ddpm", "model: null", "{}", "no/such"],
)
def test_anything_else_is_left_as_it_is(here, given):
    assert config_file(given) == given


def test_every_config_among_arguments_is_looked_up(here):
    given = ["fit", "--config", "digits/ddpm", "-c=digits/ddpm", "--model", "digits/ddpm", "-c"]
    assert with_shipped_configs(given) == [
        *("fit", "--config", DDPM, f"-c={DDPM}", "--model", "digits/ddpm", "-c")
    ]


def test_a_command_takes_a_config_by_its_name(here, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "digits/ddpm", "--print_config"])
    assert stop.value.code in (0, None)
    assert "name: digits-ddpm" in capsys.readouterr().out
