"""Running a function on every device of a trainer, with a model's averaged weights there."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from tqdm.auto import tqdm

from ddim_pl.data.base import ImageDataModule, IndexBatches
from ddim_pl.guidance import Guidance
from ddim_pl.lightning_internals import without_callbacks_and_loggers
from ddim_pl.locks import alone_in
from ddim_pl.runs import read_checkpoint, run_of
from ddim_pl.samplers import Consistency, Sampler
from ddim_pl.samplers.gamma import default_sampler
from ddim_pl.training import DiffusionModule
from ddim_pl.trust import stays_inside

T = TypeVar("T")
Earlier = Literal["remove", "replace", "refuse"]


class Worker:
    """One of the processes that share the work, each with a device of its own.

    Args:
        trainer: Started the processes.
        model: The model, on this process' device.
        run: Folder of the run, if there is one.
        progress: Show progress bars, on the first worker; by default if the trainer does.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        model: DiffusionModule,
        *,
        run: str | None = None,
        progress: bool | None = None,
    ) -> None:
        if progress is None:
            progress = trainer.progress_bar_callback is not None
        self.trainer = trainer
        self.model = model
        self.run = run
        self.rank: int = trainer.global_rank
        self.world_size: int = trainer.world_size
        self.is_first = self.rank == 0
        """Whether this worker writes the results of all."""
        self.shows_progress = progress and self.rank == 0
        self.locks = ExitStack()

    def together(self) -> "Worker":
        """The same worker, of which each process does all the work: none is shared.

        For samplers that split the work on an image themselves. The first process writes.
        """
        worker = Worker(self.trainer, self.model, run=self.run, progress=self.shows_progress)
        worker.rank, worker.world_size, worker.locks = 0, 1, self.locks
        return worker

    def with_model(self, model: DiffusionModule) -> "Worker":
        """The same worker for another model, which must be on its device already."""
        return Worker(self.trainer, model, run=self.run, progress=self.shows_progress)

    @property
    def device(self) -> torch.device:
        """Device of float64 sums: the model's, or the CPU for Apple's, which lacks float64."""
        return torch.device("cpu") if self.model.device.type == "mps" else self.model.device

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The part of the items that is this worker's."""
        return items[self.rank :: self.world_size]

    def progress(self, items: Iterable[T], total: int, text: str) -> Iterable[T]:
        """The items, with a progress bar on the first worker."""
        return tqdm(items, total=total, desc=text, leave=False, disable=not self.shows_progress)

    def batches(self, items: Sequence[T], batch_size: int, text: str) -> Iterator[Sequence[T]]:
        """Batches of this worker's share of the items, with a progress bar."""
        mine = self.share(items)
        starts = range(0, len(mine), batch_size)
        for start in self.progress(starts, len(starts), text):
            yield mine[start : start + batch_size]

    def precision(self) -> AbstractContextManager[None]:
        """A context in which the network runs in the trainer's precision."""
        return self.trainer.precision_plugin.forward_context()

    def barrier(self) -> None:
        """Wait for the other workers."""
        if self.world_size > 1:
            self.trainer.strategy.barrier("worker")

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum of all workers' values, on the CPU."""
        if self.world_size == 1:  # nothing to sum, and Apple's devices have no float64
            return values.cpu()
        there = values.to(self.model.device, copy=True)  # Lightning sums in place
        return cast(Tensor, self.trainer.strategy.reduce(there, reduce_op="sum")).cpu()

    def gather(self, values: Tensor) -> Tensor:
        """All workers' values, of one shape everywhere, `(workers, ...)` on the CPU."""
        every = torch.zeros(self.world_size, *values.shape, dtype=values.dtype)
        every[self.rank] = values.cpu()
        return self.all_reduce(every)

    def broadcast(self, value: T) -> T:
        """The first worker's value, on all of them."""
        return self.trainer.strategy.broadcast(value)

    def folder(
        self,
        output: str | None,
        name: str,
        *,
        results: Sequence[str] = (),
        earlier: Earlier | None = None,
    ) -> Path:
        """Where to write: `output`, or a folder of this name in the run; called on every worker.

        No other process can work there until this one's work is done.

        Args:
            output: The user's folder.
            name: Of the run's own.
            results: Patterns of files which an earlier call may have left there.
            earlier: What becomes of those: "remove" now, "replace" when this call is done (by
                default in the run's own folder), or "refuse" (by default in the user's).

        Raises:
            ValueError: If the folder cannot be made, another process works there, or it holds
                results of an earlier call, which are to stay.
        """
        earlier = earlier or ("replace" if output is None else "refuse")
        run = self.broadcast(self.run or self.trainer.default_root_dir)
        folder = Path(output) if output else Path(run, name)
        problem = None
        if self.is_first:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.locks.enter_context(alone_in(folder))
                _make_place(folder, results, earlier)
            except ValueError as error:
                problem = str(error)
            except OSError as error:
                problem = (
                    f"output must be a folder, got {str(folder)!r}, which cannot be made "
                    f"({error.strerror}): give another as --output"
                )
        problem = self.broadcast(problem)  # all stop, or none
        if problem is not None:
            raise ValueError(problem)
        return folder

    def sample_batches(
        self,
        indices: Sequence[int],
        batch_size: int,
        text: str,
        *,
        label: int | None = None,
        sampler: Sampler | None = None,
        levels: Tensor | None = None,
        guidance: Guidance | None = None,
        seed: int | None = None,
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Sample this worker's share of the images: indices and float images of each batch."""
        for batch in self.batches(indices, batch_size, text):
            with self.precision():
                images = self.model.sample(
                    batch,
                    label=None if label is None else torch.full((len(batch),), label),
                    sampler=sampler,
                    levels=levels,
                    guidance=guidance,
                    seed=seed,
                )
            yield batch, images

    def images(self, datamodule: L.LightningDataModule | None) -> ImageDataModule:
        """The data module with its images loaded."""
        module = check_images(datamodule)
        if self.trainer.local_rank == 0:
            module.prepare_data()
        self.barrier()
        module.setup("test")
        return module


def _make_place(folder: Path, results: Sequence[str], earlier: Earlier) -> None:
    """Remove the results of an earlier call or let them stay, and say so; or refuse them."""
    old = [file for pattern in results for file in sorted(folder.glob(pattern))]
    if not old:
        return
    if earlier == "refuse":
        raise ValueError(
            f"output must be a folder without results of an earlier call, got {folder}, which has "
            f"{old[0].relative_to(folder)}: give another folder, or remove them"
        )
    if earlier == "remove":
        for file in old:
            file.unlink()
        print(f"{len(old)} files of an earlier call are removed from {folder}")
    else:
        print(f"{len(old)} files of an earlier call in {folder} are replaced by this one's")


class _Job(L.LightningModule):
    """A function in the place of a prediction, which Lightning calls in every process.

    It is called before the one step, which predicts nothing: Lightning runs steps in the trainer's
    precision, and feature extractors and metrics must keep their own.
    """

    def __init__(self, model: DiffusionModule, work: Callable[[L.Trainer], None]) -> None:
        super().__init__()
        self.model = model
        self.work = work

    def setup(self, stage: str) -> None:
        """Set up the model, which Lightning does not see."""
        self.model.setup(stage)

    def on_predict_start(self) -> None:
        """Do all the work at once."""
        self.work(self.trainer)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the batch, because Lightning warns about None."""
        return batch


def on_every_worker(
    trainer: L.Trainer,
    model: DiffusionModule,
    work: Callable[[Worker], None],
    *,
    ckpt_path: str | None = None,
) -> None:
    """Call `work` once in every process, without gradients, with the model on its device.

    Args:
        trainer: Starts the processes; its callbacks and loggers, for fit and test, are left out.
        model: The model.
        work: What to do in each process.
        ckpt_path: Checkpoint to load the weights from first.
    """
    bar = trainer.progress_bar_callback is not None
    # Read before the loggers are left out.
    run = cast(str | None, getattr(trainer.logger, "log_dir", None))
    if ckpt_path is not None:
        checkpoint = read_checkpoint(Path(ckpt_path), "ckpt_path")
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        run = str(run_of(Path(ckpt_path)))

    def run_work(trainer: L.Trainer) -> None:
        worker = Worker(trainer, model, run=run, progress=bar)
        with worker.locks:
            work(worker)

    once_each = IndexBatches([torch.zeros(1, dtype=torch.long)])
    with without_callbacks_and_loggers(trainer):
        job = _Job(model, run_work)
        trainer.predict(job, once_each, return_predictions=False)


def check_images(datamodule: L.LightningDataModule | None) -> ImageDataModule:
    """Check that a data module has images.

    Raises:
        ValueError: If it has not.
    """
    if not isinstance(datamodule, ImageDataModule):
        raise ValueError(
            "data must be a data module with the real images, a subclass of "
            f"ddim_pl.data.base.ImageDataModule, got {type(datamodule).__name__}: set --data"
        )
    return datamodule


def check_inside(**values: str) -> None:
    """Check that names of folders stay below the folder that they are joined to.

    Raises:
        ValueError: If one does not.
    """
    for name, value in values.items():
        if not value or not stays_inside(value):
            raise ValueError(
                f"{name} must be the name of a folder in the run, got {value!r}: give another "
                "place as --output"
            )


def check_noise(name: str, model: DiffusionModule, sampler: Sampler) -> None:
    """Check that a sampler is made for the model's law of noise.

    Raises:
        ValueError: If it is not.
    """
    if sampler.noise != model.noise:
        raise ValueError(
            f"{name} must be of the model's noise {model.noise}, got {sampler}, which is made for "
            f"{sampler.noise}: leave it out for {default_sampler(model.noise)}"
        )


def precision_of(trainer: L.Trainer, model: DiffusionModule) -> str:
    """What images are drawn in, for tables: the trainer's precision, and the network's own."""
    network = model.sampling_precision
    return str(trainer.precision) + (f", network {network}" if network != 32 else "")


def warn_of_student(model: DiffusionModule, sampler: Sampler, levels: Tensor) -> None:
    """Warn of steps that a distilled model was not made for."""
    wanted, own = model.distilled_steps, model.distilled_sampler or default_sampler(model.noise)
    steps = len(levels) - 1
    if wanted is None or (knows_steps(model, steps) and replace(sampler, clip=None) == own):
        return
    most = "at most " if isinstance(own, Consistency) else ""
    rank_zero_warn(
        f"the model was distilled to {most}{wanted} steps of {own}, and knows no others: "
        f"{steps} steps of {sampler} give other images than it learned"
    )


def knows_steps(model: DiffusionModule, num_steps: int) -> bool:
    """Whether a model was trained for this many steps; a consistency model, also for fewer."""
    most = model.distilled_steps
    if most is None or num_steps == most:
        return True
    return isinstance(model.distilled_sampler, Consistency) and num_steps < most


def check_label(model: DiffusionModule, label: int | None) -> None:
    """Check that the model has this class.

    Raises:
        ValueError: If it has not.
    """
    if label is None:
        return
    if model.num_classes is None:
        raise ValueError(f"label must be left out for a model without classes, got {label}")
    if not 0 <= label < model.num_classes:
        raise ValueError(f"label must lie in [0, {model.num_classes - 1}], got {label}")
