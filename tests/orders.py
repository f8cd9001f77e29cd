"""Measured orders of convergence to the exact flow."""

from collections.abc import Callable, Sequence

import torch
from exact import ExactMixture
from torch import Tensor

from ddim_pl.samplers import Sampler

Spacing = Callable[[ExactMixture, float, float, int], Tensor]


def even(denoiser: ExactMixture, start: float, end: float, num_steps: int) -> Tensor:
    return torch.linspace(start, end, num_steps + 1, dtype=torch.float64)


def quadratic(denoiser: ExactMixture, start: float, end: float, num_steps: int) -> Tensor:
    return torch.linspace(start**0.5, end**0.5, num_steps + 1, dtype=torch.float64) ** 2


def log_snr(denoiser: ExactMixture, start: float, end: float, num_steps: int) -> Tensor:
    """Evenly spaced in the log-SNR."""
    ends = denoiser.schedule(torch.tensor([start, end], dtype=torch.float64)).log_snr.tolist()
    return denoiser.schedule.level_at(torch.linspace(*ends, num_steps + 1, dtype=torch.float64))


SPACINGS: tuple[Spacing, ...] = (even, quadratic, log_snr)


def errors(
    sampler: Sampler,
    denoiser: ExactMixture,
    spacing: Spacing,
    start: float,
    end: float,
    counts: Sequence[int],
) -> Tensor:
    """Largest distance from the exact flow for each number of steps, in float64."""
    reach = 2 if start > end else 1  # noise spreads wider than data
    z = torch.linspace(-reach, reach, 9, dtype=torch.float64)[:, None]
    exact = denoiser.flow(z, start, end)
    found = [sampler(denoiser, z, spacing(denoiser, start, end, n)) - exact for n in counts]
    return torch.stack([error.abs().max() for error in found])


def order(
    sampler: Sampler,
    denoiser: ExactMixture,
    spacing: Spacing,
    start: float,
    end: float,
    counts: Sequence[int] = (80, 160, 320),
) -> float:
    """Slope of the log error against the log step, by least squares."""
    x = -torch.tensor(counts, dtype=torch.float64).log()
    y = errors(sampler, denoiser, spacing, start, end, counts).log()
    return ((x - x.mean()) @ y / (x - x.mean()).square().sum()).item()
