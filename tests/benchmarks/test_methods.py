"""The comparison of methods: equal passes, and its page from tiny networks."""

import os
import re
import sys
import warnings
from dataclasses import replace

import methods
import pytest
import reproduce
import yaml
from measuring import ROOT
from reproduce import Runner
from studies import Fit

from benchmarks.stages_here import Here, RunnerHere
from benchmarks.tiny_study import LADDER, QUICK, TINY


def settings_of(fit):
    """The config of a fit with its options, by their names without `init_args`."""
    content = yaml.safe_load((ROOT / fit.config).read_text())
    flat = {}

    def walk(value, name):
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, name if key == "init_args" else f"{name}.{key}")
        else:
            flat[name.removeprefix(".")] = value

    walk(content, "")
    for option in fit.options:
        name, _, value = option.removeprefix("--").partition("=")
        name = name.replace("init_args.", "")
        assert name in flat, name
        flat[name] = yaml.safe_load(value)
    return flat


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_has_as_many_passes_as_its_config_makes(name):
    fit, study = methods.STUDY.fits[name], methods.STUDY
    has = settings_of(fit)
    if "model.rounds" in has:
        updates = sum(count for _, count in has["model.rounds"])
    else:
        updates = has["trainer.max_epochs"] * has["data.steps_per_epoch"]
        assert has["model.lr_scheduler.total_iters"] == updates
    passes = updates * has["data.batch_size"] * fit.passes
    if fit.pairs:
        passes += has["data.num_pairs"] * has["model.teacher_num_steps"]
    assert study.passes[name] == passes
    assert passes == pytest.approx(study.passes["ladder"], rel=0.01)


@pytest.mark.slow
def test_the_page_shows_all_methods_and_a_second_call_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reproduce, "ThreadPoolExecutor", Here)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(methods, "STEPS", (8, 4, 2, 1))
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    phases = ("--model.init_args.rounds=[[2,2],[1,2]]", "--model.init_args.teacher_num_steps=4")
    consistency = ("--model.init_args.stage_updates=2", *QUICK)
    pairs = TINY.fits["luhman"].options
    small = {
        "tract": (*phases, *LADDER[1:]),
        "consistency": consistency,
        "consistency-training": ("--model.init_args.method=training", *consistency),
        "reflow": pairs,
    }
    fits = {name: TINY.fits[name] for name in ("teacher", "ladder", "luhman")}
    fits |= {n: replace(methods.STUDY.fits[n], options=given) for n, given in small.items()}
    assert isinstance(fits["reflow"], Fit)
    tiny = replace(TINY, fits=fits, passes=methods.STUDY.passes)
    runner = RunnerHere(tmp_path, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert methods.run(tiny, [1], runner, float("inf")) == 0
    page = (tmp_path / "few-steps.md").read_text()
    lines = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    filled = {}
    for _, title, *cells in lines:  # those of one, two and four steps; the first table's
        filled.setdefault(title.strip(), [bool(cell.strip()) for cell in cells[:3]])
    assert len(re.findall(r"2,5\d\d,\d\d\d", page)) == 6
    for title in methods.METHODS.values():
        of_few = {"TRACT": [True, True, False], "Luhman": [True, False, False]}
        assert filled[title] == of_few.get(title, [True] * 3)
    assert {file.name for file in (tmp_path / "few-steps").iterdir()} == {"steps.png", "grids.png"}
    assert str(tmp_path) not in page
    assert methods.run(tiny, [1], Runner(tmp_path, 2), 0.0) == 0
    assert (tmp_path / "few-steps.md").read_text() == page
    assert os.path.isdir(tmp_path / "stages" / "few-steps-1" / "reflow")
