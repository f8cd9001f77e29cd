"""A checkpoint says how to build its module."""

import functools
import re
from pathlib import Path

import pytest
import torch
from ladders import fit, ladder
from small_trainer import trainer
from tiny import tiny_config, tiny_ddpm, tiny_unet, write_config
from torch import nn

from ddim_pl.cli import main
from ddim_pl.clipping import ClipRange, DynamicThreshold
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.fixed_point import Anderson
from ddim_pl.samplers import DDIM, DEQ, Ancestral
from ddim_pl.schedules import (
    CosineLogSNRSchedule,
    LinearSchedule,
    NoiseSchedule,
    ZeroTerminalSNR,
)
from ddim_pl.training import DDPM
from ddim_pl.training.ddpm import averaged_checkpoint
from ddim_pl.training.loading import load


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


@pytest.mark.parametrize("clip", [True, False, ClipRange(-2, 2), DynamicThreshold(0.9, 3.0)])
def test_a_rule_of_clipping_comes_back_from_a_checkpoint(tmp_path, clip):
    """The sampler's, the model's, and a schedule without signal at its end."""
    schedule = ZeroTerminalSNR(LinearSchedule(beta_end=0.03))
    made = tiny_ddpm(
        sampler=DDIM(clip=clip), clip=clip, schedule=schedule, prediction="v", last_level=1.0
    )
    torch.save(averaged_checkpoint(made), tmp_path / "model.ckpt")
    read = load(str(tmp_path / "model.ckpt"))
    assert read.sampler == DDIM(clip=clip)
    assert read.clip == clip
    assert read.schedule == schedule
    assert read.last_level == 1


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


def test_the_network_of_the_docs_goes_through_a_ladder(tmp_path, monkeypatch):
    """Its students are read from their checkpoints, which the first round would have died of."""
    text = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_networks.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DDIM_PL_TRUSTED_MODULES", "my_networks")
    config = tiny_config(tmp_path / "runs", max_steps=4, limit_val_batches=0)
    *_, saving = config["trainer"]["callbacks"]
    saving["init_args"]["every_n_train_steps"] = 2
    config["trainer"]["callbacks"] = [saving]
    network = {"class_path": "my_networks.Small", "init_args": {"width": 12}}
    config["model"]["init_args"]["network"] = network
    main(["fit", "--config", write_config(config, tmp_path / "teacher.yaml")])
    checkpoints = tmp_path / "runs/tiny/version_0/checkpoints"
    config["model"] = {
        "class_path": "ddim_pl.training.ProgressiveDistillation",
        "init_args": {"teacher": str(checkpoints / "last.ckpt"), "rounds": [[2, 1], [1, 2]]},
    }
    config["trainer"]["max_steps"] = -1
    config["trainer"]["callbacks"] = [saving, {"class_path": "callbacks.Students"}]
    main(["fit", "--config", write_config(config, tmp_path / "ladder.yaml")])
    for steps in (2, 1):
        student = load(
            tmp_path / f"runs/tiny/version_1/checkpoints/student-{steps:04d}-steps.ckpt"
        )
        assert student.network.init_args == {"width": 12, "in_channels": 1, "image_size": 8}
        assert student.distilled_steps == steps


class Opaque(nn.Conv2d):
    """A network that does not say how it is built."""

    in_channels, image_size = 1, 8

    def __init__(self):
        super().__init__(1, 1, 1)

    def forward(self, z, t):
        return super().forward(z)


def test_a_ladder_asks_for_the_networks_arguments_before_it_trains(tmp_path):
    with pytest.warns(UserWarning, match="network is not stored"):
        module = ladder(None, network=Opaque(), rounds=[(2, 1)], conversion_updates=0)
    with pytest.raises(ValueError, match=r"network must say how it is built.*init_args"):
        fit(module, tmp_path)
    module.network.init_args = {}
    fit(module, tmp_path)
    assert module.student_checkpoint()["hyper_parameters"]["network"]["init_args"] == {}
