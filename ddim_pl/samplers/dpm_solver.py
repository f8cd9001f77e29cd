"""DPM-Solver++ (Lu et al. 2022)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.prediction import Prediction, eps_from_x
from ddim_pl.rng import Generators
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.scales import expand_like
from ddim_pl.transitions import ddim_step

Order = Literal[1, 2]


@dataclass(frozen=True)
class DPMSolverPP(Sampler):
    """DPM-Solver++(2M): data prediction, multistep (Lu et al. 2022, "DPM-Solver++", algorithm 2).

    From `p` over `t` to `s` it is the DDIM step with the estimate of x led on to the middle of the
    step, linearly in `lambda`:

        x + (lambda_s - lambda_t) / (lambda_t - lambda_p) (x - x_p) / 2.

    One network evaluation a step, any spacing. The first step is DDIM, and so is that to level 0,
    where lambda is infinite, or so large that x is anything but linear in it. For the same reason
    the last level before 0 should not be far cleaner than the rest, as level 1 of "leading" and
    "linspace" is with few steps: "linear", "trailing" and "uniform_log_snr" suit.

    Args:
        order: 1 is DDIM.

    Raises:
        ValueError: If `order` is neither 1 nor 2.
    """

    order: Order = 2

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(
                f"order must be one of {get_args(Order)}, got {self.order!r}: 1 is DDIM, 2 is the "
                "multistep solver"
            )

    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Yield the state after each step; the levels may rise (encoding)."""
        log_snr = denoiser.schedule(levels).log_snr
        previous = None
        for i, (t, s) in enumerate(pairwise(levels)):
            scales = denoiser.schedule(t)
            x, eps = denoiser(z, t)
            led, led_eps = x, eps
            if self.order == 2 and previous is not None and s > 0:
                # From a level without noise, where encoding may start, the weight is 0.
                weight = (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1]) / 2
                led = x + expand_like(weight, x) * (x - previous)
                led_eps = eps_from_x(scales, z, led)
            z = ddim_step(Prediction(led, led_eps), scales, denoiser.schedule(s))
            yield State(s, z, x)
            previous = x

    def _may_rise(self, levels: Tensor) -> bool:
        return bool((levels.diff() > 0).all())
