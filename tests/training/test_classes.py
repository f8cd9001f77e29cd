"""A run that goes on says so where labels have come to mean other classes."""

import warnings

import pytest
import torch
from PIL import Image
from small_trainer import trainer
from tiny import tiny_ddpm, tiny_unet

from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.training.classes import CLASSES_KEY, LONGEST, MOST_NAMES

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def images(folder, names):
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / name / "0.png")
    return folder


def data(folder, lines=None):
    file = None
    if lines is not None:
        file = folder.with_suffix(".txt")
        file.write_text("".join(f"{line}\n" for line in lines))
    arguments = {"channels": 1, "batch_size": 2, "labels": None if file is None else str(file)}
    return ImageFolderDataModule(str(folder), 8, steps_per_epoch=1, **arguments)


def said(folder, source, *, updates, resume=None, num_classes=3):
    """Warnings about classes, of a fit that is saved in a file."""
    t = trainer(folder, max_steps=updates, limit_val_batches=0, enable_checkpointing=False)
    module = tiny_ddpm(network=tiny_unet(num_classes=num_classes))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        t.fit(module, source, ckpt_path=resume, weights_only=True if resume else None)
    t.save_checkpoint(folder / f"{updates}.ckpt")
    texts = [str(each.message) for each in found]
    return [text for text in texts if "mean other classes" in text]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A checkpoint of two classes, cat and dog."""
    folder = tmp_path_factory.mktemp("first")
    assert said(folder, data(images(folder / "images", ["cat", "dog"])), updates=1) == []
    return folder / "1.ckpt"


SAME = {
    "the same folders": (["cat", "dog"], None),
    "a file of the same names": (["x", "y"], ["x/0.png dog", "y/0.png cat"]),
    "one more class behind": (["cat", "dog", "eel"], None),
}
OTHER = {
    "other folders": (["bat", "cat", "dog"], None, "2 labels", "'cat' and is 'bat'"),
    "another folder": (["cat", "eel"], None, "1 labels", "'dog' and is 'eel'"),
    "numbers": (["cat", "dog"], ["cat/0.png 1", "dog/0.png 0"], "2 labels", "'cat' and is '0'"),
}


@pytest.mark.parametrize(("names", "lines"), SAME.values(), ids=SAME)
def test_the_same_classes_are_not_spoken_of(first, tmp_path, names, lines):
    source = data(images(tmp_path / "images", names), lines)
    assert said(tmp_path, source, updates=2, resume=first) == []


@pytest.mark.parametrize(("names", "lines", "count", "change"), OTHER.values(), ids=OTHER)
def test_other_classes_are_warned_of(first, tmp_path, names, lines, count, change):
    source = data(images(tmp_path / "images", names), lines)
    (text,) = said(tmp_path, source, updates=2, resume=first)
    assert text.startswith(f"{count} mean other classes than in the checkpoint")
    assert f"which was {change}: the network takes one for the other" in text


def test_the_names_are_plain_and_bounded(first, tmp_path):
    assert torch.load(first, weights_only=True)[CLASSES_KEY] == ["cat", "dog"]
    module, source = tiny_ddpm(network=tiny_unet(num_classes=3)), DigitsDataModule()
    module.trainer = trainer(tmp_path)
    module.trainer.datamodule = source
    source.class_names = ("x" * 1000,) * (MOST_NAMES + 1)
    checkpoint = {"state_dict": {}}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint[CLASSES_KEY] == ["x" * LONGEST] * MOST_NAMES


@pytest.mark.parametrize("given", [None, 3, {}, [None, {}], "cat"])
def test_a_checkpoint_without_names_or_with_anything_goes_on(first, tmp_path, given):
    content = torch.load(first, weights_only=True)
    content[CLASSES_KEY] = given
    torch.save(content, tmp_path / "other.ckpt")
    source = data(images(tmp_path / "images", ["cat", "eel"]))
    texts = said(tmp_path, source, updates=2, resume=tmp_path / "other.ckpt")
    assert len(texts) == (1 if isinstance(given, list) else 0)


def test_a_network_without_classes_has_no_names(tmp_path):
    source = data(images(tmp_path / "images", ["cat", "dog"]))
    said(tmp_path, source, updates=1, num_classes=None)
    assert CLASSES_KEY not in torch.load(tmp_path / "1.ckpt", weights_only=True)
