"""Distillation in one step: pairs that can be trusted, and a student that learns them."""

import functools
import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exact import ExactGaussian
from luhman_runs import ROOT, pairs, saved, student, trainer
from safetensors.torch import load_file
from tiny import some_ddpm, tiny_config, tiny_unet, write_config

from ddim_pl.cli import main
from ddim_pl.commands.pairs import pairs as pairs_command
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.data.teacher_pairs import (
    PAIR_SEED,
    PairBatch,
    PairsWithoutLatents,
    TeacherPairsDataModule,
)
from ddim_pl.guidance import Guidance
from ddim_pl.noise import latents
from ddim_pl.prediction import decode, target
from ddim_pl.rng import share_generators, step_generators
from ddim_pl.samplers import DDIM, Ancestral
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule
from ddim_pl.timesteps import make_levels
from ddim_pl.training import LuhmanDistillation, pair_distillation
from ddim_pl.training.ddpm import averaged_checkpoint
from ddim_pl.training.pairs import recipe_of


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
def test_the_residual_reading_is_z_minus_the_output(schedule):
    """Luhman & Luhman 2021, section 3, as a row of the general form."""
    level = schedule(1000.0)
    z, out = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    x, eps = decode("residual", level, z, out)
    torch.testing.assert_close(x, z - out)
    torch.testing.assert_close(level.alpha * x + level.sigma * eps, z)
    torch.testing.assert_close(target("residual", level, x, eps), out)


@pytest.mark.parametrize(("loss", "expected"), [("l2", 0.5 * 0.25), ("l1", 0.5)])
def test_the_loss_is_the_error_of_the_one_step_image(teacher_file, loss, expected):
    module = student(teacher_file, loss=loss)
    z, _ = latents(0, range(4), module.image_shape)
    denoiser = module._denoiser(module.network).condition(torch.zeros(4, dtype=torch.long))
    x = replace(denoiser, clip=False)(z, 1000.0).x.detach()
    batch = (x + 0.5, torch.zeros(4), z)
    values = module.loss(denoiser, PairBatch(*batch), step_generators(0, z.device))
    torch.testing.assert_close(values, torch.full((4,), expected))


def test_a_fit_makes_the_pairs_learns_them_and_samples_in_one_evaluation(tmp_path, teacher_file):
    data = pairs(tmp_path, num_pairs=20, steps_per_epoch=75)
    module = student(teacher_file, optimizer=functools.partial(torch.optim.Adam, lr=3e-3))
    t = trainer(tmp_path, max_epochs=2)
    t.fit(module, data)
    assert len(list((tmp_path / "pairs").glob("*.safetensors"))) == 2
    assert json.loads((tmp_path / "pairs" / "manifest.json").read_text())["levels"][0] == 1000
    assert module.levels.tolist() == [1000, 0]
    assert module.sampler.num_evaluations(module.levels) == 1
    batch = next(iter(data.train_dataloader()))
    before = student(teacher_file)
    errors = [
        m.loss(m.denoiser.condition(batch.labels), batch, step_generators(0, m.device)).mean()
        for m in (before, module)
    ]
    assert errors[1] < 0.7 * errors[0]
    path = tmp_path / "student.ckpt"
    t.save_checkpoint(path)
    again = LuhmanDistillation.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(again.sample(range(3)), module.sample(range(3)))


def test_latents_of_philox_are_made_on_the_device_and_are_those_of_the_pairs(
    tmp_path, teacher_file
):
    module, data = student(teacher_file, noise_source="philox"), pairs(tmp_path)
    made = []
    module.loss = lambda denoiser, batch, generators: (
        made.append(batch) or LuhmanDistillation.loss(module, denoiser, batch, generators)
    )
    trainer(tmp_path, max_steps=2).fit(module, data)
    manifest = json.loads((tmp_path / "pairs" / "manifest.json").read_text())
    assert manifest["noise_source"] == "philox"
    assert isinstance(next(iter(data.train_dataloader())), PairsWithoutLatents)
    teacher = module.read_teacher()
    assert made
    for batch in made:
        assert isinstance(batch, PairBatch)
        again = DDIM()(teacher.conditioned(batch.labels), batch.latents, module.teacher_levels)
        # To the rounding of another batch size, which four steps enlarge; other latents' images
        # differ by about 1.
        torch.testing.assert_close(batch.images, again, rtol=0, atol=1e-3)
    (raw,) = data.val_dataloader()
    z, _ = latents(PAIR_SEED, range(40, 48), (1, 8, 8), noise_source="philox")
    found = data.on_after_batch_transfer(raw, 0)
    assert torch.equal(found.latents, z)
    meta = PairsWithoutLatents(*(each.to("meta") for each in raw))
    assert data.on_after_batch_transfer(meta, 0).latents.device.type == "meta"  # reads no value
    half = PairsWithoutLatents(raw.images.bfloat16(), *raw[1:])
    assert torch.equal(data.on_after_batch_transfer(half, 0).latents, z.bfloat16())


