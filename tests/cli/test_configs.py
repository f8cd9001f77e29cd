"""Every config in the repository can be parsed, so that none rots, and holds what it says."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from ddim_pl.cli import main
from ddim_pl.renamed import RENAMED
from ddim_pl.training.hyperparameters import build

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
    assert len(CONFIGS) >= 27
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
        ("cifar10/edm", 55_733_891),
        ("celeba/ddpm", 78_700_803),
        ("celeba/teacher", 91_126_787),
        ("lsun_bedroom/ddpm", 113_673_219),
        ("lsun_church/ddpm", 113_673_219),
        ("lsun_bedroom/teacher", 139_578_502),
    ],
)
def test_a_network_has_the_size_its_config_says(config: str, parameters: int) -> None:
    path = FOLDER / f"{config}.yaml"
    with torch.device("meta"):
        network = build(arguments_of(path)["network"], nn.Module, name_of(path))
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
    # A ladder begins with half the steps that the teacher was made for, or says how many.
    rounds = arguments_of(config).get("rounds")
    steps = arguments_of(config).get("teacher_num_steps")
    schedule = arguments_of(runs[run]).get("schedule", {}).get("init_args", {})
    if rounds is not None and "num_levels" in schedule:
        assert schedule["num_levels"] % (steps or rounds[0][0] * 2) == 0
        assert steps or rounds[0][0] * 2 == schedule["num_levels"]


PAGE = (FOLDER.parent / "docs" / "settings.md").read_text()
# Places of files are no settings. Clipping is that of the sampler, see docs/sampling.md.
NO_SETTINGS = {"root", "val_root", "folder", "teacher", "name", "logger", "clip"}


def leaves(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Name and value of each setting; a class is a setting, with its arguments below its name."""
    if isinstance(node, dict) and "class_path" in node:
        yield place, node["class_path"].rsplit(".", 1)[-1]
        node = node.get("init_args") or {}
    if not isinstance(node, dict):
        yield place, str(node)
        return
    for key, value in node.items():
        if key == "callbacks+":
            for each in value:
                _, *below = leaves(each, each["class_path"].rsplit(".", 1)[-1])
                yield from below
        elif key not in NO_SETTINGS:
            yield from leaves(value, f"{place}.{key}" if place else key)


def settings_of(name: str) -> dict[str, str]:
    config = read(FOLDER / f"{name}.yaml")
    if "model" not in config:
        samplers = [
            f"{each['class_path'].rsplit('.', 1)[-1]}"
            f"({', '.join(f'{key}={value}' for key, value in each['init_args'].items())})"
            for each in config["samplers"]
        ]
        return dict(leaves(config | {"samplers": ", ".join(samplers)}))
    parts = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    return {key: value for part in parts for key, value in leaves(part)}


def tables() -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """Of each column of `settings.md`: the config, its settings, and their sources."""
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        head, _, *rows = [
            [cell.strip(" `") for cell in line.strip("|").split(" | ")]
            for line in block.strip().splitlines()
        ]
        for column in range(1, len(head) - 1):
            values = {row[0]: row[column] for row in rows if row[column] != "-"}
            yield head[column], values, [row[-1] for row in rows]


TABLES = {name: (values, sources) for name, values, sources in tables()}


@pytest.mark.parametrize("name", TABLES)
def test_every_setting_and_its_source_are_in_the_docs(name: str) -> None:
    values, sources = TABLES[name]
    assert values == settings_of(name)
    assert all(sources)


def test_every_config_is_in_the_docs() -> None:
    for config in CONFIGS:
        name = f"{config.parent.name}/{config.stem}"
        is_ours = name.startswith(("digits/", "cifar10/quick"))
        assert name in TABLES or (is_ours and f"`{name}`" in PAGE), name


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("cifar10/teacher", {"optimizer": "AdamW", "optimizer.weight_decay": "0.001"}),
        ("cifar10/teacher", {"warmup_steps": "1000", "network.initialisation": "lecun"}),
        ("cifar10/progressive", {"ema_decay": "0.0"}),
        ("cifar10/luhman", {"num_validation": "51200", "pair_batch_size": "1024"}),
        ("celeba/luhman", {"num_validation": "10240", "pair_batch_size": "1024"}),
        ("lsun_bedroom/luhman", {"num_validation": "2560", "pair_batch_size": "64"}),
        ("cifar10/edm", {"warmup_steps": "19531", "ema_decay.images": "500000"}),
        ("celeba/ddpm", {"network.initialisation": "torch"}),
        ("lsun_bedroom/teacher", {"prediction": "both", "network.head_width": "64"}),
        ("lsun_bedroom/teacher", {"resample": "bilinear", "crop_first": "True"}),
        ("lsun_bedroom/progressive", {"prediction": "both", "crop_first": "True"}),
        ("lsun_church/ddpm", {"resample": "bilinear", "flip": "True", "max_epochs": "120"}),
    ],
    ids=str,
)
def test_settings_are_those_of_the_authors_code(name: str, theirs: dict[str, str]) -> None:
    assert theirs.items() <= settings_of(name).items()


@pytest.mark.parametrize("name", [f"{each}/luhman" for each in ("cifar10", "celeba")])
def test_single_step_distillation_does_not_clip_gradients(name: str) -> None:
    assert "gradient_clip_val" not in settings_of(name)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("celeba/ddpm", 3 * 64 * 64),
        ("celeba/gamma_ddpm", 3 * 64 * 64),
        ("cifar10/edm", 3 * 32 * 32),
        ("cifar10/luhman", 3 * 32 * 32),
        ("celeba/luhman", 2 * 3 * 64 * 64),
        ("lsun_bedroom/luhman", 2 * 3 * 256 * 256),
    ],
)
def test_updates_are_those_of_a_sum_of_errors(name: str, factor: int) -> None:
    """The authors sum where we take the mean, or half of it: clipping and eps have no such scale.

    Adam's updates do not depend on the loss's scale otherwise.
    """
    settings = settings_of(name)
    betas = json.loads(settings.get("optimizer.betas", "[0.9, 0.999]"))
    clips = float(settings.get("gradient_clip_val", "inf"))
    updated = []
    for scale, eps, clip in (
        (1.0, 1e-8, 1.0 if "ddpm" in name else float("inf")),
        (1 / factor, float(settings["optimizer.eps"]), clips),
    ):
        # Gradients as small as Adam's eps, and one that is clipped.
        weight = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=1e-2, betas=betas, eps=eps)
        for slope in (3e-8, 1e-8, 2e-8, 5e5):
            weight.grad = scale * slope * torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
            torch.nn.utils.clip_grad_norm_([weight], clip)
            optimizer.step()
        updated.append(weight.detach())
    torch.testing.assert_close(updated[1], updated[0], rtol=1e-5, atol=0)
    assert (updated[0] - torch.tensor([1.0, -2.0, 3.0])).abs().min() > 1e-3
