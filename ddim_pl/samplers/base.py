"""Base class of the samplers: the call, the trajectory and the progress bar."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddim_pl.clipping import Clipping
from ddim_pl.denoiser import Denoiser
from ddim_pl.noise import GaussianNoise, Noise
from ddim_pl.rng import Generators


class State(NamedTuple):
    """State of a trajectory after a step.

    Attributes:
        t: Level of the state, float64 scalar.
        z: The state, `(B, ...)`.
        x: Estimate of the clean image used in the step, `(B, ...)`.
    """

    t: Tensor
    z: Tensor
    x: Tensor


@dataclass(frozen=True)
class Sampler(ABC):
    """Generates images from noise. Subclasses are frozen dataclasses that implement `steps`.

    A sampler holds hyperparameters only: no network, no device, no state between calls.

    Args:
        clip: Clip estimates of the clean image to [-1, 1], or by a rule of `ddim_pl.clipping`, in
            place of the model's own setting; by default as the model does.
    """

    # Named by `__str__`, and only if given: finished cells and pairs have the text in their names.
    clip: bool | Clipping | None = field(default=None, kw_only=True, repr=False)

    def __str__(self) -> str:
        """The sampler with its arguments, as tables and files name it."""
        text = repr(self)
        if self.clip is None:
            return text
        return f"{text[:-1]}{'' if text.endswith('()') else ', '}clip={self.clip})"

    @abstractmethod
    def steps(
        self, denoiser: Denoiser, z: Tensor, levels: Tensor, generator: Generators | None
    ) -> Iterator[State]:
        """Yield the state after each step; arguments as for `__call__`, already checked."""

    def num_evaluations(self, levels: Tensor) -> int:
        """Number of network evaluations for `levels`, `(S + 1,)`."""
        return len(levels) - 1

    @property
    def noise(self) -> Noise:
        """The law of noise that this sampler requires."""
        return GaussianNoise()

    @property
    def is_deterministic(self) -> bool:
        """Whether the latent alone determines the image: no noise is added in the steps."""
        return self.encodes

    @property
    def divides_by_signal(self) -> bool:
        """Whether the steps divide by alpha, so that no level may be without signal."""
        return False

    @property
    def encodes(self) -> bool:
        """Whether this sampler also takes rising levels, deterministically from data to noise."""
        return False

    @final
    def trajectory(
        self,
        denoiser: Denoiser,
        z: Tensor,
        levels: Tensor,
        *,
        generator: Generators | None = None,
        progress: bool = False,
    ) -> Iterator[State]:
        """Yield the state after each step, with gradients if the caller enables them.

        Args:
            denoiser: Estimates of the clean image and the noise.
            z: Start states at level `levels[0]`, `(B, ...)`.
            levels: Levels to visit, `(S + 1,)`, see `ddim_pl.timesteps`.
            generator: One generator, or one per image, for stochastic steps.
            progress: Show a progress bar.

        Raises:
            ValueError: If the levels are not a falling vector within the schedule, or one has no
                signal and the sampler divides by it.
        """
        levels = self._check_levels(denoiser, levels)  # before the first state is requested
        if self.clip is not None:
            denoiser = denoiser.with_clipping(self.clip)
        return iter(
            tqdm(
                self.steps(denoiser, z, levels, generator),
                total=len(levels) - 1,
                desc=type(self).__name__,
                disable=not progress,
                leave=False,
            )
        )

    @final
    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        z: Tensor,
        levels: Tensor,
        *,
        generator: Generators | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Go from level `levels[0]` to `levels[-1]` and return the last state, without gradients.

        Arguments and errors are those of `trajectory`.

        Returns:
            States at the last level, `(B, ...)`: images, if that level is 0.
        """
        for state in self.trajectory(denoiser, z, levels, generator=generator, progress=progress):
            z = state.z
        return z

    def _check_levels(self, denoiser: Denoiser, levels: Tensor) -> Tensor:
        levels = torch.as_tensor(levels, dtype=torch.float64, device="cpu")
        num_levels = denoiser.schedule.num_levels
        if levels.ndim != 1 or len(levels) < 2:
            raise ValueError(
                f"levels must be a vector of at least 2, got shape {tuple(levels.shape)}: see "
                "ddim_pl.timesteps"
            )
        rising = self.encodes and (levels.diff() > 0).all()
        if not rising and not (levels.diff() < 0).all():
            raise ValueError(
                f"levels must decrease strictly for {self}, got {levels.tolist()}: only a "
                "deterministic sampler encodes"
            )
        if levels.min() < 0 or levels.max() > num_levels:
            raise ValueError(
                f"levels must lie in [0, {num_levels}], got [{levels.min():g}, {levels.max():g}]"
            )
        if self.divides_by_signal and denoiser.schedule(levels.max()).alpha == 0:
            raise ValueError(
                f"levels must have some signal for {self}, which divides by it, got "
                f"{levels.max():g}: start at a lower level, or use DDIM"
            )
        return levels
