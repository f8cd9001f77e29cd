"""`main.py compare`: students and their teacher, by distance and by their images."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from ddim_pl.evaluation.cells import Cell, Entry, cell_settings, report
from ddim_pl.evaluation.worker import Worker, check_images, check_inside, on_every_worker
from ddim_pl.guidance import Guidance
from ddim_pl.samplers.gamma import default_sampler
from ddim_pl.timesteps import linear
from ddim_pl.training import DiffusionModule
from ddim_pl.training.fingerprint import fingerprint, fingerprint_of_file
from ddim_pl.training.loading import load


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
    seeds: Sequence[int] | None = None,
    statistics: str | None = None,
    name: str = "distillation",
    output: str | None = None,
) -> None:
    """Measure students with their own steps, and their teacher with DDIM at as many and more.

    A teacher of Gamma noise is measured with the deterministic sampler of that noise, one with
    guidance with that, as are the students that take its weight as an input.

    Writes `distillation.csv`, `distillation.md`, the plot `distillation.png` of the distance
    against steps, and `grids.png`, in which each row is one student and each column one latent.
    They grow with each student; a comparison that was stopped resumes when the command is given
    again.

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
        seeds: Several seeds in place of one: the table then has mean and sample deviation of each
            number, and the minimum of the distance.
        statistics: NPZ file of statistics in place of the real images, see FrechetDistance.
        name: Folder in the teacher's run to write to.
        output: Folder to write to, in place of that.

    Raises:
        ValueError: If there is no student, one cannot be read or has images of another shape, or a
            number does not fit.
    """
    check_inside(name=name)
    files = _student_files(students)
    settings = cell_settings(
        *(trainer, model, features, metrics, num_samples, batch_size, seed, num_shown),
        *(seeds, statistics),
    )
    check_images(datamodule)
    own_steps = [_read_steps(file, model) for file in files]
    steps = num_steps or sorted({*own_steps, 256}, reverse=True)
    for count in steps:
        linear(model.schedule.num_levels, count)  # says what is wrong
    teacher = fingerprint_of_file(model, ckpt_path)

    def work(worker: Worker) -> None:
        folder = worker.folder(output, name)
        data = worker.images(datamodule)
        entries = _entries(worker, teacher, steps, files)
        head = f"`{ckpt_path}` and its students, " if ckpt_path else ""
        intro = f"{head}{settings.measure.num_samples} images each"
        total = len(steps) + len(files)
        report("distillation", intro, entries, total, settings, folder, data)

    on_every_worker(trainer, model, work, ckpt_path=ckpt_path)


def _entries(
    worker: Worker, teacher: str, steps: Sequence[int], files: Sequence[str]
) -> Iterator[Entry]:
    """The teacher with each number of steps, then the students."""
    model = worker.model
    sampler = default_sampler(model.noise)
    for count in steps:
        levels = linear(model.schedule.num_levels, count)
        cell = Cell(sampler, "linear", levels, model.sampling_guidance)
        yield _entry(f"teacher, {type(sampler).__name__}", worker, cell, teacher)
    for file in files:
        student = load(file, name="students").to(model.device)
        worker.trainer.precision_plugin.convert_module(student)
        student.sampling_precision = worker.model.sampling_precision  # one for all in a table
        student.noise_source = model.noise_source  # a column is one latent
        cell = Cell(student.sampler, "own", student.levels, _guidance_of(student, model))
        yield _entry(_series(file), worker.with_model(student), cell, fingerprint(student))


def _entry(name: str, worker: Worker, cell: Cell, checkpoint: str) -> Entry:
    """A model with its steps, under the teacher's sampler or the student's experiment."""
    steps = len(cell.levels) - 1
    columns: dict[str, Any] = {"model": name, "steps": steps}
    columns |= cell.cost(worker.model.schedule)
    title = f"{name}, {steps} step{'s' if steps > 1 else ''}"
    return Entry(worker, cell, checkpoint, title, name, columns)


def _student_files(students: Sequence[str]) -> list[str]:
    """The checkpoints; those of a folder from many steps to few."""
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
    _guidance_of(student, teacher)  # says what is wrong
    return len(student.levels) - 1


def _guidance_of(student: DiffusionModule, teacher: DiffusionModule) -> Guidance | None:
    """The teacher's, if the student takes its weight as an input; else the student's own.

    Raises:
        ValueError: If it was not distilled for that weight.
    """
    if teacher.guidance is None or student.denoiser.guidance_range is None:
        return student.sampling_guidance
    return student.guidance_by(teacher.guidance)


def _series(file: str) -> str:
    """Name of a student's line in the plot: its experiment, if the file lies in a run."""
    folders = Path(file).absolute().parents
    run = folders[1].name if len(folders) > 2 else ""
    return folders[2].name if run.startswith("version_") else Path(file).stem
