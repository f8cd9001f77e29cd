"""Candidates of the search for a small CIFAR-10 teacher."""

import pytest
import quick_search
from photographs import folder_of_noise


@pytest.fixture
def folder(tmp_path):
    return folder_of_noise(tmp_path / "images", 13)


def test_every_candidate_can_be_built():
    for name in quick_search.CANDIDATES:
        candidate = quick_search.Candidate(name)
        assert candidate.model.network.num_classes == 10
        assert candidate.batch_size in (32, 64, 128)
    rates = [quick_search.Candidate(name).model.optimizer.keywords for name in ("rate 4e-4",)]
    assert rates == [{"lr": 4e-4}]


def test_a_candidate_of_twice_the_cost_sees_half_the_images_and_what_is_measured_is_kept(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    tiny = {"channels": 8, "multipliers": [1], "attention": [], "groups": 4}
    names = {"as in quick.yaml": (tiny, {}), "another": (tiny, {})}
    monkeypatch.setattr(quick_search, "CANDIDATES", names)
    calls = []

    def costs(root):
        calls.append(root)
        return {"as in quick.yaml": 1.0, "another": 2.0}

    monkeypatch.setattr(quick_search, "costs", costs)
    found = {"test/loss": 0.5, "test/cifar_fd": 9.0}
    monkeypatch.setattr(quick_search.Candidate, "measured", lambda self, data: found)
    monkeypatch.setattr("sys.argv", ["quick_search.py", folder, "--images", "256"])
    quick_search.main()
    rows = quick_search.kept("search.json", list)
    assert [row["images"] for row in rows] == [256, 128]
    assert "| another | 0 | 2 | 128 |" in capsys.readouterr().out
    quick_search.main()
    assert calls == [folder]
    assert quick_search.kept("search.json", list) == rows
