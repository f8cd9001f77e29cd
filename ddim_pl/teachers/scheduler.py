"""A scheduler of diffusers as our schedule, prediction, clipping, sampler and levels."""

from typing import Any

from ddim_pl.checks import check_at_least
from ddim_pl.clipping import Clipping, ClipRange, DynamicThreshold
from ddim_pl.samplers import DDIM, Ancestral, Sampler
from ddim_pl.schedules import (
    DiscreteSchedule,
    ImprovedCosineSchedule,
    LinearSchedule,
    NoiseSchedule,
    ScaledLinearSchedule,
    ZeroTerminalSNR,
)
from ddim_pl.timesteps import make_levels

DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "variance_type": "fixed_small",
}
"""What diffusers takes for an entry that a config has not."""

PREDICTIONS = {
    "epsilon": {"prediction": "eps", "loss_weight": "snr"},
    "sample": {"prediction": "x", "loss_weight": "truncated_snr"},
    "v_prediction": {"prediction": "v", "loss_weight": "snr_plus_one"},
}
VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
}
SPACINGS = {name: name for name in ("leading", "trailing", "linspace")}
DDIM_STEPS = 50
"""Steps of a `DDIMPipeline`."""


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of our `DDPM` from the config of a DDPM or DDIM scheduler.

    Args:
        config: Content of a `scheduler_config.json`.

    Raises:
        ValueError: If the scheduler is another, or has a setting that ours cannot express.
    """
    kind = config.get("_class_name")
    if kind not in ("DDPMScheduler", "DDIMScheduler"):
        raise ValueError(
            f"scheduler must be a DDPMScheduler or DDIMScheduler, got {kind}: if the network was "
            "trained with the betas of one of these, give its config by --scheduler"
        )
    entries = DEFAULTS | {name: value for name, value in config.items() if name in DEFAULTS}
    entries |= {"_ddim": kind == "DDIMScheduler"}
    schedule = _schedule(entries)
    steps = min(DDIM_STEPS, schedule.num_levels) if entries["_ddim"] else schedule.num_levels
    settings = {
        **_known(PREDICTIONS, "prediction_type", entries),
        "schedule": schedule,
        "clip": _clip(entries),
        "sampler": _sampler(entries),
        "timesteps": _timesteps(entries, schedule, steps),
        "num_steps": steps,
    }
    # Only DDIMScheduler can end at the first trained level.
    ends_early = entries["_ddim"] and not entries["set_alpha_to_one"]
    return settings | ({"last_level": 1.0} if ends_early else {})


def _schedule(entries: dict[str, Any]) -> NoiseSchedule:
    if entries["trained_betas"] is not None:
        raise ValueError(
            "trained_betas must be None, got a list: our schedules are given by formulas, so give "
            "one by --scheduler that has a beta_schedule; a folder of main.py export that has "
            "timesteps of its own is not read back: use the checkpoint that it was made from"
        )
    levels, name = entries["num_train_timesteps"], entries["beta_schedule"]
    ends = {"beta_start": entries["beta_start"], "beta_end": entries["beta_end"]}
    check_at_least(1, num_train_timesteps=levels)
    schedules: dict[str, DiscreteSchedule] = {"squaredcos_cap_v2": ImprovedCosineSchedule(levels)}
    if name in ("linear", "scaled_linear"):
        kind = LinearSchedule if name == "linear" else ScaledLinearSchedule
        schedules[name] = kind(levels, **ends)
    if name not in schedules:
        raise ValueError(
            f"beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, got {name!r}: "
            "there is no such schedule here"
        )
    rescaled = entries["rescale_betas_zero_snr"]
    return ZeroTerminalSNR(schedules[name]) if rescaled else schedules[name]


def _clip(entries: dict[str, Any]) -> bool | Clipping:
    if entries["thresholding"]:
        return DynamicThreshold(entries["dynamic_thresholding_ratio"], entries["sample_max_value"])
    size = float(entries["clip_sample_range"])
    return bool(entries["clip_sample"]) and (size == 1 or ClipRange(-size, size))


def _sampler(entries: dict[str, Any]) -> Sampler:
    if entries["_ddim"]:
        return DDIM()
    return Ancestral(_known(VARIANCES, "variance_type", entries))


def _timesteps(
    entries: dict[str, Any], schedule: NoiseSchedule, num_steps: int
) -> str | list[float]:
    """A strategy, or the levels themselves where diffusers shifts them."""
    spacing: str = _known(SPACINGS, "timestep_spacing", entries)
    offset = entries["steps_offset"]
    # diffusers shifts no other spacing, and with all levels the last would not exist.
    if spacing != "leading" or offset == 0 or num_steps == schedule.num_levels:
        return spacing
    levels = make_levels(spacing, schedule, num_steps)[:-1] + offset
    if levels[0] > schedule.num_levels:
        raise ValueError(
            f"steps_offset must leave the levels below {schedule.num_levels}, got {offset}: give "
            "a config without it by --scheduler"
        )
    return [*levels.tolist(), 0.0]


def _known(table: dict[str, Any], name: str, entries: dict[str, Any]) -> Any:
    if entries[name] not in table:
        raise ValueError(
            f"{name} must be one of {', '.join(table)}, got {entries[name]!r}: nothing here does "
            "the same"
        )
    return table[entries[name]]
