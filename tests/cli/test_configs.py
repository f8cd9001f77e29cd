"""Every config in the repository can be parsed, so that none rots, and holds what it says."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ddim_pl.cli import main
from ddim_pl.networks.unet import UNet

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))


def name_of(config: Path) -> str:
    return f"{config.parent.name}-{config.stem}"


def read(config: Path) -> Any:
    return yaml.safe_load(config.read_text())


def arguments_of(config: Path) -> dict[str, Any]:
    """The arguments of a config's model."""
    return read(config).get("model", {}).get("init_args", {})


STUDENTS = [config for config in CONFIGS if "teacher" in arguments_of(config)]


def verb_of(config: Path) -> str:
    """A config without a model is one of `sweep`."""
    return "fit" if "\nmodel:" in config.read_text() else "sweep"


def test_configs_are_found() -> None:
    assert len(CONFIGS) >= 21
    assert len(STUDENTS) >= 8


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_a_config_parses(config, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb_of(config), "--config", str(config), "--print_config"])
    captured = capsys.readouterr()
    assert stop.value.code in (0, None), captured.err
    assert len(captured.out) > 500


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ("cifar10/ddpm", 35_746_307),
        ("cifar10/teacher", 60_004_099),
        ("celeba/ddpm", 78_700_803),
        ("celeba/teacher", 91_126_787),
        ("lsun_bedroom/ddpm", 113_673_219),
        ("lsun_bedroom/teacher", 126_173_635),
    ],
)
def test_a_network_has_the_size_its_config_says(config: str, parameters: int) -> None:
    path = FOLDER / f"{config}.yaml"
    with torch.device("meta"):
        network = UNet(**arguments_of(path)["network"]["init_args"])
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    said = f"{parameters:,}", f"{parameters / 1e6:.1f} M"
    assert any(number in path.read_text() for number in said)


@pytest.mark.parametrize("config", STUDENTS, ids=name_of)
def test_a_student_learns_from_a_run_of_the_same_folder(config: Path) -> None:
    teacher = arguments_of(config)["teacher"]
    runs = {
        f"{logger['save_dir']}/{logger['name']}": path
        for path in config.parent.glob("*.yaml")
        if verb_of(path) == "fit"
        for logger in [read(path)["trainer"]["logger"]["init_args"]]
    }
    run = teacher.removesuffix("/version_0/checkpoints/last.ckpt")
    assert run in runs
    # A ladder begins with half the steps that the teacher was made for.
    rounds = arguments_of(config).get("rounds")
    schedule = arguments_of(runs[run]).get("schedule", {}).get("init_args", {})
    if rounds is not None and "num_levels" in schedule:
        assert rounds[0][0] * 2 == schedule["num_levels"]
