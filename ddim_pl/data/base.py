"""Image sets, the order of their batches, and the data module that joins them for Lightning.

An image set gives uint8 images and labels by index. `BatchOrder` gives the indices of batch number
k of a training run. They depend on (seed, k, rank, world size) only, so a resumed run continues
with the batch that an uninterrupted run would have seen. A dataset is a subclass of
`ImageDataModule` with one method, `load`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import UserList
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ddim_pl.checks import check_at_least
from ddim_pl.data.squares import Squaring
from ddim_pl.images import from_uint8
from ddim_pl.lightning_internals import batches_consumed


class ImageSet(ABC):
    """Labelled images of one shape, by index.

    Args:
        labels: Classes, int64 (N,).
        num_classes: Number of classes.
        shape: (C, H, W) of an image.
    """

    def __init__(self, labels: Tensor, num_classes: int, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.num_classes = num_classes
        self._labels = labels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._labels)

    @abstractmethod
    def images(self, indices: Tensor) -> Tensor:
        """Return the uint8 images (B, C, H, W) at int64 indices (B,)."""

    def digest(self) -> str | None:
        """A name for all images, to the last bit; None if there is none, so that nothing is kept.

        A subclass that has one overrides it together with `images`.
        """
        return None

    def labels(self, indices: Tensor) -> Tensor:
        """Return the int64 labels (B,) at int64 indices (B,)."""
        return self._labels[indices]

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """Return all indices (N,) in the random order of one pass of training."""
        return torch.randperm(len(self), generator=generator)


class TensorImages(ImageSet):
    """An image set held in memory: uint8 images (N, C, H, W) and int64 labels (N,)."""

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int) -> None:
        assert images.dtype == torch.uint8
        assert images.ndim == 4
        assert labels.dtype == torch.int64
        assert labels.shape == images.shape[:1]
        channels, height, width = images.shape[1:]
        super().__init__(labels, num_classes, (channels, height, width))
        self._images = images

    def images(self, indices: Tensor) -> Tensor:
        """Return the uint8 images (B, C, H, W) at int64 indices (B,)."""
        return self._images[indices]

    def digest(self) -> str:
        """A digest of the pixels."""
        pixels = self._images.contiguous().numpy().data
        return f"{tuple(self._images.shape)} {hashlib.sha256(pixels).hexdigest()}"


class BatchIndices(NamedTuple):
    """The images of one batch: int64 indices (B,) and whether each is mirrored, boolean (B,)."""

    indices: Tensor
    flip: Tensor


class Batch(NamedTuple):
    """Images (B, C, H, W), uint8 in the loader and float32 in [-1, 1] in a step; labels (B,)."""

    images: Tensor
    labels: Tensor


class IndexedImages(Dataset[Batch]):
    """A torch dataset from `BatchIndices` to a whole `Batch` of uint8 images.

    Gathering a batch at once is much faster than collating it from single images.
    """

    def __init__(self, source: ImageSet) -> None:
        self.source = source

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    def __getitem__(self, index: BatchIndices) -> Batch:
        """Return the batch, mirrored left to right where `index.flip` is true."""
        images = self.source.images(index.indices)
        images = torch.where(index.flip[:, None, None, None], images.flip(-1), images)
        return Batch(images, self.source.labels(index.indices))


def count_images(batch: Any) -> int:
    """Return the number of images, or of indices, in a batch, for a ThroughputMonitor."""
    if isinstance(batch, Tensor):
        return len(batch)
    return len(next(iter(batch.values() if isinstance(batch, Mapping) else batch)))


def shared_batches(num_items: int, batch_size: int, rank: int, world_size: int) -> list[Tensor]:
    """Return this rank's batches of the indices 0 to `num_items` - 1, each index on one rank.

    Rank r has the indices r, r + world_size, ... in order. All ranks have the same number of
    batches, of nearly equal size: an evaluation loop under DDP hangs if one rank has more batches,
    and so more collective calls, than another. Ranks differ by one batch only with fewer items
    than ranks, or a batch size of 1.

    >>> shared_batches(7, 3, rank=0, world_size=2), shared_batches(7, 3, rank=1, world_size=2)
    ([tensor([0, 2]), tensor([4, 6])], [tensor([1, 3]), tensor([5])])
    """
    share = torch.arange(num_items)[rank::world_size]
    longest = -(-num_items // world_size)
    num_batches = max(1, -(-longest // batch_size))
    return [batch for batch in share.tensor_split(num_batches) if len(batch)]


# Both samplers are DistributedSamplers because Lightning replaces any other sampler by its own in
# a distributed run (`_requires_distributed_sampler` in its data_connector.py), which would yield
# single indices.
class BatchOrder(DistributedSampler[BatchIndices]):
    """The training batches of a run, numbered from 0 across epochs.

    A pass over the set is one permutation, cut into global batches of `batch_size` * `world_size`
    indices; an incomplete last batch is dropped. Rank r takes elements r, r + world_size, ... of
    each. Of a set smaller than a global batch, the permutations are concatenated instead. The
    permutation and the flips of pass p come from a generator seeded by (seed, p).

    Args:
        num_items: Number of images in the set.
        batch_size: Images per rank and batch.
        seed: Seed of the order and the flips, at least 0.
        flip: Whether each image is mirrored with probability 1/2.
        rank: This process.
        world_size: Number of processes.
        steps_per_epoch: Batches of one iteration; those of one pass if None.
        position: Returns the number of the batch at which an iteration starts.
        shuffled: Returns the permutation of a pass, for a generator, see `ImageSet.shuffled`; any
            permutation with the same probability if None.
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
        shuffled: Callable[[torch.Generator], Tensor] | None = None,
    ) -> None:
        items: Any = range(num_items)
        super().__init__(items, num_replicas=world_size, rank=rank, seed=seed)
        self.num_items = num_items
        self.global_batch_size = batch_size * world_size
        self.flip = flip
        self.batches_per_pass = max(1, num_items // self.global_batch_size)
        self.steps_per_epoch = steps_per_epoch
        self.position = position
        self._shuffled = shuffled or (
            lambda generator: torch.randperm(num_items, generator=generator)
        )
        self._cached_pass: tuple[int, BatchIndices] | None = None

    def __len__(self) -> int:
        """Return the number of batches of one iteration."""
        return self.steps_per_epoch or self.batches_per_pass

    def __iter__(self) -> Iterator[BatchIndices]:
        """Yield `len(self)` batches, beginning with batch number `position()`."""
        # `len(self)` also when a run resumes within an epoch: Lightning stops at the epoch's end,
        # which `limit_train_batches` may move.
        start = self.position()
        return (self.batch(number) for number in range(start, start + len(self)))

    def batch(self, number: int) -> BatchIndices:
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
        return BatchIndices(indices, flip)

    def _pass(self, index: int) -> BatchIndices:
        """Return the permutation and the flips of pass `index`."""
        if self._cached_pass is None or self._cached_pass[0] != index:
            words = np.random.SeedSequence([self.seed, index]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(words[0]))
            order = self._shuffled(generator)
            flip = torch.rand(self.num_items, generator=generator) < (0.5 if self.flip else 0.0)
            self._cached_pass = index, BatchIndices(order, flip)
        return self._cached_pass[1]


class EachOnce(DistributedSampler[BatchIndices]):
    """Every image once over all ranks, in the batches of `shared_batches`, never mirrored."""

    def __init__(
        self, num_items: int, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        items: Any = range(num_items)
        super().__init__(items, num_replicas=world_size, rank=rank, shuffle=False)
        self.batches = shared_batches(num_items, batch_size, rank, world_size)

    def __len__(self) -> int:
        """Return the number of this rank's batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[BatchIndices]:
        """Yield this rank's batches."""
        for batch in self.batches:
            yield BatchIndices(batch, torch.zeros(len(batch), dtype=torch.bool))


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader that Lightning recognises as resumable.

    Without these two methods, Lightning warns when a run resumes within an epoch. The state is
    empty because `BatchOrder` takes its position from Lightning's own progress.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accept the empty state."""


class IndexBatches(UserList[Tensor]):
    """The int64 index tensors (B,) to predict on.

    Lightning would take a plain list of tensors for a list of dataloaders.
    """


class ImageDataModule(LightningDataModule, ABC):
    """Training, validation and prediction batches of an image set, for any number of devices.

    Training and validation steps get a `Batch`: float32 images (B, C, H, W) in [-1, 1] and int64
    labels (B,). Prediction steps get int64 indices (B,) of the images to generate. The global
    random state is neither used nor changed.

    Args:
        batch_size: Images, or pairs, per device and step, at least 1.
        flip: Whether training images are mirrored left to right with probability 1/2. Suits faces,
            for example, but not text.
        seed: Seed of the order of the training images, at least 0.
        num_workers: Processes that prepare batches. 0 prepares them in the training process, which
            is fastest for images held in memory.
        steps_per_epoch: Training batches per epoch; the complete batches of one pass if None. The
            order of the batches does not depend on it.
        num_predict: Number of images to generate when predicting, over all devices.

    Attributes:
        squaring: How a command that is given image files brings them to the model's size.
        class_names: Names of the classes by label, after `setup`; empty if they have none.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        batch_size: int = 128,
        *,
        flip: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        steps_per_epoch: int | None = None,
        num_predict: int = 64,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, steps_per_epoch=steps_per_epoch)
        check_at_least(0, seed=seed, num_workers=num_workers, num_predict=num_predict)
        self.batch_size = batch_size
        self.flip = flip
        self.seed = seed
        self.num_workers = num_workers
        self.steps_per_epoch = steps_per_epoch
        self.num_predict = num_predict
        self.squaring = Squaring()
        self.class_names: tuple[str, ...] = ()
        self._train_set: ImageSet | None = None
        self._val_set: ImageSet | None = None

    @property
    def preparation(self) -> str:
        """What the pixels depend on beside the source, in the name of the data."""
        return ""

    @property
    def labels_given(self) -> str | None:
        """The argument, with its value, by which labels are asked for; None where they are not."""
        return None

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: Lightning's would build whatever classes the file names.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"{cls.__name__} must be made by its constructor, or by the command line from the "
            "config in the checkpoint"
        )

    @abstractmethod
    def load(self, train: bool) -> ImageSet:
        """Return the training or the validation images; called once for each."""

    def setup(self, stage: str | None = None) -> None:
        """Load both sets, except for prediction; a second call does nothing."""
        if stage == "predict":
            return
        # Commands load images in Lightning's inference mode. A tensor that is made in it cannot be
        # filled by threads, which are not in it, nor changed afterwards.
        with torch.inference_mode(False):
            if self._train_set is None:
                self._train_set = self.load(train=True)
            if self._val_set is None:
                self._val_set = self.load(train=False)

    @property
    def predicting(self) -> bool:
        """Whether the attached trainer only predicts, which needs no images."""
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING

    @property
    def train_set(self) -> ImageSet:
        """The training images, also the reference of Fréchet distances.

        Raises:
            RuntimeError: Before `setup`.
        """
        if self._train_set is None:
            raise RuntimeError("train_set must be loaded first: call setup()")
        return self._train_set

    @property
    def val_set(self) -> ImageSet:
        """The images to validate and test on; errors as for `train_set`."""
        if self._val_set is None:
            raise RuntimeError("val_set must be loaded first: call setup()")
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
        """Number of images that `reference_images` yields over all ranks."""
        return len(self.train_set)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of training batches, which starts at the trainer's progress.

        Raises:
            ValueError: If the trainer sets `overfit_batches`.
        """
        order = self._train_order(len(self.train_set), self.train_set.shuffled)
        return self._loader(IndexedImages(self.train_set), order)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of validation batches: every image once, none mirrored.

        Raises:
            ValueError: If there are fewer images than devices.
        """
        self._check_share("the number of validation images", len(self.val_set))
        order = EachOnce(len(self.val_set), self.batch_size, **self._ranks())
        return self._loader(IndexedImages(self.val_set), order)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the same as `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> IndexBatches:
        """Return int64 index tensors that cover 0 to `num_predict` - 1 once over all ranks.

        Raises:
            ValueError: If there are fewer images than devices.
        """
        self._check_share("num_predict", self.num_predict)
        return IndexBatches(shared_batches(self.num_predict, self.batch_size, **self._ranks()))

    def reference_images(self, rank: int, world_size: int, batch_size: int) -> Iterator[Tensor]:
        """Yield uint8 batches (B, C, H, W) of the training images, each once over all ranks.

        They come in order and are never mirrored: the real side of a Fréchet distance.
        """
        for indices in shared_batches(self.num_reference, batch_size, rank, world_size):
            yield self.train_set.images(indices)

    def reference_digest(self) -> str | None:
        """A name for the images of `reference_images`; None if there is none, see `ImageSet`.

        To be overridden together with `reference_images`.
        """
        return self.train_set.digest()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Convert uint8 images to float32 in [-1, 1], on the device; pass on any other batch."""
        if isinstance(batch, tuple | list) and len(batch) == 2:
            images, labels = batch
            if isinstance(images, Tensor) and images.dtype == torch.uint8:
                return Batch(from_uint8(images), labels)
        return batch

    def _check_order(self) -> None:
        """Check that Lightning will not replace the order of the batches.

        Raises:
            ValueError: If the trainer sets `overfit_batches`.
        """
        overfit_batches = getattr(self.trainer, "overfit_batches", 0)
        if overfit_batches > 0:
            raise ValueError(
                f"overfit_batches must be 0, got {overfit_batches}: Lightning would replace the "
                "order of the batches; to overfit, train on a folder of few images"
            )

    def _check_share(self, name: str, count: int) -> None:
        """Check that every device has an image, without which Lightning hangs.

        Raises:
            ValueError: If there are fewer images than devices.
        """
        world_size = self._ranks()["world_size"]
        if count < world_size:
            raise ValueError(
                f"{name} must be at least the number of devices, {world_size}, got {count}: give "
                "more images, or fewer devices"
            )

    def _ranks(self) -> dict[str, int]:
        """Return the rank and the world size."""
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _batches_consumed(self) -> int:
        """Return how many batches the attached trainer has trained on since the run began."""
        return 0 if self.trainer is None else batches_consumed(self.trainer)

    def _train_order(
        self, num_items: int, shuffled: Callable[[torch.Generator], Tensor] | None = None
    ) -> BatchOrder:
        self._check_order()
        return BatchOrder(
            num_items,
            self.batch_size,
            seed=self.seed,
            flip=self.flip,
            steps_per_epoch=self.steps_per_epoch,
            position=self._batches_consumed,
            shuffled=shuffled,
            **self._ranks(),
        )

    def _loader(self, dataset: Dataset[Any], order: Any) -> DataLoader[Any]:
        return ResumableLoader(
            dataset,
            sampler=order,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Each iteration of a DataLoader takes a seed for its workers. Taken from the global
            # generator, it would change the dropout of a resumed run.
            generator=torch.Generator().manual_seed(self.seed),
        )
