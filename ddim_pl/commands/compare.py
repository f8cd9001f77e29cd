"""`main.py compare`: students beside their teacher, by distance and by eye."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from torch import nn

from ddim_pl.checks import check_at_least
from ddim_pl.data.base import ImageDataModule
from ddim_pl.evaluation.cells import (
    Cell,
    CellSettings,
    cell_settings,
    found_or_measured,
    shown_images,
)
from ddim_pl.evaluation.plots import label_rows, plot_distances
from ddim_pl.evaluation.tables import markdown, write_csv, write_text
from ddim_pl.evaluation.worker import Worker, check_images, on_every_worker
from ddim_pl.samplers.gamma import default_sampler
from ddim_pl.timesteps import linear
from ddim_pl.training import DiffusionModule
from ddim_pl.training.checkpoints import load
from ddim_pl.training.fingerprint import fingerprint, fingerprint_of_file


def compare(
    trainer: L.Trainer,
    model: DiffusionModule,
    datamodule: L.LightningDataModule | None = None,
    ckpt_path: str | None = None,
    *,
    students: Sequence[str],
    num_steps: Sequence[int] | None = None,
    features: Callable[[], nn.Module] | None = None,
    metrics: Sequence[str] | None = None,
    num_samples: int | None = None,
    num_shown: int = 10,
    batch_size: int | None = None,
    seed: int | None = None,
    name: str = "distillation",
    output: str | None = None,
) -> None:
    """Measure students with their own steps, and their teacher with DDIM at as many and more.

    A teacher of Gamma noise is measured with the deterministic sampler of that noise.

    Writes `distillation.csv`, `distillation.md`, the plot `distillation.png` of the distance
    against steps, and `grids.png`, in which each row is one student and each column one latent. A
    comparison that was stopped resumes when the command is given again.

    Args:
        trainer: Gives the devices.
        model: The teacher.
        datamodule: Gives the real images.
        ckpt_path: The teacher's checkpoint, or "last".
        students: Checkpoints of students; a folder stands for all `student-*.ckpt` in it or in its
            `checkpoints`, as a ladder's run has them.
        num_steps: Steps of the teacher; by default those of the students, and 256.
        features: Feature extractor; by default that of the config's FrechetDistance, as are the
            next three.
        metrics: Metrics of `ddim_pl.metrics.quality.SampleQuality`.
        num_samples: Images of each.
        num_shown: Images in a row of `grids.png`.
        batch_size: Images in a batch, on each worker.
        seed: Seed of the images; by default that of the teacher's training.
        name: Folder in the teacher's run to write to.
        output: Folder to write to, in place of that.

    Raises:
        ValueError: If there is no student, one cannot be read or has images of another shape, or a
            number does not fit.
    """
    files = _student_files(students)
    settings = cell_settings(
        trainer, model, features, metrics, num_samples, batch_size, seed, num_shown
    )
    check_images(datamodule)
    own_steps = [_read_steps(file, model) for file in files]
    steps = num_steps or sorted({*own_steps, 256}, reverse=True)
    check_at_least(1, num_steps=min(steps))
    teacher = fingerprint_of_file(model, ckpt_path)

    def work(worker: Worker) -> None:
        folder = worker.folder(output, name)
        data = worker.images(datamodule)
        rows: list[CompareRow] = []
        for entry in _entries(worker, teacher, steps, files):
            text = f"{len(rows) + 1}/{len(steps) + len(files)}: {entry.title}"
            rows.append(CompareRow(entry, *entry.measure(settings, folder, data, text)))
        if worker.is_first:
            _write(folder, rows, settings, ckpt_path)

    on_every_worker(trainer, model, work, ckpt_path=ckpt_path)


class Entry(NamedTuple):
    """A model with its steps, to be measured.

    Attributes:
        name: The teacher with its sampler, or the student's experiment.
        worker: Holds the model.
        cell: Sampler and levels.
        fingerprint: Of the model.
    """

    name: str
    worker: Worker
    cell: Cell
    fingerprint: str

    @property
    def title(self) -> str:
        """Label in pages and progress bars."""
        count = len(self.cell.levels) - 1
        return f"{self.name}, {count} step{'s' if count > 1 else ''}"

    def measure(
        self, settings: CellSettings, folder: Path, data: ImageDataModule, text: str
    ) -> tuple[str, dict[str, float]]:
        """The name of its cell's files and what was found, see `found_or_measured`."""
        return found_or_measured(
            self.worker, settings, self.cell, folder, self.fingerprint, data, text
        )


