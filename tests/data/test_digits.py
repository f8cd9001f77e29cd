import pytest
import torch

from data.inference import check_loads_in_inference_mode
from ddim_pl.data.digits import DigitsDataModule, digits_arrays, digits_split


def test_scans_fill_the_range_of_bytes_and_keep_their_17_levels() -> None:
    images, labels = digits_arrays()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert sorted(labels.unique().tolist()) == list(range(10))
    levels = (torch.arange(17) * 255 / 16).round().to(torch.uint8)
    torch.testing.assert_close(images.unique(), levels)


def test_the_split_is_fixed_disjoint_and_stratified() -> None:
    train, heldout = digits_split()
    assert torch.equal(train, digits_split()[0])
    assert (len(train), len(heldout)) == (1437, 360)
    assert sorted(torch.cat([train, heldout]).tolist()) == list(range(1797))
    _, labels = digits_arrays()
    shares = torch.bincount(labels[heldout]) / torch.bincount(labels)
    torch.testing.assert_close(shares, torch.full((10,), 360 / 1797), atol=0.01, rtol=0)


def test_all_digits_are_trained_on_and_validated_on_unless_some_are_held_out() -> None:
    data = DigitsDataModule()
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == (1797, 1797)
    assert (data.shape, data.num_classes, data.num_reference) == ((1, 8, 8), 10, 1797)
    data = DigitsDataModule(holdout=True)
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set), data.num_reference) == (1437, 360, 1437)
    images, labels = digits_arrays()
    _, heldout = digits_split()
    batches = list(data.val_dataloader())
    torch.testing.assert_close(torch.cat([batch.images for batch in batches]), images[heldout])
    torch.testing.assert_close(torch.cat([batch.labels for batch in batches]), labels[heldout])


def test_digits_are_never_mirrored() -> None:
    data = DigitsDataModule(batch_size=1797)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    originals = {image.numpy().tobytes() for image in digits_arrays()[0]}
    assert {image.numpy().tobytes() for image in batch.images} == originals
    with pytest.raises(TypeError, match="flip"):
        DigitsDataModule(flip=True)


def test_a_command_loads_images_in_its_inference_mode() -> None:
    check_loads_in_inference_mode(DigitsDataModule)
