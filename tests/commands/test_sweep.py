"""A sweep measures what FrechetDistance does, keeps what it has, and ends alike after a stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sweeps import sweep
from tiny import some_ddpm, tiny_ddpm, tiny_unet

from ddim_pl.images import read_png, to_uint8
from ddim_pl.metrics.quality import SampleQuality
from ddim_pl.samplers import DDIM, Ancestral, GammaQuantile
from ddim_pl.timesteps import make_levels

ROOT = Path(__file__).parents[2]


def test_a_sweep_has_every_combination_once_and_writes_all_files(tmp_path):
    rows = sweep(tmp_path)
    cells = [(row["sampler"], row["timesteps"], row["steps"]) for row in rows]
    assert cells == [
        *((s, "linear", n) for n in "23" for s in ("DDIM(eta=0.0)", "Heun()")),
        *((s, "exponential", "12") for s in ("DDIM(eta=0.0)", "Heun()")),
    ]
    assert [row["network evaluations"] for row in rows] == ["2", "3", "3", "5", "12", "23"]
    names = {f.name for f in tmp_path.iterdir()}
    assert {"sweep.csv", "sweep.md", "sweep.png", "grids.png", "cells"} <= names
    table = (tmp_path / "sweep.md").read_text()
    assert table.count("\n| ") == 6 + 1
    assert "40 images" in table
    for name in ("sweep.png", "grids.png"):
        assert read_png(tmp_path / name).shape[1] > 100


def test_the_page_shows_the_images_of_the_same_latents(tmp_path):
    model = some_ddpm()
    sweep(tmp_path, model, timesteps=["linear"], num_steps=[2], samplers=[DDIM(), Ancestral()])
    cells = [json.loads(f.read_text()) for f in (tmp_path / "cells").glob("*.json")]
    assert len(cells) == 2
    for file in (tmp_path / "cells").glob("*.json"):
        name = json.loads(file.read_text())["sampler"]
        sampler = DDIM() if name.startswith("DDIM") else Ancestral()
        levels = make_levels("linear", model.schedule, 2)
        expected = to_uint8(model.sample(range(4), sampler=sampler, levels=levels))
        shown = read_png(file.with_suffix(".png"))
        assert (torch.cat(list(expected), -1).int() - shown.int()).abs().max() <= 1


def test_one_sweep_has_clipped_and_unclipped_samplers(tmp_path):
    """As the DDIM paper's Table 1 does; a cell is what a model that clips so gives."""
    model = some_ddpm()
    samplers = [DDIM(), DDIM(clip=True), DDIM(clip=False)]
    rows = sweep(tmp_path, model, timesteps=["linear"], num_steps=[2], samplers=samplers)
    assert [row["sampler"] for row in rows] == [str(sampler) for sampler in samplers]
    assert model.clip
    assert rows[0]["digits_fd"] == rows[1]["digits_fd"]
    model.clip = False
    free = sweep(tmp_path / "free", model, timesteps=["linear"], num_steps=[2], samplers=[DDIM()])
    assert rows[2]["digits_fd"] == free[0]["digits_fd"] != rows[1]["digits_fd"]


def test_a_sweep_stopped_in_a_cell_ends_with_the_same_table(tmp_path, monkeypatch):
    """Stopped when a cell's images are drawn, but its metrics not yet computed."""
    monkeypatch.setattr("ddim_pl.commands.sweep.SEARCH_IMAGES", 4)
    model = some_ddpm()
    settings = {"timesteps": ["linear", "adaptive"], "num_steps": [2, 3], "samplers": [DDIM()]}
    sweep(tmp_path / "whole", model, **settings)
    original, calls = SampleQuality.compute, []

    def stops(at):
        def compute(self):
            calls.append(1)
            if len(calls) == at:
                raise OSError("stopped")
            return original(self)

        return compute

    at, folder = 3, tmp_path / "stopped"
    calls.clear()
    monkeypatch.setattr(SampleQuality, "compute", stops(at))
    with pytest.raises(OSError, match="stopped"):
        sweep(folder, model, **settings)
    assert len(list((folder / "cells").glob("[0-9a-f]*.png"))) == at - 1
    monkeypatch.setattr(SampleQuality, "compute", stops(0))
    calls.clear()
    sweep(folder, model, **settings)
    assert len(calls) == 4 - (at - 1)  # finished cells are kept
    for name in ("sweep.csv", "sweep.md", "sweep.png", "grids.png"):
        whole, resumed = ((tmp_path / "whole" / name), (folder / name))
        assert whole.read_bytes() == resumed.read_bytes(), name
    assert not list(folder.rglob("*.part"))


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path):
    """SIGKILL, from outside, as soon as the first cell is there."""
    script = (
        "import sys; sys.path[:0] = ['tests', 'tests/commands']\n"
        "import torch; torch.set_num_threads(1); torch.manual_seed(0)\n"
        "from test_sweep import *\n"
        "sweep(Path(sys.argv[1]), num_steps=[2, 3, 4, 5], timesteps=['linear'])\n"
    )
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, whole], cwd=ROOT, env=environment, check=True, timeout=300)
    process = subprocess.Popen(
        [*command, killed], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 300
    while not list(killed.glob("cells/*.json")) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command, killed], cwd=ROOT, env=environment, check=True, timeout=300)
    for name in ("sweep.csv", "sweep.md", "grids.png"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def test_a_larger_sweep_measures_the_new_cells_only(tmp_path, monkeypatch):
    model = some_ddpm()
    sweep(tmp_path, model, timesteps=["linear"], num_steps=[2])
    calls, original = [], SampleQuality.compute
    monkeypatch.setattr(SampleQuality, "compute", lambda s: calls.append(1) or original(s))
    assert len(sweep(tmp_path, model, timesteps=["linear"], num_steps=[2, 3])) == 4
    assert len(calls) == 2
    calls.clear()
    assert len(sweep(tmp_path, model, timesteps=["linear"], num_steps=[2], seed=5)) == 2
    assert len(calls) == 2
    calls.clear()
    sweep(tmp_path, tiny_ddpm(), timesteps=["linear"], num_steps=[2])  # of other weights
    assert len(calls) == 2


def test_adaptive_levels_of_an_earlier_start_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("ddim_pl.commands.sweep.SEARCH_IMAGES", 4)
    model, settings = some_ddpm(), {"timesteps": ["adaptive"], "samplers": [DDIM()]}
    sweep(tmp_path, model, num_steps=[2], **settings)
    sweep(tmp_path, model, num_steps=[3], **settings)
    (file,) = (tmp_path / "cells").glob("adaptive-*.json")
    assert sorted(json.loads(file.read_text())["levels"]) == ["2", "3"]
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="cannot be read .* levels are searched anew"):
        sweep(tmp_path, model, num_steps=[2, 3], **settings)
    assert file.read_text() == whole


