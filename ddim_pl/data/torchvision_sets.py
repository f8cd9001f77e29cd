"""MNIST, FashionMNIST, CIFAR-100 and SVHN by name, as torchvision has them, held in memory."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from torchvision.datasets.utils import check_integrity

from ddim_pl.checks import check_at_least, check_one_of
from ddim_pl.data.base import ImageDataModule, TensorImages
from ddim_pl.data.squares import Squaring
from ddim_pl.locks import alone_in

Name = Literal["MNIST", "FashionMNIST", "CIFAR100", "SVHN"]


class _File(NamedTuple):
    """A file that is downloaded: its name, address and MD5 sum."""

    name: str
    url: str
    md5: str


@dataclass(frozen=True)
class _Source:
    """Where torchvision gets a set, and what it is.

    Args:
        title: The set's own name.
        num_classes: Number of classes.
        folder: Where the files lie, in `root`.
        files: What is downloaded.
        open: From (root, train, download) to torchvision's data set.
    """

    title: str
    num_classes: int
    folder: str
    files: Callable[[], list[_File]]
    open: Callable[[str, bool, bool], Any]


def _mnist(kind: type[MNIST], title: str) -> _Source:
    return _Source(
        title,
        num_classes=10,
        folder=f"{kind.__name__}/raw",
        files=lambda: [
            _File(name, f"{kind.mirrors[0]}{name}", md5) for name, md5 in kind.resources
        ],
        open=lambda root, train, download: kind(root, train=train, download=download),
    )


def _cifar(kind: type[CIFAR10], title: str, num_classes: int) -> _Source:
    return _Source(
        title,
        num_classes,
        folder="",
        files=lambda: [_File(kind.filename, kind.url, kind.tgz_md5)],
        open=lambda root, train, download: kind(root, train=train, download=download),
    )


SOURCES = {
    "MNIST": _mnist(MNIST, "MNIST"),
    "FashionMNIST": _mnist(FashionMNIST, "FashionMNIST"),
    "CIFAR10": _cifar(CIFAR10, "CIFAR-10", 10),
    "CIFAR100": _cifar(CIFAR100, "CIFAR-100", 100),
    "SVHN": _Source(
        "SVHN",
        num_classes=10,
        folder="",
        files=lambda: [
            _File(name, url, md5)
            for url, name, md5 in (SVHN.split_list[split] for split in ("train", "test"))
        ],
        open=lambda root, train, download: SVHN(
            root, "train" if train else "test", None, None, download
        ),
    ),
}


@dataclass(frozen=True)
class PaddedSquaring(Squaring):
    """As `Squaring`, with black pixels on each side that count to the size."""

    pad: int = 0

    def __call__(self, image: Image.Image, image_size: int) -> Image.Image:
        """Return the square of `image_size` by `image_size` pixels.

        Raises:
            ValueError: If the black pixels leave no place for the image.
        """
        inner = image_size - 2 * self.pad
        if inner < 1:
            raise ValueError(
                f"pad must be less than half of the {image_size} pixels of an image, got "
                f"{self.pad}: 2 is usual"
            )
        return ImageOps.expand(super().__call__(image, inner), self.pad)


class TorchvisionDataModule(ImageDataModule):
    """A set of torchvision as uint8 images, validated on its test split.

    | dataset | images | training | test | classes |
    |---|---|---|---|---|
    | MNIST, FashionMNIST | (1, 28, 28) | 60,000 | 10,000 | 10 |
    | CIFAR100 | (3, 32, 32) | 50,000 | 10,000 | 100 |
    | SVHN | (3, 32, 32) | 73,257 | 26,032 | 10 |

    Without a network, put the files that the error names where it says. SVHN needs the package
    scipy.

    Args:
        dataset: The set, by torchvision's name.
        root: Folder of the downloaded and of the unpacked files.
        download: Whether to download the files if they are missing.
        pad: Black pixels added on each side, at least 0; 2 makes MNIST's images 32x32, as in the
            code of [EDM], which can be halved more often.
        **kwargs: Arguments of `ImageDataModule`.

    Raises:
        ValueError: If a number is out of range or the set unknown; or scipy is not installed.
    """

    def __init__(
        self,
        dataset: Name,
        root: str = "data",
        download: bool = True,
        *,
        pad: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_one_of(Name, dataset=dataset)
        check_at_least(0, pad=pad)
        self.dataset = dataset
        self.root = root
        self.download = download
        self.pad = pad
        self.squaring = PaddedSquaring(pad=pad) if pad else Squaring()

    @property
    def preparation(self) -> str:
        """How far the images are padded."""
        return f"padded by {self.pad}" if self.pad else ""

    def prepare_data(self) -> None:
        """Unpack the files in `root`, downloading them first if that is needed and allowed.

        Raises:
            FileNotFoundError: If neither `root` nor the network has the data.
            ValueError: If a package that reads it is missing.
        """
        if not self.predicting:
            prepare(self.dataset, self.root, self.download)

    def load(self, train: bool) -> TensorImages:
        """Return the training or the test split; errors as in `prepare_data`."""
        images = load(self.dataset, self.root, self.download, train)
        if not self.pad:
            return images
        everything = torch.arange(len(images))
        padded = torch.nn.functional.pad(images.images(everything), [self.pad] * 4)
        return TensorImages(padded, images.labels(everything), images.num_classes)


def prepare(name: str, root: str, download: bool) -> None:
    """Unpack what is in `root`, after downloading what is missing, if that is allowed.

    torchvision compares the MD5 sums of what it downloads, so that an incomplete download is never
    used.

    Args:
        name: A key of `SOURCES`.
        root: Folder of the files.
        download: Whether files may be downloaded.

    Raises:
        FileNotFoundError: If neither `root` nor the network has the data.
        ValueError: If a package that reads it is missing.
    """
    if name == "SVHN" and find_spec("scipy") is None:
        raise ValueError(
            "dataset 'SVHN' needs the package scipy, which reads its MATLAB files and is not "
            "installed: pip install 'ddim_pl[scipy]'"
        )
    source = SOURCES[name]
    folder = Path(root).expanduser() / source.folder
    # If the files are complete, torchvision's download only unpacks and needs no network.
    complete = all(check_integrity(folder / file.name, file.md5) for file in source.files())
    with _alone(folder, download):
        for train in (True, False):  # SVHN's splits are downloaded one by one
            _open(name, root, train, download or complete, offer=not download)


@contextmanager
def _alone(folder: Path, download: bool) -> Iterator[None]:
    """Let nodes with one disk, and runs that begin at once, download and unpack once.

    Where nothing can be written, nothing is unpacked. If it fails, no empty folder is left.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    if download:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        yield
        return
    try:
        with alone_in(folder, ".unpacking.lock", wait=True):
            yield
    except BaseException:
        with suppress(OSError):  # what holds something stays
            for each in made:
                each.rmdir()
        raise


