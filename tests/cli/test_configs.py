"""Every config in the repository can be parsed, so that none rots."""

from pathlib import Path

import pytest

from ddim_pl.cli import main

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def verb_of(config: Path) -> str:
    """A config without a model is one of `sweep`."""
    return "fit" if "\nmodel:" in config.read_text() else "sweep"


def test_configs_are_found() -> None:
    assert len(CONFIGS) >= 10


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.parent.name}-{c.stem}")
def test_a_config_parses(config, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb_of(config), "--config", str(config), "--print_config"])
    captured = capsys.readouterr()
    assert stop.value.code in (0, None), captured.err
    assert len(captured.out) > 500
