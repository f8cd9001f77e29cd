"""Data sets of the Hugging Face library `datasets`: Parquet files in a folder, or the Hub.

The library copies Parquet files into an Arrow file in its own cache (`HF_HOME`) once, which all
processes map into memory. Images stay encoded there until they are used.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ddim_pl.damage import reason_of
from ddim_pl.data.encoded import Encoded, stamps_of
from ddim_pl.data.image_folder import FileDataModule, LabelledFiles
from ddim_pl.data.numbered import count_classes

# One word alone may be a format of the library, which would read what lies in the present folder.
ON_THE_HUB = r"(?!buckets/)\w[\w.-]*/\w[\w.-]*"
CARD, SETTINGS = "README.md", ".huggingface.yaml"
"""Where a folder says which files are of which split."""

LABEL_COLUMN = "label"
"""Where most data sets have their classes."""

BINARY = ("binary", "large_binary")


class TableImages:
    """The images in a column of a data set, by number.

    Args:
        root: Where the data set comes from.
        dataset: The data set, a split of one.
        column: The column of images.
    """

    def __init__(self, root: Path, dataset: Any, column: str) -> None:
        from datasets import Image

        self.root = root
        self._column = column
        self._split = str(dataset.split)
        if isinstance(dataset.features[column], Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        self._images = dataset.select_columns([column])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def __getitem__(self, index: int) -> Path | Encoded:
        """Return the bytes of an image; its path, from the table's folder on, if it has no more.

        Raises:
            ValueError: If the row holds no image, or a path to where none is.
        """
        name = f"{self.root}, {self._split}, row {index}"
        value = self._images[index][self._column]
        if isinstance(value, dict):
            if value["bytes"] is None and value["path"] is not None:
                path = self.root / value["path"]
                if not path.is_file():
                    raise ValueError(_only_a_path(name, self._column, path))
                return path
            value = value["bytes"]
        if not isinstance(value, bytes):
            raise ValueError(
                f"{name}, must hold an image in the column {self._column}, got nothing: remove "
                "the row from the data set"
            )
        return Encoded(name, value)

    def digest(self) -> str:
        """A digest of where the images are in the data set."""
        text = f"{self.root} {self._split} {self._column} {len(self)}"
        return hashlib.sha256(text.encode()).hexdigest()

    def stamps(self) -> np.ndarray[Any, Any]:
        """Sizes and times of the library's files, int64 (N, 2)."""
        return stamps_of(Path(each["filename"]) for each in self._images.cache_files)

    def identities(self) -> Iterator[str]:
        """What is in `digest`, and the library's files."""
        yield self.digest()
        yield from (f"{each['filename']}\n" for each in self._images.cache_files)
        yield str(self.stamps().tolist())


