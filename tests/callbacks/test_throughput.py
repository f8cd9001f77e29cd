"""Throughput, by a clock that a test turns."""

import csv

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from small_trainer import trainer
from tiny import tiny_config, tiny_ddpm, write_config

import callbacks.throughput
from callbacks import Throughput
from ddim_pl.cli import main
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.lightning_internals import slow_down_progress_bar


class Turns(Callback):
    """A batch takes 2 seconds, and all of a validation and what surrounds it 1000."""

    def __init__(self):
        self.seconds = 0.0

    def on_train_batch_start(self, *_):
        self.seconds += 2.0

    def on_validation_batch_start(self, *_):
        self.seconds += 1000.0


@pytest.mark.parametrize(("accumulate", "updates"), [(1, 0.5), (2, 0.25)])
def test_it_counts_images_and_updates_but_no_validation(
    tmp_path, monkeypatch, accumulate, updates
):
    clock = Turns()
    monkeypatch.setattr(callbacks.throughput, "_now", lambda device: clock.seconds)
    t = trainer(
        tmp_path,
        logger=CSVLogger(tmp_path),
        callbacks=[Throughput(), clock],
        max_steps=12,
        log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
        limit_val_batches=2,
        val_check_interval=4,
    )
    t.fit(tiny_ddpm(), DigitsDataModule(batch_size=6, steps_per_epoch=8))
    with open(t.logger.log_dir + "/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train/images_per_second"]]
    assert [int(row["step"]) for row in rows] == [2, 5, 8, 11]
    for row in rows:
        assert float(row["train/images_per_second"]) == pytest.approx(3)
        assert float(row["train/updates_per_second"]) == pytest.approx(updates)


def test_no_batch_waits_for_the_device_but_those_that_are_logged(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        callbacks.throughput, "_now", lambda device: asked.append(device) or float(len(asked))
    )
    more = {"max_steps": 12, "log_every_n_steps": 12}
    t = trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[Throughput()], **more)
    t.fit(tiny_ddpm(), DigitsDataModule(batch_size=4, steps_per_epoch=12))
    # At the first batch, at the last, where it logs, and at the end of the epoch.
    assert 3 <= len(asked) <= 4
    assert set(asked) == {torch.device("cpu")}


def test_the_bar_that_lightning_chose_looks_at_every_twentieth_batch(tmp_path):
    t = trainer(tmp_path, enable_progress_bar=True)
    slow_down_progress_bar(t)
    assert type(t.progress_bar_callback) is TQDMProgressBar
    assert t.progress_bar_callback.refresh_rate >= 20


def test_a_bar_of_the_config_stays(tmp_path, monkeypatch):
    bars = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer, *_, **__: bars.append(trainer))
    config = tiny_config(tmp_path)
    config["trainer"].pop("enable_progress_bar")
    path = "lightning.pytorch.callbacks.TQDMProgressBar"
    for more in ([], [{"class_path": path, "init_args": {"refresh_rate": 3}}]):
        config["trainer"]["callbacks"] += more
        main(["fit", "--config", write_config(config, tmp_path / "config.yaml")])
    found = [each.progress_bar_callback for each in bars]
    assert {type(each) for each in found} == {TQDMProgressBar}
    # Where no one watches, Lightning raises the rate.
    wanted = [TQDMProgressBar(refresh_rate=20).refresh_rate, 3]
    assert [each.refresh_rate for each in found] == wanted