def test_the_same_seed_is_refused_by_philox_and_any_other_taken(tmp_path, teacher_file):
    module = student(teacher_file, noise_source="philox", seed=3)
    with pytest.raises(ValueError, match=r"pair_seed must share no latents .* got 3 for"):
        module.check_data(pairs(tmp_path, pair_seed=3))
    module.check_data(pairs(tmp_path, pair_seed=2))


@pytest.mark.parametrize("source", ["generators", "philox"])
def test_a_stopped_fit_ends_with_the_weights_of_an_unbroken_one(tmp_path, teacher_file, source):
    make = functools.partial(student, noise_source=source)
    whole = make(teacher_file)
    trainer(tmp_path / "a", max_steps=7).fit(whole, pairs(tmp_path, steps_per_epoch=5))
    half = make(teacher_file)
    t = trainer(tmp_path / "b", max_steps=3)
    t.fit(half, pairs(tmp_path, steps_per_epoch=5))
    t.save_checkpoint(tmp_path / "half.ckpt")
    rest = make(teacher_file)
    trainer(tmp_path / "c", max_steps=7).fit(
        rest, pairs(tmp_path, steps_per_epoch=5), ckpt_path=tmp_path / "half.ckpt"
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_no_seed_in_use_is_judged_by_latents_of_the_default_pairs():
    for kind in (TeacherPairsDataModule, pairs_command):
        assert inspect.signature(kind).parameters["pair_seed"].default == PAIR_SEED
    for seed in range(1500):
        assert not share_generators(seed, 60_000, PAIR_SEED, 1_100_000), seed


@pytest.mark.parametrize(("seed", "pair_seed"), [(0, 0), (3, 3), (PAIR_SEED, None)])
def test_pairs_of_latents_that_judge_the_student_are_refused(
    tmp_path, teacher_file, seed, pair_seed
):
    """Else the student answers what it was taught, and a distance tells nothing."""
    settings = {} if pair_seed is None else {"pair_seed": pair_seed}
    shared = PAIR_SEED if pair_seed is None else pair_seed
    message = (
        rf"pair_seed must share no .* of seed {seed}, .* got {shared} for 48 .* such as (\d+)"
    )
    with pytest.raises(ValueError, match=message) as caught:
        trainer(tmp_path, max_steps=1).fit(
            student(teacher_file, seed=seed), pairs(tmp_path, **settings)
        )
    assert not (tmp_path / "pairs").exists()
    other = int(str(caught.value).rpartition(" ")[2])
    trainer(tmp_path, max_steps=1).fit(
        student(teacher_file, seed=seed), pairs(tmp_path, pair_seed=other)
    )


@pytest.mark.parametrize("compiles", [False, True])
def test_the_teacher_that_draws_the_pairs_is_compiled_too(
    tmp_path, teacher_file, monkeypatch, compiles
):
    compiled, drawing = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))
    original = pair_distillation.make_pairs_on_all

    def make(trainer, store, teacher, *arguments, **more):
        drawing.append(teacher.average.module)
        return original(trainer, store, teacher, *arguments, **more)

    monkeypatch.setattr(pair_distillation, "make_pairs_on_all", make)
    module = student(teacher_file, compile=compiles)
    trainer(tmp_path, max_steps=1).fit(module, pairs(tmp_path))
    assert [id(network) for network in compiled] == [
        id(network) for network in (module.network, module.average.module, *drawing) if compiles
    ]


def test_a_student_needs_no_teacher_once_it_is_trained(tmp_path, teacher_file):
    module = student(teacher_file)
    t = trainer(tmp_path, max_steps=1)
    t.fit(module, pairs(tmp_path))
    t.save_checkpoint(tmp_path / "student.ckpt")
    state = torch.load(tmp_path / "student.ckpt", weights_only=True)
    assert not [name for name in state["state_dict"] if "teacher" in name]
    state["hyper_parameters"]["teacher"] = "gone.ckpt"
    torch.save(state, tmp_path / "moved.ckpt")
    again = LuhmanDistillation.load_from_checkpoint(tmp_path / "moved.ckpt", weights_only=True)
    assert torch.equal(again.sample([1]), module.sample([1]))


