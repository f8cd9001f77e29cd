"""A resumed run uses the settings that it is given."""

from functools import partial

import pytest
import torch
import yaml
from ladders import same
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from small_trainer import trainer
from tiny import tiny_config, tiny_ddpm, write_config

from ddim_pl.cli import main
from ddim_pl.data.digits import DigitsDataModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Checkpoint directory"
)

ADAM, SGD, LINEAR, STEP = (
    torch.optim.Adam,
    torch.optim.SGD,
    torch.optim.lr_scheduler.LinearLR,
    torch.optim.lr_scheduler.StepLR,
)


def settings(rate=1e-3, betas=(0.9, 0.999), total=10, warmup=3):
    return {
        "optimizer": partial(ADAM, lr=rate, betas=list(betas)),
        "lr_scheduler": partial(LINEAR, start_factor=1.0, end_factor=0.0, total_iters=total),
        "warmup_steps": warmup,
    }


class Rates(Callback):
    def __init__(self):
        self.rates, self.betas = [], []

    def on_train_batch_start(self, trainer, *arguments):
        (group,) = trainer.optimizers[0].param_groups
        self.rates.append(group["lr"])
        self.betas.append(tuple(group["betas"]))


def train(folder, updates, resume=None, **arguments):
    torch.manual_seed(0)  # the same weights at the start of each
    module = tiny_ddpm(**arguments)
    rates, files = Rates(), ModelCheckpoint(folder, save_last=True, save_top_k=0)
    t = trainer(folder, callbacks=[rates, files], max_steps=updates, limit_val_batches=0)
    data = DigitsDataModule(batch_size=4, steps_per_epoch=100)
    t.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    return rates, folder / "last.ckpt"


CHANGES = {
    "rate": {"rate": 5e-4},
    "betas": {"betas": (0.5, 0.9)},
    "length of the schedule": {"total": 20},
    "warm-up": {"warmup": 8},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_resumed_run_has_the_rates_of_one_that_began_with_its_settings(tmp_path, changes):
    _, last = train(tmp_path / "first", 6, **settings())
    expected, _ = train(tmp_path / "whole", 10, **settings(**changes))
    found, end = train(tmp_path / "rest", 10, resume=last, **settings(**changes))
    assert found.rates == expected.rates[6:]
    assert found.betas == expected.betas[6:]
    states = [torch.load(each, weights_only=True) for each in (last, end)]
    (group,) = states[1]["optimizer_states"][0]["param_groups"]
    arguments = states[1]["hyper_parameters"]["optimizer"]["init_args"]
    assert list(group["betas"]) == list(arguments["betas"])
    assert group["initial_lr"] == arguments["lr"]


def test_the_same_settings_leave_the_schedule_as_it_was(tmp_path):
    expected, whole = train(tmp_path / "whole", 10, **settings())
    _, last = train(tmp_path / "first", 6, **settings())
    found, end = train(tmp_path / "rest", 10, resume=last, **settings())
    assert found.rates == expected.rates[6:]
    weights = [torch.load(each, weights_only=True)["state_dict"] for each in (whole, end)]
    assert same(*weights)


def test_a_run_with_other_settings_still_updates_by_fused_kernels(tmp_path):
    """As on a GPU, where they are not asked for but chosen once the weights are there."""
    _, last = train(tmp_path / "first", 6, **settings())
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["optimizer_states"][0]["param_groups"][0]["fused"] = True
    torch.save(checkpoint, last)
    _, end = train(tmp_path / "rest", 8, resume=last, **settings(rate=5e-4))
    (group,) = torch.load(end, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert group["fused"] is True
    assert group["initial_lr"] == 5e-4


def test_a_schedule_can_be_added_and_left_out(tmp_path):
    plain = {"optimizer": partial(ADAM, lr=1e-3), "warmup_steps": 0}
    _, last = train(tmp_path / "first", 4, **plain)
    halved = plain | {"lr_scheduler": partial(STEP, step_size=3, gamma=0.5)}
    found, end = train(tmp_path / "with", 7, resume=last, **halved)
    assert found.rates == [5e-4, 5e-4, 2.5e-4]
    found, _ = train(tmp_path / "without", 9, resume=end, **plain)
    assert found.rates == [1e-3, 1e-3]


def test_another_optimizer_is_refused(tmp_path):
    _, last = train(tmp_path / "first", 2, **settings())
    with pytest.raises(ValueError, match=r"optimizer must be Adam, .* got SGD: begin a new run"):
        train(tmp_path / "rest", 4, resume=last, **settings() | {"optimizer": partial(SGD, lr=1)})


def test_updates_after_the_end_of_a_schedule_are_warned_of(tmp_path):
    _, last = train(tmp_path / "first", 10, **settings())
    with pytest.warns(UserWarning, match="the rate of update 11 is 0, so that nothing is learned"):
        train(tmp_path / "rest", 12, resume=last, **settings())


def test_the_command_line_uses_what_it_records(tmp_path):
    config = write_config(tiny_config(tmp_path, limit_val_batches=0), tmp_path / "config.yaml")
    main(["fit", "--config", config])
    version = tmp_path / "tiny" / "version_0"
    last = version / "checkpoints" / "last.ckpt"
    main(
        [
            *("fit", "--config", config, "--ckpt_path", str(last), "--trainer.max_epochs", "3"),
            *("--model.optimizer.lr", "0.0005", "--model.optimizer.betas", "[0.5, 0.9]"),
        ]
    )
    recorded = yaml.safe_load((version / "config-resumed.yaml").read_text())["model"]["init_args"]
    (group,) = torch.load(last, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == recorded["optimizer"]["init_args"]["lr"] == 5e-4
    assert list(group["betas"]) == recorded["optimizer"]["init_args"]["betas"] == [0.5, 0.9]
