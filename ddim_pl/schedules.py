"""Noise schedules: the scales of signal and noise at each level.

A state at level `t` is `z_t = alpha_t x + sigma_t eps` with `alpha_t^2 + sigma_t^2 = 1`. Level 0
is clean data, level `T = num_levels` is (almost) pure noise, and every real number between is
allowed. A schedule maps `t` to `(alpha_t, sigma_t)`; it knows neither network nor sampling steps.

Levels are float64 and usually on the CPU: a schedule is a few dozen flops, and a
zero-dimensional CPU tensor multiplies a tensor on any device without a synchronisation.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ddim_pl.checks import check_at_least
from ddim_pl.scales import Scales

MOST_KNOWN = 10_000
"""Single levels whose scales a schedule keeps."""

_CLEAN = Scales(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))


class NoiseSchedule(ABC):
    """A variance-preserving schedule over the real levels `[0, num_levels]`.

    Subclasses are frozen dataclasses with a field `num_levels`; they implement `log_alpha_sigma`.
    """

    num_levels: int

    @abstractmethod
    def log_alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(log alpha_t, log sigma_t)` for float64 levels `t` in [0, num_levels]."""

    def __call__(self, t: Tensor | float) -> Scales:
        """Scales at level `t`.

        Args:
            t: Levels in [0, num_levels], any shape.

        Returns:
            Float64 scales of the shape of `t`.

        Raises:
            ValueError: If a level lies outside [0, num_levels].
        """
        single = isinstance(t, float | int) or (t.ndim == 0 and t.device.type == "cpu")
        if single and not torch.compiler.is_compiling():
            return self._at(float(t))
        t = torch.as_tensor(t, dtype=torch.float64)
        return self._compute(t)

    def _compute(self, t: Tensor) -> Scales:
        # On another device the check would synchronise, and in a graph it would break it.
        looks = t.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and not ((t >= 0) & (t <= self.num_levels)).all():
            raise ValueError(
                f"t must lie in [0, {self.num_levels}], got values in "
                f"[{t.min().item():g}, {t.max().item():g}]: scale the levels to this schedule"
            )
        log_alpha, log_sigma = self.log_alpha_sigma(t)
        return Scales(log_alpha.exp(), log_sigma.exp())

    @cached_property
    def ends_without_signal(self) -> bool:
        """Whether alpha is 0 at the last level, exactly."""
        return bool(self(self.num_levels).alpha == 0)

    @cached_property
    def _known(self) -> dict[float, Scales]:
        """Scales of single levels, which the steps of a sampler ask for again and again."""
        return {}

    def _at(self, t: float) -> Scales:
        known = self._known
        if t not in known:
            if len(known) >= MOST_KNOWN:
                known.clear()
            # Also for gradients, whatever mode the first who asks is in.
            with torch.inference_mode(False), torch.no_grad():
                known[t] = self._compute(torch.tensor(t, dtype=torch.float64))
        return known[t]

    def step_end(self, s: Tensor | float) -> Scales:
        """Scales at the level that a step leads to: at level 0 those of clean data, (1, 0).

        A step to level 0 ends in the estimate of x, also where the schedule has noise left there,
        as in the sampler and the target of [PD]'s code. Arguments and errors as for a call.
        """
        single = not isinstance(s, Tensor) or s.ndim == 0
        if single and not torch.compiler.is_compiling():
            return _CLEAN if float(s) == 0 else self(s)
        alpha, sigma = self(s)
        clean = torch.as_tensor(s, device=alpha.device) == 0
        return Scales(torch.where(clean, 1.0, alpha), torch.where(clean, 0.0, sigma))

    def level_at(self, log_snr: Tensor | float) -> Tensor:
        """Level that has this log-SNR: the inverse of `schedule(t).log_snr`, by bisection.

        Args:
            log_snr: Values of any shape; outside the range of the schedule they give level 0 or T.
        """
        wanted = torch.as_tensor(log_snr, dtype=torch.float64)
        low = torch.zeros_like(wanted)
        high = torch.full_like(wanted, self.num_levels)
        for _ in range(64):  # log-SNR falls with t; T / 2^64 is below rounding
            middle = (low + high) / 2
            log_alpha, log_sigma = self.log_alpha_sigma(middle)
            cleaner = 2 * (log_alpha - log_sigma) > wanted
            low, high = torch.where(cleaner, middle, low), torch.where(cleaner, high, middle)
        return high


