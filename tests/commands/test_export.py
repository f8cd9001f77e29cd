"""A checkpoint to give to others: the same images, nothing of this machine."""

import pytest
import torch
from tiny import tiny_config, write_config

import ddim_pl
from ddim_pl.cli import main
from ddim_pl.commands.export import without_paths
from ddim_pl.schedules import LinearSchedule
from ddim_pl.timesteps import save_levels


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret-account")
    config = tiny_config(folder, max_epochs=1)
    levels = folder / "levels.json"
    save_levels(levels, LinearSchedule(), [torch.tensor([1000.0, 500.0, 0.0])])
    config["model"]["init_args"] |= {"timesteps": str(levels), "num_steps": 2}
    main(["fit", "--config", write_config(config, folder / "config.yaml")])
    last = folder / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    output = folder / "out" / "model.ckpt"
    main(["export", "--ckpt_path", str(last), "--output", str(output)])
    return last, output


def test_an_exported_checkpoint_draws_the_same_images(shared):
    last, output = shared
    ours, theirs = ddim_pl.load(last), ddim_pl.load(output)
    assert type(theirs) is ddim_pl.DDPM
    assert theirs.timesteps == [1000.0, 500.0, 0.0]
    assert torch.equal(ours.sample([0, 1]), theirs.sample([0, 1]))
    assert output.stat().st_size < last.stat().st_size / 2


def test_it_holds_no_path_of_this_machine(shared):
    last, output = shared
    assert b"secret-account" in last.read_bytes()
    assert b"secret-account" not in output.read_bytes()


def test_it_works_from_the_command_line(shared, tmp_path, monkeypatch):
    _, output = shared
    monkeypatch.chdir(tmp_path)
    moved = tmp_path / "model.ckpt"
    moved.write_bytes(output.read_bytes())
    main(["sample", "--ckpt_path", "model.ckpt", "--num_images", "2"])
    assert list(tmp_path.glob("model-run/**/000001.png"))
    main(["test", "--ckpt_path", "model.ckpt"])


def test_nothing_is_written_over(shared, capsys):
    last, output = shared
    before = output.read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["export", "--ckpt_path", str(last), "--output", str(output)])
    assert "output must be a new file" in str(stop.value.code)
    assert output.read_bytes() == before


def test_paths_are_left_out_wherever_they_stand():
    data = {"a": {"root": "/home/me", "b": ["~/x", "y", {"c": "/z", "d": 1}]}, "e": "data"}
    assert without_paths(data) == {"a": {"b": ["y", {"d": 1}]}, "e": "data"}
