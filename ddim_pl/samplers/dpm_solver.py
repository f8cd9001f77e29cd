"""DPM-Solver++ ([DPM-Solver++])."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ddim_pl.checks import check_one_of
from ddim_pl.denoiser import Denoiser
from ddim_pl.prediction import Prediction, eps_from_x
from ddim_pl.rng import Generators
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.scales import expand_like
from ddim_pl.transitions import ddim_step

Order = Literal[1, 2]


@dataclass(frozen=True)
class DPMSolverPP(Sampler):
    """DPM-Solver++(2M): data prediction, multistep ([DPM-Solver++], algorithm 2).

    From `p` over `t` to `s` it is the DDIM step with the estimate of x extrapolated to the middle
    of the step, linearly in `lambda`:

        x + (lambda_s - lambda_t) / (lambda_t - lambda_p) (x - x_p) / 2.

    One network evaluation per step, any spacing. The first step is DDIM. So is the step to level
    0, where lambda is infinite, or so large that x is not linear in it. For the same reason the
    last level before 0 should not be far cleaner than the others, as level 1 of "leading" and
    "linspace" is with few steps. "linear", "trailing" and "uniform_log_snr" are suitable.

    Args:
        order: 1 is DDIM, 2 the multistep solver.

    Raises:
        ValueError: If `order` is unknown.
    """

    order: Order = 2
    encodes = True

    def __post_init__(self) -> None:
        check_one_of(Order, order=self.order)

    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Yield the state after each step; the levels may rise (encoding)."""
        log_snr = denoiser.schedule(levels).log_snr
        previous = None
        for i, (t, s) in enumerate(pairwise(levels)):
            scales = denoiser.schedule(t)
            x, eps = denoiser(z, t)
            mid, mid_eps = x, eps
            if self.order == 2 and previous is not None and s > 0 and log_snr[i + 1] > -math.inf:
                # The weight is 0 from a level without noise, where encoding may start.
                weight = (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1]) / 2
                mid = x + expand_like(weight, x) * (x - previous)
                mid_eps = eps_from_x(scales, z, mid)
            z = ddim_step(Prediction(mid, mid_eps), scales, denoiser.schedule.step_end(s))
            yield State(s, z, x)
            previous = x
