"""Our schedule, levels, prediction and clipping as a `DDIMScheduler` of diffusers.

diffusers knows integer timesteps, each with its `abar = alpha^2`. A model that knows all integer
levels of DDPM keeps them: its timesteps are the levels minus 1. Any other one gets timesteps of
its own, of which the sampler visits every M-th: the levels that it samples at, with M - 1 levels
between two of them. The network is then told the number of the timestep, and its table of
embeddings says what our network is fed there, `DDIMSettings.times`.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddim_pl.clipping import ClipRange, DynamicThreshold
from ddim_pl.samplers import DDIM, Ancestral, Consistency
from ddim_pl.schedules import (
    DiscreteSchedule,
    ImprovedCosineSchedule,
    LinearSchedule,
    NoiseSchedule,
    ScaledLinearSchedule,
    ZeroTerminalSNR,
)
from ddim_pl.teachers.scheduler import PREDICTIONS
from ddim_pl.timesteps import make_levels
from ddim_pl.training import DiffusionModule
from ddim_pl.transitions import ddim_noise_scale

KINDS = {settings["prediction"]: name for name, settings in PREDICTIONS.items()}
"""What diffusers calls our predictions."""

DOUBLINGS = 7
"""How often the timesteps of a step are doubled, until float32 keeps the levels' scales."""

TOLERANCE = 2e-5
"""Error of diffusers' float32 alpha and sigma: what a pixel errs where the noise is 1."""

NOISE_TOLERANCE = 5e-5
"""Error of the scale that diffusers' float32 gives the known noise in a step with fresh noise."""

LARGEST = 1e9
"""In place of no bound of a dynamic threshold, which JSON cannot write."""


@dataclass(frozen=True)
class DDIMSettings:
    """How `DDIMPipeline` draws what a model's sampler draws.

    Args:
        config: Content of a `scheduler_config.json`.
        num_steps: `num_inference_steps` of the call.
        eta: `eta` of the call.
        times: What the network is fed at each timestep, `(num_train_timesteps,)` float64; None
            where that is the timestep itself.
        clips: Whether estimates are clipped, so that the call needs `use_clipped_model_output`.
    """

    config: dict[str, Any]
    num_steps: int
    eta: float
    times: Tensor | None
    clips: bool


def ddim_settings(model: DiffusionModule) -> DDIMSettings:
    """A `DDIMScheduler` with which diffusers draws the images of a model, and how to call it.

    Args:
        model: The model; its weights are not used.

    Raises:
        ValueError: If `DDIMPipeline` cannot do what the model's sampler does; says why.
    """
    config = {
        "_class_name": "DDIMScheduler",
        "prediction_type": _prediction(model),
        **_clip(model),
    }
    eta, clips = _eta(model), bool(config["clip_sample"] or config["thresholding"])
    levels = model.levels
    trained = _trained(model, levels)
    if trained is not None:
        return DDIMSettings(config | trained[0], trained[1], eta, None, clips)
    entries, times = _gridded(model, levels)
    return DDIMSettings(config | entries, len(levels) - 1, eta, times, clips)


def _prediction(model: DiffusionModule) -> str:
    if model.sigma_data != 1:
        raise ValueError(
            f"sigma_data must be 1 for format diffusers, got {model.sigma_data}: its network is "
            "fed scaled states, as EDM's, which DDIMScheduler does not do; use format safetensors"
        )
    if not model.noise.is_gaussian:
        raise ValueError(
            f"noise must be Gaussian for format diffusers, got {model.noise}: its pipelines draw "
            "their latents from the normal law"
        )
    if model.prediction not in KINDS:
        raise ValueError(
            f"prediction must be one of {', '.join(KINDS)} for format diffusers, got "
            f"{model.prediction!r}: its schedulers read no other; use format safetensors"
        )
    return KINDS[model.prediction]


