"""A model's sampler as numbers: what each of its steps multiplies, for programs without ours.

A step feeds the network `input_scale z`, decodes `x = z_weight z + sum_i output_weights[i] F_i`
from the parts `F_i` of its output, clips it, computes `eps = (z - alpha x) / sigma`, and goes on
to `x_weight x + eps_weight eps + noise_weight noise`. They are the coefficients of our own
formulas, found by feeding them units.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ddim_pl.prediction import Prediction, decode_x, merge_both, state_std
from ddim_pl.samplers import DDIM, Ancestral, Consistency
from ddim_pl.scales import Scales
from ddim_pl.training import DiffusionModule
from ddim_pl.transitions import ddim_step, posterior, q_sample

ONE = torch.tensor(1.0, dtype=torch.float64)
ZERO = torch.zeros_like(ONE)


def step_numbers(model: DiffusionModule) -> list[dict[str, Any]]:
    """The numbers of each step of a model's sampler, from the first level on.

    Args:
        model: The model; its weights are not used.

    Returns:
        For each step `time` and `input_scale` (what the network is fed), `alpha` and `sigma` of
        the level, and the weights `z_weight`, `output_weights` (a list), `x_weight`, `eps_weight`,
        `noise_weight`.

    Raises:
        ValueError: If the sampler is another than DDIM, Ancestral and Consistency, or the noise
            is not Gaussian.
    """
    if not model.noise.is_gaussian:
        raise ValueError(
            f"noise must be Gaussian for this format, got {model.noise}: its steps divide by "
            "other scales; use format checkpoint"
        )
    if not isinstance(model.sampler, DDIM | Ancestral | Consistency):
        raise ValueError(
            f"sampler must be DDIM, Ancestral or Consistency for this format, got "
            f"{model.sampler}, whose steps are not one function of the state: give "
            "--model.sampler DDIM"
        )
    levels = model.levels
    return [_numbers(model, t, s) for t, s in pairwise(levels)]


def _numbers(model: DiffusionModule, t: Tensor, s: Tensor) -> dict[str, Any]:
    start, end = model.schedule(t), model.schedule.step_end(s)
    sigma_data = model.sigma_data
    numbers = {
        "time": model.denoiser.network_time(t),
        "input_scale": ONE if sigma_data == 1 else 1 / state_std(start, sigma_data),
        "alpha": start.alpha,
        "sigma": start.sigma,
        "z_weight": decode_x(model.prediction, start, ONE, ZERO, sigma_data=sigma_data),
        "x_weight": _stepped(model, start, end, ONE, ZERO, ZERO),
        "eps_weight": _stepped(model, start, end, ZERO, ONE, ZERO),
        "noise_weight": _stepped(model, start, end, ZERO, ZERO, ONE) if s > 0 else ZERO,
    }
    outputs = _decoded_outputs(model, start)
    return {name: float(value) for name, value in numbers.items()} | {"output_weights": outputs}


def _decoded_outputs(model: DiffusionModule, scales: Scales) -> list[float]:
    """Weight of each part of the output in the estimate of x."""
    units = ONE[None]
    if model.prediction == "both":  # each part as an image of one pixel
        units = merge_both(scales, torch.eye(2, dtype=torch.float64)[:, :, None])[:, 0, 0]
    given = {"sigma_data": model.sigma_data}
    return [float(decode_x(model.prediction, scales, ZERO, unit, **given)) for unit in units]


def _stepped(
    model: DiffusionModule, t: Scales, s: Scales, x: Tensor, eps: Tensor, noise: Tensor
) -> Tensor:
    """Where a step of the sampler leads from an estimate of one pixel."""
    sampler = model.sampler
    if isinstance(sampler, DDIM):
        return ddim_step(Prediction(x, eps), t, s, eta=sampler.eta, noise=noise)
    if isinstance(sampler, Consistency):
        return q_sample(x, noise, s)
    assert isinstance(sampler, Ancestral)
    mean, std = posterior(t.alpha * x + t.sigma * eps, x, t, s, variance=sampler.variance)
    return mean + std * noise
