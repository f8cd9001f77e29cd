"""`main.py compare`: students beside their teacher, by distance and by eye."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from ddim_pl.commands.cells import Cell, found_or_measured, measure_of, shown_images
from ddim_pl.commands.devices import Device, at_least, check_images, on_every_device
from ddim_pl.commands.report import label_rows, markdown, plot_distances, write_csv, write_text
from ddim_pl.samplers.gamma import default_sampler
from ddim_pl.timesteps import linear
from ddim_pl.training import DiffusionModule
from ddim_pl.training.checkpoints import load as load_teacher
from ddim_pl.training.fingerprint import fingerprint


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
    comparison that was stopped goes on when the command is given again.

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
        batch_size: Images in a batch, on each device.
        seed: Seed of the images; by default that of the teacher's training.
        name: Folder in the teacher's run to write to.
        output: Folder to write to, in place of that.

    Raises:
        ValueError: If there is no student, one cannot be read or draws other images, or a number
            does not fit.
    """
    at_least(1, num_shown=num_shown)
    files = _student_files(students)
    measure = measure_of(
        trainer, model, features, metrics, num_samples, batch_size, seed, num_shown
    )
    check_images(datamodule)
    shapes = {file: _read(file, model) for file in files}
    steps = num_steps or sorted({*shapes.values(), 256}, reverse=True)
    at_least(1, num_steps=min(steps))
    state: dict[str, Any] = {}
    if ckpt_path is not None:
        state = torch.load(ckpt_path, map_location="cpu", weights_only=True, mmap=True)
    teacher = fingerprint(model, state.get("state_dict"))

    def work(device: Device) -> None:
        folder = device.folder(output, name)
        data = device.images(datamodule)
        rows, series, names, images = [], [], [], []
        tasks: list[tuple[str | None, int]] = [(None, n) for n in steps]
        tasks += [(file, 0) for file in files]
        for i, (file, count) in enumerate(tasks):
            if file is None:
                sampler = default_sampler(model.noise)
                cell = Cell(sampler, "linear", linear(model.schedule.num_levels, count))
                who, drawing, key_of = f"teacher, {type(sampler).__name__}", device, teacher
            else:
                student = load_teacher(file).to(model.device).eval()
                cell = Cell(student.sampler, "own", student.levels)
                who, drawing = _series(file), device.of(student)
                key_of = fingerprint(student)
            count = len(cell.levels) - 1
            title = f"{who}, {count} step{'s' if count > 1 else ''}"
            text = f"{i + 1}/{len(tasks)}: {title}"
            key, found = found_or_measured(drawing, measure, cell, folder, key_of, data, text)
            evaluations = cell.sampler.num_evaluations(cell.levels)
            row: dict[str, Any] = {"model": who, "steps": count}
            rows.append({**row, "network evaluations": evaluations, **found})
            series.append(who)
            if device.is_first:
                names.append(title)
                images.append(shown_images(folder, key, measure.num_shown))
        if not device.is_first:
            return
        distance = measure.quality.keys[0]
        write_csv(folder / "distillation.csv", rows)
        head = f"`{ckpt_path}` and its students, " if ckpt_path else ""
        text = f"{head}{measure.num_samples} images each, seed {measure.seed}.\n\n{markdown(rows)}"
        write_text(folder / "distillation.md", text)
        plot_distances(folder / "distillation.png", rows, distance, series)
        label_rows(folder / "grids.png", names, images)
        print(f"\n{text}\nThe table, a plot and the images are in {folder}")

    on_every_device(trainer, model, work, ckpt_path=ckpt_path)


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


def _read(file: str, teacher: DiffusionModule) -> int:
    """The steps of a student, which must draw images of the teacher's shape."""
    student = load_teacher(file)
    if student.image_shape != teacher.image_shape:
        raise ValueError(
            f"student {file!r} draws images of shape {student.image_shape}, the teacher of "
            f"{teacher.image_shape}: give a student of this teacher"
        )
    return len(student.levels) - 1


def _series(file: str) -> str:
    """A name for a student's kind: that of its experiment, if it lies in a run."""
    folders = Path(file).absolute().parents
    run = folders[1].name if len(folders) > 2 else ""
    return folders[2].name if run.startswith("version_") else Path(file).stem
