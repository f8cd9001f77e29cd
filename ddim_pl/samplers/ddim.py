"""Denoising diffusion implicit models ([DDIM]); their step is `ddim_pl.transitions.ddim_step`."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.rng import Generators, randn
from ddim_pl.samplers.base import Sampler, State
from ddim_pl.transitions import ddim_step


@dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM with any amount of noise ([DDIM], eq. 12 and 16).

    Args:
        eta: 0 is deterministic, 1 has the law of DDPM's ancestral sampling with small variance.
            The paper's "sigma-hat" is `Ancestral(variance="large")`.

    Raises:
        ValueError: If `eta` lies outside [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}: 0 is DDIM, 1 is DDPM")

    @property
    def encodes(self) -> bool:
        """With `eta = 0`."""
        return self.eta == 0

    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Yield the state after each step; with `eta = 0` the levels may rise (encoding)."""
        for t, s in pairwise(levels):
            prediction = denoiser(z, t)
            # It has no effect in the step to clean data of a discrete schedule: sigma_0 = 0.
            noise = randn(z.shape, generator, z) if self.eta > 0 else None
            z = ddim_step(
                prediction,
                denoiser.schedule(t),
                denoiser.schedule.step_end(s),
                eta=self.eta,
                noise=noise,
            )
            yield State(s, z, prediction.x)
