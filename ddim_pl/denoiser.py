"""The denoiser: a network read as an estimate of the clean image and of the noise.

It owns the network, the schedule, the meaning of the network's output and the clipping, and is the
only place that knows which number the network is fed for a level.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ddim_pl.prediction import Prediction, PredictionType, decode, eps_from_x, merge_both
from ddim_pl.schedules import NoiseSchedule, to_device

TimeInput = Literal["index", "log_snr"]


class Denoise(Protocol):
    """What a sampler needs: a schedule, and estimates of `(x, eps)` from a state and its level."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule the states follow."""

    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        """Estimate from states `z` `(B, ...)` at levels `t`, `()` or `(B,)`."""


@dataclass(frozen=True)
class Denoiser:
    """Estimates `(x, eps)` from a state: one network call, decoded.

    Args:
        network: Module `forward(z, t)` or, with labels, `forward(z, t, label)`; `z` is `(B, ...)`
            and `t` a float32 tensor `(B,)`.
        schedule: Noise schedule.
        prediction: What the network predicts.
        clip: Clip the estimate of x to [-1, 1] and derive eps from the clipped value.
        time_input: The number that stands for a level. "index" is `t - 1`, the 0-based index of
            DDPM networks, at least 0. "log_snr" is `1000 arctan(exp(-lambda_t / 2)) / (pi / 2)`
            with lambda bounded by +-20, as in the code of Salimans & Ho 2022.
        label: Class labels `(B,)` for a network with classes, see `condition`.

    Raises:
        ValueError: If `prediction` or `time_input` is unknown.
    """

    network: nn.Module
    schedule: NoiseSchedule
    prediction: PredictionType = "eps"
    clip: bool = True
    time_input: TimeInput = "index"
    label: Tensor | None = None

    def __post_init__(self) -> None:
        if self.prediction not in get_args(PredictionType):
            raise ValueError(
                f"prediction must be one of {get_args(PredictionType)}, got {self.prediction!r}"
            )
        if self.time_input not in get_args(TimeInput):
            raise ValueError(
                f"time_input must be one of {get_args(TimeInput)}, got {self.time_input!r}"
            )

    def network_time(self, t: Tensor) -> Tensor:
        """The float64 number, of the shape of `t`, that the network is fed at level `t`."""
        if self.time_input == "index":
            return (t - 1).clamp(min=0)
        log_snr = self.schedule(t).log_snr.clamp(-20, 20)
        return torch.arctan(torch.exp(-log_snr / 2)) * (1000 / (torch.pi / 2))

    def output(self, z: Tensor, t: Tensor) -> Tensor:
        """Network output `(B, ...)`, in the dtype of `z`, at levels `t`, `()` or `(B,)`.

        That of a network which answers "both" x and eps is their v.
        """
        time = to_device(self.network_time(t).float(), z).expand(z.shape[0])
        out = self.network(z, time) if self.label is None else self.network(z, time, self.label)
        out = out.to(z.dtype)
        return merge_both(self.schedule(t), out) if self.prediction == "both" else out

    def __call__(self, z: Tensor, t: Tensor | float) -> Prediction:
        """Estimate the clean image and the noise.

        Args:
            z: States, `(B, ...)`.
            t: Levels in [0, num_levels], shape `()` or `(B,)`.

        Returns:
            Estimates with `z = alpha_t x + sigma_t eps`, also after clipping.
        """
        t = torch.as_tensor(t, dtype=torch.float64)
        level = self.schedule(t)
        prediction = decode(self.prediction, level, z, self.output(z, t))
        if not self.clip:
            return prediction
        x = prediction.x.clamp(-1, 1)
        return Prediction(x, eps_from_x(level, z, x))

    def condition(self, label: Tensor | None) -> "Denoiser":
        """The same denoiser with class labels `(B,)` given to every call of the network."""
        return replace(self, label=label)

    def select(self, samples: Tensor) -> "Denoiser":
        """The same denoiser for a batch of these samples, int64 `(N,)`, of its own batch."""
        if self.label is None:
            return self
        return self.condition(self.label[samples.to(self.label.device)])
