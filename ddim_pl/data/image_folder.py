"""Any folder of images, nested or flat, with the first level of subfolders as classes."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import get_worker_info
from tqdm import tqdm

from ddim_pl.data.base import ImageDataModule, ImageSet, TensorImages

EXTENSIONS = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
# Sets up to this many bytes as uint8 are decoded once and kept in memory, in every process.
MEMORY_LIMIT = 4 * 2**30
PROGRESS_BAR_FROM = 1000

Item = TypeVar("Item")
# The part of an image from (left, upper), inclusive, to (right, lower), exclusive, in pixels.
Box = tuple[int, int, int, int]


def find_images(root: Path) -> list[Path]:
    """Return the image files below `root`, sorted; hidden files and folders are left out.

    Raises:
        ValueError: If `root` is not a folder or holds no image.
    """
    if not root.is_dir():
        raise ValueError(
            f"root={str(root)!r} is not a folder; give the path of a folder of images"
        )
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS
        ]
    if not found:
        raise ValueError(
            f"{str(root)!r} holds no image; put files ending in "
            f"{', '.join(sorted(EXTENSIONS))} there, or give another folder"
        )
    return sorted(found)


def class_names(root: Path, paths: list[Path]) -> list[str]:
    """Return the first-level subfolders, sorted, or [] if an image lies in `root` itself."""
    parents = [path.relative_to(root).parts[:-1] for path in paths]
    return sorted({parts[0] for parts in parents}) if all(parents) else []


def decode(
    path: Path,
    image_size: int,
    channels: int,
    resize: bool,
    *,
    box: Box | None = None,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Tensor:
    """Return an image file as uint8 (`channels`, `image_size`, `image_size`).

    An image is turned upright as its EXIF entry says, laid on white where it is transparent, and
    made RGB or gray. With a `box` only that part of it is kept. With `resize`, the largest central
    square is resampled by the filter `resample`, widened when reducing, so without aliasing: the
    shorter side becomes `image_size` and the longer is cropped.

    Raises:
        ValueError: If the file cannot be decoded, has more than 8 bits per channel, does not hold
            the `box`, or, without `resize`, has another size.
    """
    try:
        with Image.open(path) as file:
            image = _with_channels(ImageOps.exif_transpose(file), channels)
    # Decoders meet broken bytes with OSError, SyntaxError, struct.error and more.
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}); replace or remove it") from error
    _check_size(path, image.size, image_size, resize, box)
    if box is not None:
        image = image.crop(box)
    if resize:
        image = ImageOps.fit(image, (image_size, image_size), resample)
    pixels = torch.from_numpy(np.array(image))
    return pixels.reshape(image_size, image_size, channels).permute(2, 0, 1).contiguous()


def check_header(path: Path, image_size: int, resize: bool, *, box: Box | None = None) -> None:
    """Check an image file without decoding it: its header, its checksums (PNG), and its size.

    Raises:
        ValueError: As `decode`, as far as the header tells.
    """
    try:
        with Image.open(path) as file:
            size = file.size
            _check_depth(file.mode)
            file.verify()
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}); replace or remove it") from error
    _check_size(path, size, image_size, resize, box)


class FileImages:
    """An image set too large for memory, decoded whenever it is asked for.

    A file that turns out to be broken stops training with its name.
    """

    def __init__(
        self,
        paths: list[Path],
        labels: Tensor,
        num_classes: int,
        shape: tuple[int, int, int],
        decode_file: Callable[[Path], Tensor],
    ) -> None:
        self.shape = shape
        self.num_classes = num_classes
        self._paths = paths
        self._labels = labels
        self._decode = decode_file

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._paths)

    def images(self, indices: Tensor) -> Tensor:
        """Return the uint8 images (B, C, H, W) at int64 indices (B,)."""
        paths = [self._paths[index] for index in indices.tolist()]
        if get_worker_info() is not None:
            # The workers already share the processors among them.
            return torch.stack([self._decode(path) for path in paths])
        with ThreadPoolExecutor(_num_threads()) as pool:
            return torch.stack(list(pool.map(self._decode, paths)))

    def labels(self, indices: Tensor) -> Tensor:
        """Return the int64 labels (B,) at int64 indices (B,)."""
        return self._labels[indices]


def image_set(
    paths: list[Path],
    labels: Tensor,
    num_classes: int,
    *,
    image_size: int,
    channels: int,
    resize: bool,
    box: Box | None = None,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> ImageSet:
    """Return image files as an image set, decoded now if they fit into `MEMORY_LIMIT`.

    The files of a larger set are checked by `check_header`, which finds all but damage in the
    midst of a file that has no checksums (JPEG), and decoded as they are asked for.

    Args:
        paths: The files.
        labels: Their classes, int64 (N,).
        num_classes: Number of classes.
        image_size: As in `decode`, like all that follow.
        channels: 3 for RGB, 1 for gray.
        resize: Whether to resize, rather than to demand that size.
        box: Part of each image to keep.
        resample: Filter to resize with.

    Raises:
        ValueError: As `decode`.
    """
    shape = (channels, image_size, image_size)
    decode_file = partial(
        decode,
        image_size=image_size,
        channels=channels,
        resize=resize,
        box=box,
        resample=resample,
    )
    if len(paths) * channels * image_size**2 > MEMORY_LIMIT:
        check = partial(check_header, image_size=image_size, resize=resize, box=box)
        _for_each(check, paths, "Checking")
        return FileImages(paths, labels, num_classes, shape, decode_file)
    return TensorImages(_decode_all(paths, shape, decode_file), labels, num_classes)


class ImageFolderDataModule(ImageDataModule):
    """A folder of images, as uint8 images (`channels`, `image_size`, `image_size`).

    The classes are the first-level subfolders, in alphabetical order, if every image lies in one;
    otherwise all images have class 0. A set of up to 4 GiB is decoded once, in each process, and
    kept in memory, so that broken files are found before training. Of a larger set the headers are
    checked before training, and images are decoded as they are needed: set `num_workers`.

    Args:
        root: The folder of training images; subfolders are searched.
        image_size: Side of the square images, at least 1.
        resize: True resizes the shorter side to `image_size` and crops the centre (see `decode`);
            False demands that every file has that size.
        channels: 3 for RGB, 1 for gray.
        val_root: Folder of the images to validate on, with the same classes; `root` if None.
        batch_size: Images per device and step, at least 1.
        flip: Whether training images are mirrored left to right with probability 1/2. Set it where
            a mirrored image is as likely as the image: for faces, not for text.
        seed: Seed of the order of the training images, at least 0.
        num_workers: Processes which prepare batches; 0 is fastest for images held in memory.
        steps_per_epoch: Training batches per epoch; the whole batches of one pass if None.
        num_predict: Number of images to make when predicting, over all devices.

    Raises:
        ValueError: If a number is out of range; at `setup`, if a folder is missing or empty, or a
            file is broken or of the wrong size.
    """

    def __init__(
        self,
        root: str,
        image_size: int,
        *,
        resize: bool = True,
        channels: Literal[1, 3] = 3,
        val_root: str | None = None,
        batch_size: int = 128,
        flip: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        steps_per_epoch: int | None = None,
        num_predict: int = 64,
    ) -> None:
        super().__init__(
            batch_size,
            flip=flip,
            seed=seed,
            num_workers=num_workers,
            steps_per_epoch=steps_per_epoch,
            num_predict=num_predict,
        )
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; it must be at least 1")
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}; it must be 1 (gray) or 3 (RGB)")
        self.root = root
        self.image_size = image_size
        self.resize = resize
        self.channels = channels
        self.val_root = val_root

    def load(self, train: bool) -> ImageSet:
        """Return the images of `root` or of `val_root`."""
        if not train and self.val_root is None:
            return self.train_set
        root = Path(self.root).expanduser()
        paths = find_images(root)
        names = class_names(root, paths)
        if not train:
            assert self.val_root is not None
            root = Path(self.val_root).expanduser()
            paths = find_images(root)
        return image_set(
            paths,
            _labels(root, paths, names),
            max(1, len(names)),
            image_size=self.image_size,
            channels=self.channels,
            resize=self.resize,
        )


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    """Return an image as RGB or gray, on white where it is transparent."""
    _check_depth(image.mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def _check_depth(mode: str) -> None:
    # PIL would clip such values to 255 without a word.
    if mode.startswith(("I", "F")):
        raise ValueError(f"mode {mode} has more than 8 bits per channel; convert it to 8")


def _labels(root: Path, paths: list[Path], names: list[str]) -> Tensor:
    """Return the int64 place in `names` of each path's first-level subfolder, or zeros."""
    if not names:
        return torch.zeros(len(paths), dtype=torch.int64)
    numbers = {name: number for number, name in enumerate(names)}
    labels = []
    for path in paths:
        first, *rest = path.relative_to(root).parts
        if not rest or first not in numbers:
            raise ValueError(
                f"{path} lies in none of the training images' classes; move it to one of the "
                f"subfolders {', '.join(names[:5])}{', ...' if len(names) > 5 else ''} of {root}"
            )
        labels.append(numbers[first])
    return torch.tensor(labels)


