"""Image sets, the order of their batches, and the data module that hands them to Lightning.

An image set gives uint8 images and labels by index. `BatchOrder` says which indices make up batch
number k of a whole training run: a function of (seed, k, rank, world size) and of nothing else, so
that a resumed run goes on with the batch that an unbroken one would have seen. `ImageDataModule`
joins the two; a dataset is one subclass with one method, `load`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ddim_pl.images import from_uint8


class ImageSet(Protocol):
    """Labelled images of one shape, by index."""

    shape: tuple[int, int, int]
    num_classes: int

    def __len__(self) -> int:
        """Return the number of images."""

    def images(self, indices: Tensor) -> Tensor:
        """Return the uint8 images (B, C, H, W) at int64 indices (B,)."""

    def labels(self, indices: Tensor) -> Tensor:
        """Return the int64 labels (B,) at int64 indices (B,)."""


class TensorImages:
    """An image set held in memory: uint8 images (N, C, H, W) and int64 labels (N,)."""

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int) -> None:
        assert images.dtype == torch.uint8
        assert images.ndim == 4
        assert labels.dtype == torch.int64
        assert labels.shape == images.shape[:1]
        channels, height, width = images.shape[1:]
        self.shape = (channels, height, width)
        self.num_classes = num_classes
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def images(self, indices: Tensor) -> Tensor:
        """Return the uint8 images (B, C, H, W) at int64 indices (B,)."""
        return self._images[indices]

    def labels(self, indices: Tensor) -> Tensor:
        """Return the int64 labels (B,) at int64 indices (B,)."""
        return self._labels[indices]


class Draw(NamedTuple):
    """What to take from an image set for one batch: int64 indices (B,) and boolean flips (B,)."""

    indices: Tensor
    flip: Tensor


class Batch(NamedTuple):
    """Images (B, C, H, W), uint8 in the loader and float32 in [-1, 1] in a step; labels (B,)."""

    images: Tensor
    labels: Tensor


class DrawnImages(Dataset[Batch]):
    """A torch dataset whose index is a `Draw` and whose item is a whole `Batch` of uint8 images.

    Gathering a batch at once is far faster than collating it from single images.
    """

    def __init__(self, source: ImageSet) -> None:
        self.source = source

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    def __getitem__(self, draw: Draw) -> Batch:
        """Return the batch, mirrored left to right where `draw.flip` is true."""
        images = self.source.images(draw.indices)
        images = torch.where(draw.flip[:, None, None, None], images.flip(-1), images)
        return Batch(images, self.source.labels(draw.indices))


def count_images(batch: Batch | Tensor) -> int:
    """Return the number of images, or of indices, in a batch, for a ThroughputMonitor."""
    return len(batch) if isinstance(batch, Tensor) else len(batch.images)


def shared_batches(num_items: int, batch_size: int, rank: int, world_size: int) -> list[Tensor]:
    """Return this rank's batches of the indices 0 to `num_items` - 1, each index on one rank.

    Rank r has the indices r, r + world_size, ... in order. All ranks cut theirs into the same
    number of batches, of nearly equal size, because an evaluation loop under DDP hangs where one
    rank has a batch, and so a collective call, more than another. Only where an index is missing
    altogether (fewer items than ranks, or a batch size of 1) is a rank short of a batch.

    >>> shared_batches(7, 3, rank=0, world_size=2), shared_batches(7, 3, rank=1, world_size=2)
    ([tensor([0, 2]), tensor([4, 6])], [tensor([1, 3]), tensor([5])])
    """
    share = torch.arange(num_items)[rank::world_size]
    longest = -(-num_items // world_size)
    num_batches = max(1, -(-longest // batch_size))
    return [batch for batch in share.tensor_split(num_batches) if len(batch)]


# Both samplers are DistributedSamplers because Lightning replaces any other sampler by its own in
# a distributed run (`_requires_distributed_sampler` in its data_connector.py), and theirs would
# hand out single indices in place of draws.
class BatchOrder(DistributedSampler[Draw]):
    """The training batches of a run, numbered from 0 without regard to epochs.

    A pass over the set is one permutation, cut into global batches of `batch_size` * `world_size`
    indices; what is left at its end is dropped. Rank r takes elements r, r + world_size, ... of
    each. A set smaller than a global batch is read through permutation after permutation instead.
    Pass p draws its permutation and its flips from a generator seeded by (seed, p).

    Args:
        num_items: Number of images in the set.
        batch_size: Images per rank and batch.
        seed: Seed of the whole order, at least 0.
        flip: Whether each image is mirrored with probability 1/2.
        rank: This process.
        world_size: Number of processes.
        steps_per_epoch: Batches which one iteration yields; the batches of one pass if None.
        position: Returns the number of batches the run has consumed, at which an iteration starts.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        seed: int = 0,
        flip: bool = False,
        rank: int = 0,
        world_size: int = 1,
        steps_per_epoch: int | None = None,
        position: Callable[[], int] = lambda: 0,
    ) -> None:
        items: Any = range(num_items)
        super().__init__(items, num_replicas=world_size, rank=rank, seed=seed)
        self.num_items = num_items
        self.global_batch_size = batch_size * world_size
        self.flip = flip
        self.batches_per_pass = max(1, num_items // self.global_batch_size)
        self.steps_per_epoch = steps_per_epoch
        self.position = position
        self._cached_pass: tuple[int, Draw] | None = None

    def __len__(self) -> int:
        """Return the number of batches which one iteration yields."""
        return self.steps_per_epoch or self.batches_per_pass

    def __iter__(self) -> Iterator[Draw]:
        """Yield `len(self)` batches, beginning with batch number `position()`."""
        # Also in an epoch resumed in its middle: Lightning counts its batches and stops at the
        # epoch's end by itself. To yield only the rest would need the place in the epoch, which
        # the position does not tell once `limit_train_batches` shortens epochs.
        start = self.position()
        return (self.batch(number) for number in range(start, start + len(self)))

    def batch(self, number: int) -> Draw:
        """Return this rank's share of batch `number` of the run."""
        size = self.global_batch_size
        if self.num_items < size:
            first = number * size
        else:
            in_pass = number % self.batches_per_pass * size
            first = number // self.batches_per_pass * self.num_items + in_pass
        first_pass = first // self.num_items
        last_pass = (first + size - 1) // self.num_items
        passes = [self._pass(index) for index in range(first_pass, last_pass + 1)]
        share = torch.arange(first, first + size)[self.rank :: self.num_replicas]
        share -= first_pass * self.num_items
        indices, flip = (torch.cat(parts)[share] for parts in zip(*passes, strict=True))
        return Draw(indices, flip)

    def _pass(self, index: int) -> Draw:
        """Return the permutation and the flips of pass `index`."""
        if self._cached_pass is None or self._cached_pass[0] != index:
            words = np.random.SeedSequence([self.seed, index]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(words[0]))
            order = torch.randperm(self.num_items, generator=generator)
            flip = torch.rand(self.num_items, generator=generator) < (0.5 if self.flip else 0.0)
            self._cached_pass = index, Draw(order, flip)
        return self._cached_pass[1]


class EachOnce(DistributedSampler[Draw]):
    """Every image once over all ranks, in the batches of `shared_batches`, never flipped."""

    def __init__(
        self, num_items: int, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        items: Any = range(num_items)
        super().__init__(items, num_replicas=world_size, rank=rank, shuffle=False)
        self.batches = shared_batches(num_items, batch_size, rank, world_size)

    def __len__(self) -> int:
        """Return the number of this rank's batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Draw]:
        """Yield this rank's batches."""
        return (Draw(batch, torch.zeros(len(batch), dtype=torch.bool)) for batch in self.batches)


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader which Lightning knows to be resumable.

    The place to resume at is in Lightning's own progress, which `BatchOrder` asks for, so the
    state is empty. But a loader without these two methods makes Lightning warn, when a run resumes
    in the middle of an epoch, that its batches may be the wrong ones.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accept the empty state."""


class IndexBatches:
    """An iterable of index tensors, to predict on.

    A bare list of tensors would be taken for a list of dataloaders.
    """

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield int64 index tensors (B,)."""
        return iter(self.batches)


class ImageDataModule(LightningDataModule, ABC):
    """Training, validation and prediction batches of an image set, for any number of devices.

    Training and validation steps get a `Batch`: float32 images (B, C, H, W) in [-1, 1] and int64
    labels (B,). Prediction steps get int64 indices (B,) of the images to make. Needs no global
    random state, and leaves it alone.

    Args:
        batch_size: Images per device and step, at least 1.
        flip: Whether training images are mirrored left to right with probability 1/2.
        seed: Seed of the order of the training images, at least 0.
        num_workers: Processes which prepare batches; 0 prepares them in the training process.
        steps_per_epoch: Training batches per epoch; the whole batches of one pass if None.
            Batches follow one another in the same order, however they are cut into epochs.
        num_predict: Number of images to make when predicting, over all devices.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        batch_size: int = 128,
        *,
        flip: bool,
        seed: int = 0,
        num_workers: int = 0,
        steps_per_epoch: int | None = None,
        num_predict: int = 64,
    ) -> None:
        super().__init__()
        _require_at_least("batch_size", batch_size, 1)
        _require_at_least("seed", seed, 0)
        _require_at_least("num_workers", num_workers, 0)
        if steps_per_epoch is not None:
            _require_at_least("steps_per_epoch", steps_per_epoch, 1)
        _require_at_least("num_predict", num_predict, 0)
        self.batch_size = batch_size
        self.flip = flip
        self.seed = seed
        self.num_workers = num_workers
        self.steps_per_epoch = steps_per_epoch
        self.num_predict = num_predict
        self._train_set: ImageSet | None = None
        self._val_set: ImageSet | None = None

    @abstractmethod
    def load(self, train: bool) -> ImageSet:
        """Return the training images, or those to validate on; called once for each."""

    def setup(self, stage: str | None = None) -> None:
        """Load both sets, unless nothing but prediction is to come; a second call does nothing."""
        if stage == "predict":
            return
        if self._train_set is None:
            self._train_set = self.load(train=True)
        if self._val_set is None:
            self._val_set = self.load(train=False)

    @property
    def predicting(self) -> bool:
        """Whether the attached trainer only predicts, for which no images are needed."""
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING

    @property
    def train_set(self) -> ImageSet:
        """The images to train on, which are also those a Fréchet distance compares with."""
        if self._train_set is None:
            raise RuntimeError("The images are not loaded yet; call setup() first.")
        return self._train_set

    @property
    def val_set(self) -> ImageSet:
        """The images to validate and test on."""
        if self._val_set is None:
            raise RuntimeError("The images are not loaded yet; call setup() first.")
        return self._val_set

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image, known after `setup`."""
        return self.train_set.shape

    @property
    def num_classes(self) -> int:
        """Number of classes, known after `setup`."""
        return self.train_set.num_classes

    @property
    def num_reference(self) -> int:
        """Number of images which `reference_images` yields over all ranks."""
        return len(self.train_set)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of training batches, which goes on where the trainer's progress is.

        Raises:
            ValueError: If the trainer asks for `overfit_batches`.
        """
        self._check_order()
        order = BatchOrder(
            len(self.train_set),
            self.batch_size,
            seed=self.seed,
            flip=self.flip,
            steps_per_epoch=self.steps_per_epoch,
            position=self._batches_consumed,
            **self._place(),
        )
        return self._loader(self.train_set, order)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of validation batches: every image once, none flipped."""
        self._check_share("the validation set", len(self.val_set))
        order = EachOnce(len(self.val_set), self.batch_size, **self._place())
        return self._loader(self.val_set, order)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the same as `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> IndexBatches:
        """Return int64 index tensors which cover 0 to `num_predict` - 1 once over all ranks."""
        self._check_share("num_predict", self.num_predict)
        return IndexBatches(shared_batches(self.num_predict, self.batch_size, **self._place()))

    def reference_images(self, rank: int, world_size: int, batch_size: int) -> Iterator[Tensor]:
        """Yield uint8 batches (B, C, H, W) of the training images, each once over all ranks.

        They come in order and are never flipped: the real side of a Fréchet distance.
        """
        for indices in shared_batches(self.num_reference, batch_size, rank, world_size):
            yield self.train_set.images(indices)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn uint8 images into float32 in [-1, 1], on the device; leave all else alone."""
        if isinstance(batch, tuple | list) and len(batch) == 2:
            images, labels = batch
            if isinstance(images, Tensor) and images.dtype == torch.uint8:
                return Batch(from_uint8(images), labels)
        return batch

    def _check_order(self) -> None:
        """Refuse that Lightning puts an order of its own in the place of this module's."""
        overfit_batches = getattr(self.trainer, "overfit_batches", 0)
        if overfit_batches > 0:
            raise ValueError(
                f"overfit_batches is {overfit_batches}, which would have Lightning replace the "
                "order of the batches; it must be 0 (to overfit, train on a folder of few images)"
            )

    def _check_share(self, name: str, count: int) -> None:
        """Refuse fewer images than devices: Lightning hangs where a device has nothing to do."""
        world_size = self._place()["world_size"]
        if count < world_size:
            raise ValueError(
                f"{name} has {count} images for {world_size} devices; give at least as many, or "
                "fewer devices"
            )

    def _batches_consumed(self) -> int:
        """Return how many batches the attached trainer has trained on since the run began."""
        if self.trainer is None:
            return 0
        # Lightning restores its progress before it asks for a loader. `processed` counts the
        # batches that were trained on; `ready` would also count one that an exception broke off.
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]

    def _place(self) -> dict[str, int]:
        """Return the rank and the world size."""
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _loader(self, source: ImageSet, order: DistributedSampler[Draw]) -> DataLoader[Batch]:
        return self._loader_of(DrawnImages(source), order)

    def _loader_of(self, dataset: Dataset[Batch], order: Any) -> DataLoader[Batch]:
        return ResumableLoader(
            dataset,
            sampler=order,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # A DataLoader draws a seed for its workers whenever an iteration begins. Taken from
            # the global generator, it would shift the dropout of a resumed run.
            generator=torch.Generator().manual_seed(self.seed),
        )


def _require_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
