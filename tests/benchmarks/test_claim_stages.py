"""The stages of the study that ships: in order, each of use, with commands that can be read."""

from pathlib import Path

import pytest
import yaml
from claim_page import with_needs
from claim_stages import Maker, number, thinned
from claims import CLAIMS
from measuring import ROOT
from studies import DIGITS

from ddim_pl.cli import main

STAGES = Maker(DIGITS, 7, Path("runs/try")).all()


def test_every_stage_comes_after_those_it_needs_and_serves_a_claim():
    names = [stage.name for stage in STAGES]
    assert len({*names}) == len(names)
    for place, stage in enumerate(STAGES):
        assert {*stage.needs} <= {*names[:place]}, stage.name
    used = [with_needs(claim.stages(DIGITS), STAGES, 7) for claim in CLAIMS.values()]
    assert set.union(*used) == {*names}


def test_no_two_stages_write_to_one_folder():
    folders = [stage.folder for stage in STAGES]
    assert len({*folders}) == len(folders)


@pytest.mark.parametrize("stage", [s for s in STAGES if s.run], ids=lambda stage: stage.name)
def test_a_fit_can_be_read_and_its_rate_falls_to_its_end(stage, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    ((_, *arguments),) = stage.commands
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code in (0, None), printed.err
    config = yaml.safe_load(printed.out)
    model, trainer = config["model"]["init_args"], config["trainer"]
    assert config["seed_everything"] == 7
    assert trainer["logger"]["init_args"]["save_dir"] == "runs/try/runs"
    updates = trainer["max_epochs"] * config["data"]["init_args"]["steps_per_epoch"]
    if "rounds" not in model:  # each of which has a rate of its own
        assert model["lr_scheduler"]["init_args"]["total_iters"] == updates
    if stage.name in ("luhman-7", "ladder-7"):
        passes = DIGITS.passes[stage.name.removesuffix("-7")]
        size = config["data"]["init_args"]["batch_size"]
        if stage.name == "ladder-7":
            assert passes == 5 * size * sum(count for _, count in model["rounds"])
        else:
            pairs = config["data"]["init_args"]["num_pairs"] * model["teacher_num_steps"]
            assert passes == 3 * size * updates + pairs
            assert model["teacher_num_steps"] == DIGITS.pair_steps


def test_samplers_of_gamma_noise_have_their_models_scale():
    for stage in STAGES:
        if stage.name.endswith("-steps-7") and stage.name.startswith("gamma"):
            theta = stage.name.split("-")[1]
            assert stage.commands[0][3].count(f'"theta_0": {theta}') == 3


def test_a_cell_of_a_table_is_a_number_where_it_can_be():
    assert [number(text) for text in ("12", "-3", "1.5e-3", "4/4", "")] == [
        12,
        -3,
        1.5e-3,
        "4/4",
        "",
    ]


def test_a_thinned_curve_keeps_its_ends():
    rows = [{"update": i} for i in range(1000)]
    kept = thinned(rows)
    assert len(kept) < 70
    assert (kept[0], kept[-1]) == (rows[0], rows[-1])
    assert thinned(rows[:3]) == rows[:3]
