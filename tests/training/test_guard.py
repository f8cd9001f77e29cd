"""A run that is stopped loses nothing: it ends as one that never was."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ladders import ladder, same
from ladders import save as save_module
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from small_trainer import trainer
from tiny import some_ddpm, tiny_ddpm, tiny_unet

from ddim_pl import signals
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.schedules import CosineLogSNRSchedule
from ddim_pl.training.guard import RunGuard

ROOT = Path(__file__).parents[2]
UMASK = os.umask(0)
os.umask(UMASK)
EPOCH, SAVE, LAST = 4, 4, 28


class Diary(Callback):
    """What ran when; kept over the parts of a run, counted in checkpoints like a measurement."""

    def __init__(self, pages):
        self.pages = pages
        self.validations = 0

    def on_train_epoch_start(self, trainer, pl_module):
        self.pages.append(("epoch", trainer.current_epoch, trainer.global_step))

    def on_train_epoch_end(self, trainer, pl_module):
        self.pages.append(("epoch's end", trainer.current_epoch, trainer.global_step))

    def on_validation_end(self, trainer, pl_module):
        self.validations += 1
        self.pages.append(("validation", self.validations, trainer.global_step))

    def state_dict(self):
        return {"validations": self.validations}

    def load_state_dict(self, state_dict):
        self.validations = state_dict["validations"]


class KillAt(Callback):
    """Stop as a killed process would: nothing is written any more."""

    def __init__(self, step, hook):
        self.step = step
        setattr(self, hook, self.kill)

    def kill(self, trainer, *arguments):
        if trainer.global_step == self.step:
            for callback in trainer.callbacks:
                if isinstance(callback, RunGuard):
                    callback._whole = False
            raise InterruptedError


class FailAt(Callback):
    """An error of this hook."""

    def __init__(self, step, hook):
        self.step = step
        setattr(self, hook, self.fail)

    def fail(self, trainer, *arguments):
        if trainer.global_step == self.step:
            raise InterruptedError


class EndAt(Callback):
    """End a fit as a `Timer` does, or early stopping."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *arguments):
        trainer.should_stop = trainer.global_step == self.step


def teacher_of(folder):
    module = some_ddpm(
        network=tiny_unet(dropout=0.0),
        schedule=CosineLogSNRSchedule(),
        prediction="v",
        loss_weight="snr_plus_one",
        time_input="log_snr",
    )
    return save_module(module, folder / "teacher.ckpt")


def module_of(kind, folder):
    if kind == "ladder":
        path = folder / "teacher.ckpt"
        rounds = [(4, 8), (2, 8), (1, LAST - 16)]
        return ladder(
            str(path) if path.exists() else teacher_of(folder), rounds=rounds, conversion_updates=0
        )
    return tiny_ddpm(lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=9))


def run(kind, folder, pages, *callbacks, resume=None, every=SAVE, save_top_k=-1, **arguments):
    """A run, or one part of it; the end is that of the epochs, or that of the ladder."""
    folder.mkdir(exist_ok=True)
    seed_everything(0 if resume is None else 99, verbose=False)
    module = module_of(kind, folder)
    files = ModelCheckpoint(
        folder, every_n_train_steps=every, save_last=True, save_top_k=save_top_k, filename="{step}"
    )
    epochs = -1 if kind == "ladder" else LAST // EPOCH
    t = trainer(
        folder,
        callbacks=[Diary(pages), *callbacks, files],
        **{"max_epochs": epochs, "limit_val_batches": 2, **arguments},
    )
    data = DigitsDataModule(batch_size=4, steps_per_epoch=EPOCH)
    try:
        t.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    except InterruptedError:
        return None
    return torch.load(folder / "last.ckpt", weights_only=True)


