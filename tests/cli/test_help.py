"""`--help` of a class has a text for each of its arguments."""

import sys

import pytest
from jsonargparse import ArgumentParser
from lightning import Callback, LightningDataModule
from torch import nn

import callbacks
import ddim_pl.cli  # so that every class is known
from ddim_pl.cli_errors import known_classes
from ddim_pl.fixed_point import Solver
from ddim_pl.metrics.digits import DigitsFeatures
from ddim_pl.metrics.dinov2 import DINOv2Features
from ddim_pl.metrics.inception import InceptionFeatures
from ddim_pl.noise import Noise
from ddim_pl.samplers import Sampler
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.training import DiffusionModule

BASES = (
    *(DiffusionModule, LightningDataModule, NoiseSchedule, Noise, Sampler, Solver),
    *(nn.Module, Callback),
)
CLASSES = [kind for base in BASES for kind in known_classes(base)]
CLASSES += [DigitsFeatures, InceptionFeatures, DINOv2Features]


def test_classes_are_found():
    names = {kind.__name__ for kind in CLASSES}
    assert {"DDPM", "CIFAR10DataModule", "UNet", "DDIM", "LinearSchedule", "BitsPerDim"} <= names
    assert len(CLASSES) >= 30
    assert set(callbacks.__all__) <= names
    assert ddim_pl.cli.DiffusionCLI


def test_the_help_of_a_command_has_no_option_without_effect_on_it(capsys):
    texts = {}
    for command in ("sample", "fit"):
        with pytest.raises(SystemExit) as stop:
            ddim_pl.cli.main([command, "--help"])
        assert stop.value.code == 0
        texts[command] = capsys.readouterr().out
    for name in ("--trainer.devices", "--num_images", "--model.help"):
        assert name in texts["sample"]
    for name in ("--trainer.max_steps", "--trainer.callbacks", "--trainer.logger.help"):
        assert name in texts["fit"]
        assert name not in texts["sample"]


@pytest.mark.parametrize("command", ["import", "measure", "sample"])
def test_the_usage_names_the_program_as_it_was_called(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/ddim-pl", command, "--help"])
    with pytest.raises(SystemExit):
        ddim_pl.cli.main()
    first = capsys.readouterr().out.split("\n", 1)[0].replace("[options] ", "")
    assert first.startswith(f"usage: ddim-pl {command} ")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_argument_has_a_text(kind):
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "it", fail_untyped=False)
    silent = [
        action.dest
        for action in parser._actions
        if action.dest.startswith("it.") and not (action.help or "").strip()
    ]
    assert not silent
