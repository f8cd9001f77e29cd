"""Running a function on every device of a trainer, with a model's averaged weights there."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, cast

import lightning as L
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddim_pl.data.base import ImageDataModule, IndexBatches
from ddim_pl.samplers import Sampler
from ddim_pl.training import DiffusionModule

T = TypeVar("T")


class Device:
    """One of the devices that share a verb's work; its `rank` is the process' number."""

    def __init__(
        self, trainer: L.Trainer, model: DiffusionModule, run: str | None, progress: bool
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.run = run
        self.rank: int = trainer.global_rank
        self.world_size: int = trainer.world_size
        self.shows_progress = progress and self.rank == 0

    def of(self, model: DiffusionModule) -> "Device":
        """The same device for another model, which must be there already."""
        return Device(self.trainer, model, self.run, self.shows_progress)

    @property
    def is_first(self) -> bool:
        """Whether this device writes what all have made."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The part of the items that is this device's."""
        return items[self.rank :: self.world_size]

    def progress(self, items: Iterable[T], total: int, text: str) -> Iterable[T]:
        """The items, with a progress bar on the first device."""
        return tqdm(items, total=total, desc=text, leave=False, disable=not self.shows_progress)

    def wait(self) -> None:
        """Wait for the other devices."""
        self.trainer.strategy.barrier("verb")

    def sum(self, values: Tensor) -> Tensor:
        """Sum of all devices' values, on the CPU."""
        if self.world_size == 1:  # Apple's devices, of which there is one, have no float64
            return values.cpu()
        there = values.to(self.model.device)
        return cast(Tensor, self.trainer.strategy.reduce(there, reduce_op="sum")).cpu()

    def gather(self, values: Tensor) -> Tensor:
        """All devices' values, of one shape everywhere, `(devices, ...)` on the CPU."""
        every = torch.zeros(self.world_size, *values.shape, dtype=values.dtype)
        every[self.rank] = values.cpu()
        return self.sum(every)

    def agree(self, value: T) -> T:
        """The first device's value, on all of them."""
        return self.trainer.strategy.broadcast(value)

    def folder(self, output: str | None, name: str) -> Path:
        """Where to write: `output`, or a folder of this name in the run; ask on every device."""
        run = self.agree(self.run or self.trainer.default_root_dir)
        folder = Path(output) if output else Path(run, name)
        problem = None
        if self.is_first:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                problem = f"output {str(folder)!r} cannot be made a folder ({error.strerror})"
        problem = self.agree(problem)  # all stop, or none
        if problem is not None:
            raise ValueError(f"{problem}: give another as --output")
        return folder

    def draw(
        self,
        indices: Sequence[int],
        batch_size: int,
        text: str,
        *,
        label: int | None = None,
        sampler: Sampler | None = None,
        levels: Tensor | None = None,
        seed: int | None = None,
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Draw this device's share of the images, yielding indices and float images of batches."""
        mine = self.share(indices)
        starts = range(0, len(mine), batch_size)
        for start in self.progress(starts, len(starts), text):
            batch = mine[start : start + batch_size]
            with self.trainer.precision_plugin.forward_context():
                images = self.model.sample(
                    batch,
                    label=None if label is None else torch.full((len(batch),), label),
                    sampler=sampler,
                    levels=levels,
                    seed=seed,
                )
            yield batch, images

    def images(self, datamodule: L.LightningDataModule | None) -> ImageDataModule:
        """The data module with its images loaded."""
        module = check_images(datamodule)
        if self.trainer.local_rank == 0:
            module.prepare_data()
        self.wait()
        module.setup("test")
        return module


class _Job(L.LightningModule):
    """A function in the place of a prediction, which Lightning calls on every device.

    It is called before the one step that predicts nothing, since a step runs in the trainer's
    precision: feature extractors and metrics keep their own.
    """

    def __init__(
        self, model: DiffusionModule, work: Callable[[Device], None], run: str | None, bar: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.work = work
        self.run = run
        self.bar = bar

    def setup(self, stage: str) -> None:
        """Let the model, which Lightning does not see, make itself ready."""
        self.model.setup(stage)

    def on_predict_start(self) -> None:
        """Do all the work at once."""
        self.work(Device(self.trainer, self.model, self.run, self.bar))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return something: Lightning warns of nothing."""
        return batch


def on_every_device(
    trainer: L.Trainer,
    model: DiffusionModule,
    work: Callable[[Device], None],
    *,
    ckpt_path: str | None = None,
) -> None:
    """Call `work` once on every device, without gradients, with the model there.

    Args:
        trainer: Starts the processes; its callbacks and loggers, which are of fit and test, take
            no part.
        model: The model.
        work: What to do on each device.
        ckpt_path: Checkpoint to load the weights from first.
    """
    if ckpt_path is not None:
        checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True, mmap=True)
        model.load_state_dict(checkpoint["state_dict"])
    bar = trainer.progress_bar_callback is not None
    # Asked for here because Lightning would begin a log in the run's folder.
    run = cast(str | None, getattr(trainer.logger, "log_dir", None))
    if ckpt_path is not None:
        run = str(_run_of(Path(ckpt_path)))
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    trainer.callbacks, trainer.loggers = [], []  # type: ignore[attr-defined]
    try:
        once_each = IndexBatches([torch.zeros(1, dtype=torch.long)])
        trainer.predict(_Job(model, work, run, bar), once_each, return_predictions=False)
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]


def _run_of(checkpoint: Path) -> Path:
    """The run of a checkpoint; of a file that lies in none, a folder of its name beside it.

    The same folder every time, so that a sweep of a moved file finds its cells again.
    """
    run = checkpoint.absolute().parent.parent
    if checkpoint.absolute().parent.name == "checkpoints" and run.name.startswith("version_"):
        return run
    return checkpoint.absolute().with_name(f"{checkpoint.stem}-run")


def check_images(datamodule: L.LightningDataModule | None) -> ImageDataModule:
    """See that a data module has images.

    Raises:
        ValueError: If it has not.
    """
    if not isinstance(datamodule, ImageDataModule):
        raise ValueError(
            "this needs a data module with the real images (a subclass of "
            f"ddim_pl.data.base.ImageDataModule), got {type(datamodule).__name__}: set --data"
        )
    return datamodule


def check_label(model: DiffusionModule, label: int | None) -> None:
    """See that the model has this class.

    Raises:
        ValueError: If it has not.
    """
    if label is None:
        return
    if model.num_classes is None:
        raise ValueError(f"label is {label}, but the model has no classes: leave it out")
    if not 0 <= label < model.num_classes:
        raise ValueError(f"label must lie in [0, {model.num_classes - 1}], got {label}")


def at_least(least: int, **values: int) -> None:
    """See that numbers are large enough.

    Raises:
        ValueError: If one is not.
    """
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
