"""Pairs (latent, teacher's image) on disk, for one-step distillation ([KD]).

A folder of pairs holds `manifest.json`, the recipe of the images, and shards `00000.safetensors`
with checksums `00000.sha256`. Only images are stored: `ddim_pl.noise.latents` recomputes latent
`i` of a seed, by generators to the bit, by Philox up to rounding. A shard that is missing or does
not match its checksum is generated again. The folder of another teacher is refused.
"""

import errno
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddim_pl.checks import check_at_least
from ddim_pl.damage import DamagedError, read_sealed, sealed
from ddim_pl.data.base import BatchIndices, EachOnce, ImageDataModule, ImageSet
from ddim_pl.files import replacing
from ddim_pl.rng import NoiseSource, gaussian_latents

# A student must not be evaluated on latents it was trained on. For every evaluation seed below
# 1,500, the first 60,000 images share no generator with the first 1.1 million pairs of this seed,
# see `ddim_pl.rng.share_generators`.
PAIR_SEED = 1_001_301

ORIGINS = {
    "sampling_precision": (
        " (of the teacher: the student's teacher_precision, or by default the teacher's own)"
    )
}
"""Where entries of a recipe come from that a user gives by another name."""

Latents = Callable[..., tuple[Tensor, Any]]
"""The latents of a seed, given as to `ddim_pl.rng.gaussian_latents`."""


class PairBatch(NamedTuple):
    """Teacher images `(B, C, H, W)` in about [-1, 1], labels `(B,)`, and their latents."""

    images: Tensor
    labels: Tensor
    latents: Tensor


