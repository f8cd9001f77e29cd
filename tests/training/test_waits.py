"""A training step never waits for the device to read a value from it.

On the meta device a tensor has no values, so that whatever reads one fails. With a GPU, PyTorch
itself reports what waits.
"""

import pytest
import torch
from ladders import ladder, save
from lightning.pytorch.callbacks import Callback
from small_trainer import trainer
from tiny import some_ddpm, tiny_unet

from ddim_pl.data.base import Batch
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.data.teacher_pairs import PairBatch
from ddim_pl.networks.songunet import SongUNet
from ddim_pl.noise import GammaNoise
from ddim_pl.rng import StepGenerators
from ddim_pl.schedules import CosineLogSNRSchedule, EDMSchedule
from ddim_pl.training import DDPM, LuhmanDistillation, base
from ddim_pl.training.ema import HalfLife
from ddim_pl.training.finite import _has_bad, _Part


def on_the_host(seed, device):
    """Generators for a step on the meta device, which has none."""
    return StepGenerators(torch.Generator(), torch.Generator())


def step(module, batch, monkeypatch):
    """A step on the meta device, without the trainer."""
    monkeypatch.setattr(base, "step_generators", on_the_host)
    module.average.update_parameters(module.network)  # the first of a fit reads their number
    module = module.to("meta")
    batch = type(batch)(*(each.to("meta") for each in batch))
    loss = module._mean_loss(module.network, batch, 0)
    loss.backward()
    optimizer = torch.optim.Adam(module.network.parameters())
    module._trainer = trainer(None)
    assert _has_bad(module, optimizer, [_Part(batch, 0, loss)]).device.type == "meta"
    module.average.update_parameters(module.network)
    assert all(p.grad is not None for p in module.network.conv_out.parameters())


IMAGES, LABELS = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prediction": "eps"},
        {"prediction": "eps", "loss_weight": "min_snr", "loss": "l1"},
        {"prediction": "v", "loss_weight": "snr_plus_one", "time_input": "log_snr"},
        {"prediction": "x", "loss_weight": "truncated_snr", "level_sampling": "antithetic"},
        {"prediction": "v", "schedule": CosineLogSNRSchedule(), "noise": GammaNoise()},
    ],
)
def test_ddpm_reads_no_value(arguments, monkeypatch):
    module = DDPM(tiny_unet(num_classes=10), **arguments)
    step(module, Batch(IMAGES, LABELS), monkeypatch)


def test_edm_reads_no_value(monkeypatch):
    """Nor do levels of a normal law, nor changes of the images."""
    network = SongUNet(8, 1, channels=8, multipliers=[1], attention=[], num_augment_labels=9)
    module = DDPM(
        network,
        EDMSchedule(),
        prediction="edm",
        loss_weight="edm",
        level_sampling="log_normal",
        augment_probability=0.12,
        ema_decay=HalfLife(),
    )
    step(module, Batch(IMAGES, LABELS), monkeypatch)


@pytest.mark.parametrize("conversion", [0, 2])
def test_progressive_distillation_reads_no_value(conversion, monkeypatch, tmp_path):
    teacher = save(some_ddpm(prediction="v", loss_weight="snr_plus_one"), tmp_path / "t.ckpt")
    module = ladder(teacher, conversion_updates=conversion)
    step(module, Batch(IMAGES, LABELS), monkeypatch)


@pytest.mark.filterwarnings("ignore:.*distinct levels")
def test_single_step_distillation_reads_no_value(monkeypatch, tmp_path):
    teacher = save(some_ddpm(prediction="v", loss_weight="snr_plus_one"), tmp_path / "t.ckpt")
    module = LuhmanDistillation(teacher=teacher)
    step(module, PairBatch(IMAGES, LABELS, IMAGES), monkeypatch)


class Reads(DDPM):
    """A loss that reads a value, as a mistake would."""

    def loss(self, denoiser, batch, generators):
        return super().loss(denoiser, batch, generators) * float(batch[0].mean())


def test_a_loss_that_reads_a_value_is_found(monkeypatch):
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        step(Reads(tiny_unet()), Batch(IMAGES, LABELS), monkeypatch)


class Watch(Callback):
    """Lets PyTorch refuse what waits for the GPU, within the steps after the first."""

    def on_train_batch_start(self, trainer, *_):
        torch.cuda.set_sync_debug_mode("error" if trainer.global_step >= 2 else "default")

    def on_train_batch_end(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fit_on_a_gpu_does_not_wait(precision, tmp_path):
    more = {"accelerator": "gpu", "max_steps": 8, "precision": precision, "gradient_clip_val": 1.0}
    data = DigitsDataModule(batch_size=16, steps_per_epoch=8)
    module = DDPM(tiny_unet(num_classes=10), warmup_steps=3)
    trainer(tmp_path, callbacks=[Watch()], limit_val_batches=0, **more).fit(module, data)
    assert module.average.n_averaged == 8
    assert all(group["fused"] for group in module.optimizers().param_groups)