def assert_equal_states(found, expected):
    assert found["global_step"] == expected["global_step"]
    assert same(without_round(found), without_round(expected))
    state, wanted = (each["optimizer_states"][0]["state"] for each in (found, expected))
    assert state.keys() == wanted.keys()
    for key, values in wanted.items():
        assert all(torch.equal(state[key][name], value) for name, value in values.items())
    assert found["lr_schedulers"] == expected["lr_schedulers"]
    assert found["callbacks"]["Diary"] == expected["callbacks"]["Diary"]
    assert found["loops"]["fit_loop"] == expected["loops"]["fit_loop"]


def without_round(checkpoint):
    state = checkpoint["state_dict"]
    return {name: value for name, value in state.items() if name != "_extra_state"}


SETTINGS = {
    "validation at each epoch's end": {},
    "no validation": {"limit_val_batches": 0},
    "validation at each second epoch": {"check_val_every_n_epoch": 2},
    "validation twice an epoch": {"val_check_interval": 2, "every": 2},
    "validation by updates": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "accumulated": {"accumulate_grad_batches": 2, "every": 2},
}


QUICK = [
    ("validation at each epoch's end", "ladder"),
    ("validation by updates", "ddpm"),
    ("accumulated", "ddpm"),
]
"""The cases that are tried each time; the others take minutes."""

CASES = [
    pytest.param(
        *(kind, settings),
        id=f"{name}-{kind}",
        marks=[] if (name, kind) in QUICK else [pytest.mark.slow],
    )
    for name, settings in SETTINGS.items()
    for kind in ("ddpm", "ladder")
]


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_a_run_that_is_killed_twice_ends_as_one_that_is_not(tmp_path, kind, settings):
    expected_pages, pages = [], []
    expected = run(kind, tmp_path / "whole", expected_pages, **settings)
    if kind == "ddpm" and "accumulate_grad_batches" not in settings:
        assert expected["global_step"] == LAST
    folder, last = tmp_path / "part", tmp_path / "part" / "last.ckpt"
    assert run(kind, folder, pages, KillAt(9, "on_train_batch_start"), **settings) is None
    kept = [page for page in pages if page[2] < 8]
    pages[:] = kept
    killed = KillAt(13, "on_train_batch_start")
    assert run(kind, folder, pages, killed, resume=last, **settings) is None
    pages[:] = [page for page in pages if page[2] < 12]
    found = run(kind, folder, pages, resume=last, **settings)
    assert_equal_states(found, expected)
    assert of_kind("validation", pages) == of_kind("validation", expected_pages)
    assert of_kind("epoch", pages) == of_kind("epoch", expected_pages)


def of_kind(kind, pages):
    return [page for page in pages if page[0] == kind]


