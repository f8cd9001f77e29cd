"""Students beside their teacher: each with its own steps, and kept where it was measured."""

import csv

import pytest
import torch
from tiny import some_ddpm, tiny_ddpm, tiny_unet

from ddim_pl.commands import Trainer
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.images import read_png
from ddim_pl.metrics.digits import DigitsFeatures
from ddim_pl.metrics.quality import SampleQuality
from ddim_pl.training import (
    ConsistencyModel,
    DiffusionModule,
    GuidanceDistillation,
    ProgressiveDistillation,
)
from ddim_pl.training.ddpm import averaged_checkpoint


def trainer(folder):
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )


@pytest.fixture
def run(tmp_path):
    """A teacher, and a run of students of four and two steps."""
    teacher = some_ddpm()
    t = trainer(tmp_path)
    t.strategy.connect(teacher)
    t.save_checkpoint(tmp_path / "teacher.ckpt")
    ladder = ProgressiveDistillation(
        teacher=str(tmp_path / "teacher.ckpt"), rounds=[(4, 1), (2, 1)]
    )
    folder = tmp_path / "ladder" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    for round_, steps in enumerate((4, 2)):
        ladder.round_index = round_
        next(ladder.average.module.parameters()).data += 0.1
        file = folder / f"student-{steps:04d}-steps.ckpt"
        torch.save(ladder.student_checkpoint(), file)
    return teacher, folder


def compare(folder, teacher, students, **arguments):
    settings = {
        "features": DigitsFeatures,
        "num_samples": 40,
        "num_shown": 4,
        "output": str(folder),
        **arguments,
    }
    trainer(folder).compare(teacher, DigitsDataModule(), students=students, **settings)
    return list(csv.DictReader((folder / "distillation.csv").read_text().splitlines()))


def test_every_student_has_its_own_steps_and_the_teacher_as_many(tmp_path, run):
    teacher, folder = run
    rows = compare(tmp_path / "out", teacher, [str(folder.parent)], num_steps=[8, 4, 2])
    assert [(row["model"], row["steps"]) for row in rows] == [
        *(("teacher, DDIM", n) for n in "842"),
        *(("ladder", n) for n in "42"),
    ]
    values = [float(row["digits_fd"]) for row in rows]
    assert len(set(values)) == 5
    for name in ("distillation.png", "grids.png"):
        assert read_png(tmp_path / "out" / name).shape[1] > 100
    assert (tmp_path / "out" / "distillation.md").read_text().count("\n| ") == 6


def test_a_consistency_model_has_a_step_for_each_of_its_noises(tmp_path, run):
    teacher, _ = run
    path, files = str(tmp_path / "teacher.ckpt"), []
    for sigmas in ([80.0], [80.0, 0.821]):
        model = ConsistencyModel(teacher=path, sampling_sigmas=sigmas)
        files.append(str(tmp_path / f"noises-{len(sigmas)}.ckpt"))
        torch.save(averaged_checkpoint(model), files[-1])
    rows = compare(tmp_path / "out", teacher, files, num_steps=[2])
    assert [(row["model"], row["network evaluations"]) for row in rows] == [
        *(("teacher, DDIM", "2"), ("noises-1", "1"), ("noises-2", "2"))
    ]


def test_students_that_take_the_weight_are_guided_as_their_teacher(tmp_path):
    network = tiny_unet(num_classes=10, null_class=True)
    teacher = some_ddpm(network=network, guidance=2.0)
    t = trainer(tmp_path)
    t.strategy.connect(teacher)
    t.save_checkpoint(tmp_path / "teacher.ckpt")
    model = GuidanceDistillation(
        teacher=str(tmp_path / "teacher.ckpt"), guidance_range=(1, 3), num_steps=2
    )
    model.average.module.guidance_in.linear.weight.data += 1
    torch.save(averaged_checkpoint(model), tmp_path / "student.ckpt")
    files = [str(tmp_path / "student.ckpt")]
    rows = compare(tmp_path / "out", teacher, files, num_steps=[2])
    assert [(row["guidance"], row["network evaluations"]) for row in rows] == [
        *(("2", "4"), ("2", "2"))
    ]
    teacher.guidance = 2.5
    (_, other) = compare(tmp_path / "other", teacher, files, num_steps=[2])
    assert other["digits_fd"] != rows[1]["digits_fd"]
    teacher.guidance = 4.0
    with pytest.raises(ValueError, match=r"guidance must lie in \[1, 3\], .* got 4\.0"):
        compare(tmp_path / "none", teacher, files, num_steps=[2])
    assert not (tmp_path / "none").exists()


def test_a_column_is_one_latent_whatever_the_students_draw_from(tmp_path, run, monkeypatch):
    """The students have generators, as their teacher had."""
    teacher, folder = run
    teacher.noise_source = "philox"
    seen, original = set(), DiffusionModule.latents

    def watched(model, *arguments, **more):
        z, generators = original(model, *arguments, **more)
        seen.add((id(model), float(z.sum())))
        return z, generators

    monkeypatch.setattr(DiffusionModule, "latents", watched)
    compare(tmp_path / "out", teacher, [str(folder)], num_steps=[4])
    assert len({model for model, _ in seen}) == 3
    assert len({value for _, value in seen}) == 1


def test_students_are_drawn_in_the_precision_of_their_teacher(tmp_path, run):
    teacher, folder = run
    exact = compare(tmp_path / "out", teacher, [str(folder)], num_steps=[2])
    teacher.sampling_precision = "bf16"
    rows = compare(tmp_path / "bf16", teacher, [str(folder)], num_steps=[2])
    assert "network bf16" in (tmp_path / "bf16" / "distillation.md").read_text()
    for row, other in zip(rows, exact, strict=True):
        drawn, expected = float(row["digits_fd"]), float(other["digits_fd"])
        assert drawn != expected
        assert drawn == pytest.approx(expected, rel=0.05)


def test_what_was_measured_is_kept(tmp_path, run, monkeypatch):
    teacher, folder = run
    first = compare(tmp_path / "out", teacher, [str(folder)], num_steps=[2])
    calls, original = [], SampleQuality.compute
    monkeypatch.setattr(SampleQuality, "compute", lambda s: calls.append(1) or original(s))
    assert compare(tmp_path / "out", teacher, [str(folder)], num_steps=[2]) == first
    assert not calls


def test_wrong_students_are_errors(tmp_path, run):
    teacher, folder = run
    (tmp_path / "empty").mkdir()
    for students, message in (
        ([], "students must name at least one"),
        ([str(tmp_path / "empty")], "holds no student"),
        (["gone.ckpt"], "which is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(tmp_path / "out", teacher, students)
    other = tiny_ddpm(network=tiny_unet(image_size=16, attention=[8]))
    with pytest.raises(ValueError, match="must have images of the teacher's shape"):
        compare(tmp_path / "out", other, [str(folder)])
    assert not (tmp_path / "out").exists()