class HuggingFaceDataModule(FileDataModule):
    """A data set of the library `datasets`, as uint8 images.

    Needs `pip install 'ddim_pl[datasets]'`.

    Args:
        source: Folder of Parquet files, named by their splits as in `train-00000-of-00001.parquet`
            or `data/test.parquet`; or a name on the Hub as `owner/name`.
        image_size: Side of the square images, at least 1.
        config: Which of the data set's configurations, where there are several.
        split: The split to train on; also a part of one, as "train[:90%]".
        val_split: The split to validate on; `split` if None.
        image_column: The column of images, in the format of files; the only one if None.
        label_column: The column of classes, names or whole numbers from 0; None if there are none.
        download: Whether to ask the Hub for what is not in the library's cache.
        **kwargs: Arguments of `FileDataModule`.

    Raises:
        ValueError: As for `FileDataModule`; at `setup`, if the library is not installed, the data
            set cannot be read, has no such split or column, or a label is missing.
    """

    def __init__(
        self,
        source: str,
        image_size: int,
        *,
        config: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = LABEL_COLUMN,
        download: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, **kwargs)
        self.source = source
        self.config = config
        self.split = split
        self.val_split = val_split
        self.image_column = image_column
        self.label_column = label_column
        self.download = download

    @property
    def validates_apart(self) -> bool:
        """Whether there is a `val_split`."""
        return self.val_split is not None

    @property
    def labels_given(self) -> str | None:
        """The column of labels, where it is not the default."""
        column = self.label_column
        return None if column in (None, LABEL_COLUMN) else f"label_column {column}"

    def labelled(self, train: bool, *, report: bool) -> LabelledFiles:
        """The images of `split` or of `val_split`."""
        dataset = self._open(self.split)
        column = self._image_column(dataset)
        labels, classes = self._labels(dataset, None, warn=report and train)
        if not train:
            assert self.val_split is not None
            dataset = self._open(self.val_split)
            labels, _ = self._labels(dataset, classes)
        root = Path(self.source).expanduser()
        images = TableImages(root, dataset, column)
        _ = images[0]  # a path may lead nowhere
        if report:
            found = "no classes" if self.label_column is None else f"{len(classes)} classes"
            rank_zero_info(f"{self.source}, {dataset.split}: {len(dataset)} images, {found}")
        name = f"{root.name}-{re.sub(r'[^A-Za-z0-9]+', '-', str(dataset.split))}"
        given = getattr(dataset.features.get(self.label_column), "names", None)
        names = () if self.label_column is None else tuple(map(str, given or classes))
        return LabelledFiles(images, labels, len(classes), name, names)

    def _open(self, split: str) -> Any:
        """A split of the data set."""
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                f"source {self.source!r} needs the package datasets, which is not installed "
                f"({error}): pip install 'ddim_pl[datasets]'"
            ) from None
        folder = Path(self.source).expanduser()
        is_here = folder.is_dir()
        if is_here:
            _check_parquet(folder)
            _check_card(folder)
        elif not re.fullmatch(ON_THE_HUB, self.source):
            raise ValueError(
                "source must be a folder of Parquet files or a name on the Hugging Face Hub as "
                f"owner/name, got {self.source!r}: give one of them"
            )
        place = str(folder) if is_here else self.source
        try:
            with _without_bars(), _asking_the_hub(self.download and not is_here):
                if is_here:
                    builder = datasets.load_dataset_builder(place, self.config)
                    _check_files(folder, builder.config.data_files)
                # From memory nothing would tell whether the files are still the same.
                return datasets.load_dataset(place, self.config, split=split, keep_in_memory=False)
        except _OtherFilesError:
            raise
        except Exception as error:  # of the library, of what it reads with and connects with
            raise self._unreadable(folder, split, error) from error

    def _unreadable(self, folder: Path, split: str, error: Exception) -> ValueError:
        cause = error.__cause__
        reason = reason_of(cause if isinstance(cause, Exception) else error)
        if folder.is_dir() or not isinstance(error, OSError):
            return ValueError(
                f"source {self.source!r} has no split {split!r} that can be read ({reason}): give "
                "another split or config, or repair the files"
            )
        offer = "" if self.download else "set `download: true`, or "
        return ValueError(
            f"source {self.source!r} is no folder here and cannot be downloaded ({reason}): "
            f"{offer}on a machine with a network run hf download {self.source} --repo-type "
            "dataset --local-dir FOLDER and give that folder as the source"
        )

    def _image_column(self, dataset: Any) -> str:
        found = [name for name, kind in dataset.features.items() if _holds_images(kind)]
        given = self.image_column
        if given is None and len(found) == 1:
            return found[0]
        if given is None or given not in found:
            raise ValueError(
                f"image_column must be a column of encoded images in {self.source}, got {given}: "
                f"give one of {', '.join(found) or 'none there'} (the columns are "
                f"{_columns(dataset)})"
            )
        return given

    def _labels(
        self, dataset: Any, classes: list[Any] | None, *, warn: bool = False
    ) -> tuple[Tensor, list[Any]]:
        """Labels, int64 (N,), and the classes by label, those of the training images if given."""
        column = self.label_column
        if column is None:
            return torch.zeros(len(dataset), dtype=torch.int64), [0]
        if column not in dataset.features:
            raise ValueError(
                f"label_column must be a column of {self.source}, got {column!r}: give one of "
                f"{_columns(dataset)}, or null to leave the classes out"
            )
        values = dataset[column][:]
        if classes is None:
            place = f"{self.source}, {dataset.split}, column {column},"
            classes = _classes(dataset.features[column], values, place, warn)
        numbers = {value: number for number, value in enumerate(classes)}
        labels = [numbers.get(value, -1) if _is_class(value) else -1 for value in values]
        if -1 in labels:
            row = labels.index(-1)
            raise ValueError(
                f"{self.source}, {dataset.split}, row {row}, must hold a class of the training "
                f"images in the column {column}, a name or a whole number from 0, got "
                f"{values[row]!r}: give another label_column or split, or label_column null to "
                "leave the classes out"
            )
        return torch.tensor(labels, dtype=torch.int64), classes