ENDS = {
    "by max_steps": ([], {"max_steps": 11}, 11),
    "by max_steps at an epoch's end": ([], {"max_steps": 12}, 12),
    "by max_epochs": ([], {"max_epochs": 3}, 12),
    "as by max_time": ([EndAt(10)], {}, 10),
    "by an error between updates": ([FailAt(9, "on_train_batch_start")], {}, 9),
    "by an error at an epoch's start": ([FailAt(12, "on_train_epoch_start")], {}, 12),
    "by an error before the first batch": ([FailAt(12, "on_train_batch_start")], {}, 12),
    "by an error in a validation": ([FailAt(12, "on_validation_batch_end")], {}, 12),
    "by an error at a validation's end": ([FailAt(12, "on_validation_end")], {}, 12),
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that saves its end only."""
    pages = []
    return run("ddpm", tmp_path_factory.mktemp("whole"), pages, every=1000), pages


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")
@pytest.mark.parametrize(("callbacks", "arguments", "step"), ENDS.values(), ids=ENDS)
def test_the_last_update_is_kept_however_a_fit_ends(
    unbroken, tmp_path, callbacks, arguments, step
):
    (expected, expected_pages), pages, every = unbroken, [], 1000
    folder = tmp_path / "part"
    run("ddpm", folder, pages, *callbacks, every=every, **arguments)
    last = folder / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == step
    assert [file.name for file in folder.glob("*.ckpt")] == ["last.ckpt"]
    pages[:] = [page for page in pages if page[2] < step]
    found = run("ddpm", folder, pages, resume=last, every=every)
    assert [file.name for file in folder.glob("*.ckpt")] == ["last.ckpt"]
    assert_equal_states(found, expected)
    assert [p for p in of_kind("validation", pages) if p[2] > step] == [
        p for p in of_kind("validation", expected_pages) if p[2] > step
    ]


class SignalIn(Callback):
    """SIGTERM in the first validation."""

    def __init__(self):
        self.sent = False

    def on_validation_batch_end(self, *arguments):
        if not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")
def test_a_signal_in_a_validation_within_accumulated_gradients_loses_no_update(tmp_path):
    settings = {
        **{"accumulate_grad_batches": 4, "val_check_interval": 6, "every": 1000},
        **{"check_val_every_n_epoch": None, "max_epochs": 6},
    }
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(signals.Interrupted), signals.handled():
            run("ddpm", tmp_path / "part", [], SignalIn(), **settings)
    finally:
        signal.signal(signal.SIGTERM, before)
    last = tmp_path / "part" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] >= 1
    found = run("ddpm", tmp_path / "part", [], resume=last, **settings)
    assert_equal_states(found, run("ddpm", tmp_path / "whole", [], **settings))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_damaged_checkpoint_is_no_beginning(tmp_path):
    run("ddpm", tmp_path, [], max_steps=6)
    damaged = tmp_path / "step=4.ckpt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    message = r"ckpt_path must be a checkpoint, got .*step=4.ckpt, which is damaged .*last.ckpt"
    with pytest.raises(ValueError, match=message):
        run("ddpm", tmp_path, [], resume=damaged)


def test_an_error_within_an_update_leaves_the_files_as_they_are(tmp_path):
    assert run("ddpm", tmp_path, [], FailAt(6, "on_after_backward")) is None
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_the_end_is_saved_beside_what_a_users_settings_save(tmp_path):
    files = ModelCheckpoint(tmp_path, every_n_epochs=1, save_last=True, filename="{step}")
    t = trainer(tmp_path, callbacks=[files], max_steps=6)
    t.fit(tiny_ddpm(), DigitsDataModule(batch_size=4, steps_per_epoch=EPOCH))
    names = sorted(file.name for file in tmp_path.glob("*.ckpt"))
    assert names == ["last.ckpt", "step=6.ckpt"]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs two disks")
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path):
    """Where the folder of temporary files lies on another disk, Lightning copies."""
    last = tmp_path / "last.ckpt"
    code = f"""
import os, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
from pathlib import Path
from training.test_guard import run
write, saves = os.write, []
import torch
save = torch.save
def kill(checkpoint, file, **more):
    saves.append(1)
    if len(saves) == 2:
        file.write(b"a part")
        file.flush()
        os.kill(os.getpid(), 9)
    save(checkpoint, file, **more)
torch.save = kill
run("ddpm", Path({str(tmp_path)!r}), [], save_top_k=0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert len(list(tmp_path.glob("*.part"))) == 1
    assert run("ddpm", tmp_path, [], resume=last, save_top_k=0)["global_step"] == LAST
    assert not list(tmp_path.glob("*.part"))
    assert last.stat().st_mode & 0o777 == 0o666 & ~UMASK


def test_a_full_disk_leaves_the_checkpoint_before_and_one_line(tmp_path, monkeypatch):
    write, saves = torch.save, []

    def full(checkpoint, file, **more):
        saves.append(1)
        if len(saves) < 2:
            return write(checkpoint, file, **more)
        with open("/dev/full", "wb", buffering=0) as disk:
            write(checkpoint, disk, **more)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run("ddpm", tmp_path, [], save_top_k=0)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
