"""Where the images of a command come from."""

import pytest
import torch
from command_runs import trainer
from PIL import Image
from tiny import some_ddpm
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.functional import pil_to_tensor

from ddim_pl.commands import sources
from ddim_pl.commands.sources import image_source, read_images
from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.data.squares import Squaring
from ddim_pl.data.teacher_pairs import TeacherPairsDataModule
from ddim_pl.images import from_uint8, write_png


@pytest.fixture
def photograph(tmp_path):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 43, 30), generator=generator, dtype=torch.uint8)
    write_png(image, tmp_path / "x.png")
    return tmp_path / "x.png"


def test_a_file_is_resized_as_the_images_of_the_data(photograph):
    """That is what the model knows; without data, as an `ImageFolderDataModule` by default."""
    box = ImageFolderDataModule(str(photograph.parent), 8, resample="box")
    pairs = TeacherPairsDataModule(box, "unused", num_pairs=1)
    for data, filter_ in ((None, "bilinear"), (box, "box"), (pairs, "box")):
        with Image.open(photograph) as file:
            square = Compose([Resize(8, InterpolationMode(filter_)), CenterCrop(8)])(file)
        expected = from_uint8(pil_to_tensor(square.convert("L")))
        gray_first = read_images(some_ddpm(), data, [str(photograph)], None).images[0]
        # Gray before it is resized: a level of rounding.
        torch.testing.assert_close(gray_first, expected, rtol=0, atol=1.01 / 127.5)
        given = image_source(some_ddpm(), data, [str(photograph)], None, 1)(None)
        torch.testing.assert_close(given.images[0], gray_first)


class SeenError(Exception):
    """Stops a command once it has read its images."""


@pytest.mark.parametrize("command", ["reconstruct", "invert", "interpolate"])
def test_every_command_reads_files_as_the_data_does(tmp_path, photograph, monkeypatch, command):
    def decode(path, image_size, channels, squaring):
        raise SeenError(squaring)

    monkeypatch.setattr(sources, "decode", decode)
    data = ImageFolderDataModule(str(tmp_path), 8, resample="lanczos", crop_first=True)
    with pytest.raises(SeenError, match="lanczos") as seen:
        getattr(trainer(tmp_path), command)(some_ddpm(), data, images=[str(photograph)] * 2)
    assert seen.value.args == (Squaring("lanczos", True),)
