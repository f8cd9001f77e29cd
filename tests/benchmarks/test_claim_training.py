"""What fits wrote is read back: images, operations, losses, distances."""

from dataclasses import replace

import pytest
import yaml
from claim_training import progress, trained
from limits import count_flops
from studies import DIGITS, LADDER, Fit
from torch.utils.tensorboard import SummaryWriter

from benchmarks.tiny_study import TINY

FD = {"class_path": "callbacks.FrechetDistance", "init_args": {"num_samples": 2000}}


def write(run, scalars, *, callbacks=(FD,), batch_size=10, num_steps=16):
    """Logs of a fit, with what its config says."""
    run.mkdir(parents=True, exist_ok=True)
    config = {
        "data": {"init_args": {"batch_size": batch_size}},
        "model": {"init_args": {"num_steps": num_steps}},
        "trainer": {"callbacks": [*callbacks]},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with SummaryWriter(str(run)) as writer:
        for name, points in scalars.items():
            for step, value in points:
                writer.add_scalar(name, value, step)
    return run


def test_logs_are_read_by_images_seen(tmp_path):
    scalars = {"val/loss": [(9, 0.5), (19, 0.25)], "val/digits_fd": [(19, 3.0)]}
    found = progress(write(tmp_path / "a", scalars), "digits")
    assert found.images == 200
    assert found.losses == pytest.approx({100: 0.5, 200: 0.25})
    assert found.distances == pytest.approx({200: 3.0})
    assert found.of == "2,000 images, 16 steps"


def test_a_fit_that_went_on_counts_its_steps_once(tmp_path):
    run = write(tmp_path / "a", {"val/loss": [(9, 0.5), (19, 0.25)]})
    write(run, {"val/loss": [(19, 0.125), (29, 0.0625)]})
    assert progress(run, "digits").losses == pytest.approx({100: 0.5, 200: 0.125, 300: 0.0625})


def test_a_fit_that_has_validated_nothing_is_left_out(tmp_path):
    assert progress(tmp_path / "no folder", "digits") is None
    assert progress(write(tmp_path / "a", {"train/loss": [(9, 0.5)]}), "digits") is None
    assert trained(TINY, {"eps": {0: tmp_path / "no folder"}}) == ([], None)


def test_the_table_has_images_and_operations_and_the_figure_distances(tmp_path):
    runs = {
        "teacher": {
            seed: write(
                tmp_path / f"t{seed}",
                {"val/loss": [(9, 0.5 + seed)], "val/digits_fd": [(9, 3.0 + seed)]},
            )
            for seed in (0, 1)
        },
        "ladder": {0: write(tmp_path / "l", {"val/loss": [(19, 0.5)]}, callbacks=())},
    }
    rows, panel = trained(DIGITS, runs)
    teacher, ladder = rows
    assert (teacher["seeds"], teacher["images seen"]) == (2, "100")
    assert float(teacher["validation loss"].split()[0]) == pytest.approx(1)
    assert (ladder["seeds"], ladder["images seen"]) == (1, "200")
    # Twice the images, and 5 passes for 3.
    operations = [float(row["PFLOP"].split()[0]) for row in rows]
    assert operations[1] / operations[0] == pytest.approx(2 * LADDER / 3, rel=0.02)
    assert panel.lines == {"teacher: 2,000 images, 16 steps": {100: pytest.approx([3.0, 4.0])}}


def test_operations_are_those_of_the_teachers_network(tmp_path):
    """One forward pass of an image, by the counter of another script."""
    import torch
    from subjects import build

    run = write(tmp_path / "a", {"val/loss": [(0, 0.5)]}, batch_size=1)
    study = replace(DIGITS, fits={**DIGITS.fits, "one": Fit("", teacher="teacher", passes=1)})
    ((row,), _) = trained(study, {"one": {0: run}})
    file = DIGITS.fits["teacher"].config
    with open(file) as text:
        network = build(yaml.safe_load(text)["model"]["init_args"]["network"]).eval()
    label = torch.zeros(1, dtype=torch.long)
    one = count_flops(network, torch.zeros(1, 1, 8, 8), torch.zeros(1), label)
    assert 1e6 < one < 1e9
    assert float(row["PFLOP"]) == pytest.approx(one / 1e15, rel=0.01)