class CompareRow(NamedTuple):
    """An entry, the name of its cell's files, and what was found."""

    entry: Entry
    key: str
    found: dict[str, float]


def _entries(
    worker: Worker, teacher: str, steps: Sequence[int], files: Sequence[str]
) -> Iterator[Entry]:
    """The teacher with each number of steps, then the students."""
    model = worker.model
    sampler = default_sampler(model.noise)
    for count in steps:
        cell = Cell(sampler, "linear", linear(model.schedule.num_levels, count))
        yield Entry(f"teacher, {type(sampler).__name__}", worker, cell, teacher)
    for file in files:
        student = load(file, name="students").to(model.device)
        cell = Cell(student.sampler, "own", student.levels)
        yield Entry(_series(file), worker.with_model(student), cell, fingerprint(student))


def _write(
    folder: Path, done: Sequence[CompareRow], settings: CellSettings, ckpt_path: str | None
) -> None:
    """Write table, plot and page of images."""
    rows = []
    for entry, _, found in done:
        cell = entry.cell
        row: dict[str, Any] = {"model": entry.name, "steps": len(cell.levels) - 1}
        row["network evaluations"] = cell.sampler.num_evaluations(cell.levels)
        rows.append({**row, **found})
    write_csv(folder / "distillation.csv", rows)
    head = f"`{ckpt_path}` and its students, " if ckpt_path else ""
    count = settings.measure.num_samples
    text = f"{head}{count} images each, seed {settings.seed}.\n\n{markdown(rows)}"
    write_text(folder / "distillation.md", text)
    distance = settings.measure.quality.keys[0]
    plot_distances(folder / "distillation.png", rows, distance, [row.entry.name for row in done])
    images = [shown_images(folder, row.key, settings.num_shown) for row in done]
    label_rows(folder / "grids.png", [row.entry.title for row in done], images)
    print(f"\n{text}\nThe table, a plot and the images are in {folder}")


def _student_files(students: Sequence[str]) -> list[str]:
    """The checkpoints, those of a folder from many steps to few."""
    files: list[str] = []
    for each in students:
        if not Path(each).is_dir():
            files.append(each)
            continue
        found = sorted(Path(each).glob("student-*.ckpt"), reverse=True)
        found = found or sorted(Path(each, "checkpoints").glob("student-*.ckpt"), reverse=True)
        if not found:
            raise ValueError(f"students folder {each!r} holds no student-*.ckpt: give another")
        files += map(str, found)
    if not files:
        raise ValueError("students must name at least one checkpoint or folder")
    return files


def _read_steps(file: str, teacher: DiffusionModule) -> int:
    """The steps of a student, which must have images of the teacher's shape."""
    student = load(file, name="students")
    if student.image_shape != teacher.image_shape:
        raise ValueError(
            f"students must have images of the teacher's shape {teacher.image_shape}, got "
            f"{file!r} with {student.image_shape}: give a student of this teacher"
        )
    return len(student.levels) - 1


def _series(file: str) -> str:
    """A name for a student's kind: that of its experiment, if it lies in a run."""
    folders = Path(file).absolute().parents
    run = folders[1].name if len(folders) > 2 else ""
    return folders[2].name if run.startswith("version_") else Path(file).stem
