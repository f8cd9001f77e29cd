"""Distillation in one step: pairs that can be trusted, and a student that learns them."""

import errno
import functools
import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from exact import ExactGaussian
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file
from tiny import some_ddpm, tiny_config, tiny_unet, write_config

from ddim_pl.cli import main
from ddim_pl.commands import Trainer as TrainerWithVerbs
from ddim_pl.commands.pairs import pairs as pairs_verb
from ddim_pl.data import teacher_pairs
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.data.teacher_pairs import PAIR_SEED, PairBatch, PairStore, TeacherPairsDataModule
from ddim_pl.evaluation.worker import Worker
from ddim_pl.noise import latents
from ddim_pl.prediction import decode, target
from ddim_pl.rng import share_generators, step_generators
from ddim_pl.samplers import DDIM, Ancestral
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule
from ddim_pl.training import DDPM, LuhmanDistillation, luhman
from ddim_pl.training.pairs import make_pairs, recipe_of

ROOT = Path(__file__).parents[2]


def trainer(folder, kind=L.Trainer, **arguments):
    return kind(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        **arguments,
    )


def saved(module, path):
    """A checkpoint of a module, as its trainer writes it."""
    t = trainer(path.parent, max_epochs=0)
    t.fit(module, DigitsDataModule())
    t.save_checkpoint(path)
    return str(path)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    module = some_ddpm(network=tiny_unet(num_classes=10))
    return saved(module, folder / "teacher.ckpt"), module


def pairs(folder, **arguments):
    settings = {
        "num_pairs": 40,
        "num_validation": 8,
        "shard_size": 16,
        "batch_size": 10,
        **arguments,
    }
    return TeacherPairsDataModule(DigitsDataModule(), str(folder / "pairs"), **settings)


def student(teacher_file, **arguments):
    settings = {
        "teacher_timesteps": "linear",
        "teacher_num_steps": 4,
        "ema_decay": 0.9,
        "optimizer": functools.partial(torch.optim.Adam, lr=1e-3),
        **arguments,
    }
    return LuhmanDistillation(teacher=teacher_file[0], **settings)


def with_the_steps_of_fit(teacher_file):
    """The teacher as `main.py pairs` is given it for `student`."""
    return DDPM.load_from_checkpoint(
        teacher_file[0], weights_only=True, timesteps="linear", num_steps=4
    )


def store_of(folder, module, *, num_pairs=40, **arguments):
    levels = torch.tensor([1000.0, 500, 0])
    recipe = {**recipe_of(module, DDIM(), levels, precision="32-true"), "seed": 3, **arguments}
    store = PairStore(folder, recipe, num_pairs=num_pairs, shard_size=16)
    return store, functools.partial(make_pairs, store, module, DDIM(), levels, batch_size=5)


# ---- pairs ------------------------------------------------------------------------------------


def test_pairs_are_the_teachers_images_of_the_latents_that_a_batch_holds(tmp_path, teacher_file):
    _, module = teacher_file
    data = pairs(tmp_path, pair_seed=3)
    levels = torch.tensor([1000.0, 500, 0])
    store = data.open(recipe_of(module, DDIM(), levels, precision="32-true"))
    store.begin()
    assert make_pairs(store, module, DDIM(), levels, batch_size=5) == 3
    batch = next(iter(data.train_dataloader()))
    again = DDIM()(module.conditioned(batch.labels), batch.latents, levels)
    torch.testing.assert_close(batch.images, again, rtol=0, atol=2e-5)
    validation = list(data.val_dataloader())
    z, _ = latents(3, range(40, 48), (1, 8, 8))
    assert torch.equal(validation[0].latents, z)
    assert validation[0].labels.tolist() == [i % 10 for i in range(40, 48)]


