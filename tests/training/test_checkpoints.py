import functools

import lightning as L
import pytest
import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny import tiny_ddpm, tiny_unet
from torch import nn

from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.fixed_point import Anderson
from ddim_pl.samplers import DDIM, DEQ, Ancestral
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule
from ddim_pl.training import DDPM


def trainer(folder, **arguments):
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 1,
            "default_root_dir": folder,
            **arguments,
        }
    )


class StopAt(Callback):
    """Stop as a killed process would: after the checkpoint callback has written."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise InterruptedError


def train(folder, *, stop=None, resume=None, accumulate=1, steps_per_epoch=30, workers=0):
    seed_everything(0 if resume is None else 99, verbose=False)
    module = tiny_ddpm(
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=70)
    )
    data = DigitsDataModule(batch_size=8, steps_per_epoch=steps_per_epoch, num_workers=workers)
    checkpoints = ModelCheckpoint(
        folder, every_n_train_steps=100, save_top_k=-1, filename="{step}"
    )
    # Callbacks that checkpoint run last, so the file is written by an earlier hook of its own.
    callbacks = [checkpoints] + ([StopAt(stop + 1)] if stop else [])
    t = trainer(
        folder,
        max_steps=200,
        max_epochs=-1,
        callbacks=callbacks,
        accumulate_grad_batches=accumulate,
    )
    try:
        t.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    except InterruptedError:
        assert t.global_step == stop + 1
    return module


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("steps_per_epoch", "accumulate"),
    [(30, 1), (100, 1), (60, 2)],
    ids=["mid-epoch", "epoch's end", "accumulated"],
)
def test_a_resumed_run_ends_in_the_same_weights_bit_for_bit(tmp_path, steps_per_epoch, accumulate):
    arguments = {"steps_per_epoch": steps_per_epoch, "accumulate": accumulate}
    whole = train(tmp_path / "whole", **arguments)
    train(tmp_path / "part", stop=100, **arguments)
    resumed = train(tmp_path / "rest", resume=tmp_path / "part" / "step=100.ckpt", **arguments)
    expected, got = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    assert got["average.n_averaged"] == 200
    start = tiny_ddpm().state_dict()
    assert not torch.equal(start["network.time_in.weight"], got["network.time_in.weight"])


def test_a_checkpoint_alone_rebuilds_the_module(tmp_path):
    module = tiny_ddpm(
        network=tiny_unet(num_classes=10),
        schedule=CosineLogSNRSchedule(log_snr_max=10.0),
        prediction="v",
        loss_weight="snr_plus_one",
        time_input="log_snr",
        sampler=DDIM(eta=0.5),
        timesteps=[1000, 500, 250.5],
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-4, weight_decay=0.1),
        seed=7,
    )
    t = trainer(tmp_path, max_steps=2, logger=False, enable_checkpointing=False)
    t.fit(module, DigitsDataModule(batch_size=8))
    path = tmp_path / "model.ckpt"
    t.save_checkpoint(path)
    loaded = DDPM.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert loaded.sampler == DDIM(eta=0.5)
    assert loaded.schedule == module.schedule
    assert loaded.network.init_args == module.network.init_args
    torch.testing.assert_close(loaded.sample([3, 4]), module.sample([3, 4]), rtol=0, atol=0)
    optimizer = loaded.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["weight_decay"] == 0.1
    other = DDPM.load_from_checkpoint(
        path,
        map_location="cpu",
        weights_only=True,
        sampler=Ancestral(),
        timesteps="linear",
        num_steps=2,
    )
    assert other.sampler == Ancestral()
    assert len(other.levels) == 3


class Plain(nn.Module):
    """A network of a user, who has not heard of `init_args`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, z, t):
        return self.layer(z) + t[:, None, None, None] / 1000


def test_any_network_trains_and_is_asked_for_again_when_loading(tmp_path):
    with pytest.warns(UserWarning, match="network is not stored in checkpoints"):
        module = tiny_ddpm(network=Plain(), image_shape=(1, 8, 8))
    t = trainer(tmp_path, max_steps=2, enable_checkpointing=False)
    t.fit(module, DigitsDataModule(batch_size=8))
    t.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.warns(UserWarning, match="network is not stored"):
        loaded = DDPM.load_from_checkpoint(
            tmp_path / "model.ckpt", network=Plain(), weights_only=True
        )
    torch.testing.assert_close(loaded.sample([0]), module.sample([0]), rtol=0, atol=0)


def test_evaluation_uses_the_averaged_weights():
    module = tiny_ddpm()
    before = module.sample([0])
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.add_(1)
    torch.testing.assert_close(module.sample([0]), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in module.average.parameters():
            parameter.add_(0.01)
    assert not torch.equal(module.sample([0]), before)


def test_a_sampler_with_a_solver_comes_back_from_a_checkpoint(tmp_path):
    sampler = DEQ(Anderson(memory=3, tolerance=0.01), first_guess=2)
    module = tiny_ddpm(sampler=sampler)
    t = trainer(tmp_path, max_steps=1, enable_checkpointing=False)
    t.fit(module, DigitsDataModule(batch_size=8))
    t.save_checkpoint(tmp_path / "model.ckpt")
    loaded = DDPM.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.sampler == sampler
    torch.testing.assert_close(loaded.sample([0]), module.sample([0]), rtol=0, atol=0)


class Undescribable(NoiseSchedule):
    num_levels = 700

    def log_alpha_sigma(self, t):
        return LinearSchedule(700).log_alpha_sigma(t)


def test_a_schedule_that_cannot_be_stored_is_told(tmp_path):
    with pytest.warns(UserWarning, match="schedule is not stored in checkpoints"):
        tiny_ddpm(schedule=Undescribable())


class Wide(DDPM):
    """A user's subclass that makes its own network."""

    def __init__(self, channels=8, **kwargs):
        super().__init__(tiny_unet(channels=channels), **kwargs)


def test_a_subclass_is_rebuilt_from_its_own_arguments(tmp_path):
    module = Wide(12, num_steps=3)
    t = trainer(tmp_path, max_steps=1, enable_checkpointing=False)
    t.fit(module, DigitsDataModule(batch_size=8))
    t.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Wide.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.num_steps == 3
    torch.testing.assert_close(loaded.sample([0]), module.sample([0]), rtol=0, atol=0)