def test_etas_replace_that_of_samplers_that_have_one(tmp_path):
    rows = sweep(tmp_path, samplers=[DDIM()], etas=[0.0, 1.0], timesteps=["linear"], num_steps=[2])
    assert [row["sampler"] for row in rows] == ["DDIM(eta=0.0)", "DDIM(eta=1.0)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": ["cubic"]}, "timesteps must be one of .*'adaptive'.*'linear'.*cubic"),
        ({"etas": [0.5]}, r"etas must be left out for Heun\(\), which has no eta"),
        ({"samplers": [DDIM()], "etas": [1.5]}, "eta must lie in"),
        ({"metrics": ["foo"]}, "metrics must be one or more of .* got 'foo'"),
        ({"num_steps": [0]}, "num_steps must be at least 1, got 0"),
        ({"num_steps": []}, "num_steps must be at least 1"),
        ({"num_steps": [2000]}, "num_steps must lie in"),
        ({"timesteps": ["adaptive"], "num_steps": [500]}, "num_steps of adaptive levels"),
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"num_shown": 0}, "num_shown must be at least 1"),
        (
            {"samplers": [GammaQuantile(0.1)]},
            "samplers must be of the model's noise GaussianNoise",
        ),
    ],
)
def test_wrong_sweeps_are_errors_before_anything_is_drawn(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        sweep(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_fewer_samples_than_features_are_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="singular covariance"):
        sweep(tmp_path, num_samples=20, timesteps=["linear"], num_steps=[1], samplers=[DDIM()])


def test_adaptive_levels_of_another_schedule_are_an_error(tmp_path):
    from ddim_pl.schedules import ImprovedCosineSchedule
    from ddim_pl.timesteps import save_levels

    file = tmp_path / "levels.json"
    save_levels(file, ImprovedCosineSchedule(), [torch.tensor([1000.0, 10, 0])])
    with pytest.raises(ValueError, match=r"were found for Improved.*but the model has Linear"):
        sweep(tmp_path / "out", timesteps=[str(file)], num_steps=[2])


def test_a_sweep_over_guidance_says_it_and_keeps_its_cells_apart(tmp_path, monkeypatch):
    calls, original = [], SampleQuality.compute
    monkeypatch.setattr(SampleQuality, "compute", lambda s: calls.append(1) or original(s))

    def run(**arguments):
        calls.clear()
        given = {"timesteps": ["linear"], "num_steps": [3], "samplers": [DDIM()]}
        return sweep(tmp_path, model, **given, **arguments)

    network = tiny_unet(num_classes=10, null_class=True)
    model = some_ddpm(network=network)
    plain = run()
    assert "guidance" not in plain[0]
    rows = run(guidances=[1.0, 2.0, 4.0])
    assert len(calls) == 2  # with weight 1 it is the cell without
    assert [row["guidance"] for row in rows] == ["1", "2", "4"]
    assert [row["network evaluations"] for row in rows] == ["3", "6", "6"]
    assert rows[0]["digits_fd"] == plain[0]["digits_fd"]
    assert len({row["digits_fd"] for row in rows}) == 3
    model.guidance = 2.0
    assert run()[0]["digits_fd"] == rows[1]["digits_fd"]
    assert not calls
    model.guidance_interval = (0.5, 2.0)
    (some,) = run()
    assert len(calls) == 1
    assert some["guidance"] == "2 in (0.5, 2]"
    assert some["digits_fd"] not in {row["digits_fd"] for row in rows}
    expected = to_uint8(model.sample(range(4), levels=make_levels("linear", model.schedule, 3)))
    files = {json.loads(f.read_text()).get("guidance"): f for f in tmp_path.glob("cells/*.json")}
    shown = read_png(files["2 in (0.5, 2]"].with_suffix(".png"))
    assert (torch.cat(list(expected), -1).int() - shown.int()).abs().max() <= 1


def test_guidance_is_refused_of_a_model_that_has_no_null_class(tmp_path):
    with pytest.raises(ValueError, match="guidance must be left out for a network without a null"):
        sweep(tmp_path / "out", some_ddpm(), guidances=[2.0])
    assert not (tmp_path / "out").exists()
