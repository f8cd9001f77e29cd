"""The warm-up of the learning rate."""

import pytest
import torch
from torch import nn

from ddim_pl.training.warmup import Warmup


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2.0, total_steps=30),
    ],
)
def test_warm_up_multiplies_any_schedule_and_resumes(make):
    def rates(warmup, stop=None):
        seen, optimizer = [], torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = Warmup(optimizer, warmup, make(optimizer))
        for step in range(20):
            if step == stop:
                saved = optimizer.state_dict(), schedule.state_dict()
                optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
                schedule = Warmup(optimizer, warmup, make(optimizer))
                schedule.load_state_dict(saved[1])
                optimizer.load_state_dict(saved[0])
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return seen

    expected = [min(1, (k + 1) / 5) * rate for k, rate in enumerate(rates(0))]
    assert rates(4) == pytest.approx(expected)
    assert rates(4, stop=2) == pytest.approx(expected)
    assert rates(4, stop=9) == pytest.approx(expected)
