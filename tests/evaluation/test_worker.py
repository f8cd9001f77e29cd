"""Work on every device."""

from unittest.mock import patch

import torch
from command_runs import trainer
from tiny import some_ddpm

from ddim_pl.evaluation.worker import Worker, on_every_worker


def test_work_is_not_in_the_trainers_precision_but_the_network_is(tmp_path):
    """An extractor in bfloat16 would measure another distance than `test` does."""
    seen = []

    def work(worker):
        seen.append(torch.is_autocast_enabled("cpu"))
        model.average.module.register_forward_pre_hook(
            lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
        )
        list(worker.sample_batches([0], 1, ""))

    model = some_ddpm(num_steps=1)
    on_every_worker(trainer(tmp_path, precision="bf16-mixed"), model, work)
    assert seen == [False, True]


def test_the_model_is_set_up_so_that_it_can_compile(tmp_path, monkeypatch):
    model, stages = some_ddpm(compile=True), []
    monkeypatch.setattr(model, "setup", stages.append)
    on_every_worker(trainer(tmp_path), model, lambda device: None)
    assert stages == ["predict"]


def test_a_sum_over_workers_leaves_their_own_values(tmp_path):
    """Lightning's sum writes into what it is given."""
    model, mine = some_ddpm(), torch.ones(3)
    worker = Worker(trainer(tmp_path), model, run=None, progress=False)
    worker.world_size = 2
    with patch.object(worker.trainer.strategy, "reduce", lambda each, reduce_op: each.mul_(2)):
        assert torch.equal(worker.all_reduce(mine), torch.full((3,), 2.0))
    assert torch.equal(mine, torch.ones(3))
