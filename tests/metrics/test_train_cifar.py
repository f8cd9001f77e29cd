import os
from pathlib import Path

import pytest
import torch
from photographs import folder_of_noise

from ddim_pl.metrics import train_cifar
from ddim_pl.metrics.cifar import HELDOUT_ACCURACY, CIFARFeatures

PHOTOGRAPHS = os.environ.get("DDIM_PL_CIFAR10_FOLDER")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return folder_of_noise(tmp_path / "images", 12)


def test_every_tenth_image_of_each_class_is_held_out() -> None:
    labels = torch.arange(400) % 10
    training, heldout = train_cifar.cifar_split(labels)
    assert sorted([*training.tolist(), *heldout.tolist()]) == list(range(400))
    assert heldout.tolist() == [
        *range(90, 100),
        *range(190, 200),
        *range(290, 300),
        *range(390, 400),
    ]


def test_training_writes_what_the_extractor_loads(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cifar.safetensors"
    state = torch.get_rng_state()
    train_cifar.main([folder, "--output", str(path), "--epochs", "1"])
    assert torch.equal(torch.get_rng_state(), state)
    assert "held-out accuracy 0." in capsys.readouterr().out
    assert {each.name for each in tmp_path.iterdir()} == {"cifar.safetensors", "images"}
    assert path.stat().st_size < 2_000_000
    assert CIFARFeatures(str(path)).classifier.head.weight.dtype == torch.float32


def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (300, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(300) % 10
    whole = train_cifar.train(images, labels, num_epochs=2)

    calls = 0
    epoch = train_cifar.Training.epoch

    def dies_in_the_second(run: train_cifar.Training, *arguments: torch.Tensor) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return epoch(run, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_cifar.Training, "epoch", dies_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            train_cifar.train(images, labels, num_epochs=2, kept=tmp_path / "kept.state")
    resumed = train_cifar.train(images, labels, num_epochs=2, kept=tmp_path / "kept.state")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
    assert not torch.equal(whole.head.weight, train_cifar.Training(2, 0).network.head.weight)


def test_a_folder_without_ten_classes_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match="each of 10 classes, got 1 classes in"):
        train_cifar.read_images(f"{folder}/3")


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS, reason="DDIM_PL_CIFAR10_FOLDER names no folder of CIFAR-10")
def test_heldout_photographs_are_classified_as_well_as_stated() -> None:
    images, labels = train_cifar.read_images(str(PHOTOGRAPHS))
    _, heldout = train_cifar.cifar_split(labels)
    accuracy = train_cifar.accuracy_on(CIFARFeatures(), images[heldout], labels[heldout])
    assert accuracy == pytest.approx(HELDOUT_ACCURACY, abs=0.002)
