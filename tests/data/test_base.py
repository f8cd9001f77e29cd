"""The order of the batches, and the data module that follows it through a Trainer."""

import hashlib
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from ddim_pl.data.base import (
    Batch,
    BatchIndices,
    BatchOrder,
    EachOnce,
    ImageDataModule,
    IndexedImages,
    TensorImages,
    shared_batches,
)

pytestmark = [
    # Images held in memory need no workers.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # The resumed runs of these tests keep no checkpoints.
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    # Lightning 2.6 itself uses what torch 2.15 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

# ---- the order of the batches -----------------------------------------------------------------


def first(order: BatchOrder, count: int) -> list[BatchIndices]:
    return [order.batch(number) for number in range(count)]


@pytest.mark.parametrize(("num_items", "batch_size"), [(40, 4), (43, 4), (3, 8), (8, 8)])
def test_batch_depends_on_its_number_only(num_items: int, batch_size: int) -> None:
    whole = first(BatchOrder(num_items, batch_size, flip=True), 30)
    for start in (0, 7, 10, 23):
        late = BatchOrder(
            num_items, batch_size, flip=True, steps_per_epoch=7, position=lambda at=start: at
        )
        for expected, seen in zip(whole[start : start + 7], late, strict=True):
            torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("num_items", [48, 50, 5])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_batch_of_a_single_process(num_items: int, world_size: int) -> None:
    single = BatchOrder(num_items, 12, seed=3, flip=True)
    ranks = [
        BatchOrder(
            num_items, 12 // world_size, seed=3, flip=True, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    assert {len(order) for order in ranks} == {len(single)}
    for number in range(9):
        whole = single.batch(number)
        parts = [order.batch(number) for order in ranks]
        for field in (0, 1):
            interleaved = torch.stack([part[field] for part in parts], 1).flatten()
            torch.testing.assert_close(interleaved, whole[field])


def test_every_index_comes_at_most_once_in_a_pass_and_the_rest_is_dropped() -> None:
    order = BatchOrder(43, 4)
    assert len(order) == 10
    for pass_number in range(3):
        batches = [order.batch(10 * pass_number + number) for number in range(10)]
        indices = torch.cat([batch.indices for batch in batches])
        assert len(indices) == 40
        assert len(indices.unique()) == 40


def test_permutations_of_a_set_smaller_than_a_batch_are_concatenated() -> None:
    order = BatchOrder(3, 8, flip=True)
    assert len(order) == 1
    indices = torch.cat([batch.indices for batch in first(order, 6)])
    assert len(indices) == 48
    for permutation in indices.split(3):
        assert sorted(permutation.tolist()) == [0, 1, 2]


def test_passes_and_seeds_differ() -> None:
    order, other = BatchOrder(64, 64, seed=0), BatchOrder(64, 64, seed=1)
    seen = [*first(order, 3), *first(other, 3)]
    for one, two in itertools.combinations(seen, 2):
        assert not torch.equal(one.indices, two.indices)


def test_flips_are_off_or_fair_and_do_not_change_the_order() -> None:
    plain = BatchOrder(10_000, 10_000).batch(0)
    flipped = BatchOrder(10_000, 10_000, flip=True).batch(0)
    assert not plain.flip.any()
    # The share of flips has a standard deviation of 0.005.
    assert abs(flipped.flip.double().mean().item() - 0.5) < 0.02
    torch.testing.assert_close(plain.indices, flipped.indices)


@pytest.mark.parametrize("steps", [1, 7, 25])
def test_steps_per_epoch_does_not_change_the_batches(steps: int) -> None:
    whole = first(BatchOrder(40, 4), 50)
    consumed = 0
    order = BatchOrder(40, 4, steps_per_epoch=steps, position=lambda: consumed)
    assert len(order) == steps
    for _ in range(2):
        for batch in order:
            torch.testing.assert_close(batch, whole[consumed])
            consumed += 1
    assert consumed == 2 * steps


def test_flipped_images_are_mirrored_exactly() -> None:
    images = torch.arange(4 * 3 * 2 * 5).reshape(4, 3, 2, 5).to(torch.uint8)
    dataset = IndexedImages(TensorImages(images, torch.arange(4), num_classes=4))
    batch = dataset[BatchIndices(torch.tensor([2, 0, 2]), torch.tensor([True, False, False]))]
    expected = torch.stack([images[2].flip(-1), images[0], images[2]])
    torch.testing.assert_close(batch.images, expected)
    assert batch.labels.tolist() == [2, 0, 2]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("num_items", "batch_size"), [(43, 4), (41, 7), (12, 12), (8, 2), (8, 1)])
def test_each_index_is_on_one_rank_and_ranks_have_as_many_batches(
    num_items: int, batch_size: int, world_size: int
) -> None:
    orders = [
        EachOnce(num_items, batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    seen = torch.cat([batch.indices for order in orders for batch in order])
    assert sorted(seen.tolist()) == list(range(num_items))
    assert all(0 < len(batch.indices) <= batch_size for order in orders for batch in order)
    assert not any(batch.flip.any() for order in orders for batch in order)
    if batch_size > 1:
        assert len({len(order) for order in orders}) == 1


def test_fewer_items_than_ranks_leave_some_ranks_empty() -> None:
    shares = [shared_batches(2, 4, rank, 3) for rank in range(3)]
    assert [torch.cat(share).tolist() for share in shares[:2]] == [[0], [1]]
    assert shares[2] == []
    assert shared_batches(0, 4, 0, 1) == []


# ---- the data module --------------------------------------------------------------------------

NUM_IMAGES = 42
BATCH_SIZE = 4
STEPS = 25


class NoiseImages(ImageDataModule):
    def __init__(self, flip: bool = True, **arguments: Any) -> None:
        super().__init__(BATCH_SIZE, flip=flip, **arguments)
        self.loads = 0

    def load(self, train: bool) -> TensorImages:
        self.loads += 1
        generator = torch.Generator().manual_seed(int(train))
        count = NUM_IMAGES if train else 11
        images = torch.randint(0, 256, (count, 3, 4, 4), generator=generator).to(torch.uint8)
        return TensorImages(images, torch.arange(count) % 5, num_classes=5)


class Recorder(LightningModule):
    """Trains one parameter and records its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen: list[str] = []
        self.validated = 0
        self.predicted: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        content = images.numpy().tobytes() + labels.numpy().tobytes()
        self.seen.append(hashlib.sha256(content).hexdigest())
        assert images.dtype == torch.float32
        return (self.scale * images).square().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += len(batch.images)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert batch.dtype == torch.int64
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def make_trainer(folder: Path, **arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"max_epochs": -1, "num_sanity_val_steps": 0, "enable_checkpointing": False} | arguments,
    )


def uninterrupted(num_steps: int, **arguments: Any) -> list[str]:
    """The hashes of the first batches, without a Trainer."""
    data = NoiseImages(**arguments)
    data.setup()
    order: Any = data.train_dataloader().sampler
    source: Any = data.train_dataloader().dataset
    hashes = []
    for number in range(num_steps):
        images, labels = data.on_after_batch_transfer(source[order.batch(number)], 0)
        content = images.numpy().tobytes() + labels.numpy().tobytes()
        hashes.append(hashlib.sha256(content).hexdigest())
    return hashes


def with_ranks(data: ImageDataModule, rank: int, world_size: int) -> ImageDataModule:
    loop = SimpleNamespace(
        epoch_loop=SimpleNamespace(
            batch_progress=SimpleNamespace(total=SimpleNamespace(processed=0))
        )
    )
    trainer: Any = SimpleNamespace(
        global_rank=rank, world_size=world_size, overfit_batches=0, fit_loop=loop
    )
    data.trainer = trainer
    data.setup()
    return data


def test_an_uninterrupted_run_sees_the_batches_in_order(tmp_path: Path) -> None:
    module = Recorder()
    make_trainer(tmp_path, max_steps=STEPS).fit(module, datamodule=NoiseImages())
    assert module.seen == uninterrupted(STEPS)
    assert len(set(module.seen)) == STEPS
    assert module.validated == 2 * 11


def saved_at_with(folder: Path, step: int, data: ImageDataModule) -> Path:
    """A checkpoint at the end of a run of `step` batches."""
    trainer = make_trainer(folder, max_steps=step)
    trainer.fit(Recorder(), datamodule=data)
    trainer.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


def saved_at(folder: Path, step: int, way: str, **arguments: Any) -> Path:
    """A checkpoint after `step` batches, written by a callback or at the end of a run."""
    if way == "callback":
        keeper = ModelCheckpoint(folder, every_n_train_steps=step, save_top_k=-1)
        trainer = make_trainer(
            folder, max_steps=step + 3, callbacks=[keeper], enable_checkpointing=True
        )
        trainer.fit(Recorder(), datamodule=NoiseImages(**arguments))
        return next(folder.glob(f"*step={step}.ckpt"))
    return saved_at_with(folder, step, NoiseImages(**arguments))


# An epoch has 10 batches: 10 and 20 are the ends of epochs.
@pytest.mark.parametrize("step", [7, 10, 13, 20])
@pytest.mark.parametrize("way", ["callback", "end"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(
    tmp_path: Path, step: int, way: str, num_workers: int
) -> None:
    path = saved_at(tmp_path, step, way, num_workers=num_workers)
    module = Recorder()
    data = NoiseImages(num_workers=num_workers)
    make_trainer(tmp_path, max_steps=STEPS).fit(module, datamodule=data, ckpt_path=path)
    assert module.seen == uninterrupted(STEPS)[step:]


@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_run_accumulates_the_batches_of_an_uninterrupted_one(
    tmp_path: Path, step: int
) -> None:
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1)
    kwargs: Any = {"accumulate_grad_batches": 2, "max_steps": 12}
    whole = Recorder()
    make_trainer(tmp_path, callbacks=[keeper], enable_checkpointing=True, **kwargs).fit(
        whole, datamodule=NoiseImages()
    )
    module = Recorder()
    make_trainer(tmp_path, **kwargs).fit(
        module, datamodule=NoiseImages(), ckpt_path=next(tmp_path.glob(f"*step={step}.ckpt"))
    )
    assert whole.seen == uninterrupted(24)
    assert module.seen == uninterrupted(24)[2 * step :]


def test_a_run_stopped_by_an_exception_repeats_the_batch_it_lost(tmp_path: Path) -> None:
    class Failing(Recorder):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if len(self.seen) == 6:
                raise InterruptedError
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(tmp_path, max_steps=STEPS)
    with pytest.raises(InterruptedError):
        trainer.fit(Failing(), datamodule=NoiseImages())
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    module = Recorder()
    make_trainer(tmp_path, max_steps=STEPS).fit(
        module, datamodule=NoiseImages(), ckpt_path=tmp_path / "stopped.ckpt"
    )
    assert module.seen == uninterrupted(STEPS)[6:]


@pytest.mark.parametrize("limit", [3, 0.7])
def test_shortened_epochs_continue_where_the_last_one_stopped(
    tmp_path: Path, limit: int | float
) -> None:
    module = Recorder()
    trainer = make_trainer(tmp_path, max_steps=STEPS, limit_train_batches=limit)
    trainer.fit(module, datamodule=NoiseImages())
    assert module.seen == uninterrupted(STEPS)


def test_epochs_of_any_length_have_the_same_batches(tmp_path: Path) -> None:
    module = Recorder()
    trainer = make_trainer(tmp_path, max_steps=STEPS)
    trainer.fit(module, datamodule=NoiseImages(steps_per_epoch=7))
    assert module.seen == uninterrupted(STEPS)
    assert module.validated == 3 * 11


def test_loaders_do_not_change_the_global_random_state() -> None:
    data = NoiseImages()
    data.setup()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert len(list(loader)) == len(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_predicting_yields_every_index_once(tmp_path: Path) -> None:
    outputs: Any = make_trainer(tmp_path).predict(Recorder(), datamodule=NoiseImages())
    assert torch.cat(outputs).tolist() == list(range(64))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_validate_predict_and_compare_each_image_once(world_size: int) -> None:
    labels, indices, reference = [], [], []
    for rank in range(world_size):
        data = with_ranks(NoiseImages(num_predict=10), rank, world_size)
        val: DataLoader[Batch] = data.val_dataloader()
        labels += [batch.labels for batch in val]
        indices += list(data.predict_dataloader())
        reference += list(data.reference_images(rank, world_size, batch_size=5))
        assert len(data.train_dataloader()) == NUM_IMAGES // (BATCH_SIZE * world_size)
    assert sorted(torch.cat(labels).tolist()) == sorted(number % 5 for number in range(11))
    assert sorted(torch.cat(indices).tolist()) == list(range(10))
    images = torch.cat(reference)
    assert images.dtype == torch.uint8
    assert len(images) == data.num_reference == NUM_IMAGES
    expected = data.train_set.images(torch.arange(NUM_IMAGES))
    assert sorted(image.tolist() for image in images) == sorted(i.tolist() for i in expected)


def test_reference_images_are_the_training_images_in_order() -> None:
    data = NoiseImages()
    data.setup()
    images = torch.cat(list(data.reference_images(0, 1, batch_size=8)))
    torch.testing.assert_close(images, data.train_set.images(torch.arange(NUM_IMAGES)))


def test_steps_see_images_between_minus_one_and_one() -> None:
    data = NoiseImages()
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    labels = torch.tensor([2, 1, 0])
    batch = data.on_after_batch_transfer(Batch(images, labels), 0)
    torch.testing.assert_close(batch.images.flatten(), torch.tensor([-1.0, -0.6, 1.0]))
    assert batch.labels is labels
    indices = torch.arange(3)
    assert data.on_after_batch_transfer(indices, 0) is indices


def test_setup_loads_each_set_once() -> None:
    data = NoiseImages()
    with pytest.raises(RuntimeError, match=r"setup\(\)"):
        _ = data.shape
    for stage in ("fit", "validate", "predict"):
        data.setup(stage)
    assert data.loads == 2
    assert data.shape == (3, 4, 4)
    assert data.num_classes == 5


def test_overfit_batches_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, overfit_batches=2)
    with pytest.raises(ValueError, match="overfit_batches must be 0, got 2"):
        trainer.fit(Recorder(), datamodule=NoiseImages())


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("steps_per_epoch", 0, 1),
        ("steps_per_epoch", -1, 1),
        ("seed", -1, 0),
        ("num_workers", -1, 0),
        ("num_predict", -1, 0),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, value: int, least: int) -> None:
    arguments: Any = {name: value}
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {value}"):
        NoiseImages(**arguments)


def test_fewer_images_than_devices_are_refused() -> None:
    data = with_ranks(NoiseImages(num_predict=1), rank=0, world_size=12)
    with pytest.raises(ValueError, match="num_predict must be at least the number of devices, 12"):
        data.predict_dataloader()
    with pytest.raises(ValueError, match=r"validation images must be .* devices, 12, got 11"):
        data.val_dataloader()