def _decode_all(
    paths: list[Path], shape: tuple[int, int, int], decode_file: Callable[[Path], Tensor]
) -> Tensor:
    """Return all images as uint8 (N, C, H, W)."""
    images = torch.empty((len(paths), *shape), dtype=torch.uint8)

    def place(index: int) -> None:
        images[index] = decode_file(paths[index])

    _for_each(place, range(len(paths)), "Decoding")
    return images


def _for_each(function: Callable[[Item], None], items: Sequence[Item], verb: str) -> None:
    """Call the function on every item in threads; the first error, in order, ends it."""
    hidden = len(items) <= PROGRESS_BAR_FROM or not sys.stderr.isatty()
    # PIL releases the interpreter's lock while it decodes.
    with ThreadPoolExecutor(_num_threads()) as pool:
        done = pool.map(function, items)
        for _ in tqdm(done, desc=f"{verb} images", total=len(items), disable=hidden):
            pass


def _check_size(
    path: Path, size: tuple[int, int], image_size: int, resize: bool, box: Box | None
) -> None:
    width, height = size
    if box is not None:
        left, upper, right, lower = box
        # PIL would fill what lies outside with black without a word.
        if right > width or lower > height:
            raise ValueError(
                f"{path} has {width}x{height} pixels, too few to cut out columns {left} to "
                f"{right} and rows {upper} to {lower}; replace it by an image that has them"
            )
        width, height = right - left, lower - upper
    if not resize and (width, height) != (image_size, image_size):
        raise ValueError(
            f"{path} has {width}x{height} pixels in place of {image_size}x{image_size}; "
            "set `resize: true`, or bring all images to that size"
        )


def _num_threads() -> int:
    return min(16, os.cpu_count() or 1)
