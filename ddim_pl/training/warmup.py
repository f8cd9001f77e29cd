"""A linear warm-up in front of any learning-rate schedule."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Warmup(LRScheduler):
    """Multiply the rates of another schedule by `min(1, (update + 1) / (steps + 1))`.

    Unlike `ChainedScheduler` it serves schedules that compute their rate from scratch as well as
    those that compute it from the last one: each step hands the schedule the rates it left.

    Args:
        optimizer: Its rates are set.
        steps: Updates of the warm-up.
        schedule: Schedule of the same optimizer; by default its rates are constant.
    """

    def __init__(
        self, optimizer: Optimizer, steps: int, schedule: LRScheduler | None = None
    ) -> None:
        self.optimizer = optimizer
        self.steps = steps
        self.schedule = schedule
        self.last_epoch = 0  # Lightning's name for the number of steps made
        self._apply()

    def step(self, epoch: int | None = None) -> None:
        """Go on to the next update."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        if self.schedule is not None:
            self.schedule.step()
        self.last_epoch += 1
        self._apply()

    def _apply(self) -> None:
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        share = min(1.0, (self.last_epoch + 1) / (self.steps + 1))
        self._last_lr = [rate * share for rate in self._rates]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Plain data, the inner schedule's included."""
        schedule = None if self.schedule is None else self.schedule.state_dict()
        return {"step": self.last_epoch, "rates": self._rates, "schedule": schedule}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the optimizer's rates come with its own state."""
        self.last_epoch = state_dict["step"]
        self._rates = state_dict["rates"]
        if self.schedule is not None:
            self.schedule.load_state_dict(state_dict["schedule"])
