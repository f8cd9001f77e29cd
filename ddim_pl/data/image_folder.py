"""Any folder of images, nested or flat; its subfolders are the classes, or a text file has them.

What comes before that is for image files of any place: see `ImageFiles` and `FileDataModule`.
"""

import hashlib
import io
import os
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import get_worker_info
from tqdm.contrib.concurrent import thread_map

from ddim_pl.checks import check_at_least, check_one_of
from ddim_pl.data.base import ImageDataModule, ImageSet, TensorImages
from ddim_pl.data.encoded import Encoded, ImageSource
from ddim_pl.data.folders import class_names, find_images, labels_of, report_classes
from ddim_pl.data.image_list import NUM_THREADS, CheckedFiles
from ddim_pl.data.image_map import PROGRESS_BAR_FROM, ImageMap
from ddim_pl.data.label_file import read_labels
from ddim_pl.data.squares import Resample, Squaring

# Sets up to this many bytes as uint8 are decoded once and kept in memory, in every process.
MEMORY_LIMIT = 4 * 2**30

ORIENTATION = 0x0112
"""Of a photograph in its EXIF; from 5 on it lies on its side."""

Item = TypeVar("Item", covariant=True)
Channels = Literal[1, 3]
# The part of an image from (left, upper), inclusive, to (right, lower), exclusive, in pixels.
Box = tuple[int, int, int, int]


def decode(
    path: Path | Encoded,
    image_size: int,
    channels: int,
    squaring: Squaring | None,
    *,
    box: Box | None = None,
) -> Tensor:
    """Return an image file as uint8 (`channels`, `image_size`, `image_size`).

    An image is rotated as its EXIF entry says, laid on white where it is transparent, and
    converted to RGB or gray. A `box` crops it. Then `squaring` brings it to its size.

    Raises:
        ValueError: If the file cannot be decoded, has more than 8 bits per channel, is animated,
            does not hold the `box`, or, without `squaring`, has another size.
    """
    image = _picture(path, channels)
    _check_size(path, image.size, image_size, squaring is not None, box)
    if box is not None:
        image = image.crop(box)
    if squaring is not None:
        image = squaring(image, image_size)
    pixels = torch.from_numpy(np.array(image))
    return pixels.reshape(image_size, image_size, channels).permute(2, 0, 1).contiguous()


def decode_whole(path: Path | Encoded, channels: int) -> Tensor:
    """Return an image file of any size as uint8 (`channels`, H, W), otherwise as `decode`.

    Raises:
        ValueError: If the file cannot be decoded, has more than 8 bits per channel, or is
            animated.
    """
    pixels = np.array(_picture(path, channels))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


class Header(NamedTuple):
    """What the header of an image file says.

    Attributes:
        width: Of the image as `decode_whole` gives it.
        height: Likewise.
        is_gray: Whether it holds gray alone.
    """

    width: int
    height: int
    is_gray: bool


def header_of(path: Path | Encoded) -> Header:
    """What the header of an image file says.

    Raises:
        ValueError: As there, as far as header and checksums (PNG) show it.
    """
    with _opened(path) as file:
        width, height = file.size
        is_gray = file.mode in ("1", "L", "LA")
        # A PNG would be decoded for its EXIF, and hardly has one.
        turned = file.format != "PNG" and file.getexif().get(ORIENTATION, 1) >= 5
        file.verify()
    return Header(height, width, is_gray) if turned else Header(width, height, is_gray)


def check_header(
    path: Path | Encoded, image_size: int, resize: bool, *, box: Box | None = None
) -> None:
    """Check an image file without decoding it: its header, its checksums (PNG), and its size.

    Raises:
        ValueError: As in `decode`, as far as the header shows it.
    """
    with _opened(path) as file:
        size = file.size
        file.verify()
    _check_size(path, size, image_size, resize, box)


