"""ImageNet at 64x64 or any size: folders `train` and `val`, as torchvision lays them out."""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torchvision.datasets.imagenet import (
    ARCHIVE_META,
    META_FILE,
    parse_devkit_archive,
    parse_train_archive,
    parse_val_archive,
)
from torchvision.datasets.utils import check_integrity

from ddim_pl.data.folders import class_names, find_images, labels_of
from ddim_pl.data.image_folder import FileDataModule, LabelledFiles
from ddim_pl.data.squares import Resample
from ddim_pl.locks import alone_in

HOME = "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php"


class ImageNetDataModule(FileDataModule):
    """ImageNet (ILSVRC 2012) as uint8 images (3, `image_size`, `image_size`) of 1,000 classes.

    Reads `train/n01440764/...` and so on below `root`, at any size: ImageNet's own photographs, or
    images that are reduced to 64x64 already, which stay as they are. Validates on `val`, or if
    there is none on the training images. Photographs are cut to the central square and then
    reduced by a Lanczos filter, as by the `center-crop` of the code of [EDM]; where the rest is an
    odd number of pixels the square may lie one beside theirs.

    Where a folder is missing, ImageNet's archives in `root` are unpacked into it: they cannot be
    downloaded without an account. `val` needs the package scipy for that.

    Args:
        root: Folder of `train` and `val`, or of the archives.
        image_size: Side of the square images, at least 1.
        resample: Filter to resize with, see `Squaring`.
        crop_first: Whether the centre is cropped before it is resized.
        **kwargs: Arguments of `FileDataModule`.

    Raises:
        ValueError: As for `FileDataModule`; at `setup`, if a folder is not laid out like this.
    """

    def __init__(
        self,
        root: str = "data/imagenet",
        image_size: int = 64,
        *,
        resample: Resample = "lanczos",
        crop_first: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, resample=resample, crop_first=crop_first, **kwargs)
        self.root = root

    @property
    def validates_apart(self) -> bool:
        """Whether there is a folder `val`."""
        return self._is_unpacked("val")

    def prepare_data(self) -> None:
        """Unpack the archives whose folders are missing, then as `FileDataModule`.

        Raises:
            FileNotFoundError: If `train` and the archive of it are missing.
            ValueError: As for `FileDataModule`; or scipy is needed and not installed.
        """
        if self.predicting or self._train_set is not None:
            return
        if not self._is_unpacked("train") and not self._archive("train").is_file():
            raise self._absent("train", f"{ARCHIVE_META['train'][0]} is missing")
        if self._is_to_unpack("train") or self._is_to_unpack("val"):
            # Nodes with one disk, and runs that begin at once, do it once.
            with alone_in(self._folder, ".unpacking.lock", wait=True):
                if self._is_to_unpack("train"):
                    self._unpack_train()
                if self._is_to_unpack("val"):
                    self._unpack_val()
        super().prepare_data()

    def labelled(self, train: bool, *, report: bool) -> LabelledFiles:
        """The images of `train` or `val`.

        Raises:
            FileNotFoundError: If there is no folder `train`.
            ValueError: See `find_images` and `class_names`.
        """
        if not self._is_unpacked("train"):
            raise self._absent("train", "it is not there")
        files = find_images(self._folder / "train", report=report)
        names = class_names(files.root, files, report=report)
        if not train:
            files = find_images(self._folder / "val", report=report)
        labels = labels_of(files.root, files, names)
        name = f"imagenet-{'train' if train else 'val'}"
        return LabelledFiles(files, labels, max(1, len(names)), name, names)

    @property
    def _folder(self) -> Path:
        return Path(self.root).expanduser()

    def _is_unpacked(self, split: str) -> bool:
        return (self._folder / split).is_dir()

    def _archive(self, split: str) -> Path:
        return self._folder / str(ARCHIVE_META[split][0])

    def _is_to_unpack(self, split: str) -> bool:
        return not self._is_unpacked(split) and self._archive(split).is_file()

    def _unpack_train(self) -> None:
        self._check_archive("train", "train")
        # Elsewhere first: an interruption must not leave an incomplete folder under this name.
        with TemporaryDirectory(dir=self._folder, prefix="unpacking-") as part:
            parse_train_archive(self._folder, folder=f"{Path(part).name}/train")
            Path(part, "train").rename(self._folder / "train")

    def _unpack_val(self) -> None:
        self._check_archive("val", "val")
        if not (self._folder / META_FILE).is_file():
            self._check_archive("val", "devkit")
            if find_spec("scipy") is None:
                raise ValueError(
                    f"unpacking {ARCHIVE_META['val'][0]} needs the package scipy, which reads the "
                    "classes in its development kit and is not installed: pip install "
                    "'ddim_pl[scipy]'"
                )
            parse_devkit_archive(self._folder)
        with TemporaryDirectory(dir=self._folder, prefix="unpacking-") as part:
            parse_val_archive(self._folder, folder=f"{Path(part).name}/val")
            Path(part, "val").rename(self._folder / "val")

    def _check_archive(self, split: str, kind: str) -> None:
        archive, md5 = ARCHIVE_META[kind]
        if not check_integrity(self._folder / archive, md5):
            state = "damaged" if (self._folder / archive).is_file() else "missing"
            raise self._absent(split, f"{archive} is {state}")

    def _absent(self, split: str, reason: str) -> FileNotFoundError:
        kinds = ("train",) if split == "train" else ("val", "devkit")
        files = " and ".join(
            f"{name} (MD5 {md5})" for name, md5 in map(ARCHIVE_META.__getitem__, kinds)
        )
        return FileNotFoundError(
            f"root must hold a folder {split} with a subfolder for each class, as "
            f"{split}/n01440764, got {self.root!r} ({reason}): put images there in such folders, "
            f"or {files} from {HOME}, which asks for an account; archives are then unpacked"
        )
