"""Every config in the repository can be parsed, so that none rots, and holds what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ddim_pl.cli import main
from ddim_pl.networks.unet import UNet
from ddim_pl.renamed import RENAMED

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*/*.yaml"))
RESOLVED = json.loads(Path(__file__).with_name("resolved_configs.json").read_text())


def name_of(config: Path) -> str:
    return f"{config.parent.name}-{config.stem}"


def read(config: Path) -> Any:
    return yaml.safe_load(config.read_text())


def arguments_of(config: Path) -> dict[str, Any]:
    """The arguments of a config's model."""
    return read(config).get("model", {}).get("init_args", {})


STUDENTS = [config for config in CONFIGS if "teacher" in arguments_of(config)]


def command_of(config: Path) -> str:
    """A config without a model is one of `sweep`."""
    return "fit" if "\nmodel:" in config.read_text() else "sweep"


def test_configs_are_found() -> None:
    assert len(CONFIGS) >= 21
    assert len(STUDENTS) >= 8


def resolved(config: Path, capsys) -> Any:
    with pytest.raises(SystemExit) as stop:
        main([command_of(config), "--config", str(config), "--print_config"])
    captured = capsys.readouterr()
    assert stop.value.code in (0, None), captured.err
    return yaml.safe_load(captured.out)


def assert_same(found: Any, recorded: Any, place: str = "") -> None:
    """Of the trainer and of classes of others, what both know: their versions differ."""
    if isinstance(recorded, str):
        recorded = RENAMED.get(recorded, recorded)
    if isinstance(recorded, dict) and isinstance(found, dict):
        theirs = str(recorded.get("class_path", "")).startswith(("torch.", "lightning."))
        if not theirs and "trainer" not in place and "init_args" not in place:
            assert found.keys() == recorded.keys(), place
        for key in found.keys() & recorded.keys():
            assert_same(found[key], recorded[key], f"{place}.{key}")
    elif place.endswith("trainer.callbacks") and recorded:
        by_class = {each["class_path"]: each for each in found}
        assert len(by_class) == len(found)
        assert by_class.keys() == {each["class_path"] for each in recorded}
        for each in recorded:
            assert_same(by_class[each["class_path"]], each, f"{place}.{each['class_path']}")
    elif isinstance(recorded, list) and isinstance(found, list):
        assert len(found) == len(recorded), place
        for i, (one, other) in enumerate(zip(found, recorded, strict=True)):
            assert_same(one, other, f"{place}[{i}]")
    else:
        assert found == recorded, place


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_a_config_comes_to_what_it_did_when_it_was_written_out(config, capsys) -> None:
    """Recorded when each file held all of `default.yaml`, and where it changed by `record.py`."""
    recorded = RESOLVED[str(config.relative_to(FOLDER))]
    assert_same(resolved(config, capsys), recorded)


class _Strict(yaml.SafeLoader):
    """Refuses a key that stands twice, of which PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        names = [self.construct_object(name) for name, _ in node.value]
        assert len(names) == len(set(names)), f"{names}: {node.start_mark}"
        return super().construct_mapping(node, deep)


@pytest.mark.parametrize("config", [*CONFIGS, FOLDER / "default.yaml"], ids=name_of)
def test_no_key_stands_twice(config: Path) -> None:
    assert yaml.load(config.read_text(), _Strict)


def test_the_default_holds_nothing_that_changes_the_numbers_of_a_training() -> None:
    """Complete configs of users were written without it."""
    default = read(FOLDER / "default.yaml")
    assert default.keys() == {"trainer"}
    assert default["trainer"].keys() == {
        "accelerator",
        "num_sanity_val_steps",
        "log_every_n_steps",
        "logger",
        "callbacks",
    }


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ("cifar10/ddpm", 35_746_307),
        ("cifar10/teacher", 60_004_099),
        ("celeba/ddpm", 78_700_803),
        ("celeba/teacher", 91_126_787),
        ("lsun_bedroom/ddpm", 113_673_219),
        ("lsun_bedroom/teacher", 139_578_502),
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
        f"runs/{logger['name']}": path
        for path in config.parent.glob("*.yaml")
        if command_of(path) == "fit"
        for logger in [read(path)["trainer"]["logger"]["init_args"]]
    }
    run = teacher.removesuffix("/version_0/checkpoints/last.ckpt")
    assert run in runs
    # A ladder begins with half the steps that the teacher was made for.
    rounds = arguments_of(config).get("rounds")
    schedule = arguments_of(runs[run]).get("schedule", {}).get("init_args", {})
    if rounds is not None and "num_levels" in schedule:
        assert rounds[0][0] * 2 == schedule["num_levels"]