class FileImages(ImageSet):
    """An image set too large for memory, decoded on demand.

    A broken file stops training with an error that names it.
    """

    def __init__(
        self,
        paths: ImageSource,
        labels: Tensor,
        num_classes: int,
        shape: tuple[int, int, int],
        decode_file: "partial[Tensor]",
    ) -> None:
        super().__init__(labels, num_classes, shape)
        self._paths = paths
        self._decode = decode_file

    def images(self, indices: Tensor) -> Tensor:
        """Return the uint8 images (B, C, H, W) at int64 indices (B,)."""
        paths = [self._paths[index] for index in indices.tolist()]
        if get_worker_info() is not None:
            # The workers already use the processors in parallel.
            return torch.stack([self._decode(path) for path in paths])
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return torch.stack(list(pool.map(self._decode, paths)))

    def digest(self) -> str:
        """A digest of names, sizes and times of the files, and of how they are decoded."""
        digest = hashlib.sha256(f"{self.shape} {self._decode.keywords}".encode())
        for each in self._paths.identities():
            digest.update(each.encode())
        return digest.hexdigest()


class ImageFiles:
    """Image files, and how they become an image set.

    With a folder of maps they are decoded once and for all, see `ImageMap`. Without it they are
    decoded by each process if they fit into `MEMORY_LIMIT`; the files of a larger set are decoded
    on demand. Those are checked before by `check_header`, which does not find damage inside a file
    without checksums (JPEG), and not again unless a file has changed.

    Args:
        paths: The files.
        image_size: As in `decode`.
        channels: 3 for RGB, 1 for gray.
        squaring: How to bring the images to this size; None requires that they have it.
        box: Part of each image to keep.
        cache: The folder of maps.
        name: Of these files in that folder.
    """

    def __init__(
        self,
        paths: ImageSource,
        *,
        image_size: int,
        channels: int,
        squaring: Squaring | None,
        box: Box | None = None,
        cache: str | None = None,
        name: str = "images",
    ) -> None:
        self.paths = paths
        self._shape = (channels, image_size, image_size)
        self._decode = partial(
            decode, image_size=image_size, channels=channels, squaring=squaring, box=box
        )
        self._check = partial(
            check_header, image_size=image_size, resize=squaring is not None, box=box
        )
        self._in_memory = len(paths) * channels * image_size**2 <= MEMORY_LIMIT
        self._map: ImageMap | None = None
        if cache is not None:
            folder = Path(cache).expanduser()
            self._map = ImageMap(folder, name, paths, self._decode, self._shape)

    def prepare(self) -> None:
        """Do what other processes need not do again.

        Raises:
            ValueError: As in `decode` and `ImageMap.make`.
        """
        if self._map is not None:
            self._map.make()
        elif not self._in_memory:
            self._check_headers()

    def load(self, labels: Tensor, num_classes: int) -> ImageSet:
        """Return the images with their classes, int64 (N,).

        Raises:
            ValueError: As in `decode` and `ImageMap.open`.
        """
        if self._map is not None:
            return self._map.open(labels, num_classes)
        if not self._in_memory:
            self._check_headers()
            return FileImages(self.paths, labels, num_classes, self._shape, self._decode)
        images = torch.empty((len(self.paths), *self._shape), dtype=torch.uint8)

        def place(index: int) -> None:
            images[index] = self._decode(self.paths[index])

        _for_each(place, range(len(self.paths)), "Decoding")
        return TensorImages(images, labels, num_classes)

    def _check_headers(self) -> None:
        checked = CheckedFiles(self.paths)
        resize, side, box = (self._check.keywords[key] for key in ("resize", "image_size", "box"))
        check = f"{'any size' if resize else f'{side}x{side} pixels'}, box {box}"
        if not checked.passed(check):
            _for_each(self._check, self.paths, "Checking")
            checked.keep(check)


class LabelledFiles(NamedTuple):
    """Image files with their classes, int64 (N,), and a name for them in the folder of maps.

    The names of the classes stand by label, if they have some.
    """

    files: ImageSource
    labels: Tensor
    num_classes: int
    name: str
    class_names: Sequence[str] = ()


