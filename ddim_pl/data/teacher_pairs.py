"""Pairs (latent, teacher's image) on disk, for distillation in one step (Luhman & Luhman 2021).

A folder of pairs holds `manifest.json`, which says what the images were drawn with, and shards
`00000.safetensors`, each beside `00000.sha256`. Only images are stored: latent `i` of a seed is
made anew, to the bit, by `ddim_pl.noise.latents`. A shard that is missing or does not match its
checksum is made again; a folder of another teacher is refused.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddim_pl.data.base import BatchOrder, Draw, EachOnce, ImageDataModule, ImageSet
from ddim_pl.files import replacing
from ddim_pl.rng import gaussian_latents

# A student must not be judged by images that begin at latents it was trained on. For every seed of
# evaluation below 1,500, the first 60,000 images share no generator with the first 1.1 million
# pairs of this seed, see `ddim_pl.rng.share_generators`.
PAIR_SEED = 1_001_301

Latents = Callable[[int, Iterable[int], Sequence[int]], tuple[Tensor, list[torch.Generator]]]
"""Makes the latents of a seed, given indices and shape, as `ddim_pl.noise.latents`."""


class PairBatch(NamedTuple):
    """Teacher images `(B, C, H, W)` in about [-1, 1], labels `(B,)`, and their latents."""

    images: Tensor
    labels: Tensor
    latents: Tensor


class PairStore:
    """The images of pairs 0 to `num_pairs` - 1, in shards.

    Args:
        folder: Where they are, or will be.
        recipe: What they are drawn with, plain data: `seed` and `shape` at least.
        num_pairs: How many.
        shard_size: Images in a shard.

    Raises:
        ValueError: If a number is too small, or the folder holds pairs of another recipe.
    """

    def __init__(
        self, folder: Path, recipe: dict[str, Any], *, num_pairs: int, shard_size: int
    ) -> None:
        for name, value in {"num_pairs": num_pairs, "shard_size": shard_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.folder = folder
        self.recipe = {**json.loads(json.dumps(recipe)), "shard_size": shard_size}
        self.num_pairs = num_pairs
        self.shard_size = shard_size
        self._loaded: dict[int, Tensor] = {}
        self._check_manifest()

    def __len__(self) -> int:
        """Return the number of pairs."""
        return self.num_pairs

    @property
    def num_shards(self) -> int:
        """Number of shards; all but the last are full."""
        return -(-self.num_pairs // self.shard_size)

    def indices(self, shard: int) -> range:
        """Indices of the pairs in a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_pairs))

    def is_whole(self, shard: int) -> bool:
        """Whether a shard is there, long enough, and what was written."""
        path = self._path(shard)
        digest = path.with_suffix(".sha256")
        if not (path.is_file() and digest.is_file()):
            return False
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest.read_text().strip():
            rank_zero_warn(f"{path} does not match its checksum and is made again")
            return False
        return len(load_file(path)["images"]) >= len(self.indices(shard))

    def begin(self) -> None:
        """Write the manifest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "manifest.json") as part:
            part.write_text(json.dumps(self.recipe, indent=1))

    def write(self, shard: int, images: Tensor) -> None:
        """Write a shard's images, `(n, C, H, W)`; it appears whole or not at all.

        Raises:
            OSError: If the disk is full or cannot be written; what is there stays good.
        """
        assert len(images) == len(self.indices(shard))
        path = self._path(shard)
        digest = path.with_suffix(".sha256")
        try:
            with replacing(path) as part:
                save_file({"images": images.contiguous()}, part)
                with part.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                digest.unlink(missing_ok=True)
            with replacing(digest) as part:
                part.write_text(found)
        # What the system says, safetensors tells as an error of its own without a number.
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            reason = "no space is left" if full else str(error)
            raise OSError(
                f"shard {shard} of {self.num_shards} cannot be written to "
                f"{str(self.folder)!r} ({reason}): make room and give the same command again, "
                "the shards before it are kept"
            ) from error
        self._loaded.pop(shard, None)

    def images(self, indices: Tensor) -> Tensor:
        """Images `(B, C, H, W)`, float32, at int64 indices `(B,)`."""
        rows = []
        for index in indices.tolist():
            shard, row = divmod(index, self.shard_size)
            if shard not in self._loaded:
                self._loaded[shard] = load_file(self._path(shard))["images"]  # mapped, not read
            rows.append(self._loaded[shard][row])
        return torch.stack(rows)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    def _check_manifest(self) -> None:
        path = self.folder / "manifest.json"
        if not path.exists():
            if any(self.folder.glob("*.safetensors")):
                raise ValueError(
                    f"pairs folder {str(self.folder)!r} holds shards without a manifest.json: "
                    "give another folder"
                )
            return
        try:
            written = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} cannot be read ({error}): give another folder") from error
        for name, value in self.recipe.items():
            if written.get(name) != value:
                raise ValueError(
                    f"pairs folder {str(self.folder)!r} was made with {name}="
                    f"{written.get(name)!r}, but {value!r} is wanted: give another folder, or "
                    "remove this one"
                )


class DrawnPairs(Dataset[PairBatch]):
    """A torch dataset whose index is a `Draw` and whose item is a whole `PairBatch`."""

    def __init__(
        self, store: PairStore, first: int, count: int, make_latents: Latents = gaussian_latents
    ) -> None:
        self.store = store
        self.make_latents = make_latents
        self.first = first
        self.count = count

    def __len__(self) -> int:
        """Return the number of pairs."""
        return self.count

    def __getitem__(self, draw: Draw) -> PairBatch:
        """Return the pairs, their latents made anew."""
        indices = draw.indices + self.first
        recipe = self.store.recipe
        z, _ = self.make_latents(recipe["seed"], indices.tolist(), recipe["shape"])
        classes = recipe.get("num_classes")
        label = indices % classes if classes else torch.zeros_like(indices)
        return PairBatch(self.store.images(indices), label, z)


class TeacherPairsDataModule(ImageDataModule):
    """Training and validation batches of teacher pairs, beside the real images of another module.

    The pairs are made by the training module when a fit begins, see `LuhmanDistillation`; the real
    images serve Fréchet distances and `test`.

    Args:
        images: Data module of the real images.
        folder: Folder of the pairs.
        num_pairs: Pairs to train on.
        num_validation: Pairs to validate on, further ones of the same seed.
        shard_size: Pairs in a file.
        batch_size: Pairs per device and step, at least 1.
        seed: Seed of the order of the pairs, at least 0.
        pair_seed: Seed of the latents; none of those that the student is judged by may be among
            them, see `PAIR_SEED`.
        num_workers: Processes which prepare batches; 0 prepares them in the training process.
        steps_per_epoch: Training batches per epoch; the whole batches of one pass if None.
        num_predict: Number of images to make when predicting, over all devices.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        images: ImageDataModule,
        folder: str,
        *,
        num_pairs: int,
        num_validation: int = 256,
        shard_size: int = 10_000,
        batch_size: int = 128,
        seed: int = 0,
        pair_seed: int = PAIR_SEED,
        num_workers: int = 0,
        steps_per_epoch: int | None = None,
        num_predict: int = 64,
    ) -> None:
        super().__init__(
            batch_size,
            flip=False,  # a mirrored image has another latent
            seed=seed,
            num_workers=num_workers,
            steps_per_epoch=steps_per_epoch,
            num_predict=num_predict,
        )
        for name, value in {
            "num_pairs": num_pairs,
            "num_validation": num_validation,
            "shard_size": shard_size,
        }.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.source = images
        self.folder = Path(folder)
        self.num_pairs = num_pairs
        self.num_validation = num_validation
        self.shard_size = shard_size
        self.pair_seed = pair_seed
        self._store: PairStore | None = None
        self._latents: Latents = gaussian_latents

    def prepare_data(self) -> None:
        """Download the real images, if they are to be."""
        self.source.prepare_data()

    def load(self, train: bool) -> ImageSet:
        """Return the real images."""
        return self.source.load(train)

    def open(self, recipe: dict[str, Any], make_latents: Latents = gaussian_latents) -> PairStore:
        """Return the pairs of a teacher, of which some may not be made yet.

        Args:
            recipe: What the teacher draws with, see `PairStore`.
            make_latents: Makes the latents it draws from; by default Gaussian.

        Raises:
            ValueError: If the folder holds the pairs of another teacher, or the trainer asks for
                what the loaders refuse: better before the pairs are made than after.
        """
        self._check_order()
        self._check_share("num_validation", self.num_validation)
        self._latents = make_latents
        self._store = PairStore(
            self.folder,
            {**recipe, "seed": self.pair_seed},
            num_pairs=self.num_pairs + self.num_validation,
            shard_size=self.shard_size,
        )
        return self._store

    @property
    def store(self) -> PairStore:
        """The pairs, once they are open.

        Raises:
            ValueError: If they are not.
        """
        if self._store is None:
            raise ValueError(
                "the pairs are not open: only fit opens them, and validates on them; use test, "
                "which needs none"
            )
        return self._store

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of training pairs, which goes on where the trainer's progress is.

        Raises:
            ValueError: If the trainer asks for `overfit_batches`, or the pairs are not open.
        """
        self._check_order()
        order = BatchOrder(
            self.num_pairs,
            self.batch_size,
            seed=self.seed,
            steps_per_epoch=self.steps_per_epoch,
            position=self._batches_consumed,
            rank=self._place()["rank"],
            world_size=self._place()["world_size"],
        )
        return self._pair_loader(0, self.num_pairs, order)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of validation pairs, which are none of the training pairs.

        Raises:
            ValueError: If there are fewer than devices, or the pairs are not open.
        """
        self._check_share("num_validation", self.num_validation)
        order = EachOnce(self.num_validation, self.batch_size, **self._place())
        return self._pair_loader(self.num_pairs, self.num_validation, order)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the real validation images: a test needs no pairs."""
        return super().val_dataloader()

    def _pair_loader(self, first: int, count: int, order: Any) -> DataLoader[Any]:
        pairs: Any = DrawnPairs(self.store, first, count, self._latents)
        return self._loader_of(pairs, order)


def shards_of(store: PairStore, rank: int, world_size: int) -> Iterable[int]:
    """The shards that a rank sees to."""
    return range(rank, store.num_shards, world_size)