class PairsWithoutLatents(NamedTuple):
    """What a loader yields where the latents are made on the training device: their indices."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class PairStore:
    """The images of pairs 0 to `num_pairs` - 1, in shards.

    Args:
        folder: Folder of the shards.
        recipe: All that the images depend on, as plain data: `seed` and `shape` at least.
        num_pairs: Number of pairs, at least 1.
        shard_size: Images in a shard, at least 1.

    Raises:
        ValueError: If a number is too small, or the folder holds pairs of another recipe.
    """

    def __init__(
        self, folder: Path, recipe: dict[str, Any], *, num_pairs: int, shard_size: int
    ) -> None:
        check_at_least(1, num_pairs=num_pairs, shard_size=shard_size)
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
    def noise_source(self) -> NoiseSource:
        """Where the latents come from; folders of before do not say, and have generators."""
        return cast(NoiseSource, self.recipe.get("noise_source", "generators"))

    @property
    def num_shards(self) -> int:
        """Number of shards; all but the last are full."""
        return -(-self.num_pairs // self.shard_size)

    def indices(self, shard: int) -> range:
        """Indices of the pairs in a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_pairs))

    def is_whole(self, shard: int) -> bool:
        """Whether a shard exists, matches its checksum, and has all its images."""
        path = self._path(shard)
        digest = path.with_suffix(".sha256")
        if not (path.is_file() and digest.is_file()):
            return False
        if _digest(path) != digest.read_text(errors="replace").strip():
            rank_zero_warn(f"{path} does not match its checksum and is generated again")
            return False
        return len(load_file(path)["images"]) >= len(self.indices(shard))

    def begin(self) -> None:
        """Write the manifest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "manifest.json") as part:
            part.write_text(json.dumps(sealed(self.recipe), indent=1))

    def write(self, shard: int, images: Tensor) -> None:
        """Write a shard's images, `(n, C, H, W)`, atomically.

        Raises:
            OSError: If the disk is full or cannot be written; the shards on it stay valid.
        """
        assert len(images) == len(self.indices(shard))
        path = self._path(shard)
        digest = path.with_suffix(".sha256")
        try:
            with replacing(path) as part:
                save_file({"images": images.contiguous()}, part)
                found = _digest(part)
                digest.unlink(missing_ok=True)
            with replacing(digest) as part:
                part.write_text(found)
        # safetensors raises system errors as its own error without errno.
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            reason = "no space is left" if full else str(error)
            raise OSError(
                f"shard {shard} of {self.num_shards} cannot be written to "
                f"{str(self.folder)!r} ({reason}): make room and run the same command again; "
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
                    f"pairs folder {str(self.folder)!r} must not hold shards without a "
                    "manifest.json: give another folder"
                )
            return
        try:
            written = read_sealed(path)
        except DamagedError as error:
            raise ValueError(f"{error}: give another folder") from error
        source = {"noise_source": "generators"}
        # Folders of before say neither; of the network's precision the teacher's digest tells.
        network = {"sampling_precision": self.recipe.get("sampling_precision")}
        written = source | network | written
        for name, value in (source | self.recipe).items():
            if written.get(name) != value:
                raise ValueError(
                    f"pairs folder {str(self.folder)!r} must be made with {name}={value!r}"
                    f"{ORIGINS.get(name, '')}, got {written.get(name)!r}: give another folder, or "
                    "remove this one"
                )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(eq=False)
class IndexedPairs(Dataset[PairBatch | PairsWithoutLatents]):
    """A torch dataset from `BatchIndices`, counted from `first`, to a whole batch of pairs."""

    store: PairStore
    first: int
    count: int
    make_latents: Latents

    def __len__(self) -> int:
        """Return the number of pairs."""
        return self.count

    def __getitem__(self, index: BatchIndices) -> PairBatch | PairsWithoutLatents:
        """Return the pairs, with latents that generators recompute."""
        indices = index.indices + self.first
        recipe = self.store.recipe
        classes = recipe.get("num_classes")
        label = indices % classes if classes else torch.zeros_like(indices)
        images = self.store.images(indices)
        if self.store.noise_source != "generators":
            return PairsWithoutLatents(images, label, indices)
        z, _ = self.make_latents(recipe["seed"], indices, recipe["shape"])
        return PairBatch(images, label, z)


class TeacherPairsDataModule(ImageDataModule):
    """Training and validation batches of teacher pairs, with the real images of another module.

    The student's module generates the pairs when a fit begins. The real images serve Fréchet
    distances and `test`.

    Args:
        images: Data module of the real images.
        folder: Folder of the pairs.
        num_pairs: Pairs to train on, at least 1.
        num_validation: Pairs to validate on, further ones of the same seed, at least 1.
        shard_size: Pairs in a file, at least 1.
        pair_seed: Seed of the latents, which must not include those of the evaluation, see
            `PAIR_SEED`.
        **kwargs: Arguments of `ImageDataModule`, without `flip`.

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
        pair_seed: int = PAIR_SEED,
        **kwargs: Any,
    ) -> None:
        super().__init__(flip=False, **kwargs)  # a mirrored image has another latent
        check_at_least(1, num_pairs=num_pairs, num_validation=num_validation)
        check_at_least(1, shard_size=shard_size)
        self.source = images
        self.squaring = images.squaring
        self.folder = Path(folder)
        self.num_pairs = num_pairs
        self.num_validation = num_validation
        self.shard_size = shard_size
        self.pair_seed = pair_seed
        self._store: PairStore | None = None
        self._latents: Latents = gaussian_latents

    @property
    def preparation(self) -> str:
        """That of the real images."""
        return self.source.preparation

    def prepare_data(self) -> None:
        """Prepare the real images."""
        self.source.prepare_data()

    def load(self, train: bool) -> ImageSet:
        """Return the real images."""
        self.source.setup()
        self.class_names = self.source.class_names
        return self.source.train_set if train else self.source.val_set

    def open(self, recipe: dict[str, Any], make_latents: Latents = gaussian_latents) -> PairStore:
        """Return the pairs of a teacher, some of which may not exist yet.

        Args:
            recipe: All that the pairs depend on except their seed, see `PairStore`.
            make_latents: Gives the teacher's latents; by default Gaussian.

        Raises:
            ValueError: If the folder holds the pairs of another teacher, or the loaders do not
                support the trainer's settings, so that it is known before pairs are generated.
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
        """The pairs.

        Raises:
            ValueError: Before `open`.
        """
        if self._store is None:
            raise ValueError(
                "the pairs must be opened first: only fit opens them and validates on them; use "
                "test, which needs none"
            )
        return self._store

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of training pairs, which starts at the trainer's progress.

        Raises:
            ValueError: If the trainer sets `overfit_batches`, or the pairs are not open.
        """
        return self._pair_loader(0, self.num_pairs, self._train_order(self.num_pairs))

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of validation pairs, none of which is a training pair.

        Raises:
            ValueError: If there are fewer pairs than devices, or the pairs are not open.
        """
        self._check_share("num_validation", self.num_validation)
        order = EachOnce(self.num_validation, self.batch_size, **self._ranks())
        return self._pair_loader(self.num_pairs, self.num_validation, order)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the real validation images: a test needs no pairs."""
        return super().val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Make latents on the device where the loader made none."""
        if not isinstance(batch, PairsWithoutLatents):
            return super().on_after_batch_transfer(batch, dataloader_idx)
        images, labels, indices = batch
        z, _ = self._latents(
            self.store.recipe["seed"],
            indices,
            self.store.recipe["shape"],
            noise_source=self.store.noise_source,
            device=images.device,
        )
        return PairBatch(images, labels, z.to(images))

    def _pair_loader(self, first: int, count: int, order: Any) -> DataLoader[Any]:
        return self._loader(IndexedPairs(self.store, first, count, self._latents), order)