class DiscreteSchedule(NoiseSchedule):
    """A schedule given by variances `beta_1 ... beta_T` ([DDPM]).

    `abar_t = prod_{i <= t} (1 - beta_i)` at the integers, `abar_0 = 1` exactly; between them
    `log abar` is linear, that is, noise is added at a constant rate. The last variance may be 1,
    which leaves no signal at level T; there alpha falls linearly from level T - 1.
    """

    @abstractmethod
    def betas(self) -> Tensor:
        """Variances `beta_1 ... beta_T`, float64 of shape `(num_levels,)`."""

    @cached_property
    def _log_abar(self) -> Tensor:
        return torch.cat(
            [torch.zeros(1, dtype=torch.float64), torch.log1p(-self.betas()).cumsum(0)]
        )

    def log_alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Interpolate `log abar` linearly between the integer levels."""
        table = self._log_abar.to(t.device)
        lower = t.floor().long().clamp(max=self.num_levels - 1)
        low, high, weight = table.take(lower), table.take(lower + 1), t - lower
        # log abar_T is -inf if the last variance is 1.
        to_no_signal = low + 2 * torch.log1p(-weight)
        log_abar = torch.where(high.isinf(), to_no_signal, torch.lerp(low, high, weight))
        # expm1 keeps the digits of 1 - abar at the first levels, where it is 1e-4.
        return log_abar / 2, torch.log(-torch.expm1(log_abar)) / 2


def _check_betas(beta_start: float, beta_end: float) -> None:
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"beta_start and beta_end must satisfy 0 < beta_start <= beta_end < 1, got "
            f"{beta_start} and {beta_end}: DDPM uses 1e-4 and 0.02 with 1000 levels"
        )


@dataclass(frozen=True)
class LinearSchedule(DiscreteSchedule):
    """Variances growing linearly from `beta_start` to `beta_end` ([DDPM], section 4).

    Args:
        num_levels: Number T of levels, at least 1.
        beta_start: Variance of the first level, in (0, 1).
        beta_end: Variance of the last level, in (0, 1), at least `beta_start`.
    """

    num_levels: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        check_at_least(1, num_levels=self.num_levels)
        _check_betas(self.beta_start, self.beta_end)

    def betas(self) -> Tensor:
        """Evenly spaced variances."""
        return torch.linspace(self.beta_start, self.beta_end, self.num_levels, dtype=torch.float64)


@dataclass(frozen=True)
class ScaledLinearSchedule(DiscreteSchedule):
    """Standard deviations growing linearly ([LDM]).

    Args:
        num_levels: Number T of levels, at least 1.
        beta_start: Variance of the first level, in (0, 1).
        beta_end: Variance of the last level, in (0, 1), at least `beta_start`.
    """

    num_levels: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def __post_init__(self) -> None:
        check_at_least(1, num_levels=self.num_levels)
        _check_betas(self.beta_start, self.beta_end)

    def betas(self) -> Tensor:
        """Squares of evenly spaced standard deviations."""
        start, end = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
        return torch.linspace(start, end, self.num_levels, dtype=torch.float64) ** 2


@dataclass(frozen=True)
class ImprovedCosineSchedule(DiscreteSchedule):
    """Squared-cosine `abar` with clipped variances ([IDDPM], eq. 17).

    Args:
        num_levels: Number T of levels, at least 1.
        offset: The paper's `s`, at least 0: keeps the first variances from vanishing.
        max_beta: Upper bound of the variances, in (0, 1).
    """

    num_levels: int = 1000
    offset: float = 0.008
    max_beta: float = 0.999

    def __post_init__(self) -> None:
        check_at_least(1, num_levels=self.num_levels)
        check_at_least(0, offset=self.offset)
        if not 0 < self.max_beta < 1:
            raise ValueError(
                f"max_beta must lie in (0, 1), got {self.max_beta}: the paper has 0.999"
            )

    def betas(self) -> Tensor:
        """Ratios of successive squared cosines, clipped at `max_beta`."""
        u = torch.linspace(0, 1, self.num_levels + 1, dtype=torch.float64)
        abar = torch.cos((u + self.offset) / (1 + self.offset) * math.pi / 2) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=self.max_beta)


@dataclass(frozen=True)
class ZeroTerminalSNR(DiscreteSchedule):
    """Another schedule, rescaled so that level T has no signal at all ([ZeroSNR], algorithm 1).

    `alpha_t` is shifted and scaled to keep its value at level 1 and become 0 at T: diffusers'
    `rescale_betas_zero_snr`. The network must predict v or x there, where eps says nothing of the
    image, and the samplers must start at T, as "trailing" and "linear" do.

    Args:
        schedule: The schedule to rescale, of at least 2 levels; by default `LinearSchedule`.
    """

    schedule: DiscreteSchedule = field(default_factory=lambda: LinearSchedule())

    def __post_init__(self) -> None:
        check_at_least(2, num_levels=self.num_levels)

    @property
    def num_levels(self) -> int:  # type: ignore[override]
        """Number T of levels, that of the rescaled schedule."""
        return self.schedule.num_levels

    def betas(self) -> Tensor:
        """Variances of the rescaled schedule; the last is 1."""
        first, *_ = betas = self.schedule.betas()
        alpha = (torch.log1p(-betas).cumsum(0) / 2).exp()
        abar = ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2
        return torch.cat([first[None], 1 - abar[1:] / abar[:-1]])


@dataclass(frozen=True)
class CosineLogSNRSchedule(NoiseSchedule):
    """Continuous cosine schedule with a bounded log-SNR ([PD], section 4).

    `lambda(u) = -2 log tan(a u + b)` with `u = t / T`, so that `lambda` falls from `log_snr_max`
    at level 0 to `log_snr_min` at level T. Level 0 has some noise: `sigma_0 = 4.5e-5` at 20.

    Args:
        num_levels: Number T of levels, at least 1.
        log_snr_min: Log-SNR at level T.
        log_snr_max: Log-SNR at level 0, above `log_snr_min`.
    """

    num_levels: int = 1000
    log_snr_min: float = -20.0
    log_snr_max: float = 20.0

    def __post_init__(self) -> None:
        check_at_least(1, num_levels=self.num_levels)
        if not self.log_snr_min < self.log_snr_max:
            raise ValueError(
                f"log_snr_min must be below log_snr_max, got {self.log_snr_min} and "
                f"{self.log_snr_max}: the paper has -20 and 20"
            )

    def log_alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the closed form; `alpha^2 = sigmoid(lambda)`, `sigma^2 = sigmoid(-lambda)`."""
        b = math.atan(math.exp(-self.log_snr_max / 2))
        a = math.atan(math.exp(-self.log_snr_min / 2)) - b
        log_snr = -2 * torch.log(torch.tan(a * t / self.num_levels + b))
        return logsigmoid(log_snr) / 2, logsigmoid(-log_snr) / 2


