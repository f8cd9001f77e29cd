"""Classifier-free guidance ([CFG]).

A network that was trained with some labels dropped estimates the clean image with its class,
`x_c`, and without one, `x_u`. The guided estimate goes beyond the former, away from the latter:

    x = x_u + w (x_c - x_u),

and so does every other linear estimate, eps and v among them. `w = 0` is the model without
classes, `w = 1` the plain one of the class, `w > 1` draws images that are more typical of their
class, and fewer kinds of them. [CFG], eq. 6, call `w - 1` the strength: `(1 + w') eps_c - w'
eps_u`. Imagen, latent diffusion and diffusers have the `w` of here, as has [Interval].

In an interval of levels alone, guidance neither exaggerates what is decided first, in the noisiest
states, nor costs an evaluation in the cleanest ones, where it has little effect ([Interval]).

A student that has distilled the guided estimate takes `w` as an input of its network, and makes
one evaluation ([Distilled]); see `ddim_pl.training.GuidanceDistillation`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddim_pl.clipping import Clipping, clipping_of
from ddim_pl.denoiser import Denoiser, NetworkDenoiser
from ddim_pl.prediction import Prediction, eps_from_x
from ddim_pl.scales import Scales, expand_like
from ddim_pl.schedules import NoiseSchedule

__all__ = ["Guidance", "Guided", "guidance_of", "with_guidance"]


@dataclass(frozen=True)
class Guidance:
    """How much to guide, and where.

    Args:
        weight: The `w` above; at least 0. [CFG]'s is one less.
        interval: Noise-to-signal ratios `sigma_t / alpha_t`, [EDM]'s sigma, between which to
            guide, the first excluded ([Interval], section 3); elsewhere the estimate is that of
            the class alone. By default at every level.
        is_input: Whether the weight is an input of the network, which has learned the guided
            estimates.

    Raises:
        ValueError: If an argument is out of range.
    """

    weight: float
    interval: tuple[float, float] | None = None
    is_input: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(
                f"guidance must be at least 0 and finite, got {self.weight}: 1 is none, 0 is "
                "without classes"
            )
        if self.interval is None:
            return
        object.__setattr__(self, "interval", tuple(self.interval))
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(
                "guidance_interval must be two ratios sigma / alpha of at least 0, the lower one "
                f"first, got {list(self.interval)}: such as [0.28, 2.9]"
            )

    def __str__(self) -> str:
        """Short words for tables and files, which name all that it is."""
        if self.interval is None or self.is_plain:
            return _exact(self.weight)
        low, high = self.interval
        return f"{_exact(self.weight)} in ({_exact(low)}, {_exact(high)}]"

    @property
    def is_plain(self) -> bool:
        """Whether it changes nothing."""
        return self.weight == 1

    @property
    def is_twofold(self) -> bool:
        """Whether it takes the estimates with and without the class, where it applies."""
        return not self.is_input and self.weight not in (0, 1)

    def applies(self, scales: Scales) -> Tensor:
        """Whether it applies at levels of these scales, boolean of their shape."""
        if self.interval is None:
            return torch.ones_like(scales.alpha, dtype=torch.bool)
        ratio = scales.sigma / scales.alpha
        return (ratio > self.interval[0]) & (ratio <= self.interval[1])


def _exact(number: float) -> str:
    """All digits of a number, but no ".0"."""
    return str(float(number)).removesuffix(".0")


def guidance_of(
    weight: float | None,
    interval: tuple[float, float] | None,
    *,
    null_class: int | None,
    distilled_steps: int | None = None,
    guidance_range: Sequence[float] | None = None,
) -> Guidance | None:
    """The guidance of a model by its arguments; None if it has none.

    Args:
        weight: Of `Guidance`, or None.
        interval: Of `Guidance`.
        null_class: Label without a class of the model's network, if there is one.
        distilled_steps: Steps that the model was distilled to, if it was.
        guidance_range: Weights that the model's network takes as an input, if it does.

    Raises:
        ValueError: If the model cannot be guided, or an argument is out of range.
    """
    if weight is None:
        if interval is not None:
            raise ValueError(
                f"guidance_interval must be left out without guidance, got {[*interval]}: set "
                "both, or both to null"
            )
        return None
    if guidance_range is not None:
        return _as_input(weight, interval, guidance_range)
    _check_null_class(weight, null_class)
    if distilled_steps is not None:
        raise ValueError(
            f"guidance must be left out for a model distilled to {distilled_steps} steps, got "
            f"{weight}: it has not learned the steps of images without a class"
        )
    return Guidance(weight, interval)


def _as_input(
    weight: float, interval: tuple[float, float] | None, guidance_range: Sequence[float]
) -> Guidance:
    low, high = guidance_range
    if not low <= weight <= high:
        raise ValueError(
            f"guidance must lie in [{_exact(low)}, {_exact(high)}], the weights that this model "
            f"was distilled for, got {weight}"
        )
    if interval is not None:
        raise ValueError(
            f"guidance_interval must be left out for a model of distilled guidance, got "
            f"{[*interval]}: it has learned to be guided at every level"
        )
    return Guidance(weight, is_input=True)


def with_guidance(
    denoiser: Denoiser, guidance: Guidance | None, null_class: int | None
) -> Denoiser:
    """A denoiser with guidance, which clips as it does; itself without.

    Args:
        denoiser: Estimates with a class and without.
        guidance: How much, and where.
        null_class: Label without a class, if there is one.

    Raises:
        ValueError: If there is guidance that the model cannot have, or no such label.
    """
    if guidance is None:
        return denoiser
    if isinstance(denoiser, NetworkDenoiser) and denoiser.guidance_range is not None:
        asked = _as_input(guidance.weight, guidance.interval, denoiser.guidance_range)
        return replace(denoiser, guidance_weight=asked.weight)
    if guidance.is_input:
        raise ValueError(
            f"guidance must be guidance_by({_exact(guidance.weight)}) of the model that is drawn "
            "from, got one of a network that takes the weight as an input"
        )
    label = _check_null_class(guidance.weight, null_class)
    return Guided(denoiser.without_clipping(), guidance, label, denoiser.clip)


def _check_null_class(weight: float, null_class: int | None) -> int:
    if null_class is None:
        raise ValueError(
            f"guidance must be left out for a network without a null class, got {weight}: train "
            "one with null_class: true and label_dropout: 0.1, see docs/sampling.md"
        )
    return null_class


def guided(with_class: Tensor, without: Tensor, weight: Tensor | float) -> Tensor:
    """The guided estimate, `(B, ...)`, of x, eps or v.

    Args:
        with_class: Estimates of the class, `(B, ...)`.
        without: Estimates without one.
        weight: The `w` above, of all images or `(B,)`.
    """
    if isinstance(weight, Tensor):
        weight = expand_like(weight, with_class)
    return without + weight * (with_class - without)


@dataclass(frozen=True)
class Guided(Denoiser):
    """A denoiser with guidance: one network call of twice the batch where that applies.

    The guided estimate is clipped, and not what it is made of: it leaves the range of images even
    where both of these lie in it ([Imagen], section 2.3).

    Args:
        denoiser: Estimates with a class and without; must not clip.
        guidance: How much, and where.
        null_class: Label of images without a class.
        clip: Clip the guided estimate of x, as in `NetworkDenoiser`.
        label: Class labels `(B,)`, see `condition`.

    Raises:
        ValueError: If the denoiser clips.
    """

    denoiser: Denoiser
    guidance: Guidance
    null_class: int
    clip: bool | Clipping = True
    label: Tensor | None = None

    def __post_init__(self) -> None:
        self.denoiser.check_unclipped("what is guided is clipped")

    @property
    def schedule(self) -> NoiseSchedule:  # type: ignore[override]
        """That of the denoiser."""
        return self.denoiser.schedule

    @property
    def estimates_noise_of_clean_data(self) -> bool:  # type: ignore[override]
        """As the denoiser."""
        return self.denoiser.estimates_noise_of_clean_data

    def __call__(self, z: Tensor, t: Tensor | float) -> Prediction:
        """Guided estimates; arguments and result as of `NetworkDenoiser`.

        Raises:
            ValueError: If there are no labels.
        """
        t = torch.as_tensor(t, dtype=torch.float64)
        scales = self.schedule(t)
        found = self._unclipped(z, t, self.guidance.applies(scales).expand(len(z)))
        rule = clipping_of(self.clip)
        if rule is None:
            return found
        x = rule(found.x)
        return Prediction(x, eps_from_x(scales, z, x))

    def _unclipped(self, z: Tensor, t: Tensor, applies: Tensor) -> Prediction:
        """Estimates of which those where `applies` `(B,)` are guided."""
        if self.label is None:
            raise ValueError("label must be given for guidance, got None: call condition(label)")
        if self.guidance.weight == 0:
            null = self.label.masked_fill(applies.to(self.label.device), self.null_class)
            return self.denoiser.condition(null)(z, t)
        if not (self.guidance.is_twofold and applies.any()):
            return self.denoiser.condition(self.label)(z, t)
        again = applies.nonzero()[:, 0]  # the states to evaluate a second time
        null = self.label.new_full((len(again),), self.null_class)
        denoiser = self.denoiser.condition(torch.cat([self.label, null]))
        states = torch.cat([z, z[again.to(z.device)]])
        x, eps = denoiser(states, torch.cat([t, t[again]]) if t.ndim else t)
        return Prediction(self._guided(x, again), self._guided(eps, again))

    def _guided(self, both: Tensor, again: Tensor) -> Tensor:
        """Of estimates with a class, then without for the states `again`, the guided ones."""
        count = len(both) - len(again)
        with_class = both[:count]
        without = with_class.index_copy(0, again.to(both.device), both[count:])
        return guided(with_class, without, self.guidance.weight)
