"""Millions of images in shards: few large files that litdata has written.

litdata reads an image by its number. So the order of the batches is that of every other set: it
depends on the seed and the number of the batch alone, not on workers or devices, and a resumed run
goes on in the middle of an epoch. Only the permutation of a pass is another: some shards at a time
are mixed, so that disks read in long pieces.
"""

import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ddim_pl.checks import check_at_least
from ddim_pl.damage import reason_of
from ddim_pl.data.base import ImageSet
from ddim_pl.data.encoded import Encoded
from ddim_pl.data.image_folder import ResizedDataModule, decode
from ddim_pl.data.image_list import NUM_THREADS

INDEX = "index.json"
IMAGE, LABEL = "image", "label"
PLAIN = frozenset(("bytes", "int", "float", "str", "text", "bool", "json"))
"""litdata's formats that are read without unpickling."""


class ShardIndex:
    """What a folder of shards holds, by its `index.json`.

    Args:
        root: The folder.
        with_labels: Whether samples must have labels.

    Raises:
        ValueError: If there is no such file, a shard is missing, of another size or in another
            folder, or samples are not `{"image": bytes, "label": int}`. Samples that would be
            unpickled are refused.
    """

    def __init__(self, root: Path, *, with_labels: bool) -> None:
        self.root = root
        try:
            text = (root / INDEX).read_bytes()
            content = json.loads(text)
            config, chunks = content["config"], content["chunks"]
            self.names = [str(chunk["filename"]) for chunk in chunks]
            self.counts = torch.tensor([int(chunk["chunk_size"]) for chunk in chunks])
            if (self.counts < 0).any():
                raise ValueError("it has a negative number of images")
            self._ends = self.counts.cumsum(0)
            sizes = [int(chunk["chunk_bytes"]) for chunk in chunks]
            formats = _formats(config)
        except Exception as error:  # the bytes may say anything
            raise ValueError(
                f"root must be a folder of shards with litdata's {INDEX}, got {str(root)!r} "
                f"({reason_of(error)}): write it as docs/data.md shows"
            ) from error
        self.digest = hashlib.sha256(text).hexdigest()
        self._check_formats(formats, config, with_labels)
        self._check_files(sizes)

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self.counts.sum())

    def place(self, index: int) -> str:
        """Where an image is, for messages."""
        shard = int(torch.searchsorted(self._ends, index, right=True))
        before = int(self._ends[shard] - self.counts[shard])
        return f"{self.root / self.names[shard]}, image {index - before}"

    def _check_formats(self, formats: dict[str, str], config: Any, with_labels: bool) -> None:
        wanted = {IMAGE: "bytes", **({LABEL: "int"} if with_labels else {})}
        for name, kind in wanted.items():
            if formats.get(name) != kind:
                raise ValueError(
                    f"{self.root / INDEX} must have samples with {name!r} of the type {kind}, got "
                    f"{formats.get(name, 'none')}: write the bytes of the image file as {IMAGE!r} "
                    f"and the class as int({LABEL}), as docs/data.md shows"
                    + (", or leave num_classes out" if name == LABEL else "")
                )
        for name, kind in formats.items():
            if kind not in PLAIN:
                raise ValueError(
                    f"{self.root / INDEX} must have samples of plain values alone, got {name!r} "
                    f"of the type {kind}, which could run code when it is read: leave it out"
                )
        # Another format, MosaicML's, may hold pickles; other loaders have formats of their own.
        for name in ("compression", "encryption", "format"):
            if config.get(name) is not None:
                raise ValueError(
                    f"{self.root / INDEX} must be without {name}, got {config[name]!r}: write the "
                    "shards as docs/data.md shows"
                )
        if config.get("item_loader") not in (None, "PyTreeLoader"):
            raise ValueError(
                f"{self.root / INDEX} must be of litdata's PyTreeLoader, got "
                f"{config['item_loader']!r}: write the shards as docs/data.md shows"
            )

    def _check_files(self, sizes: list[int]) -> None:
        if len(self) == 0:
            raise ValueError(
                f"root must hold images, got {str(self.root)!r} without any: write it again"
            )
        for name, size in zip(self.names, sizes, strict=True):
            if Path(name).name != name:
                raise ValueError(
                    f"{self.root / INDEX} must name files beside it, got {name!r}: write the "
                    "shards as docs/data.md shows"
                )
            file = self.root / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                raise ValueError(
                    f"{file} must have {size} bytes, got "
                    f"{'no file' if found is None else found}: copy the shard again"
                )


