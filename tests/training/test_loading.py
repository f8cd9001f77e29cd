import functools

import pytest
import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from small_trainer import trainer
from tiny import tiny_ddpm, tiny_unet

from ddim_pl.data.digits import DigitsDataModule


class StopAt(Callback):
    """Stop as a killed process would: after the checkpoint callback has written."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise InterruptedError


def train(
    folder, *, stop=None, resume=None, accumulate=1, steps_per_epoch=9, workers=0, label_dropout=0
):
    seed_everything(0 if resume is None else 99, verbose=False)
    classes = {"num_classes": 10, "null_class": True} if label_dropout else {}
    module = tiny_ddpm(
        network=tiny_unet(**classes),
        label_dropout=label_dropout,
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=21),
    )
    data = DigitsDataModule(batch_size=8, steps_per_epoch=steps_per_epoch, num_workers=workers)
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=30, save_top_k=-1, filename="{step}")
    # Callbacks that checkpoint run last, so the file is written by an earlier hook of its own.
    callbacks = [checkpoints] + ([StopAt(stop + 1)] if stop else [])
    t = trainer(
        folder,
        max_steps=60,
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
    "arguments",
    [
        {"steps_per_epoch": 9},
        {"steps_per_epoch": 30},
        {"steps_per_epoch": 18, "accumulate": 2},
        {"steps_per_epoch": 9, "label_dropout": 0.3},
    ],
    ids=["mid-epoch", "epoch's end", "accumulated", "labels dropped"],
)
def test_a_resumed_run_ends_in_the_same_weights_bit_for_bit(tmp_path, arguments):
    whole = train(tmp_path / "whole", **arguments)
    train(tmp_path / "part", stop=30, **arguments)
    resumed = train(tmp_path / "rest", resume=tmp_path / "part" / "step=30.ckpt", **arguments)
    expected, got = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    assert got["average.n_averaged"] == 60
    start = tiny_ddpm().state_dict()
    assert not torch.equal(start["network.time_in.weight"], got["network.time_in.weight"])


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
