"""What an image costs: network evaluations, each of one state at one level."""

import torch
from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.guidance import Guidance
from ddim_pl.prediction import Prediction, eps_from_x
from ddim_pl.samplers import Sampler
from ddim_pl.schedules import NoiseSchedule


def network_evaluations(
    sampler: Sampler, levels: Tensor, schedule: NoiseSchedule, guidance: Guidance | None = None
) -> int:
    """Network evaluations for an image: two where it is guided, with and without its class.

    Where the sampler's own number is a maximum, so is this.

    Args:
        sampler: The sampler.
        levels: Its levels, `(S + 1,)`.
        schedule: Noise schedule of the levels.
        guidance: How the image is guided, if it is.
    """
    count = sampler.num_evaluations(levels)
    if guidance is None or not guidance.is_twofold:
        return count
    # Those that solve the whole chain evaluate as often as they need to.
    if guidance.interval is None or hasattr(sampler, "split_levels"):
        return 2 * count
    t = torch.tensor(_visited(sampler, levels, schedule), dtype=torch.float64)
    return len(t) + int(guidance.applies(schedule(t)).sum())


def _visited(sampler: Sampler, levels: Tensor, schedule: NoiseSchedule) -> list[float]:
    """The level of each evaluation."""
    recorder = _Recorder(schedule)
    z = torch.ones(1, 1, dtype=torch.float64)
    sampler(recorder, z, levels, generator=torch.Generator().manual_seed(0))
    return recorder.levels


class _Recorder(Denoiser):
    """Notes the levels at which it is called, and knows all images to be zero."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule, self.levels = schedule, list[float]()

    def with_clipping(self, clip: object) -> "_Recorder":
        return self

    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        self.levels += torch.as_tensor(t).expand(len(z)).tolist()
        x = torch.zeros_like(z)
        return Prediction(x, eps_from_x(self.schedule(t), z, x))