class ResizedDataModule(ImageDataModule):
    """Encoded images, brought to uint8 images (`channels`, `image_size`, `image_size`).

    Args:
        image_size: Side of the square images, at least 1.
        resize: True resizes the shorter side to `image_size` and crops the centre, see
            `Squaring`; False requires that every file has that size.
        resample: Filter to resize with: "bilinear", "bicubic", "lanczos" or "box".
        crop_first: Whether the centre is cropped before it is resized.
        channels: 3 for RGB, 1 for gray.
        **kwargs: Arguments of `ImageDataModule`.

    Raises:
        ValueError: If a number is out of range, or there is a way to resize without `resize`.
    """

    def __init__(
        self,
        image_size: int,
        *,
        resize: bool = True,
        resample: Resample = "bilinear",
        crop_first: bool = False,
        channels: Channels = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_at_least(1, image_size=image_size)
        check_one_of(Channels, channels=channels)
        given = Squaring(resample, crop_first)
        if not resize and given != Squaring():
            raise ValueError(
                f"resize must be true with resample {resample} and crop_first {crop_first}, got "
                "false: leave these two out, or set `resize: true`"
            )
        self.image_size = image_size
        self.resize = resize
        self.squaring = given
        self.channels = channels

    @property
    def preparation(self) -> str:
        """How the images are resized."""
        return repr(self.squaring) if self.resize else ""


class FileDataModule(ResizedDataModule):
    """Image files, wherever they lie, as uint8 images (`channels`, `image_size`, `image_size`).

    A set of up to 4 GiB is decoded once in each process, which finds broken files before training.
    Of a larger set only the headers are checked, and images are decoded on demand: set
    `num_workers` then, or `cache`.

    Args:
        image_size: Side of the square images, at least 1.
        cache: Folder in which all images are kept decoded, `channels` * `image_size`**2 bytes
            each, made by `prepare_data` unless they are there; all processes read them from it.
            None decodes anew in each run.
        **kwargs: Arguments of `ResizedDataModule`.

    Raises:
        ValueError: As for `ResizedDataModule`; at `setup`, if a file is broken or of the wrong
            size, or the `cache` is not made.
    """

    def __init__(self, image_size: int, *, cache: str | None = None, **kwargs: Any) -> None:
        super().__init__(image_size, **kwargs)
        self.cache = cache

    @property
    @abstractmethod
    def validates_apart(self) -> bool:
        """Whether there are images to validate on beside those to train on."""

    @abstractmethod
    def labelled(self, train: bool, *, report: bool) -> LabelledFiles:
        """The files to train on, or if `validates_apart` those to validate on.

        Args:
            train: Which of them.
            report: Say what is read and skipped.
        """

    def prepare_data(self) -> None:
        """Decode the images into `cache`, or check very many, for all processes.

        Raises:
            ValueError: As at `setup`; or the `cache` cannot be written to or is too small.
        """
        if self.predicting or self._train_set is not None:
            return
        for train in (True, False) if self.validates_apart else (True,):
            # What labels mean is checked before the longer work.
            self._files(self.labelled(train, report=False)).prepare()

    def load(self, train: bool) -> ImageSet:
        """Return the images to train on, or those to validate on, which may be the same."""
        if not train and not self.validates_apart:
            return self.train_set
        labelled = self.labelled(train, report=True)
        if train:
            self.class_names = tuple(labelled.class_names)
        return self._files(labelled).load(labelled.labels, labelled.num_classes)

    def _files(self, labelled: LabelledFiles) -> ImageFiles:
        return ImageFiles(
            labelled.files,
            image_size=self.image_size,
            channels=self.channels,
            squaring=self.squaring if self.resize else None,
            cache=self.cache,
            name=labelled.name,
        )


class ImageFolderDataModule(FileDataModule):
    """A folder of images, as uint8 images (`channels`, `image_size`, `image_size`).

    The classes are the first-level subfolders, in alphabetical order; images that lie in `root`
    itself all have class 0. A folder that mixes the two is refused. With `labels` the classes are
    those of a text file, and subfolders mean nothing.

    Args:
        root: The folder of training images; subfolders are searched.
        image_size: Side of the square images, at least 1.
        val_root: Folder of the images to validate on, with the same classes; `root` if None.
        labels: Text file with a line for each image in `root`, its name and its class, see
            `read_labels`.
        val_labels: The same for `val_root`.
        **kwargs: Arguments of `FileDataModule`.

    Raises:
        ValueError: As for `FileDataModule`; if only one of two folders has a file of labels; at
            `setup`, if a folder is missing or empty or its layout ambiguous, see `find_images` and
            `class_names`, or a file of labels is wrong.
    """

    def __init__(
        self,
        root: str,
        image_size: int,
        *,
        val_root: str | None = None,
        labels: str | None = None,
        val_labels: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, **kwargs)
        if (val_labels is None) != (labels is None or val_root is None):
            raise ValueError(
                f"val_labels must be given with labels and val_root, and only then, got "
                f"val_labels {val_labels}, labels {labels} and val_root {val_root}: give the file "
                "of labels of each folder"
            )
        self.root = root
        self.val_root = val_root
        self.label_file = labels
        self.val_label_file = val_labels

    @property
    def validates_apart(self) -> bool:
        """Whether there is a `val_root`."""
        return self.val_root is not None

    @property
    def labels_given(self) -> str | None:
        """The file of labels; subfolders alone may be there for other reasons."""
        return None if self.label_file is None else f"labels {self.label_file}"

    def labelled(self, train: bool, *, report: bool) -> LabelledFiles:
        """The files of `root` or of `val_root`."""
        files = find_images(Path(self.root).expanduser(), report=report)
        if self.label_file is not None:
            labels, names = read_labels(Path(self.label_file).expanduser(), files)
            if report:
                counts = torch.bincount(labels, minlength=len(names)).tolist()
                report_classes(Path(self.label_file), dict(zip(names, counts, strict=True)))
        else:
            names = class_names(files.root, files, report=report)
            labels = labels_of(files.root, files, names)
        if not train:
            assert self.val_root is not None
            files = find_images(Path(self.val_root).expanduser(), name="val_root", report=report)
            if self.val_label_file is not None:
                labels, _ = read_labels(Path(self.val_label_file).expanduser(), files, names)
            else:
                labels = labels_of(files.root, files, names)
        name = Path(os.path.abspath(files.root)).name
        return LabelledFiles(files, labels, max(1, len(names)), name, names)


def _picture(path: Path | Encoded, channels: int) -> Image.Image:
    """A decoded image file, upright, gray or RGB."""
    with _opened(path) as file:
        return _with_channels(ImageOps.exif_transpose(file), channels)


@contextmanager
def _opened(path: Path | Encoded) -> Iterator[Image.Image]:
    """Open an image file; whatever is wrong with it becomes an error that names it."""
    try:
        with Image.open(path if isinstance(path, Path) else io.BytesIO(path.content)) as file:
            if file.format == "EPS":  # whatever the file's name: PIL would start Ghostscript
                raise ValueError("EPS is a program, which would be run: convert it to PNG")
            if file.mode.startswith(("I", "F")):  # PIL would clip such values to 255 silently
                raise ValueError(
                    f"mode {file.mode} has more than 8 bits per channel: convert it to 8"
                )
            # Not the preview that a telephone puts into a JPEG (MPO).
            if getattr(file, "is_animated", False) and file.format != "MPO":
                raise ValueError("it holds several images: write each to a file of its own")
            yield file
    # Decoders raise OSError, SyntaxError, struct.error and more on broken bytes.
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}): replace or remove it") from error


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    """Return an image as RGB or gray, on white where it is transparent."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


class _Items(Protocol[Item]):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Item: ...


def _for_each(function: Callable[[Item], None], items: _Items[Item], verb: str) -> None:
    """Call the function on every item in threads, and raise the first error in order."""
    count = len(items)
    # A task for each item would take more memory than the names of the files.
    size = max(1, min(100, count // (8 * NUM_THREADS)))

    def some(begin: int) -> None:
        for index in range(begin, min(begin + size, count)):
            function(items[index])

    thread_map(  # PIL releases the interpreter lock while it decodes
        some,
        range(0, count, size),
        max_workers=NUM_THREADS,
        desc=f"{verb} images",
        disable=count <= PROGRESS_BAR_FROM or not sys.stderr.isatty(),
        unit_scale=size,
    )


def _check_size(
    path: Path | Encoded, size: tuple[int, int], image_size: int, resize: bool, box: Box | None
) -> None:
    width, height = size
    if box is not None:
        left, upper, right, lower = box
        # PIL would fill the pixels outside with black silently.
        if right > width or lower > height:
            raise ValueError(
                f"{path} must have columns {left} to {right} and rows {upper} to {lower}, got "
                f"{width}x{height} pixels: replace it by a larger image"
            )
        width, height = right - left, lower - upper
    if not resize and (width, height) != (image_size, image_size):
        raise ValueError(
            f"{path} must have {image_size}x{image_size} pixels, got {width}x{height}: set "
            "`resize: true`, or resize all images to that size"
        )
