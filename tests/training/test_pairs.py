"""Pairs that can be trusted."""

import copy
import errno
import functools
import json
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from luhman_runs import ROOT, pairs, student, trainer
from safetensors.torch import load_file
from tiny import some_ddpm, tiny_unet

from ddim_pl.commands import Trainer as CommandTrainer
from ddim_pl.data import teacher_pairs
from ddim_pl.data.teacher_pairs import PairStore
from ddim_pl.noise import latents
from ddim_pl.samplers import DDIM
from ddim_pl.training import DDPM
from ddim_pl.training.pairs import make_pairs, recipe_of


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


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"sampler": "Heun()"},
        {"sampler": str(DDIM(clip=False))},
        {"levels": [1000.0, 0.0]},
    ],
)
def test_pairs_of_another_recipe_are_refused(tmp_path, teacher_file, change):
    store, _ = store_of(tmp_path, teacher_file[1])
    store.begin()
    (name,) = change
    with pytest.raises(ValueError, match=f"must be made with {name}="):
        store_of(tmp_path, teacher_file[1], **change)


@pytest.mark.parametrize("first", ["generators", "philox"])
def test_pairs_of_the_other_source_of_noise_are_refused(tmp_path, teacher_file, first):
    """A folder of before names none; its latents are of generators."""
    other = {"generators": "philox", "philox": "generators"}[first]
    module = some_ddpm(network=tiny_unet(num_classes=10), noise_source=first)
    store, _ = store_of(tmp_path, module)
    store.begin()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest.get("noise_source") == {"generators": None, "philox": "philox"}[first]
    assert store_of(tmp_path, module)[0].noise_source == first
    module.noise_source = other
    with pytest.raises(
        ValueError, match=f"must be made with noise_source='{other}', got '{first}'"
    ):
        store_of(tmp_path, module)


def test_pairs_of_other_weights_are_refused(tmp_path, teacher_file):
    store, _ = store_of(tmp_path, teacher_file[1])
    store.begin()
    other = some_ddpm(network=tiny_unet(num_classes=10))
    next(other.average.module.parameters()).data += 1e-3
    with pytest.raises(ValueError, match="must be made with teacher="):
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


@pytest.mark.slow
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
    message = "must be made with precision='bf16-mixed', got '32-true'"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1, precision="bf16-mixed").fit(
            student(teacher_file), pairs(tmp_path)
        )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, CommandTrainer, precision="bf16-mixed").pairs(
            with_the_steps_of_fit(teacher_file),
            folder=str(tmp_path / "pairs"),
            num_pairs=48,
            shard_size=16,
        )


def test_pairs_of_another_precision_of_the_network_are_refused_by_its_name(tmp_path, teacher_file):
    """The teacher's digest differs too, and says nothing to a user."""
    reduced = with_the_steps_of_fit(teacher_file)
    reduced.sampling_precision = "bf16"
    there = {"folder": str(tmp_path / "pairs"), "num_pairs": 48, "shard_size": 16}
    trainer(tmp_path, CommandTrainer).pairs(reduced, **there)
    manifest = json.loads((tmp_path / "pairs/manifest.json").read_text())
    assert manifest["sampling_precision"] == "bf16"
    message = (
        r"must be made with sampling_precision=32 \(of the teacher: the student's "
        r"teacher_precision, or by default the teacher's own\), got 'bf16'"
    )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1).fit(student(teacher_file), pairs(tmp_path))
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "pairs").glob("0*")}
    same = student(teacher_file, teacher_precision="bf16")
    trainer(tmp_path, max_steps=1).fit(same, pairs(tmp_path))
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "pairs").glob("0*")} == before
    message = (
        r"must be made with sampling_precision=32 \(of the teacher: the student's "
        r"teacher_precision, or by default the teacher's own\), got 'bf16'"
    )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, CommandTrainer).pairs(with_the_steps_of_fit(teacher_file), **there)


@pytest.mark.parametrize("precision", [32, "bf16"])
def test_a_folder_of_before_does_not_name_the_networks_precision(
    tmp_path, teacher_file, precision
):
    module = copy.deepcopy(teacher_file[1])
    module.sampling_precision = precision
    store, _ = store_of(tmp_path, module)
    del store.recipe["sampling_precision"]
    store.begin()
    assert store_of(tmp_path, module)[0].num_pairs == 40
    module.sampling_precision = {32: "bf16", "bf16": 32}[precision]
    with pytest.raises(ValueError, match="must be made with teacher="):
        store_of(tmp_path, module)


def test_the_command_makes_the_pairs_that_fit_asks_for(tmp_path, teacher_file):
    trainer(tmp_path, CommandTrainer).pairs(
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
        (SingleDeviceStrategy, "barrier"),
    ]:
        recorded(monkeypatch, owner, name, events)
    if way == "fit":
        trainer(tmp_path, max_steps=1).fit(student(teacher_file), pairs(tmp_path))
    else:
        trainer(tmp_path, CommandTrainer).pairs(
            teacher_file[1], folder=str(tmp_path / "pairs"), num_pairs=8
        )
    wait = "barrier"
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
