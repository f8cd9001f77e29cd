from pathlib import Path

import pytest
import torch

from ddim_pl.metrics import train_digits
from ddim_pl.metrics.digits import HELDOUT_ACCURACY, DigitsFeatures


def test_heldout_digits_are_classified_as_well_as_stated() -> None:
    accuracy = train_digits.heldout_accuracy(DigitsFeatures())
    assert accuracy >= 0.97
    # Other processors may round one borderline image differently.
    assert accuracy == pytest.approx(HELDOUT_ACCURACY, abs=1.5 / 360)


def test_training_writes_what_the_extractor_loads_and_repeats_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "digits.safetensors"
    state = torch.get_rng_state()
    train_digits.main(["--output", str(path), "--steps", "4"])
    assert torch.equal(torch.get_rng_state(), state)
    assert "held-out accuracy 0." in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]
    first = DigitsFeatures(path).state_dict()
    again = train_digits.train(seed=0, num_steps=4)
    torch.testing.assert_close(first["classifier.head.weight"], again.head.weight.detach())
    other = train_digits.train(seed=1, num_steps=4)
    assert not torch.equal(other.head.weight, again.head.weight)


def test_shifts_move_by_at_most_one_pixel() -> None:
    images = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    images[:, :, 3, 4] = 1
    moved = train_digits.shifted(images, torch.Generator().manual_seed(0)).nonzero()
    assert moved[:, 0].tolist() == list(range(200))
    assert set(moved[:, 2].tolist()) == {2, 3, 4}
    assert set(moved[:, 3].tolist()) == {3, 4, 5}
