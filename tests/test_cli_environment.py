"""Options by environment variables: how they are spelled, what wins, and what sets nothing."""

import re
from pathlib import Path

import pytest
import yaml

from ddim_pl.cli import main
from ddim_pl.cli_commands import DESCRIPTIONS
from ddim_pl.cli_environment import OTHERS, options_by, variable_of, with_environment

ROOT = Path(__file__).parents[1]
STEPS = {"DDIM_PL_FIT__TRAINER__MAX_STEPS": "7"}
OPTION = "--trainer.max_steps=7"


@pytest.fixture
def resolved(monkeypatch, capsys):
    """The config that arguments and variables come to."""

    def resolve(args, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stop:
            main([*args, "--print_config"])
        captured = capsys.readouterr()
        assert stop.value.code in (0, None), captured.err
        return yaml.safe_load(captured.out)

    return resolve


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fit"], ["fit", OPTION]),
        (["fit", "--config", "a", "--x", "1"], ["fit", "--config", "a", OPTION, "--x", "1"]),
        (["fit", "--x=1", "-c=a"], ["fit", "--x=1", "-c=a", OPTION]),
        (["fit", "--trainer.max_steps", "3"], ["fit", "--trainer.max_steps", "3"]),
        (["fit", "--trainer.max_steps=3", "-c", "a"], ["fit", "--trainer.max_steps=3", "-c", "a"]),
        (["--config", "a", "fit"], ["--config", "a", "fit", OPTION]),
        (["test", "--x"], ["test", "--x"]),
        (["--version"], ["--version"]),
        ([], []),
    ],
)
def test_a_variable_stands_behind_the_configs_and_below_the_arguments(args, expected):
    assert with_environment(args, STEPS) == expected


def test_a_config_by_a_variable_is_below_those_of_the_arguments():
    given = STEPS | {"DDIM_PL_FIT__CONFIG": "a"}
    assert with_environment(["fit", "-c", "b"], given) == ["fit", "--config=a", "-c", "b", OPTION]


@pytest.mark.parametrize("command", DESCRIPTIONS)
def test_a_variable_is_of_one_command(command):
    name = variable_of("model.network.channels", command)
    assert name == f"DDIM_PL_{command.upper()}__MODEL__NETWORK__CHANNELS"
    assert options_by({name: "8"}, command=command) == {"--model.network.channels": "8"}
    assert options_by({name: "8"}, command=None) == {}


def test_variables_set_options_of_any_depth_above_the_config(resolved):
    found = resolved(
        ["fit", "--model.num_steps", "3"],
        DDIM_PL_FIT__CONFIG="digits/ddpm",
        DDIM_PL_FIT__TRAINER__MAX_EPOCHS="77",
        DDIM_PL_FIT__MODEL__NETWORK__CHANNELS="16",
        DDIM_PL_FIT__MODEL__NUM_STEPS="5",
        DDIM_PL_FIT__TRAINER__LOGGER__NAME="mine",
        DDIM_PL_TEST__TRAINER__MAX_EPOCHS="88",
    )
    assert found["trainer"]["max_epochs"] == 77  # the config has 6
    assert found["model"]["init_args"]["network"]["init_args"]["channels"] == 16
    assert found["model"]["init_args"]["num_steps"] == 3
    assert found["trainer"]["logger"]["init_args"]["name"] == "mine"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("DDIM_PL_FITT__TRAINER__MAX_STEPS", "did you mean DDIM_PL_FIT__TRAINER__MAX_STEPS?"),
        ("DDIM_PL_TRACEBAK", "did you mean DDIM_PL_TRACEBACK?"),
        ("DDIM_PL_TRAINER__X", "did you mean DDIM_PL_FIT__TRAINER__X?"),
        ("DDIM_PL_FIT__", "an option is spelled as in DDIM_PL_FIT__TRAINER__MAX_STEPS"),
        ("DDIM_PL_FIT__trainer", "did you mean DDIM_PL_FIT__TRAINER?"),
    ],
)
def test_a_variable_that_sets_nothing_is_an_error(monkeypatch, name, hint):
    monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "digits/ddpm", "--print_config"])
    assert str(stop.value.code).startswith(
        f"error: the environment variable {name} must set an option, but sets none: "
    )
    assert hint in str(stop.value.code)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("TRAINER__MAX_STEPZ", "1", "unrecognized arguments: --trainer.max_stepz"),
        ("TRAINER__MAX_STEP", "1", "did you mean --trainer.max_steps?"),
        ("SEED", "1", "did you mean --seed_everything?"),
        ("MODEL__SAMPLER__ETAA", "1", "etaa is no argument of DDIM: did you mean eta?"),
        ("TRAINER__MAX_STEPS", "many", "max_steps must be an integer"),
    ],
)
def test_an_error_of_an_option_names_its_variable(monkeypatch, capsys, option, value, reason):
    monkeypatch.setenv(f"DDIM_PL_FIT__{option}", value)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "digits/ddpm_linear", "--print_config"])
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert reason in line
    assert line.endswith(f"(set by DDIM_PL_FIT__{option})\n")


def test_a_variable_of_a_command_without_model_is_no_beginning_of_an_option(monkeypatch, capsys):
    monkeypatch.setenv("DDIM_PL_MEASURE__BATCH", "1")
    with pytest.raises(SystemExit) as stop:
        main(["measure", "a.npz", "b.npz"])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert "--batch=1: did you mean --batch_size? (set by DDIM_PL_MEASURE__BATCH)" in line


def test_the_variables_of_the_project_are_known():
    """Those that are read by name, which is a text of its own in the code."""
    places = [ROOT / name for name in ("ddim_pl", "callbacks", "tests", "benchmarks")]
    texts = [file.read_text() for place in places for file in place.rglob("*.py")]
    named = {name for text in texts for name in re.findall(r'"(DDIM_PL_[A-Z0-9_]+)"', text)}
    read = {name for name in named if "__" not in name and name != "DDIM_PL_TRACEBAK"}
    assert read - {"DDIM_PL_"} == {*OTHERS}
