"""The list of commands, and what is said without importing PyTorch."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

from ddim_pl import __version__
from ddim_pl.cli import DiffusionCLI, main
from ddim_pl.cli_commands import DESCRIPTIONS
from ddim_pl.commands import ALONE, COMMANDS, Trainer

ROOT = Path(__file__).parents[1]
NAMES = ", ".join(map(repr, DESCRIPTIONS))
WITH_MODEL = [name for name in DESCRIPTIONS if name not in ALONE]
LISTS = "(--help and --print_config list what there is)"
NO_COMMAND = (
    'error: expected "subcommand" to be one of {fit,validate,test,predict,sample, ...}, but it '
    f"was not provided {LISTS}\n"
)
WITHOUT_COMMAND = {
    (): (2, NO_COMMAND),
    ("--trust",): (2, NO_COMMAND),
    ("fitt",): (
        2,
        f"error: argument subcommand: invalid choice: 'fitt' (choose from {NAMES}) {LISTS}\n",
    ),
    ("--version",): (0, f"ddim_pl {__version__}\n"),
}
LATE = """
import atexit, runpy, sys
late = ("torch", "lightning", "jsonargparse", "yaml")
atexit.register(lambda: print([name for name in late if name in sys.modules]))
sys.argv = ["main.py", *sys.argv[1:]]
runpy.run_path("main.py", run_name="__main__")
"""


def outcome(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    found = capsys.readouterr()
    return stop.value.code or 0, found.out + found.err


@pytest.fixture
def built(monkeypatch):
    """Names of the commands whose parsers were built."""
    names = []
    prepare = DiffusionCLI._prepare_subcommand_parser

    def record(self, kind, command, **settings):
        names.append(command)
        return prepare(self, kind, command, **settings)

    monkeypatch.setattr(DiffusionCLI, "_prepare_subcommand_parser", record)
    return names


def test_every_command_has_a_description():
    assert set(DESCRIPTIONS) == {*LightningCLI.subcommands(), *COMMANDS, *ALONE}


@pytest.mark.parametrize("command", [*COMMANDS, *ALONE])
def test_the_description_is_the_first_sentence_of_the_commands_text(command):
    text = inspect.getdoc(ALONE.get(command) or getattr(Trainer, command))
    assert DESCRIPTIONS[command] == text.partition("\n")[0]


@pytest.mark.parametrize("command", ALONE)
def test_a_command_alone_has_the_description_and_no_trainer(command, built, capsys):
    code, text = outcome([command, "--help"], capsys)
    assert code == 0
    assert DESCRIPTIONS[command] in " ".join(text.split())
    assert "--trainer" not in text
    assert built == []


@pytest.mark.parametrize("command", WITH_MODEL)
def test_the_parser_of_a_command_alone_is_built_and_has_the_description(command, built, capsys):
    code, text = outcome([command, "--help"], capsys)
    assert code == 0
    assert DESCRIPTIONS[command] in " ".join(text.split())
    assert "--trainer.devices" in text
    assert built == [command]


@pytest.mark.parametrize("command", ALONE)
def test_a_command_alone_has_its_own_arguments_only(command, built, capsys):
    code, text = outcome(["--trust", command, "--help"], capsys)
    assert code == 0
    assert DESCRIPTIONS[command] in " ".join(text.split())
    assert "--trainer" not in text
    assert built == []


def test_with_an_option_before_the_command_every_parser_is_built(built, capsys):
    code, text = outcome(["--foo", "fit"], capsys)
    assert (code, text) == (2, f"error: unrecognized arguments: --foo {LISTS}\n")
    assert built == WITH_MODEL


def test_a_config_before_the_command_is_read(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("fit: {trainer: {max_epochs: 12345}}\n")
    code, text = outcome(["--config", str(config), "fit", "--print_config"], capsys)
    assert code == 0
    assert "max_epochs: 12345" in text


@pytest.mark.parametrize("arguments", WITHOUT_COMMAND)
def test_without_a_command_nothing_is_built(arguments, built, capsys):
    assert outcome(arguments, capsys) == WITHOUT_COMMAND[arguments]
    assert built == []


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--trust", "--help"]])
def test_help_lists_the_commands(arguments, built, capsys):
    code, text = outcome(arguments, capsys)
    assert code == 0
    words = " ".join(text.split())
    assert all(f" {name} {text} " in f"{words} " for name, text in DESCRIPTIONS.items())
    assert built == []


@pytest.mark.parametrize("arguments", [["--help"], [], ["fitt"], ["--version"]])
def test_without_a_command_nothing_slow_is_imported(arguments):
    done = subprocess.run(
        [sys.executable, "-c", LATE, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("[]\n"), done
    assert done.returncode == (0 if arguments in (["--help"], ["--version"]) else 2)
