from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.functional import pil_to_tensor

from data.inference import check_loads_in_inference_mode
from ddim_pl.data import image_folder
from ddim_pl.data.encoded import Encoded
from ddim_pl.data.image_folder import ImageFolderDataModule, check_header, decode
from ddim_pl.data.squares import Squaring

SIZE = 8


def write(path: Path, mode: str = "RGB", size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    """Write a random image whose content depends on its name, and return its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()))
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = rng.integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    Image.fromarray(pixels if bands > 1 else pixels[..., 0]).save(path)
    return pixels.transpose(2, 0, 1)


def folder(root: Path, **arguments: Any) -> ImageFolderDataModule:
    data = ImageFolderDataModule(str(root), SIZE, **arguments)
    data.setup("fit")
    return data


@pytest.fixture(params=["in memory", "from files"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "from files":
        monkeypatch.setattr(image_folder, "MEMORY_LIMIT", 0)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("resize", [True, False])
def test_first_level_subfolders_are_classes(tmp_path: Path, resize: bool) -> None:
    expected = [
        write(tmp_path / "cat" / "1.png"),
        write(tmp_path / "cat" / "deep" / "er" / "2.png"),
        write(tmp_path / "dog" / "0.bmp"),
    ]
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / "._1.png").write_text("what macOS leaves")
    data = folder(tmp_path, resize=resize)
    everything = torch.arange(3)
    # Resizing does not change an image of the right size.
    torch.testing.assert_close(
        data.train_set.images(everything), torch.from_numpy(np.stack(expected))
    )
    assert data.train_set.labels(everything).tolist() == [0, 0, 1]
    assert (data.shape, data.num_classes, data.num_reference) == ((3, SIZE, SIZE), 2, 3)
    assert not data.flip
    assert data.val_set is data.train_set


@pytest.mark.usefixtures("memory")
def test_gray_and_colour_become_what_channels_asks_for(tmp_path: Path) -> None:
    gray = write(tmp_path / "0.png", "L")
    write(tmp_path / "1.png", "RGB")
    both = torch.arange(2)
    images = folder(tmp_path).train_set.images(both)
    assert images.shape == (2, 3, SIZE, SIZE)
    torch.testing.assert_close(images[0], torch.from_numpy(gray).expand(3, -1, -1))
    images = folder(tmp_path, channels=1).train_set.images(both)
    assert images.shape == (2, 1, SIZE, SIZE)
    torch.testing.assert_close(images[0], torch.from_numpy(gray))


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("size", [(24, 16), (17, 31), (9, 8)], ids=str)
@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos", "box"])
def test_resizing_is_that_of_torchvision(
    tmp_path: Path, resample: str, size: tuple[int, int]
) -> None:
    write(tmp_path / "0.png", size=size)
    mode = InterpolationMode(resample)
    after = Compose([Resize(SIZE, mode), CenterCrop(SIZE)])
    before = Compose([CenterCrop(min(size)), Resize(SIZE, mode)])
    for crop_first, theirs in ((False, after), (True, before)):
        data = folder(tmp_path, resample=resample, crop_first=crop_first)
        with Image.open(tmp_path / "0.png") as file:
            expected = pil_to_tensor(theirs(file))
        found = data.train_set.images(torch.arange(1))[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_photograph_of_4_to_3_keeps_its_pixels(tmp_path: Path) -> None:
    """Every LSUN photograph of 4:3 is 341x256: there is nothing to interpolate."""
    pixels = write(tmp_path / "0.png", size=(341, 256))
    data = ImageFolderDataModule(str(tmp_path), 256)
    data.setup("fit")
    found = data.train_set.images(torch.arange(1))[0]
    torch.testing.assert_close(found, torch.from_numpy(pixels[..., 42:298].copy()))


def test_a_way_to_resize_without_resizing_is_refused(tmp_path: Path) -> None:
    for arguments in ({"resample": "box"}, {"crop_first": True}):
        with pytest.raises(ValueError, match="resize must be true with resample"):
            folder(tmp_path, resize=False, **arguments)


def test_transparent_pixels_turn_white_and_photographs_upright(tmp_path: Path) -> None:
    Image.new("RGBA", (SIZE, SIZE), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert (decode(tmp_path / "clear.png", SIZE, 3, Squaring()) == 255).all()
    pixels = np.zeros((SIZE, SIZE), dtype=np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = decode(tmp_path / "turned.png", SIZE, 1, None)
    torch.testing.assert_close(turned[0], torch.from_numpy(pixels[::-1].copy()))


def test_a_box_is_cut_out_before_resizing(tmp_path: Path) -> None:
    pixels = write(tmp_path / "0.png", size=(24, 16))
    cut = decode(tmp_path / "0.png", SIZE, 3, None, box=(5, 2, 5 + SIZE, 2 + SIZE))
    torch.testing.assert_close(cut, torch.from_numpy(pixels)[:, 2 : 2 + SIZE, 5 : 5 + SIZE])
    flat = np.zeros((16, 24), dtype=np.uint8)
    flat[:, 12:] = 255
    Image.fromarray(flat).save(tmp_path / "halves.png")
    assert (decode(tmp_path / "halves.png", SIZE, 1, Squaring(), box=(12, 4, 24, 16)) == 255).all()


@pytest.mark.parametrize("box", [(20, 0, 28, 8), (0, 9, 8, 17)], ids=["right", "below"])
def test_a_box_that_leaves_the_image_is_refused(
    tmp_path: Path, box: tuple[int, int, int, int]
) -> None:
    write(tmp_path / "0.png", size=(24, 16))
    message = r"0\.png must have columns .* and rows .*, got 24x16 pixels"
    with pytest.raises(ValueError, match=message):
        decode(tmp_path / "0.png", SIZE, 3, Squaring(), box=box)
    with pytest.raises(ValueError, match=message):
        check_header(tmp_path / "0.png", SIZE, resize=True, box=box)


def test_val_root_has_the_classes_of_root(tmp_path: Path) -> None:
    for path in ("train/cat/0.png", "train/dog/0.png", "val/dog/1.png", "odd/cow/2.png"):
        write(tmp_path / path)
    data = folder(tmp_path / "train", val_root=str(tmp_path / "val"))
    assert len(data.val_set) == 1
    assert data.val_set.num_classes == 2
    assert data.val_set.labels(torch.arange(1)).tolist() == [1]
    with pytest.raises(ValueError, match=r"cow.* must lie in .*move it to one of cat, dog in"):
        folder(tmp_path / "train", val_root=str(tmp_path / "odd"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"val_root must hold images, got .*empty"):
        folder(tmp_path / "train", val_root=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"val_root must be a folder of images, got .*none"):
        folder(tmp_path / "train", val_root=str(tmp_path / "none"))


@pytest.mark.usefixtures("memory")
def test_workers_decode_what_the_main_process_decodes(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / f"{number}.png", size=(11, 9))
    alone = folder(tmp_path, batch_size=2)
    helped = folder(tmp_path, batch_size=2, num_workers=1)
    for one, two in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("damage", ["no image at all", "truncated"])
def test_a_broken_file_is_named_at_setup(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "0.png")
    write(tmp_path / "broken.png")
    data = (tmp_path / "broken.png").read_bytes()
    content = data[: len(data) // 2] if damage == "truncated" else b"no image at all"
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.png cannot be read .*: replace or remove it"):
        folder(tmp_path)


@pytest.mark.usefixtures("memory")
def test_sixteen_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((SIZE, SIZE), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png .*more than 8 bits"):
        folder(tmp_path)


@pytest.mark.usefixtures("memory")
def test_without_resize_the_first_odd_size_is_named(tmp_path: Path) -> None:
    for name, size in (("0", (SIZE, SIZE)), ("1", (9, SIZE)), ("2", (7, 7))):
        write(tmp_path / f"{name}.png", size=size)
    with pytest.raises(
        ValueError, match=r"1\.png must have 8x8 pixels, got 9x8: set `resize: true`"
    ):
        folder(tmp_path, resize=False)


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"root must be a folder of images, got '.*nowhere'"):
        folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"root must hold images, got '.*empty' without any"):
        folder(tmp_path / "empty")


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        ImageFolderDataModule("anywhere", 0)
    channels: Any = 2
    with pytest.raises(ValueError, match=r"channels must be one of \(1, 3\), got 2"):
        ImageFolderDataModule("anywhere", 8, channels=channels)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ImageFolderDataModule("anywhere", 8, batch_size=0)


def test_no_program_in_an_image_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of PostScript, which PIL gives to Ghostscript under any name."""
    program, mark = tmp_path / "gs", tmp_path / "mark"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what was found before
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with Image.open(path) as file, pytest.raises(OSError, match="cannot identify"):
        file.load()
    assert mark.exists()  # it is dangerous
    mark.unlink()
    for image in (path, Encoded("a.png", content)):
        with pytest.raises(ValueError, match=r"a\.png cannot be read \(EPS is a program"):
            decode(image, 8, 3, None)
        with pytest.raises(ValueError, match=r"a\.png cannot be read \(EPS is a program"):
            check_header(image, 8, False)
    assert not mark.exists()


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("cached", [False, True])
def test_a_command_loads_images_in_its_inference_mode(tmp_path: Path, cached: bool) -> None:
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        write(tmp_path / "images" / name)
    cache = str(tmp_path / "maps") if cached else None
    check_loads_in_inference_mode(
        lambda: ImageFolderDataModule(str(tmp_path / "images"), SIZE, cache=cache)
    )
