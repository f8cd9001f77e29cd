"""All stages but the tests run at tiny sizes on a CPU, and the hours are right."""

import json
import sys

import gpu
import pytest
from measuring import Bench, Results, command, run
from peak_memory import CASES, ON_A_GPU


def call(monkeypatch, folder, *more):
    given = ["--out", str(folder), "--tiny", "--no-compile", "--rounds", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *given, *more])
    return command(gpu.STAGES, "", name="gpu", device="cpu", threads=1)


def test_all_stages_run_and_are_not_run_again(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, tmp_path, "--stage", "hours") == 1  # it needs others
    assert call(monkeypatch, tmp_path) == 0, capsys.readouterr().out
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["conditions"]["tiny"] is True
    assert {"torch", "processor", "commit", "diffusers"} <= set(content["conditions"])
    stages = content["stages"]
    assert set(stages) == set(gpu.STAGES)
    assert all(stage["done"] for stage in stages.values())
    assert stages["tests"]["notes"] == ["left out with --tiny"]
    for name in set(gpu.STAGES) - {"tests"}:
        rows = [row for case in stages[name]["cases"].values() for row in case]
        assert rows
        for row in rows:
            numbers = [value for value in row.values() if isinstance(value, float)]
            assert numbers
            assert name == "memory" or min(numbers) >= 0
    contenders = {
        row["contender"] for case in stages["training"]["cases"].values() for row in case
    }
    assert {"bare loop, ours", "bare loop, diffusers", "Lightning, ours"} <= contenders
    assert "Lightning, ours foreach=True of Adam" in contenders
    capsys.readouterr()
    assert call(monkeypatch, tmp_path) == 0
    assert capsys.readouterr().out.count("done before") == len(gpu.STAGES)


def test_hours_are_those_of_the_config():
    config = {
        "model": {"init_args": {"num_steps": 10}},
        "data": {"init_args": {"steps_per_epoch": 36_000}},
        "trainer": {
            "max_epochs": 100,
            "callbacks+": [
                {"class_path": "callbacks.BitsPerDim"},
                {
                    "class_path": "callbacks.FrechetDistance",
                    "init_args": {"num_samples": 3600, "every_n_validations": 50},
                },
            ],
        },
    }
    fits = [("digits", "Lightning, ours", 9.0), ("cifar10", "bare loop, ours", 8.0)]
    fits += [("cifar10", "Lightning, ours", 2.0), ("cifar10", "Lightning, ours a=1", 1.0)]
    draws = [(1, "ours", 7.0), (8, "ours", 5.0), (8, "ours a=1", 1.0), (8, "ours b=2", 4.0)]
    draws += [(8, "ours contiguous by hand", 9.0), (8, "diffusers' pipeline", 9.0)]
    cells = {
        "training": [
            {"case": f"{name}, batch 8, float32", "contender": contender, "ms an update": ms}
            for name, contender, ms in fits
        ],
        "sampling": [
            {"case": f"cifar10, batch {batch}", "contender": f"{contender}, float32"}
            | {"ms for image and step": ms}
            for batch, contender, ms in draws
        ],
        "features": [{"case": "", "contender": "features and sums, float32", "images/s": 0.5}],
    }
    plain, other, drawing = gpu.hours_of(config, cells, ("float32", "bf16"))  # bf16 has no rows
    assert plain["updates"] == 3_600_000
    assert plain["training, hours"] == pytest.approx(2.0)
    assert plain["3,600 images of 10 steps, hours"] == pytest.approx(0.05)
    assert plain["their features, hours"] == pytest.approx(2.0)
    assert plain["fit, hours"] == pytest.approx(2.0 + 2 * 2.05)
    assert other["contender"] == "ours a=1, float32"
    assert other["fit, hours"] == pytest.approx(1.0 + 2 * 2.01)
    assert drawing["contender"] == "ours b=2, float32"  # a fit is as fast with it as without
    assert drawing["fit, hours"] == pytest.approx(2.0 + 2 * 2.04)


def test_hours_are_counted_anew_until_their_stages_are_finished(tmp_path):
    bench = Bench(Results(tmp_path, "try", {}))
    stages = {"hours": gpu.STAGES["hours"]}
    rows = {
        "training": ("Lightning, ours", "ms an update"),
        "sampling": ("ours", "ms for image and step"),
        "features": ("features and sums", "images/s"),
    }
    for stage, (contender, number) in rows.items():
        assert run(bench, stages, []) == 1
        assert not bench.results.rows("hours")
        row = {"contender": contender + ", float32" * (stage != "training"), number: 1.0}
        bench.results.stage(stage)["cases"]["cifar10, float32"] = [row]
    assert run(bench, stages, []) == 1
    assert len(bench.results.rows("hours")) == 1
    more = [{"contender": "Lightning, ours a=1", "ms an update": 1.0}]
    bench.results.stage("training")["cases"]["cifar10, batch 8, float32"] = more
    for stage in rows:
        bench.results.stage(stage)["done"] = True
    assert run(bench, stages, []) == 0
    assert len(bench.results.rows("hours")) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:100 steps hold 96 distinct levels")
@pytest.mark.parametrize("name", [*CASES, *ON_A_GPU])
def test_every_case_of_memory_runs(name):
    (CASES | ON_A_GPU)[name]("cpu", True)