def load(name: str, root: str, download: bool, train: bool) -> TensorImages:
    """Return a split that is prepared; arguments and errors as for `prepare`."""
    split = _open(name, root, train, download=False, offer=not download)
    images = torch.as_tensor(split.data)
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    labels: Tensor = torch.as_tensor(split.labels if name == "SVHN" else split.targets)
    return TensorImages(images.contiguous(), labels.long(), SOURCES[name].num_classes)


def _open(name: str, root: str, train: bool, download: bool, *, offer: bool) -> Any:
    source = SOURCES[name]
    folder = Path(root).expanduser() / source.folder
    try:
        return source.open(root, train, download)
    except (
        OSError,
        HTTPException,
        RuntimeError,
        AssertionError,
        LookupError,
        ValueError,
    ) as error:
        reason = error
    files = source.files()
    # torchvision compares no sums of what it has unpacked of MNIST, and takes it where it is.
    if source.folder and all((folder / Path(file.name).stem).is_file() for file in files):
        raise FileNotFoundError(
            f"root must hold a complete {source.title}, got {root!r} with a damaged file in "
            f"{str(folder)!r} ({type(reason).__name__}): remove the unpacked files, which are "
            "then unpacked or downloaded again"
        ) from reason
    missing = [
        file for file in files if not check_integrity(folder / file.name, file.md5)
    ] or files
    places = dict.fromkeys(file.url.rpartition("/")[0] for file in missing)
    names = f"{', '.join(file.name for file in missing)} from {' and '.join(places)}"
    place = f"into {str(folder)!r}" if source.folder else "there"
    verb = "is" if len(missing) == 1 else "are"
    then = f", which {verb} then compared with known sums and unpacked"
    packed = all(file.name.endswith("gz") for file in files)
    raise FileNotFoundError(
        f"root must hold a complete {source.title}, got {root!r}, and it could not be downloaded "
        f"({_short(reason)}): put {names} {place}{then if packed else ''}"
        f"{', or set `download: true`' if offer else ''}"
    ) from reason


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