def _eta(model: DiffusionModule) -> float:
    """The eta of DDIM that has the sampler's law."""
    sampler, levels = model.sampler, model.levels.tolist()
    if isinstance(sampler, DDIM):
        return sampler.eta
    if isinstance(sampler, Consistency):
        if len(levels) == 2 and levels[1] == 0:
            return 0.0
        raise ValueError(
            f"levels of Consistency must be one and 0 for format diffusers, got {levels}: in a "
            "step to a level between, DDIMPipeline keeps some of the noise, and a consistency "
            "model none; use format safetensors"
        )
    if isinstance(sampler, Ancestral) and sampler.variance == "small":
        return 1.0
    raise ValueError(
        f"sampler must be DDIM, or Ancestral with the small variance, for format diffusers, got "
        f"{sampler}: DDIMPipeline has no other; give --model.sampler DDIM"
    )


def _clip(model: DiffusionModule) -> dict[str, Any]:
    rule = model.sampling_clip
    entries: dict[str, Any] = {"clip_sample": False, "thresholding": False}
    if isinstance(rule, ClipRange) and rule.low == -rule.high:
        return entries | {"clip_sample": True, "clip_sample_range": rule.high}
    if isinstance(rule, DynamicThreshold):
        most = {"sample_max_value": min(rule.most, LARGEST)}
        return entries | {
            "thresholding": True,
            "dynamic_thresholding_ratio": rule.quantile,
            **most,
        }
    if rule is not None:
        raise ValueError(
            f"clip must be a range from -r to r or a DynamicThreshold for format diffusers, got "
            f"{rule}: DDIMScheduler has no other"
        )
    return entries


def _trained(model: DiffusionModule, levels: Tensor) -> tuple[dict[str, Any], int] | None:
    """Entries and steps where the timesteps are the integer levels that the network knows."""
    schedule, last = model.schedule, float(levels[-1])
    knows_all = isinstance(schedule, DiscreteSchedule) and model.distilled_steps is None
    if not (knows_all and model.time_input == "index" and last in (0, 1)):
        return None
    assert isinstance(schedule, DiscreteSchedule)
    for spacing in ("trailing", "leading"):
        for steps in (len(levels) - 1, len(levels)):  # a level 1 that is also visited
            if _visited(spacing, schedule, steps, last, levels):
                ends = {"set_alpha_to_one": last == 0, "steps_offset": 0}
                _check_noise(model, _products(schedule.betas().float())[levels.long()])
                entries = {**_betas(schedule), "timestep_spacing": spacing, **ends}
                return entries, steps
    return None


def _visited(
    spacing: str, schedule: NoiseSchedule, num_steps: int, last: float, levels: Tensor
) -> bool:
    """Whether these are the levels of diffusers' spacing.

    Its step of "trailing" leads to the next timestep only where the steps divide the levels.
    """
    num_levels = schedule.num_levels
    if num_steps > num_levels or (spacing == "trailing" and num_levels % num_steps):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.equal(make_levels(spacing, schedule, num_steps, last), levels)


def _betas(schedule: NoiseSchedule) -> dict[str, Any]:
    """A discrete schedule by its name, or by its variances where it has none in diffusers."""
    if isinstance(schedule, ZeroTerminalSNR):
        entries = _betas(schedule.schedule)
        if "trained_betas" not in entries:
            return entries | {"rescale_betas_zero_snr": True}
    assert isinstance(schedule, DiscreteSchedule)
    entries = {"num_train_timesteps": schedule.num_levels}
    names = {LinearSchedule: "linear", ScaledLinearSchedule: "scaled_linear"}
    if isinstance(schedule, LinearSchedule | ScaledLinearSchedule):
        ends = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
        return entries | {"beta_schedule": names[type(schedule)], **ends}
    if schedule == ImprovedCosineSchedule(schedule.num_levels):
        return entries | {"beta_schedule": "squaredcos_cap_v2"}
    return entries | {"trained_betas": _floats(schedule.betas())}


