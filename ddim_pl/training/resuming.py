"""Settings of optimiser and schedule that a resumed run is given anew.

Lightning restores both as the checkpoint has them, rate and arguments included, whatever the run
was given; yet the run would record what it was given.
"""

import warnings
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

if TYPE_CHECKING:
    from ddim_pl.training.base import DiffusionModule

SETTINGS = (
    "optimizer",
    "lr_scheduler",
    "warmup_steps",
    "rounds",
    "conversion_updates",
    "linear_decay",
)
"""Arguments of which optimiser and schedule are made."""


def apply_settings(module: "DiffusionModule", checkpoint: dict[str, Any]) -> None:
    """Put the module's own settings into a checkpoint that is about to be restored.

    The optimiser keeps its state; its arguments are the new ones. The schedule is the new one at
    the update that was reached, as if it had been there from the beginning. Where nothing differs
    the checkpoint stays as it is.

    Raises:
        ValueError: If the optimiser is of another class, whose state the checkpoint does not hold.
    """
    recorded, given = checkpoint.get("hyper_parameters", {}), dict(module.hparams)
    # What is 0 or absent is the same.
    changed = [name for name in SETTINGS if (recorded.get(name) or 0) != (given.get(name) or 0)]
    if not changed or not checkpoint.get("optimizer_states"):
        return
    classes = [_class_of(each.get("optimizer")) for each in (recorded, given)]
    if classes[0] != classes[1]:
        raise ValueError(
            f"optimizer must be {classes[0]}, whose state the checkpoint holds, got {classes[1]}: "
            "begin a new run to change it"
        )
    updates = checkpoint["global_step"]
    made: Any = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made.get("lr_scheduler", {}).get("scheduler")
    if schedule is not None:
        with warnings.catch_warnings():
            # Of steps before the optimiser's.
            warnings.simplefilter("ignore")
            for _ in range(updates):
                schedule.step()
    checkpoint["lr_schedulers"] = [] if schedule is None else [schedule.state_dict()]
    kept = checkpoint["optimizer_states"][0]["param_groups"]
    for group, new in zip(kept, optimizer.param_groups, strict=True):
        # The weights are not on their device yet: how they are updated there is the run's own.
        unknown = [name for name in ("fused", "foreach") if new.get(name) is None]
        group |= {n: value for n, value in new.items() if n not in ("params", *unknown)}
    rates = ", ".join(f"{group['lr']:g}" for group in kept)
    rank_zero_info(
        f"{', '.join(changed)} differ from the checkpoint's and apply from update {updates + 1}, "
        f"with rate {rates}"
    )


def _class_of(optimizer: Any) -> str:
    """The class's name, without its module: PyTorch's have two paths."""
    path = optimizer["class_path"] if isinstance(optimizer, dict) else "Adam"  # the default
    return str(path).rpartition(".")[2]
