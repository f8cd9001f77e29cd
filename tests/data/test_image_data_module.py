import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from ddim_pl.data.base import Batch, ImageDataModule, TensorImages

pytestmark = [
    # Images held in memory need no workers; Lightning cannot know.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # The resumed runs of these tests keep no checkpoints.
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    # Lightning 2.6 itself uses what torch 2.15 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

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
    """Learns next to nothing and writes down what it sees."""

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


def unbroken(num_steps: int, **arguments: Any) -> list[str]:
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


def with_place(data: ImageDataModule, rank: int, world_size: int) -> ImageDataModule:
    loop = SimpleNamespace(
        epoch_loop=SimpleNamespace(
            batch_progress=SimpleNamespace(total=SimpleNamespace(processed=0))
        )
    )
    place: Any = SimpleNamespace(
        global_rank=rank, world_size=world_size, overfit_batches=0, fit_loop=loop
    )
    data.trainer = place
    data.setup()
    return data


def test_an_unbroken_run_sees_the_batches_in_order(tmp_path: Path) -> None:
    module = Recorder()
    make_trainer(tmp_path, max_steps=STEPS).fit(module, datamodule=NoiseImages())
    assert module.seen == unbroken(STEPS)
    assert len(set(module.seen)) == STEPS
    assert module.validated == 2 * 11


def saved_at(folder: Path, step: int, way: str, **arguments: Any) -> Path:
    """A checkpoint after so many batches, made by a callback in mid-run or at a run's end."""
    if way == "callback":
        keeper = ModelCheckpoint(folder, every_n_train_steps=step, save_top_k=-1)
        trainer = make_trainer(
            folder, max_steps=step + 3, callbacks=[keeper], enable_checkpointing=True
        )
        trainer.fit(Recorder(), datamodule=NoiseImages(**arguments))
        return next(folder.glob(f"*step={step}.ckpt"))
    trainer = make_trainer(folder, max_steps=step)
    trainer.fit(Recorder(), datamodule=NoiseImages(**arguments))
    trainer.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


# An epoch has 10 batches: 10 and 20 are the ends of epochs.
@pytest.mark.parametrize("step", [7, 10, 13, 20])
@pytest.mark.parametrize("way", ["callback", "end"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_sees_the_batches_of_an_unbroken_one(
    tmp_path: Path, step: int, way: str, num_workers: int
) -> None:
    path = saved_at(tmp_path, step, way, num_workers=num_workers)
    module = Recorder()
    data = NoiseImages(num_workers=num_workers)
    make_trainer(tmp_path, max_steps=STEPS).fit(module, datamodule=data, ckpt_path=path)
    assert module.seen == unbroken(STEPS)[step:]


@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_run_accumulates_the_batches_of_an_unbroken_one(
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
    assert whole.seen == unbroken(24)
    assert module.seen == unbroken(24)[2 * step :]


def test_a_run_broken_off_by_an_exception_repeats_the_batch_it_lost(tmp_path: Path) -> None:
    class Falling(Recorder):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if len(self.seen) == 6:
                raise InterruptedError
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(tmp_path, max_steps=STEPS)
    with pytest.raises(InterruptedError):
        trainer.fit(Falling(), datamodule=NoiseImages())
    trainer.save_checkpoint(tmp_path / "broken.ckpt")
    module = Recorder()
    make_trainer(tmp_path, max_steps=STEPS).fit(
        module, datamodule=NoiseImages(), ckpt_path=tmp_path / "broken.ckpt"
    )
    assert module.seen == unbroken(STEPS)[6:]


@pytest.mark.parametrize("limit", [3, 0.7])
def test_shortened_epochs_go_on_where_the_last_one_stopped(
    tmp_path: Path, limit: int | float
) -> None:
    module = Recorder()
    trainer = make_trainer(tmp_path, max_steps=STEPS, limit_train_batches=limit)
    trainer.fit(module, datamodule=NoiseImages())
    assert module.seen == unbroken(STEPS)


def test_epochs_of_any_length_have_the_same_batches(tmp_path: Path) -> None:
    module = Recorder()
    trainer = make_trainer(tmp_path, max_steps=STEPS)
    trainer.fit(module, datamodule=NoiseImages(steps_per_epoch=7))
    assert module.seen == unbroken(STEPS)
    assert module.validated == 3 * 11


def test_loaders_leave_the_global_random_state_alone() -> None:
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
        data = with_place(NoiseImages(num_predict=10), rank, world_size)
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
    with pytest.raises(ValueError, match="overfit_batches is 2"):
        trainer.fit(Recorder(), datamodule=NoiseImages())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps_per_epoch", 0),
        ("steps_per_epoch", -1),
        ("seed", -1),
        ("num_workers", -1),
        ("num_predict", -1),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, value: int) -> None:
    arguments: Any = {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least"):
        NoiseImages(**arguments)