def test_the_origin_says_how_the_pairs_were_drawn(tmp_path, teacher_file):
    module = student(teacher_file)
    assert module.origin == ()
    t = trainer(tmp_path, max_steps=1)
    t.fit(module, pairs(tmp_path))
    for _ in range(2):
        t.save_checkpoint(tmp_path / "student.ckpt")
    other = {"teacher": "/secret/other.ckpt", "teacher_num_steps": 7}
    again = LuhmanDistillation.load_from_checkpoint(
        tmp_path / "student.ckpt", weights_only=True, **other
    )
    (own,) = again.origin  # as it was, whatever is given now
    assert own == {
        "by": "LuhmanDistillation",
        "teacher": Path(teacher_file[0]).name,
        "updates": 1,
        "teacher_sampler": "DDIM(eta=0.0)",
        "teacher_num_steps": 4,
        "teacher_timesteps": "linear",
    }
    assert averaged_checkpoint(again)["ddim_pl_origin"] == [own]


def test_an_exact_student_of_an_exact_teacher_has_no_loss(teacher_file):
    """Gaussian data: the flow from T to 0 is affine, and so is the student's answer."""
    schedule = LinearSchedule()
    exact = ExactGaussian(schedule, 0.2, 0.5)
    z, _ = latents(0, range(50), (1, 8, 8))
    z = z.double()
    x = exact.flow(z, 1000.0, 0.0)
    level = schedule(1000.0)
    eps = (z - level.alpha * x) / level.sigma
    read = decode("residual", level, z, target("residual", level, x, eps))
    torch.testing.assert_close(read.x, x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_sampler": Ancestral()}, "the teacher's sampler must be deterministic"),
        ({"teacher_sampler": DDIM(0.5)}, "the teacher's sampler must be deterministic"),
        ({"loss": "huber"}, r"loss must be one of \('l2', 'l1'\), got 'huber'"),
        ({"prediction": "eps"}, "got 'eps': at the last level"),
        ({"pair_batch_size": 0}, "pair_batch_size must be at least 1"),
        ({"teacher_num_steps": 0}, "num_steps must lie in"),
        ({"teacher_timesteps": "cubic"}, "timesteps must be one of"),
        ({"network": tiny_unet(num_classes=10)}, None),
    ],
)
def test_wrong_arguments_are_errors(teacher_file, arguments, message):
    if message is None:
        student(teacher_file, **arguments)
        return
    with pytest.raises(ValueError, match=message):
        student(teacher_file, **arguments)


def test_a_plain_data_module_is_refused(tmp_path, teacher_file):
    with pytest.raises(ValueError, match=r"must be .*TeacherPairsDataModule"):
        trainer(tmp_path, max_steps=1).fit(student(teacher_file), DigitsDataModule())


def test_a_missing_teacher_is_an_error():
    with pytest.raises(ValueError, match="teacher must be given"):
        LuhmanDistillation()
    with pytest.raises(
        ValueError, match=r"teacher must be a checkpoint .* got 'gone.ckpt', which is no file"
    ):
        LuhmanDistillation(teacher="gone.ckpt")


