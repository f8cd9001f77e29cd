"""No number moves, see `record.py`; and what earlier versions wrote loads and resumes."""

import json
import tarfile
import warnings
from pathlib import Path

import pytest

from ddim_pl.cli import main
from ddim_pl.training.loading import load as load_teacher
from golden import record

CHECKPOINTS = Path(__file__).with_name("checkpoints.tar.xz")


@pytest.mark.slow
def test_every_number_is_as_it_was_recorded(tmp_path):
    recorded = json.loads(record.NUMBERS.read_text())
    assert not record.differences(record.collect(tmp_path), recorded)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Checkpoints that version 0.1.0 wrote in the middle of a fit, and what became of it."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(CHECKPOINTS) as archive:
        archive.extractall(folder, filter="data")
    return folder, json.loads((folder / "expected.json").read_text())


def of(expected, name):
    """What was recorded of one checkpoint."""
    numbers = {k: v for k, v in expected["numbers"].items() if k.startswith(f"{name}/")}
    return {"machine": expected["machine"], "numbers": numbers}


@pytest.mark.parametrize("name", ["ddpm", "gamma", "progressive", "student", "luhman"])
def test_an_old_checkpoint_draws_what_it_drew(old, name):
    folder, expected = old
    images = load_teacher(str(folder / f"{name}.ckpt")).sample(range(3))
    found = {f"{name}/images": record.summary(images)}
    numbers = {key: of(expected, name)["numbers"][key] for key in found}
    # With the cosine schedule the last step has ended in the estimate of x since: other bits.
    machine = expected["machine"] if name in ("ddpm", "luhman") else {}
    assert not record.differences(found, {"machine": machine, "numbers": numbers})


@pytest.mark.parametrize("name", ["ddpm", "gamma", "progressive", "luhman"])
def test_an_old_checkpoint_resumes_to_the_weights_of_an_unbroken_run(
    old, name, tmp_path, monkeypatch
):
    folder, expected = old
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ddpm.ckpt").write_bytes((folder / "ddpm.ckpt").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(["fit", "--ckpt_path", str(folder / f"{name}.ckpt")])
    last = next((tmp_path / "runs" / name).glob("version_*/checkpoints/last.ckpt"))
    found = {f"{name}/{k}": record.summary(v) for k, v in record.weights(last).items()}
    numbers = {key: of(expected, name)["numbers"][key] for key in found}
    assert not record.differences(found, {**expected, "numbers": numbers})