def _check_parquet(folder: Path) -> None:
    """Check that there are Parquet files, each whole as far as its end shows."""
    import pyarrow.parquet

    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise ValueError(
            f"source must hold Parquet files, got {str(folder)!r} without any: give another "
            "folder; one of image files is read by ImageFolderDataModule"
        )
    for file in files:
        try:
            pyarrow.parquet.read_metadata(file)
        except Exception as error:  # the bytes may say anything
            raise ValueError(
                f"{file} cannot be read ({reason_of(error)}): copy or download it again"
            ) from error


def _check_card(folder: Path) -> None:
    """Check that what the folder says of its own files leads nowhere else, as to an address.

    The library would ask there for files, whatever `download` is.
    """
    from huggingface_hub.repocard import metadata_load

    for name, read in ((CARD, metadata_load), (SETTINGS, lambda p: yaml.safe_load(p.read_text()))):
        if not (folder / name).is_file():
            continue
        try:
            configs = (read(folder / name) or {}).get("configs")
        except Exception as error:  # the bytes may say anything
            raise ValueError(
                f"{folder / name} cannot be read ({reason_of(error)}): repair or remove it"
            ) from error
        for text in _texts(configs):
            if "://" in text or text.startswith(("/", "~")) or ".." in Path(text).parts:
                raise ValueError(
                    f"{folder / name} must name files of its folder alone, got {text!r}: remove "
                    "its configs, or the file"
                )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _check_files(folder: Path, files: Any) -> None:
    """Check that all files that the library will read are Parquet files of the folder."""
    root = folder.resolve()
    for file in (file for files_of_split in files.values() for file in files_of_split):
        if not (Path(file).is_relative_to(root) and file.endswith(".parquet")):
            raise _OtherFilesError(
                f"source must hold Parquet files alone, got {str(folder)!r}, of which {file} "
                "would be read: move the Parquet files into a folder of their own"
            )


class _OtherFilesError(ValueError):
    """What would be read is not what was asked for."""


@contextmanager
def _asking_the_hub(allowed: bool) -> Iterator[None]:
    """Let the library ask the Hub, or not."""
    import datasets

    # internal: datasets 5.2 tells no call apart; HF_HUB_OFFLINE would be for the whole process.
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _without_bars() -> Iterator[None]:
    """Let the library draw no progress bars."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _only_a_path(name: str, column: str, path: Path) -> str:
    """The message on an image that is not in the table, nor where the table says."""
    return (
        f"{name}, must hold the bytes of an image in the column {column}, got a path alone, to "
        f"{path}, where no file is: write the file with the bytes in it, "
        'dataset.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)'
        ".with_format(None).to_parquet(FILE), or put the images there"
    )


def _holds_images(kind: Any) -> bool:
    from datasets import Image

    as_struct = isinstance(kind, dict) and set(kind) == {"bytes", "path"}
    return isinstance(kind, Image) or as_struct or getattr(kind, "dtype", None) in BINARY


def _is_class(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is int and value >= 0)


def _classes(kind: Any, values: list[Any], place: str, warn: bool) -> list[Any]:
    """The classes by label."""
    names = getattr(kind, "names", None)
    if names is not None:
        return list(range(len(names)))
    found = {value for value in values if _is_class(value)}
    if any(isinstance(value, str) for value in found):
        return sorted(found)
    return list(range(count_classes(found, place, report=warn)))


def _columns(dataset: Any) -> str:
    return ", ".join(dataset.features)
