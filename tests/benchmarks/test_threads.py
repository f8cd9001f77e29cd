"""One thread and two take turns, and what others take is counted."""

import os
import time

import pytest
import torch
from measuring import Bench, Results, run
from threads import Others, _busy, threads


def test_the_number_of_threads_is_as_before_and_the_busy_process_has_ended(tmp_path):
    bench = Bench(Results(tmp_path, "try", {}), threads=torch.get_num_threads(), tiny=True)
    bench.rounds = 2
    assert run(bench, {"threads": (threads, 100.0)}, []) == 0, bench.failures
    assert torch.get_num_threads() == bench.threads
    rows = bench.results.rows("threads")
    assert [row["contender"] for row in rows] == ["one thread", "two threads"] * 2
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="Linux counts")
def test_a_busy_process_is_counted_and_this_one_is_not(monkeypatch):
    """By a clock and counters that are made up: a real one would have to be quiet."""
    times = iter([(0.0, 10.0, 1.0), (4.0, 17.0, 4.0)])
    monkeypatch.setattr(Others, "_now", staticmethod(lambda: next(times)))
    assert Others().processors() == 1.0


def test_the_counters_are_those_of_this_machine():
    with _busy(1):
        begin, found = time.perf_counter(), Others._now()
        time.sleep(1.5)
        later = Others._now()
    if found is not None:
        assert later[0] - found[0] >= 1.5
        assert 0 < later[1] - found[1] <= (time.perf_counter() - begin + 1) * os.cpu_count()
