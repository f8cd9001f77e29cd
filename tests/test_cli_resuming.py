"""The notes of a fit that goes on: small cases. The command line is in tests/cli."""

from types import SimpleNamespace

import pytest

from ddim_pl.cli_resuming import changed_settings, tell_of_idleness


@pytest.mark.parametrize(
    ("now", "changes"),
    [
        ({"data.root": "a"}, []),
        ({"data.root": "b"}, ["data.root: a -> b"]),
        ({}, ["data.root: a -> none"]),
        ({"data.root": "a", "data.pad": 1}, []),  # an older version did not know it
        ({"data.root": "x" * 100}, [f"data.root: a -> {'x' * 60}..."]),
    ],
)
def test_settings_that_were_others(now, changes):
    assert changed_settings({"data.root": "a"}, now) == changes


def test_what_another_note_says_is_left_out():
    before = {"trainer.max_steps": 1, "model.optimizer.lr": 0.1, "model.clip": True}
    now = {"trainer.max_steps": 2, "model.optimizer.lr": 0.2, "model.clip": False}
    assert changed_settings(before, now) == ["model.clip: True -> False"]


@pytest.mark.parametrize(
    ("step", "limits", "said"),
    [
        (21, {"max_steps": 21}, None),
        (20, {"max_steps": 20}, "at update 20, the end by trainer.max_steps=20; give"),
        (20, {"max_epochs": 2}, "the end by trainer.max_epochs=2; give"),
        (20, {"max_epochs": 2, "max_steps": 9}, "by trainer.max_steps=9 and trainer.max_epochs=2"),
        (20, {}, "the end by the settings of the trainer"),
    ],
)
def test_a_fit_that_did_nothing_says_so(step, limits, said, caplog):
    caplog.set_level("INFO")
    trainer = SimpleNamespace(
        **{"max_steps": -1, "max_epochs": None, "global_step": step} | limits
    )
    tell_of_idleness(trainer, 20)
    assert said in caplog.text if said else not caplog.records