@dataclass(frozen=True)
class EDMSchedule(NoiseSchedule):
    """Noise in units of the signal, evenly spaced in its rho-th root ([EDM], eq. 5).

    `sigma_t / alpha_t` is `sigma_min` at level 1 and `sigma_max` at level T, and its rho-th root
    is linear between them; below level 1 it falls linearly to 0, which is clean data. The
    strategy "karras" gives the paper's levels.

    Args:
        num_levels: Number T of levels, at least 2.
        sigma_min: Noise at level 1, positive.
        sigma_max: Noise at level T, above `sigma_min`.
        rho: Density of the levels near the data, at least 1.
    """

    num_levels: int = 1000
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_at_least(2, num_levels=self.num_levels)
        check_at_least(1, rho=self.rho)
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                "sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, both finite, "
                f"got {self.sigma_min} and {self.sigma_max}: the paper has 0.002 and 80"
            )

    def log_alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the closed form; `alpha^2 = 1 / (1 + s^2)` for `s = sigma / alpha`."""
        low, high = (each ** (1 / self.rho) for each in (self.sigma_min, self.sigma_max))
        u = (t - 1) / (self.num_levels - 1)
        root = low + u.clamp(min=0) * (high - low)
        log_s = self.rho * root.log() + t.clamp(max=1).log()
        log_alpha = -torch.log1p((2 * log_s).exp()) / 2
        return log_alpha, log_s + log_alpha
