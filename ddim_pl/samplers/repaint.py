"""Inpainting by resampling ([RePaint])."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddim_pl.checks import check_at_least
from ddim_pl.denoiser import Denoiser
from ddim_pl.rng import Generators, randn
from ddim_pl.samplers.ddim import DDIM
from ddim_pl.transitions import forward_step, q_sample


def visits(num_steps: int, jump_length: int, num_resamples: int) -> list[int]:
    """Indices into the levels in the order of visits, from 0 to `num_steps`.

    With one step left, and at every `jump_length` steps before that, jump back by `jump_length`
    and sample down again, `num_resamples - 1` times (the authors' `get_schedule_jump`).

    >>> visits(4, 1, 2)
    [0, 1, 0, 1, 2, 1, 2, 3, 2, 3, 4]
    >>> visits(6, 2, 2)
    [0, 1, 2, 3, 1, 2, 3, 4, 5, 3, 4, 5, 6]
    """
    turns = range(num_steps - 1, jump_length - 1, -jump_length)
    left = dict.fromkeys(turns, num_resamples - 1)
    path = [0]
    while path[-1] < num_steps:
        path.append(path[-1] + 1)
        if left.get(path[-1], 0) > 0:
            left[path[-1]] -= 1
            path.append(path[-1] - jump_length)
    return path


@dataclass(frozen=True)
class RePaint:
    """Fill the unknown part of an image ([RePaint], algorithm 1).

    After each denoising step the known part is sampled from `q(z_s | x)`. To harmonise the unknown
    part with it, the states are noised again by `q(z_t | z_s)` and denoised again. Line 5 of the
    algorithm scales the noise by the variance; the standard deviation of eq. 8a is meant.

    Args:
        eta: Noise of the denoising steps, see `DDIM`; 1 is the paper's DDPM.
        jump_length: Number of levels that a jump goes back, the paper's `j`.
        num_resamples: Number of passes through each stretch, the paper's `r`; 1 is no jump.

    Raises:
        ValueError: If `eta` lies outside [0, 1] or a number is less than 1.
    """

    eta: float = 1.0
    jump_length: int = 10
    num_resamples: int = 10

    def __post_init__(self) -> None:
        DDIM(self.eta)
        check_at_least(1, jump_length=self.jump_length, num_resamples=self.num_resamples)

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        z: Tensor,
        levels: Tensor,
        *,
        image: Tensor,
        mask: Tensor,
        generator: Generators | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Sample images that equal `image` where `mask` is 1, without gradients.

        Args:
            denoiser: Estimates of the clean image and the noise.
            z: Start noise at level `levels[0]`, `(B, ...)`.
            levels: Decreasing levels that end at 0, `(S + 1,)`, see `ddim_pl.timesteps`.
            image: Images of the shape of `z`, in [-1, 1] where known and of any value elsewhere.
            mask: 1 or True where the image is known, 0 or False elsewhere; of the shape of `z` or
                one that broadcasts to it, such as `(B, 1, H, W)` or `(H, W)`.
            generator: One generator, or one per image.
            progress: Show a progress bar.

        Returns:
            Images, `(B, ...)`, in the dtype of `z`.

        Raises:
            ValueError: If a shape or a value does not fit.
        """
        levels = torch.as_tensor(levels, dtype=torch.float64, device="cpu")
        path = self._visits(levels)
        image, known = image.to(z), _check(z, image, mask)
        scales, step = [denoiser.schedule(t) for t in levels], DDIM(self.eta)
        for i, j in tqdm(list(pairwise(path)), "RePaint", disable=not progress, leave=False):
            if j > i:
                z = step(denoiser, z, levels[i : j + 1], generator=generator)
                noisy = q_sample(image, randn(z.shape, generator, z), scales[j])
                z = torch.where(known, noisy, z)
            else:
                z = forward_step(z, randn(z.shape, generator, z), scales[i], scales[j])
        return torch.where(known, image, z)  # level 0 of some schedules has noise

    def num_evaluations(self, levels: Tensor) -> int:
        """Number of network evaluations for `levels`, `(S + 1,)`."""
        return sum(j > i for i, j in pairwise(self._visits(levels)))

    def _visits(self, levels: Tensor) -> list[int]:
        if levels.ndim != 1 or len(levels) < 2 or levels[-1] != 0 or not (levels.diff() < 0).all():
            raise ValueError(
                f"levels must be a vector that decreases strictly to 0, got {levels.tolist()}: "
                "see ddim_pl.timesteps"
            )
        num_steps = len(levels) - 1
        if self.num_resamples > 1 and self.jump_length >= num_steps:
            raise ValueError(
                f"jump_length must be less than the number of steps, {num_steps}, got "
                f"{self.jump_length}: take more steps, or num_resamples=1 for no jumps"
            )
        return visits(num_steps, self.jump_length, self.num_resamples)


def _check(z: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Check the shapes and values; return the mask as bool, of the shape and device of `z`."""
    if image.shape != z.shape:
        raise ValueError(
            f"image must have the shape of z, {tuple(z.shape)}, got {tuple(image.shape)}"
        )
    try:
        known = mask.to(z.device).expand(z.shape)
    except RuntimeError:
        raise ValueError(
            f"mask must broadcast to the shape of z, {tuple(z.shape)}, got {tuple(mask.shape)}: "
            "(B, 1, H, W) is usual"
        ) from None
    if not ((known == 0) | (known == 1)).all():
        raise ValueError(
            f"mask must hold only 0 and 1, got values in [{mask.min():g}, {mask.max():g}]: "
            "threshold it, 1 is known"
        )
    values = image.to(z.device)[known == 1]
    if not (values.abs() <= 1).all():
        raise ValueError(
            f"image must lie in [-1, 1] where known, got values in [{values.min():g}, "
            f"{values.max():g}]: scale it like the training data"
        )
    return known == 1