def _gridded(model: DiffusionModule, levels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Entries, and the network's times, where every M-th timestep is a level of the sampler."""
    rising, ends_at_0 = levels.flip(0), float(levels[-1]) == 0
    least = _least_between(model, levels)
    for between in (least << i for i in range(DOUBLINGS)):
        # The last level is a timestep of its own, unless it is clean data.
        places = torch.arange(1 if ends_at_0 else 0, (len(levels) - 1) * between + 1) / between
        grid = _interpolated(rising, places)
        betas = _betas_of(model.schedule, grid)
        used = places == places.round()
        if _keeps(model, betas, grid, used):
            products = _products(betas)
            visited = products[1:][used].flip(0)
            _check_noise(model, torch.cat([visited, products[:1]]) if ends_at_0 else visited)
            entries = {
                "num_train_timesteps": len(grid),
                "trained_betas": _floats(betas),
                "timestep_spacing": "trailing" if ends_at_0 else "leading",
                "steps_offset": 0 if ends_at_0 else between,
                "set_alpha_to_one": ends_at_0,
            }
            return entries, model.denoiser.network_time(grid)
    raise ValueError(
        f"levels must have alphas that float32 can tell from 0 and 1 for format diffusers, got "
        f"{levels.tolist()} of {model.schedule}: its schedulers keep products of them in float32; "
        "use format safetensors"
    )


def _least_between(model: DiffusionModule, levels: Tensor) -> int:
    """Timesteps for a step: a teacher of evenly spaced levels may then take other steps too."""
    gaps = levels.diff()
    even = bool((gaps - gaps.mean()).abs().max() < 1e-9 * model.schedule.num_levels)
    if model.distilled_steps is not None or not even:
        return 1
    return math.ceil(model.schedule.num_levels / len(gaps))


def _interpolated(levels: Tensor, places: Tensor) -> Tensor:
    """Levels at real places in their list, `(N,)`, exact at the integers."""
    lower = places.floor().long().clamp(max=len(levels) - 2)
    weight = places.double() - lower
    return (1 - weight) * levels[lower] + weight * levels[lower + 1]


def _betas_of(schedule: NoiseSchedule, grid: Tensor) -> Tensor:
    """Variances, float32 `(N,)`, whose products are the alphas of rising levels."""
    abar = schedule(grid).alpha ** 2
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    return (1 - abar / before).float()


def _keeps(model: DiffusionModule, betas: Tensor, grid: Tensor, used: Tensor) -> bool:
    """Whether diffusers finds our scales at the levels that are used."""
    found = torch.cumprod(1 - betas, 0)[used]
    alpha, sigma = model.schedule(grid[used])
    errors = (found.sqrt() - alpha).abs(), ((1 - found).sqrt() - sigma).abs()
    # The clean image is estimated by a division by alpha.
    relative = errors[0] / alpha if model.prediction == "eps" else errors[0]
    # Where some sigma is 0 there, the noise would be a quotient of nothing.
    return bool((found < 1).all() and max(relative.max(), errors[1].max()) < TOLERANCE)


def _products(betas: Tensor) -> Tensor:
    """`abar` of clean data and of each timestep, as diffusers finds it, float32 `(N + 1,)`."""
    return torch.cat([torch.ones(1), torch.cumprod(1 - betas, 0)])


def _check_noise(model: DiffusionModule, abar: Tensor) -> None:
    """Check the scale of the known noise in each stochastic step, a small root of a difference.

    Args:
        model: The model.
        abar: Of its levels, as diffusers finds it.
    """
    eta, levels = _eta(model), model.levels
    if eta == 0:
        return
    now, after = abar[:-1], abar[1:]
    std = eta * ((1 - after) / (1 - now) * (1 - now / after)) ** 0.5
    found = (1 - after - std**2) ** 0.5  # NaN where rounding makes it negative
    start, end = model.schedule(levels[:-1]), model.schedule.step_end(levels[1:])
    fresh = ddim_noise_scale(start, end, eta)
    wanted = (end.sigma**2 - fresh**2).clamp(min=0).sqrt()
    wrong = ~((found - wanted).abs() < NOISE_TOLERANCE)
    if wrong.any():
        raise ValueError(
            f"sampler must be deterministic for format diffusers from level "
            f"{float(levels[:-1][wrong][0]):g} of {model.schedule}, got {model.sampler}: what its "
            "float32 leaves of the known noise there is wrong or not a number; give "
            "--model.sampler DDIM, or use format safetensors"
        )


def _floats(values: Tensor) -> list[float]:
    """Numbers that are float32 there, for a JSON file."""
    return values.float().tolist()