@pytest.mark.parametrize("name", ["num_pairs", "num_validation", "shard_size", "batch_size"])
def test_wrong_numbers_of_pairs_are_errors(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        pairs(tmp_path, **{name: 0})


def test_what_the_loaders_refuse_is_refused_before_a_pair_is_made(tmp_path, teacher_file):
    with pytest.raises(ValueError, match="overfit_batches must be 0, got 2"):
        trainer(tmp_path, max_steps=1, overfit_batches=2).fit(
            student(teacher_file), pairs(tmp_path)
        )
    assert not (tmp_path / "pairs").exists()


def test_fewer_validation_pairs_than_devices_are_refused(tmp_path, teacher_file):
    data = pairs(tmp_path, num_validation=1)
    levels = torch.tensor([1000.0, 0])
    recipe = recipe_of(teacher_file[1], DDIM(), levels, precision="32-true")
    data.open(recipe)
    data.trainer = SimpleNamespace(global_rank=0, world_size=2, overfit_batches=0)
    message = "num_validation must be at least the number of devices, 2, got 1"
    with pytest.raises(ValueError, match=message):
        data.val_dataloader()
    with pytest.raises(ValueError, match=message):
        data.open(recipe)


def luhman_config(folder, teacher):
    """Three shards of pairs and six updates; validation pairs that two ranks share unevenly."""
    config = tiny_config(folder)
    config["model"] = {
        "class_path": "ddim_pl.training.LuhmanDistillation",
        "init_args": {
            "teacher": teacher,
            "teacher_timesteps": "linear",
            "teacher_num_steps": 4,
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
            "ema_decay": 0.5,
        },
    }
    config["data"] = {
        "class_path": "ddim_pl.data.teacher_pairs.TeacherPairsDataModule",
        "init_args": {
            "images": {"class_path": "ddim_pl.data.digits.DigitsDataModule"},
            "folder": str(folder / "pairs"),
            "num_pairs": 40,
            "num_validation": 7,
            "shard_size": 16,
            "batch_size": 5,
            "steps_per_epoch": 3,
            "num_predict": 6,
        },
    }
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][-1:]
    config["trainer"]["log_every_n_steps"] = 1
    config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 3
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher_file):
    """The folder of a fit of one process."""
    folder = tmp_path_factory.mktemp("alone")
    config = luhman_config(folder, teacher_file[0])
    main(["fit", "--config", write_config(config, folder / "config.yaml")])
    return folder


def last_of(folder):
    return folder / "tiny" / "version_0" / "checkpoints" / "last.ckpt"


def test_validate_says_that_only_fit_opens_the_pairs(run):
    with pytest.raises(SystemExit, match=r"^error: .*only fit opens them.*use test[^\n]*$"):
        main(["validate", "--ckpt_path", str(last_of(run))])
    main(["test", "--ckpt_path", str(last_of(run))])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--data.pair_seed", "3"], "got 3 for"),
        (["--trainer.precision", "bf16-mixed"], "must be made with precision="),
        (["--trainer.overfit_batches", "2"], "overfit_batches must be 0, got 2"),
    ],
)
def test_what_is_wrong_with_pairs_is_found_before_a_run_begins(run, option, message, tmp_path):
    logs = ["--trainer.logger.init_args.save_dir", str(tmp_path / "runs")]
    with pytest.raises(SystemExit, match=rf"^error: .*{message}"):
        main(["fit", "--config", str(run / "config.yaml"), *logs, *option])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_two_processes_make_the_pairs_of_one_and_end_the_fit(tmp_path, run, teacher_file):
    config = luhman_config(tmp_path, teacher_file[0])
    path = write_config(config, tmp_path / "config.yaml")
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", "fit", "--config", path, "--trainer.devices", "2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    alone, shared = (
        {f.name: f.read_bytes() for f in (folder / "pairs").iterdir()}
        for folder in (run, tmp_path)
    )
    assert len(alone) == 7
    assert shared == alone
    last = torch.load(last_of(tmp_path), weights_only=True)
    assert last["global_step"] == 6
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_pairs_are_drawn_with_the_teachers_guidance_or_another(tmp_path):
    model = some_ddpm(network=tiny_unet(num_classes=10, null_class=True), guidance=2.0)
    teacher = saved(model, tmp_path / "guided.ckpt"), model
    levels = make_levels("linear", model.schedule, 4)
    seen = {}
    for weight in (None, 3.0, 1.0):
        module = student(teacher, teacher_guidance=weight)
        assert module.sampling_guidance is None
        folder = tmp_path / str(weight)
        trainer(folder, max_steps=1).fit(module, pairs(folder, num_pairs=10, num_validation=2))
        assert module.settings_of_origin()["teacher_guidance"] == (weight or 2.0)
        manifest = json.loads((folder / "pairs" / "manifest.json").read_text())
        assert manifest.get("guidance") == {None: "2", 3.0: "3", 1.0: None}[weight]
        images = load_file(folder / "pairs" / "00000.safetensors")["images"]
        drawn = model.sample(
            range(10), levels=levels, seed=PAIR_SEED, guidance=Guidance(weight or 2.0)
        )
        torch.testing.assert_close(images[:10], drawn, rtol=0, atol=1e-3)
        seen[weight] = images
    assert len({float(images.sum()) for images in seen.values()}) == 3
    assert student(teacher).hparams["teacher_guidance"] == 2.0


def test_guidance_of_a_teacher_without_a_null_class_is_refused(tmp_path, teacher_file):
    module = student(teacher_file, teacher_guidance=2.0)
    with pytest.raises(ValueError, match="teacher_guidance must be left out for a teacher witho"):
        module.check_data(pairs(tmp_path))
