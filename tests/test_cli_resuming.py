"""The notes of a fit that goes on: small cases. The command line is in tests/cli."""

from types import SimpleNamespace

import pytest
import torch

from ddim_pl.cli_resuming import changed_settings, tell_of_idleness, tell_of_resuming
from ddim_pl.training.hyperparameters import CONFIG_KEY


def sampled(name, **arguments):
    return {"model": {"init_args": {"sampler": {"class_path": name, "init_args": arguments}}}}


@pytest.mark.parametrize(
    ("before", "now", "changes"),
    [
        ({"root": "a"}, {"root": "a"}, []),
        ({"root": "a"}, {"root": "b"}, ["data.root: 'a' -> 'b'"]),
        ({"root": "a"}, {"root": None}, ["data.root: 'a' -> None"]),
        ({"root": "a"}, {"root": "a", "pad": 1}, []),  # an older version did not know it
        ({"root": "~/a"}, {"root": "/home/me/a"}, []),
        ({"sizes": [*range(9)]}, {"sizes": [1]}, ["data.sizes: [0, 1, 2, 3, ...] -> [1]"]),
        ("text", {"root": "a"}, []),
    ],
)
def test_settings_that_were_others(before, now, changes, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [*changed_settings({"data": before}, {"data": now})] == changes


def test_a_class_stands_under_its_arguments_name():
    before, now = sampled("DDIM", eta=0.0, clip=None), sampled("Heun", clip=None)
    assert [*changed_settings(before, now)] == ["model.sampler: 'DDIM' -> 'Heun'"]
    assert [*changed_settings(before, sampled("DDIM", eta=1.0))] == [
        "model.sampler.eta: 0.0 -> 1.0"
    ]


def test_what_another_note_says_is_left_out():
    before = {"trainer": {"max_steps": 1, "logger": 1}, "model": {"init_args": {"optimizer": 1}}}
    now = {"trainer": {"max_steps": 2, "logger": 2}, "model": {"init_args": {"optimizer": 2}}}
    assert [*changed_settings(before, now)] == []


@pytest.mark.parametrize("text", ["[1]", "", "a: [", "1", "trainer: x", "\t", "&a [*a]"])
def test_a_strangers_config_of_any_form_is_no_error(text, tmp_path, caplog):
    caplog.set_level("INFO")
    torch.save({"state_dict": {}, CONFIG_KEY: text, "global_step": 7}, tmp_path / "a.ckpt")
    settings = {"trainer": {"precision": 1}, "data": {"root": "a"}}
    assert tell_of_resuming(tmp_path / "a.ckpt", settings) == 7
    assert not caplog.records


def test_a_strangers_text_is_short_and_cannot_write_to_the_terminal(tmp_path, caplog):
    caplog.set_level("INFO")
    bomb = "\n".join(
        ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
        + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)]
    )
    text = f'{bomb}\ndata: {{root: "\\e[31m\\nerror: all lost", x: *a11, y: "{"z" * 500}"}}'
    torch.save({"state_dict": {}, CONFIG_KEY: text}, tmp_path / "a.ckpt")
    settings = {"data": {"root": "a", "x": [1], "y": "a", **{f"k{n}": n for n in range(20)}}}
    tell_of_resuming(tmp_path / "a.ckpt", settings)
    (record,) = caplog.records
    message = record.getMessage()
    assert "\x1b" not in message
    assert "\n" not in message
    assert len(message) < 400


def test_many_changes_are_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    text = "data: {" + ", ".join(f"k{n}: 0" for n in range(20)) + "}"
    torch.save({"state_dict": {}, CONFIG_KEY: text}, tmp_path / "a.ckpt")
    tell_of_resuming(tmp_path / "a.ckpt", {"data": {f"k{n}": 1 for n in range(20)}})
    assert "data.k7: 0 -> 1; and 12 more" in caplog.text


LADDER = SimpleNamespace(rounds=[])


@pytest.mark.parametrize(
    ("step", "epoch", "limits", "more", "said"),
    [
        (21, 1, {"max_steps": 21}, {}, None),
        (20, 1, {"max_steps": 20}, {}, "at update 20, the end by trainer.max_steps=20; give"),
        (20, 2, {"max_epochs": 2}, {}, "the end by trainer.max_epochs=2; give"),
        (20, 1, {"max_epochs": 2}, {}, None),  # max_time, for example
        (20, 1, {"max_steps": -1, "max_epochs": None}, {}, None),
        (20, 1, {"max_steps": 20}, {"fast_dev_run": 1}, None),
        (20, 1, {}, {"lightning_module": LADDER, "max_steps": 20}, "the end of its rounds"),
        (20, 1, {}, {"lightning_module": LADDER, "max_steps": 30}, None),
        (20, 1, {}, {"max_steps": 20}, None),
    ],
)
def test_a_fit_that_did_nothing_says_so(step, epoch, limits, more, said, caplog):
    caplog.set_level("INFO")
    state = {"global_step": step, "current_epoch": epoch, "lightning_module": None}
    trainer = SimpleNamespace(**{"max_steps": -1, **state, **more})
    tell_of_idleness(trainer, 20, limits)
    assert said in caplog.text if said else not caplog.records
