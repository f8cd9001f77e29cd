"""The files of each round of a distillation: a checkpoint, a grid, a measurement."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import yaml

from callbacks.fid import FrechetDistance
from ddim_pl.checks import check_at_least
from ddim_pl.evaluation.plots import plot_distances
from ddim_pl.evaluation.tables import write_csv
from ddim_pl.files import write_tensors
from ddim_pl.images import grid, to_uint8, write_png
from ddim_pl.lightning_internals import add_callback_states, callbacks_of, datamodule_of
from ddim_pl.loggers import log_image, run_folder
from ddim_pl.training.hyperparameters import CONFIG_KEY
from ddim_pl.training.ladder import Ladder


class Students(L.Callback):
    """Write each round's student when its updates are made.

    Writes into the run's folder: `checkpoints/student-0008-steps.ckpt`, which every command takes
    and which holds its number of steps; `students/student-0008-steps.png`, of the same latents for
    every student; and a line of `students/students.csv` with the numbers of the config's
    `FrechetDistance`, if there is one, which are also logged as "student/...", and plotted in
    `students/students.png`. The loggers get the pictures as "students/samples" and
    "students/plot".

    A round is closed at the first batch of the next one. A run that was stopped before that closes
    it when it resumes, and writes the same files.

    Args:
        num_images: Images in a grid.
        columns: Images in a row; by default the grid is about square.
        max_measured_steps: Students of more steps are not measured, to save time; None measures
            all.

    Raises:
        ValueError: If a number is less than 1.
    """

    def __init__(
        self,
        num_images: int = 80,
        *,
        columns: int | None = None,
        max_measured_steps: int | None = None,
    ) -> None:
        check_at_least(1, num_images=num_images, max_measured_steps=max_measured_steps)
        self.num_images = num_images
        self.columns = columns
        self.max_measured_steps = max_measured_steps
        self._closed = -1  # the last round that was

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there will be students, and load what measures them."""
        if stage != "fit":
            return
        if not isinstance(pl_module, Ladder):
            raise ValueError(
                "the model of the callback Students must be ProgressiveDistillation or TRACT, got "
                f"{type(pl_module).__name__}: leave it out of the callbacks"
            )
        measure = _measure_of(trainer)
        if measure is not None:
            measure.check(datamodule_of(trainer), "validate")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Close the round before the module begins the next one."""
        module = cast(Ladder, pl_module)
        if module.round_index < module.round_at(module.global_step):
            self._close(trainer, module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the last round if it is complete."""
        module = cast(Ladder, pl_module)
        if module.round_is_over:
            self._close(trainer, module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the last round of a fit that resumed with no update left, and so did not train.

        Lightning has moved the module to the CPU by now.
        """
        module = cast(Ladder, pl_module)
        if module.round_is_over and self._closed != module.round_index:
            module.to(trainer.strategy.root_device)
            self._close(trainer, module)

    @torch.no_grad()
    def _close(self, trainer: L.Trainer, module: Ladder) -> None:
        if module.round_index < 0:
            return  # a converted teacher is no student yet
        run = run_folder(trainer)  # on every rank: it broadcasts
        name = f"student-{module.student_steps:04d}-steps"
        row: dict[str, Any] = {"steps": module.student_steps, "updates": module.round_updates}
        measure = _measure_of(trainer)
        if measure is not None and module.student_steps <= (self.max_measured_steps or math.inf):
            found = {k: float(value) for k, value in measure.measure(trainer, module).items()}
            row |= found
            logged = {f"student/{key}": value for key, value in found.items()}
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=module.global_step)
        if trainer.is_global_zero:
            with trainer.precision_plugin.forward_context():
                images = to_uint8(module.sample(range(self.num_images))).cpu()
            file = run / "students" / f"{name}.png"
            write_png(grid(images, columns=self.columns), file)
            log_image(trainer.loggers, "students/samples", file, module.global_step)
            rows = _add_row(run / "students" / "students.csv", row)
            if measure is not None and measure.settings.quality.keys[0] in row:
                file = run / "students" / "students.png"
                _plot(file, rows, measure.settings.quality.keys[0])
                log_image(trainer.loggers, "students/plot", file, module.global_step)
            _save(trainer, module, run / "checkpoints" / f"{name}.ckpt")
        trainer.strategy.barrier("student written")
        self._closed = module.round_index


def _measure_of(trainer: L.Trainer) -> FrechetDistance | None:
    return next((c for c in callbacks_of(trainer) if isinstance(c, FrechetDistance)), None)


def _save(trainer: L.Trainer, module: Ladder, path: Path) -> None:
    """Write the student's checkpoint, with the config of the run but for the model."""
    checkpoint = module.student_checkpoint()
    add_callback_states(trainer, checkpoint)
    if CONFIG_KEY in checkpoint:
        config = yaml.safe_load(checkpoint[CONFIG_KEY])
        hyper = checkpoint["hyper_parameters"]
        arguments = {k: v for k, v in hyper.items() if not k.startswith("_")}
        config["model"] = {"class_path": hyper["_class_path"], "init_args": arguments}
        # It is no ladder any more.
        config["trainer"]["callbacks"] = [
            each
            for each in config["trainer"].get("callbacks") or []
            if not each["class_path"].endswith(f".{Students.__name__}")
        ]
        checkpoint[CONFIG_KEY] = yaml.safe_dump(config)
    write_tensors(checkpoint, path)


def _add_row(path: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Add a student's line, in place of an earlier one of as many steps; return all lines."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        rows = list(csv.DictReader(path.read_text().splitlines()))
    rows = [each for each in rows if int(each["steps"]) != row["steps"]]
    rows = sorted([*rows, row], key=lambda each: -int(each["steps"]))
    write_csv(path, rows)
    return rows


def _plot(path: Path, rows: Sequence[dict[str, Any]], key: str) -> None:
    """Plot a distance against the students' steps, of those that were measured."""
    measured = [row for row in rows if row.get(key) not in (None, "")]
    points = [
        {"steps": steps, "network evaluations": steps, key: float(row[key])}
        for row in measured
        for steps in [int(row["steps"])]
    ]
    plot_distances(path, points, key, ["students"] * len(points))
