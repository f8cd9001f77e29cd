"""Pairs beside real images of any kind."""

import pytest
from PIL import Image

from ddim_pl.data.base import ImageDataModule
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.data.teacher_pairs import TeacherPairsDataModule


class Same(ImageDataModule):
    """Validates on its training images, as folders and shards do that have no others."""

    def load(self, train):
        return DigitsDataModule().load(True) if train else self.train_set


def folder(root, names=("cat", "dog")):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "0.png")
    return str(root)


@pytest.mark.parametrize("kind", [Same, DigitsDataModule, ImageFolderDataModule])
def test_the_real_images_are_those_of_its_source(kind, tmp_path):
    of_folder = kind is ImageFolderDataModule
    source = kind(folder(tmp_path / "images"), 8) if of_folder else kind()
    pairs = TeacherPairsDataModule(source, str(tmp_path / "pairs"), num_pairs=4, num_validation=4)
    pairs.prepare_data()
    pairs.setup("fit")
    assert pairs.train_set is source.train_set
    assert pairs.val_set is source.val_set
    assert (pairs.val_set is pairs.train_set) == (kind is not DigitsDataModule)
    assert pairs.class_names == source.class_names
    assert pairs.class_names == (("cat", "dog") if of_folder else ())
