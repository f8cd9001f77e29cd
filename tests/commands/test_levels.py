"""`main.py levels`."""

import json

import pytest
from command_runs import trainer, with_classes
from tiny import some_ddpm


def test_found_levels_can_be_given_as_timesteps(tmp_path, capsys):
    model = some_ddpm()
    trainer(tmp_path).levels(model, num_steps=[2, 4], num_images=8)
    file = tmp_path / "levels.json"
    found = json.loads(file.read_text())["levels"]
    assert sorted(found) == ["2", "4"]
    assert "4 steps" in capsys.readouterr().out
    again = some_ddpm(timesteps=str(file), num_steps=4)
    assert again.levels.tolist() == found["4"]
    assert again.sample(range(2)).isfinite().all()


@pytest.mark.slow
def test_levels_do_not_depend_on_the_batches(tmp_path):
    model = with_classes()
    for size in (3, 64):
        output = str(tmp_path / f"{size}.json")
        trainer(tmp_path).levels(
            model, num_steps=[3], num_images=8, batch_size=size, output=output
        )
    assert json.loads((tmp_path / "3.json").read_text()) == json.loads(
        (tmp_path / "64.json").read_text()
    )