def test_what_is_there_is_kept_and_what_is_damaged_is_made_again(tmp_path, teacher_file):
    store, make = store_of(tmp_path, teacher_file[1])
    store.begin()
    assert make() == 3
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert make() == 0
    shard = tmp_path / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    (tmp_path / "00002.sha256").unlink()
    with pytest.warns(UserWarning, match="does not match its checksum"):
        assert make() == 2
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_ranks_share_the_shards_and_make_the_same_pairs(tmp_path, teacher_file):
    alone, make = store_of(tmp_path / "alone", teacher_file[1])
    alone.begin()
    make()
    shared, make = store_of(tmp_path / "shared", teacher_file[1])
    shared.begin()
    assert [make(rank=rank, world_size=2) for rank in range(2)] == [2, 1]
    for shard in range(3):
        name = f"{shard:05d}.safetensors"
        one, two = (load_file(s.folder / name)["images"] for s in (alone, shared))
        assert torch.equal(one, two)


def test_more_pairs_are_added_to_those_there(tmp_path, teacher_file):
    few, make = store_of(tmp_path, teacher_file[1], num_pairs=32)
    few.begin()
    assert make() == 2
    many, make = store_of(tmp_path, teacher_file[1], num_pairs=50)
    assert make() == 2
    assert all(many.is_whole(shard) for shard in range(4))


@pytest.mark.parametrize("change", [{"seed": 4}, {"sampler": "Heun()"}, {"levels": [1000.0, 0.0]}])
def test_pairs_of_another_recipe_are_refused(tmp_path, teacher_file, change):
    store, _ = store_of(tmp_path, teacher_file[1])
    store.begin()
    (name,) = change
    with pytest.raises(ValueError, match=f"was made with {name}="):
        store_of(tmp_path, teacher_file[1], **change)


def test_pairs_of_other_weights_are_refused(tmp_path, teacher_file):
    store, _ = store_of(tmp_path, teacher_file[1])
    store.begin()
    other = some_ddpm(network=tiny_unet(num_classes=10))
    next(other.average.module.parameters()).data += 1e-3
    with pytest.raises(ValueError, match="was made with teacher="):
        store_of(tmp_path, other)


def test_a_full_disk_stops_cleanly_and_the_same_command_goes_on(
    tmp_path, teacher_file, monkeypatch
):
    store, make = store_of(tmp_path, teacher_file[1])
    store.begin()
    original, calls = teacher_pairs.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(teacher_pairs, "save_file", full)
    with pytest.raises(OSError, match=r"shard 1 of 3 .*no space is left.*make room"):
        make()
    assert store.is_whole(0)
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.setattr(teacher_pairs, "save_file", original)
    assert make() == 2
    assert all(store.is_whole(shard) for shard in range(3))


WRITE_UNDER_A_LIMIT = """
import resource, signal, sys
from pathlib import Path
import torch
from ddim_pl.data.teacher_pairs import PairStore

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = PairStore(Path(sys.argv[1]), {"seed": 0}, num_pairs=4, shard_size=2)
store.begin()
store.write(0, torch.zeros(2, 1, 8, 8))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    store.write(1, torch.zeros(2, 1, 64, 64))
except OSError as error:
    print(error)
assert store.is_whole(0)
"""