class ShardImages(ImageSet):
    """Images in shards, read and decoded on demand, with their labels.

    Args:
        index: What the shards hold.
        num_classes: Number of classes; None if labels are not to be read.
        decode_image: From an `Encoded` image to the uint8 image (C, H, W).
        shape: (C, H, W).
        shuffle_shards: How many shards are mixed at a time.
    """

    def __init__(
        self,
        index: ShardIndex,
        num_classes: int | None,
        decode_image: "partial[Tensor]",
        shape: tuple[int, int, int],
        shuffle_shards: int,
    ) -> None:
        # Labels come with the images: those of all would take a pass over all shards.
        nothing = torch.zeros((), dtype=torch.int64).expand(len(index))
        super().__init__(nothing, num_classes or 1, shape)
        self._index = index
        self._with_labels = num_classes is not None
        self._decode = decode_image
        self._shuffle_shards = shuffle_shards
        self._reader: _Reader | None = None
        self._latest: tuple[Tensor, Tensor] | None = None

    def images(self, indices: Tensor) -> Tensor:
        """Return the uint8 images (B, C, H, W) at int64 indices (B,).

        Raises:
            ValueError: If one cannot be read, or has no label of the classes.
        """
        encoded, labels = self._read(indices)
        self._latest = indices.clone(), labels
        if get_worker_info() is not None:
            # The workers already use the processors in parallel.
            return torch.stack([self._decode(each) for each in encoded])
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return torch.stack(list(pool.map(self._decode, encoded)))

    def labels(self, indices: Tensor) -> Tensor:
        """Return the int64 labels (B,) at int64 indices (B,); errors as in `images`."""
        if not self._with_labels:
            return super().labels(indices)
        latest = self._latest
        if latest is not None and torch.equal(latest[0], indices):
            return latest[1].clone()
        return self._read(indices)[1]

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """Return all indices (N,) in a random order that mixes some shards at a time."""
        counts = self._index.counts
        groups = torch.randperm(len(counts), generator=generator) // self._shuffle_shards
        order = torch.randperm(len(self), generator=generator)
        group = groups.repeat_interleave(counts)[order]
        return order[group.argsort(stable=True)]

    def digest(self) -> str:
        """A digest of litdata's index, with its time of writing, and of how images are decoded."""
        recipe = f"{self.shape} {self._decode.keywords} {self._index.digest}"
        return hashlib.sha256(recipe.encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open."""
        return {**self.__dict__, "_reader": None, "_latest": None}

    def _read(self, indices: Tensor) -> tuple[list[Encoded], Tensor]:
        if self._reader is None or self._reader.process != os.getpid():
            self._reader = _Reader(self._index)
        order = indices.argsort()  # a shard is mapped anew for each change between shards
        samples = dict(
            zip(order.tolist(), self._reader.read(indices[order].tolist()), strict=True)
        )
        encoded, labels = [], torch.zeros(len(indices), dtype=torch.int64)
        for row, index in enumerate(indices.tolist()):
            place = self._index.place(index)
            encoded.append(Encoded(place, samples[row][IMAGE]))
            if self._with_labels:
                labels[row] = label = samples[row][LABEL]
                if not 0 <= label < self.num_classes:
                    raise ValueError(
                        f"{place} must have a label below num_classes {self.num_classes}, got "
                        f"{label}: set num_classes to the number of classes, counted from 0"
                    )
        return encoded, labels


class ShardDataModule(ResizedDataModule):
    """Shards that litdata has written, as uint8 images; for sets of millions.

    Needs `pip install 'ddim_pl[litdata]'`. Images are decoded on demand: set `num_workers`. How to
    write shards is in docs/data.md.

    Args:
        root: Folder of the shards to train on and of their `index.json`.
        image_size: Side of the square images, at least 1.
        num_classes: Number of classes; None if the shards have no labels or they are not to be
            read.
        val_root: Folder of the shards to validate on; `root` if None.
        shuffle_shards: Shards that are mixed at a time, at least 1. More mix better, fewer are
            read in longer pieces: of shards of 64 MB, 16 are a gigabyte, which should fit in
            memory.
        **kwargs: Arguments of `ResizedDataModule`.

    Raises:
        ValueError: As for `ResizedDataModule`; at `setup`, if litdata is not installed, or the
            shards are not complete or hold something else, see `ShardIndex`; in training, if an
            image is broken or its label is none of the classes.
    """

    def __init__(
        self,
        root: str,
        image_size: int,
        *,
        num_classes: int | None = None,
        val_root: str | None = None,
        shuffle_shards: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, **kwargs)
        check_at_least(1, num_classes=num_classes, shuffle_shards=shuffle_shards)
        self.root = root
        self.val_root = val_root
        self.classes = num_classes
        self.shuffle_shards = shuffle_shards

    @property
    def labels_given(self) -> str | None:
        """The number of classes, without which no labels are read."""
        return None if self.classes is None else f"num_classes {self.classes}"

    def load(self, train: bool) -> ImageSet:
        """Return the images of `root` or of `val_root`, after decoding the first of them."""
        if not train and self.val_root is None:
            return self.train_set
        folder = self.root if train else self.val_root
        assert folder is not None
        index = ShardIndex(Path(folder).expanduser(), with_labels=self.classes is not None)
        decode_image = partial(
            decode,
            image_size=self.image_size,
            channels=self.channels,
            squaring=self.squaring if self.resize else None,
        )
        shape = (self.channels, self.image_size, self.image_size)
        images = ShardImages(index, self.classes, decode_image, shape, self.shuffle_shards)
        images.images(torch.zeros(1, dtype=torch.int64))
        return images


class _Reader:
    """litdata's reader of shards, in one process, which one thread uses at a time."""

    def __init__(self, index: ShardIndex) -> None:
        try:
            from litdata import StreamingDataset
        except ImportError as error:
            raise ValueError(
                f"root {str(index.root)!r} holds shards, for which the package litdata is needed, "
                f"which is not installed ({error}): pip install 'ddim_pl[litdata]'"
            ) from None
        self.process = os.getpid()
        self._index = index
        self._lock = threading.Lock()
        # As a path: in a text litdata reads prefixes and dates.
        self._samples = StreamingDataset(index.root)

    def read(self, indices: list[int]) -> list[dict[str, Any]]:
        with self._lock:
            return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> dict[str, Any]:
        try:
            sample: dict[str, Any] = self._samples[index]
            # A shard may hold a second table, of which the index says nothing.
            if type(sample[IMAGE]) is not bytes or type(sample.get(LABEL, 0)) is not int:
                raise ValueError("it is not of the types in the index")
        except Exception as error:  # the bytes may say anything
            raise ValueError(
                f"{self._index.place(index)} cannot be read ({reason_of(error)}): copy the shard "
                "again"
            ) from error
        return sample


def _formats(config: Any) -> dict[str, str]:
    """The type of each part of a sample, by name."""
    # PyTorch's text of a tree, whose classes it would import.
    tree = json.loads(config["data_spec"])[1]
    if tree["type"] != "builtins.dict" or any(
        c["type"] is not None for c in tree["children_spec"]
    ):
        raise ValueError("its samples are no dicts of plain values")
    names = json.loads(tree["context"])
    # litdata reads them all, also one that another of its name would hide here.
    if len(set(names)) < len(names):
        raise ValueError(f"its samples have a name twice: {names}")
    return dict(zip(names, config["data_format"], strict=True))
