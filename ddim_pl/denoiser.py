"""Denoisers: estimates of the clean image and of the noise in a state.

`Denoiser` is the interface that a sampler needs. `NetworkDenoiser` implements it by a network: it
owns the network, the schedule, the prediction type and the clipping, and alone defines the time
input of the network at a level.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from ddim_pl.checks import check_one_of
from ddim_pl.clipping import Clipping, clipping_of
from ddim_pl.prediction import (
    Prediction,
    PredictionType,
    decode,
    decode_x,
    eps_from_x,
    merge_both,
    state_std,
)
from ddim_pl.scales import expand_like, to_device
from ddim_pl.schedules import NoiseSchedule

TimeInput = Literal["index", "log_snr", "log_sigma"]


class Denoiser(ABC):
    """Interface for samplers. Subclasses are frozen dataclasses that implement `__call__`.

    Attributes:
        schedule: The noise schedule that the states follow.
        clip: Whether estimates of the clean image are clipped to [-1, 1], or by another rule.
        label: Class labels `(B,)` of the batch, if there are any.
        estimates_noise_of_clean_data: Whether eps is defined at a level without noise, where
            encoding starts.
        guidance_weight: Weights of guidance, `(B,)` or one of all images, if they are an input.
        guidance_range: The lowest and the highest of these weights, if they are an input.
    """

    schedule: NoiseSchedule
    clip: bool | Clipping = False
    label: Tensor | None = None
    guidance_weight: Tensor | float | None = None
    guidance_range: Sequence[float] | None = None
    estimates_noise_of_clean_data: bool = True

    @abstractmethod
    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        """Estimates from states `z` `(B, ...)` at levels `t`, `()` or `(B,)`."""

    def condition(self, label: Tensor | None) -> Self:
        """The same denoiser for images of these class labels `(B,)`."""
        return replace(self, label=label)  # type: ignore[type-var]

    def as_told(self, other: "Denoiser") -> Self:
        """The same denoiser for the labels, and weights of guidance, that another one has."""
        return self.condition(other.label)

    def without_clipping(self) -> Self:
        """The same denoiser with `clip=False`, for encoding and gradients."""
        return self.with_clipping(False)

    def with_clipping(self, clip: bool | Clipping) -> Self:
        """The same denoiser with another `clip`.

        Raises:
            ValueError: If this denoiser cannot clip.
        """
        if clip == self.clip:
            return self
        if "clip" not in {each.name for each in fields(self)}:  # type: ignore[arg-type]
            raise ValueError(f"clip must be False for {type(self).__name__}, got {clip}")
        return replace(self, clip=clip)  # type: ignore[type-var]

    def select(self, samples: Tensor) -> Self:
        """The same denoiser for the samples `(N,)` int64 of its batch."""
        if self.label is None:
            return self
        return self.condition(self.label[samples.to(self.label.device)])

    def check_unclipped(self, reason: str) -> None:
        """Check that estimates are not clipped.

        Raises:
            ValueError: If they are; the message gives the reason.
        """
        if self.clip:
            raise ValueError(
                f"denoiser must not clip, got clip={self.clip}, {reason}: use "
                "denoiser.without_clipping()"
            )


@dataclass(frozen=True)
class NetworkDenoiser(Denoiser):
    """Estimates `(x, eps)` from a state by one network evaluation.

    Args:
        network: Module `forward(z, t)` or, with labels, `forward(z, t, label)`; `z` is `(B, ...)`
            and `t` a float32 tensor `(B,)`.
        schedule: Noise schedule.
        prediction: What the network predicts.
        clip: Clip the estimate of x to [-1, 1], or by another rule, and compute eps from the
            clipped value.
        time_input: Time input of the network at a level. "index" is `t - 1`, the 0-based index of
            DDPM networks, at least 0. "log_snr" is `1000 arctan(exp(-lambda_t / 2)) / (pi / 2)`
            with lambda bounded by +-20, as in the code of [PD]. "log_sigma" is `ln(sigma_t /
            alpha_t) / 4`, of lambda so bounded ([EDM], table 1).
        sigma_data: Standard deviation of the images. The network is fed states scaled to variance
            1, `z / sqrt(alpha_t^2 sigma_data^2 + sigma_t^2)` ([EDM], table 1); with 1 they are fed
            as they are.
        label: Class labels `(B,)` for a network with classes, see `condition`.
        guidance_weight: Weights of guidance, `(B,)` or one of all images, for a network that
            takes them as an input, see `guidance_range` of `UNet`; by default 1, which is none.
        augment: Labels `(B, N)` of the changes of the images in training, for a network that takes
            them as `augment`; see `ddim_pl.training.augmentation`.

    Raises:
        ValueError: If `prediction` or `time_input` is unknown, `sigma_data` is not positive, or
            eps is predicted where the last level has no signal.
    """

    network: nn.Module
    schedule: NoiseSchedule
    prediction: PredictionType = "eps"
    clip: bool | Clipping = True
    time_input: TimeInput = "index"
    label: Tensor | None = None
    sigma_data: float = 1.0
    augment: Tensor | None = None
    guidance_weight: Tensor | float | None = None

    def __post_init__(self) -> None:
        check_one_of(PredictionType, prediction=self.prediction)
        check_one_of(TimeInput, time_input=self.time_input)
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(
                f"sigma_data must be positive and finite, got {self.sigma_data}: 1 feeds states "
                "as they are, and 0.5 is that of images in [-1, 1] in EDM"
            )
        if self.prediction == "eps" and self.schedule.ends_without_signal:
            raise ValueError(
                f"prediction must be 'v' or 'x' for {self.schedule}, got 'eps': at its last level "
                "there is no signal, and eps says nothing of the image"
            )

    @property
    def guidance_range(self) -> Sequence[float] | None:  # type: ignore[override]
        """The weights of guidance that the network takes as an input, if it does."""
        return getattr(self.network, "guidance_range", None)

    def as_told(self, other: Denoiser) -> Self:
        """The same denoiser for the labels, and weights of guidance, that another one has."""
        return replace(self, label=other.label, guidance_weight=other.guidance_weight)

    def select(self, samples: Tensor) -> Self:
        """The same denoiser for the samples `(N,)` int64 of its batch."""
        chosen = super().select(samples)
        if not isinstance(self.guidance_weight, Tensor) or self.guidance_weight.ndim == 0:
            return chosen
        return replace(
            chosen, guidance_weight=self.guidance_weight[samples.to(self.guidance_weight.device)]
        )

    @property
    def estimates_noise_of_clean_data(self) -> bool:  # type: ignore[override]
        """False for x-prediction, where z is the image itself and says nothing of eps."""
        return self.prediction != "x"

    def network_time(self, t: Tensor) -> Tensor:
        """Time input of the network at levels `t`, float64 of the same shape."""
        if self.time_input == "index":
            return (t - 1).clamp(min=0)
        log_snr = self.schedule(t).log_snr.clamp(-20, 20)
        if self.time_input == "log_sigma":
            return log_snr / -8
        return torch.arctan(torch.exp(-log_snr / 2)) * (1000 / (torch.pi / 2))

    def output(self, z: Tensor, t: Tensor) -> Tensor:
        """Network output `(B, ...)`, in the dtype of `z`, at levels `t`, `()` or `(B,)`.

        For prediction "both" it is the v of x and eps, see `merge_both`.
        """
        time = to_device(self.network_time(t).float(), z).expand(z.shape[0])
        # The trainer's precision may have converted the weights.
        weights = next(self.network.parameters(), z)
        fed = self._scaled(z, t).to(weights.dtype)
        labels = () if self.label is None else (self.label,)
        told = {} if self.augment is None else {"augment": self.augment}
        if self.guidance_range is not None:
            weight = torch.as_tensor(1.0 if self.guidance_weight is None else self.guidance_weight)
            told["guidance"] = to_device(weight.float(), z).expand(z.shape[0])
        out = self.network(fed, time, *labels, **told).to(z.dtype)
        return merge_both(self.schedule(t), out) if self.prediction == "both" else out

    def _scaled(self, z: Tensor, t: Tensor) -> Tensor:
        """States `(B, ...)` as the network is fed them."""
        if self.sigma_data == 1:
            return z
        return z * expand_like(1 / state_std(self.schedule(t), self.sigma_data), z)

    def __call__(self, z: Tensor, t: Tensor | float) -> Prediction:
        """Estimate the clean image and the noise.

        Args:
            z: States, `(B, ...)`.
            t: Levels in [0, num_levels], shape `()` or `(B,)`.

        Returns:
            Estimates that satisfy `z = alpha_t x + sigma_t eps`, also after clipping.
        """
        t = torch.as_tensor(t, dtype=torch.float64)
        scales = self.schedule(t)
        output, rule = self.output(z, t), clipping_of(self.clip)
        if rule is None:
            return decode(self.prediction, scales, z, output, sigma_data=self.sigma_data)
        x = rule(decode_x(self.prediction, scales, z, output, sigma_data=self.sigma_data))
        return Prediction(x, eps_from_x(scales, z, x))
