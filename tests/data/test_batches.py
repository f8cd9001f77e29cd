"""Every loader's batches become images and labels that training can take, or one line."""

import warnings

import pytest
import torch
from small_trainer import trainer
from tiny import tiny_ddpm, tiny_unet
from torch.utils.data import DataLoader, TensorDataset

from ddim_pl.data.base import Batch, count_images
from ddim_pl.data.batches import NUM_CHECKED, BatchReader
from ddim_pl.data.teacher_pairs import PairBatch
from ddim_pl.images import from_uint8

# Images held in memory need no workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

SHAPE = (1, 8, 8)
PIXELS = torch.randint(0, 256, (16, *SHAPE), dtype=torch.uint8, generator=torch.manual_seed(0))
IMAGES = from_uint8(PIXELS)
LABELS = torch.arange(16) % 3

FORMS = {
    "tensor": IMAGES,
    "one in a list": [IMAGES],
    "tuple": (IMAGES, LABELS),
    "list": [IMAGES, LABELS],
    "named": Batch(IMAGES, LABELS),
    "dict": {"labels": LABELS, "images": IMAGES},
    "uint8": PIXELS,
    "uint8 in a dict": {"images": PIXELS},
    "float64": (IMAGES.double(), LABELS),
}


@pytest.mark.parametrize("batch", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_images(batch):
    read = BatchReader(SHAPE, None)(batch)
    torch.testing.assert_close(read[0], IMAGES, rtol=0, atol=1e-7)
    assert len(read) == 1 or torch.equal(read[1], LABELS)


@pytest.mark.parametrize("batch", FORMS.values(), ids=FORMS)
def test_every_form_can_be_counted(batch):
    assert count_images(batch) == 16


def test_a_dict_with_other_names_is_read_where_they_are_told():
    read_batch = BatchReader(SHAPE, 3)
    batch = {"pixel_values": IMAGES, "label": LABELS}
    with pytest.raises(
        ValueError, match=r"got a dict of 'pixel_values', 'label'.*read_batch.keys"
    ):
        read_batch(batch)
    read_batch.keys = ("pixel_values", "label")
    assert torch.equal(read_batch(batch)[1], LABELS)


def test_pairs_keep_their_latents_and_may_lie_anywhere():
    pairs = PairBatch(IMAGES * 30, LABELS, IMAGES)
    assert BatchReader(SHAPE, None)(pairs) is pairs


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (IMAGES[0], r"got \(1, 8, 8\): give the DataLoader a batch_size"),
        (IMAGES[:, 0], r"got \(16, 8, 8\): insert the channel"),
        (IMAGES.permute(0, 2, 3, 1), r"got \(16, 8, 8, 1\): move the channels"),
        (IMAGES[..., :6], r"got \(16, 1, 8, 6\): change the images"),
        (IMAGES[:0], r"got \(0, 1, 8, 8\)"),
        (PIXELS.long(), "must be float in .* or uint8, got torch.int64"),
        (PIXELS.float(), r"must lie in about \[-1, 1\], got 0 to 255: rescale"),
        (IMAGES / 0, "must lie in about"),
        (IMAGES.new_full(IMAGES.shape, torch.nan), "must lie in about .* got nan to nan"),
        ("images", "must be a tensor of images, a tuple .*, got str"),
        ([], "got list"),
        ((["cat.png"], LABELS), "images must be a tensor .*, got list"),
        ({}, "got a dict of nothing"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_with_the_remedy(batch, message):
    with pytest.raises(ValueError, match=message):
        BatchReader(SHAPE, None)(batch)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (IMAGES, "batch must hold labels for a model of 3 classes, got NoneType"),
        ((IMAGES, LABELS.float()), "must be whole numbers .*, got torch.float32"),
        ((IMAGES, LABELS[:5]), r"of shape \(16,\), got .* \(5,\)"),
        ((IMAGES, LABELS + 1), r"must lie in \[0, 2\], got 1 to 3: count the classes from 0"),
        (Batch(IMAGES, LABELS.float()), "must be whole numbers"),
    ],
)
def test_wrong_labels_are_refused_by_a_model_with_classes(batch, message):
    with pytest.raises(ValueError, match=message):
        BatchReader(SHAPE, 3)(batch)
    if isinstance(batch, Batch):
        return
    BatchReader(SHAPE, None)(batch)  # which a model without classes does not read


def fit(folder, model, loader):
    limits = {"max_steps": NUM_CHECKED, "enable_checkpointing": False}
    trainer(folder, **limits).fit(model, loader, loader)
    return model.state_dict()


def test_any_loader_trains_as_the_images_do(tmp_path):
    loaders = [
        DataLoader(TensorDataset(IMAGES), 4),
        DataLoader(IMAGES, 4),
        DataLoader(PIXELS, 4),
        DataLoader([{"images": image} for image in IMAGES], 4),
    ]
    seen = []
    for loader in loaders:
        torch.manual_seed(0)
        seen.append(fit(tmp_path, tiny_ddpm(network=tiny_unet(dropout=0.0)), loader))
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0])


def test_single_images_are_no_batch(tmp_path):
    loader = DataLoader(IMAGES, batch_size=None)
    with pytest.raises(ValueError, match="give the DataLoader a batch_size"):
        fit(tmp_path, tiny_ddpm(), loader)


def test_images_above_0_alone_are_a_warning_in_training(tmp_path):
    with pytest.warns(UserWarning, match=r"no value of the first 4 batches is below 0: if"):
        fit(tmp_path, tiny_ddpm(), DataLoader(IMAGES / 2 + 0.5, 4))


def test_a_bright_batch_alone_is_none():
    read_batch = BatchReader(SHAPE, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(NUM_CHECKED - 1):
            read_batch(IMAGES.abs())
        read_batch(IMAGES)
        for _ in range(NUM_CHECKED):
            read_batch(IMAGES.abs())
            BatchReader(SHAPE, None)(PIXELS | 128)