def test_a_file_that_the_system_will_not_let_grow_stops_cleanly(tmp_path):
    """As a quota does: safetensors raises an error of its own."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE_UNDER_A_LIMIT, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "shard 1 of 2 cannot be written to" in done.stdout
    assert "File too large" in done.stdout
    assert {f.name for f in tmp_path.iterdir()} == {
        "manifest.json",
        "00000.safetensors",
        "00000.sha256",
    }


def test_pairs_of_another_precision_are_refused(tmp_path, teacher_file):
    trainer(tmp_path, max_steps=1).fit(student(teacher_file), pairs(tmp_path))
    assert json.loads((tmp_path / "pairs/manifest.json").read_text())["precision"] == "32-true"
    message = "was made with precision='32-true', but 'bf16-mixed' is wanted"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1, precision="bf16-mixed").fit(
            student(teacher_file), pairs(tmp_path)
        )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, TrainerWithVerbs, precision="bf16-mixed").pairs(
            with_the_steps_of_fit(teacher_file),
            folder=str(tmp_path / "pairs"),
            num_pairs=48,
            shard_size=16,
        )


def test_the_verb_makes_the_pairs_that_fit_asks_for(tmp_path, teacher_file):
    trainer(tmp_path, TrainerWithVerbs).pairs(
        with_the_steps_of_fit(teacher_file),
        folder=str(tmp_path / "pairs"),
        num_pairs=48,
        shard_size=16,
    )
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "pairs").glob("0*")}
    trainer(tmp_path, max_steps=1).fit(student(teacher_file), pairs(tmp_path))
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "pairs").glob("0*")} == before
    assert len(before) == 6


def recorded(monkeypatch, owner, name, events):
    original = getattr(owner, name)

    def record(self, *arguments):
        events.append(name)
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, record)


@pytest.mark.parametrize("way", ["fit", "verb"])
def test_no_device_writes_a_shard_before_the_manifest_is_there(
    tmp_path, teacher_file, monkeypatch, way
):
    """All wait between reading and writing it, and again before the first shard."""
    events = []
    for owner, name in [
        (PairStore, "_check_manifest"),
        (PairStore, "begin"),
        (PairStore, "write"),
        (SingleDeviceStrategy, "barrier") if way == "fit" else (Worker, "wait"),
    ]:
        recorded(monkeypatch, owner, name, events)
    if way == "fit":
        trainer(tmp_path, max_steps=1).fit(student(teacher_file), pairs(tmp_path))
    else:
        trainer(tmp_path, TrainerWithVerbs).pairs(
            teacher_file[1], folder=str(tmp_path / "pairs"), num_pairs=8
        )
    wait = "barrier" if way == "fit" else "wait"
    first = events.index("_check_manifest")
    assert events[first : first + 5] == ["_check_manifest", wait, "begin", wait, "write"]
    last = len(events) - events[::-1].index("write")
    assert events[last] == wait


def test_a_folder_without_a_readable_manifest_is_refused(tmp_path, teacher_file):
    (tmp_path / "00000.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"without a manifest.json"):
        store_of(tmp_path, teacher_file[1])
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        store_of(tmp_path, teacher_file[1])


# ---- the student ------------------------------------------------------------------------------


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


def test_a_stopped_fit_ends_with_the_weights_of_an_unbroken_one(tmp_path, teacher_file):
    whole = student(teacher_file)
    trainer(tmp_path / "a", max_steps=7).fit(whole, pairs(tmp_path, steps_per_epoch=5))
    half = student(teacher_file)
    t = trainer(tmp_path / "b", max_steps=3)
    t.fit(half, pairs(tmp_path, steps_per_epoch=5))
    t.save_checkpoint(tmp_path / "half.ckpt")
    rest = student(teacher_file)
    trainer(tmp_path / "c", max_steps=7).fit(
        rest, pairs(tmp_path, steps_per_epoch=5), ckpt_path=tmp_path / "half.ckpt"
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_no_seed_in_use_is_judged_by_latents_of_the_default_pairs():
    for kind in (TeacherPairsDataModule, pairs_verb):
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
    original = luhman.make_pairs

    def make(store, teacher, *arguments, **more):
        drawing.append(teacher.average.module)
        return original(store, teacher, *arguments, **more)

    monkeypatch.setattr(luhman, "make_pairs", make)
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


# ---- bad input --------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="overfit_batches is 2"):
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
    message = "num_validation has 1 images for 2 devices"
    with pytest.raises(ValueError, match=message):
        data.val_dataloader()
    with pytest.raises(ValueError, match=message):
        data.open(recipe)


# ---- from the command line --------------------------------------------------------------------


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
        (["--trainer.precision", "bf16-mixed"], "was made with precision="),
        (["--trainer.overfit_batches", "2"], "overfit_batches is 2"),
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
