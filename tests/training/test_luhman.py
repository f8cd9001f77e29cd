"""Distillation in one step: pairs that can be trusted, and a student that learns them."""

import errno
import functools
import json
from dataclasses import replace

import lightning as L
import pytest
import torch
from exact import ExactGaussian
from safetensors.torch import load_file
from tiny import some_ddpm, tiny_unet

from ddim_pl.data import teacher_pairs
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.data.teacher_pairs import PairBatch, PairStore, TeacherPairsDataModule
from ddim_pl.noise import latents, step_generators
from ddim_pl.prediction import decode, target
from ddim_pl.samplers import DDIM, DDPM
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule
from ddim_pl.training import LuhmanDistillation
from ddim_pl.training.luhman import make_pairs, recipe_of


def trainer(folder, **arguments):
    return L.Trainer(
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


def store_of(folder, module, *, num_pairs=40, **arguments):
    levels = torch.tensor([1000.0, 500, 0])
    recipe = {**recipe_of(module, DDIM(), levels), "seed": 3, **arguments}
    store = PairStore(folder, recipe, num_pairs=num_pairs, shard_size=16)
    return store, functools.partial(make_pairs, store, module, DDIM(), levels, batch_size=5)


# ---- pairs ------------------------------------------------------------------------------------


def test_pairs_are_the_teachers_images_of_the_latents_that_a_batch_holds(tmp_path, teacher_file):
    _, module = teacher_file
    data = pairs(tmp_path, pair_seed=3)
    levels = torch.tensor([1000.0, 500, 0])
    store = data.open(recipe_of(module, DDIM(), levels))
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
        ({"teacher_sampler": DDPM()}, "teacher_sampler must be deterministic"),
        ({"teacher_sampler": DDIM(0.5)}, "teacher_sampler must be deterministic"),
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
    with pytest.raises(ValueError, match=r"needs .*TeacherPairsDataModule"):
        trainer(tmp_path, max_steps=1).fit(student(teacher_file), DigitsDataModule())


def test_a_missing_teacher_is_an_error():
    with pytest.raises(ValueError, match="teacher must be given"):
        LuhmanDistillation()
    with pytest.raises(ValueError, match=r"teacher 'gone.ckpt' is not a file"):
        LuhmanDistillation(teacher="gone.ckpt")


@pytest.mark.parametrize("name", ["num_pairs", "num_validation", "shard_size", "batch_size"])
def test_wrong_numbers_of_pairs_are_errors(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        pairs(tmp_path, **{name: 0})
