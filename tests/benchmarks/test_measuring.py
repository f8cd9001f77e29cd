"""Contenders take turns, ratios are those of pairs, and results are kept."""

import argparse
import json
import os
import sys
from pathlib import Path

import measuring
import pytest
import torch
from measuring import COMPILED, Bench, Results, command, device_of, run, shown, speed


def bench(folder, **arguments):
    return Bench(Results(folder, "try", {"device": "cpu"}), **arguments)


def test_a_device_that_is_not_there_is_said_in_a_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be cpu here, got cuda: .* no GPU"):
        device_of("cuda")
    assert device_of("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of("cuda") == "cuda"


def test_every_script_says_so():
    for path in sorted(Path(measuring.__file__).parent.glob("*.py")):
        text = path.read_text()
        count = text.count('parser.add_argument("--device"')
        assert count == text.count('parser.add_argument("--device", type=device_of'), path.name


def test_contenders_take_turns_and_the_first_round_does_not_count(tmp_path):
    seconds = {"slow": iter([100.0, 2.0, 4.0, 6.0]), "fast": iter([1.0, 1.0, 1.0, 2.0])}
    calls = []

    def contender(name):
        def call():
            calls.append(name)
            return next(seconds[name])  # its own seconds

        return call

    rows = bench(tmp_path, rounds=3).in_turn({n: contender(n) for n in seconds}, work=8, unit="u")
    assert calls == ["slow", "fast"] * 4
    slow, fast = rows
    assert (slow["seconds"], slow["speed"], slow["rounds"]) == (4.0, 1.0, 3)
    assert (fast["seconds"], fast["speed"], fast["u/s"]) == (1.0, 3.0, 8.0)  # of 2, 4 and 3
    assert fast["quartiles"] == "2.500 to 3.500"


def test_a_peer_is_compared_round_by_round(tmp_path):
    seconds = {
        "a": iter([1.0] * 4),
        "b": iter([9.0, 1.0, 2.0, 3.0]),
        "c": iter([9.0, 3.0, 4.0, 3.0]),
    }
    contenders = {name: lambda each=each: next(each) for name, each in seconds.items()}
    rows = bench(tmp_path, rounds=3).in_turn(contenders, peers={"b": "c"})
    assert [row.get("over its peer") for row in rows] == [None, "2.000 (1.500 to 2.500)", None]


def test_a_call_without_seconds_of_its_own_is_timed(tmp_path):
    matrix = torch.randn(300, 300)

    def long():
        for _ in range(20):
            matrix @ matrix

    short, many = bench(tmp_path, rounds=3).in_turn({"short": lambda: None, "long": long})
    assert 0 <= short["seconds"] < many["seconds"]
    assert many["speed"] < 1


def test_a_case_without_time_left_makes_two_rounds(tmp_path):
    rows = bench(tmp_path, rounds=50, case_seconds=0.0).in_turn({"one": lambda: 1.0})
    assert rows[0]["rounds"] == 2


def test_speed_is_the_median_of_the_ratios_not_the_ratio_of_the_medians():
    assert speed([1.0, 10.0, 100.0], [1.0, 5.0, 400.0])["speed"] == 1.0


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    calls = []

    def stage(given):
        for name in ("a", "b"):
            given.case(name, lambda name=name: calls.append(name) or [{"value": 1.0}])

    def broken(given):
        given.case("c", lambda: calls.append("c") or 1 / 0)
        stage(given)

    first = bench(tmp_path)
    assert run(first, {"one": (broken, 100.0)}, []) == 1
    assert calls == ["c", "a", "b"]
    assert first.failures == ["one, c: ZeroDivisionError: division by zero"]
    assert "one (not finished)" in (tmp_path / "try.md").read_text()
    again = bench(tmp_path)
    assert run(again, {"one": (stage, 100.0), "two": (stage, 100.0)}, []) == 0
    assert calls == ["c", "a", "b", "a", "b"]  # those of stage "two"
    assert run(bench(tmp_path), {"one": (broken, 100.0)}, []) == 0  # it is done
    stages = json.loads((tmp_path / "try.json").read_text())["stages"]
    assert stages["one"]["cases"] == {"a": [{"value": 1.0}], "b": [{"value": 1.0}]}
    assert (tmp_path / "try.md").read_text().count("| a | 1 |") == 2


def test_a_stage_begins_no_case_after_its_time(tmp_path):
    calls = []
    stages = {"one": (lambda given: given.case("a", lambda: calls.append("a") or []), -1.0)}
    assert run(bench(tmp_path), stages, []) == 1
    assert not calls


def test_a_run_begins_nothing_after_its_own_time_and_goes_on_with_the_next(tmp_path):
    calls = []
    stages = {
        name: (lambda given, name=name: given.case(name, lambda: calls.append(name) or []), 100.0)
        for name in ("one", "two")
    }
    assert run(bench(tmp_path), stages, [], -1.0) == 1
    assert not calls
    assert run(bench(tmp_path), stages, [], 100.0) == 0
    assert calls == ["one", "two"]


def test_notes_on_finished_cases_stay_and_others_are_made_anew(tmp_path):
    def stage(given):
        given.note("of the stage")
        given.case("a", lambda: given.note("a: of the case") or [])
        given.case("b", lambda: given.results.stage("one")["cases"]["c"])

    for _ in range(2):
        given = bench(tmp_path)
        assert run(given, {"one": (stage, 100.0)}, []) == 1
        assert sorted(given.results.stage("one")["notes"]) == ["a: of the case", "of the stage"]


def test_what_was_compiled_is_forgotten_after_each_case_and_told(tmp_path):
    """In one process all would share a limit of versions, and run uncompiled after it."""
    given = bench(tmp_path, compile=True)
    given.stage = "one"

    for name in ("a", "b"):
        given.case(name, lambda: [{"value": float(_compiled(torch.zeros(())))}])
    assert given.results.stage("one")["notes"] == [
        f"{name}: 1 compiled graphs, 0 breaks between them" for name in ("a", "b")
    ]


@torch.compile(backend="eager")
def _compiled(x):
    return x + 1


def test_a_call_shares_no_kernels_with_one_that_may_have_been_killed(tmp_path, monkeypatch):
    monkeypatch.delenv(COMPILED, raising=False)
    monkeypatch.setattr(sys, "argv", ["try.py", "--out", str(tmp_path)])
    places = []

    def stage(given):
        given.case("a", lambda: places.append(os.environ[COMPILED]) or [])

    for name in ("one", "two"):
        threads = torch.get_num_threads()
        assert command({name: (stage, 100.0)}, "", name=name, device="cpu", threads=threads) == 0
    assert len(set(places)) == 2
    assert not any(os.path.exists(place) for place in places)
    assert COMPILED not in os.environ


def test_results_of_another_machine_are_refused(tmp_path):
    bench(tmp_path).results.write()
    with pytest.raises(ValueError, match=r"conditions.*'device': 'cpu'.*give another folder"):
        Results(tmp_path, "try", {"device": "cuda"})


def test_numbers_in_tables_have_three_digits():
    cells = [shown(value) for value in (1234.5, 12.345, 0.00012345, 3, None, "a|b")]
    assert cells == ["1,234", "12.3", "0.000123", "3", "", "a/b"]
