"""The averaged copy of a network, which is the one to evaluate, export and promote to teacher."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Decay(ABC):
    """What an update keeps of an average; subclasses are frozen dataclasses."""

    @abstractmethod
    def kept(self, updates: int, images: int) -> float:
        """Share of the average that an update keeps.

        Args:
            updates: Number of updates before it, at least 1.
            images: Images of an update.
        """


@dataclass(frozen=True)
class HalfLife(Decay):
    """A decay for any batch size: after so many images half of the average is new ([EDM]).

    An update of B images, after n of them, keeps `0.5^(B / min(images, ramp n B))`.

    Args:
        images: The half-life, positive; by default that of [EDM], table 7, for CIFAR-10.
        ramp: Most of the images seen so far that a half-life may be, positive, so that a run
            forgets its random start; 0.05 is that of the authors' code. None turns it off.

    Raises:
        ValueError: If an argument is out of range.
    """

    images: float = 500_000
    ramp: float | None = 0.05

    def __post_init__(self) -> None:
        for name in ("images", "ramp"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f"{name} of a HalfLife must be positive and finite, got {value}: EDM has "
                    "500000 images and a ramp of 0.05"
                )

    def kept(self, updates: int, images: int) -> float:
        """The share for a half-life, or for a part of the images seen."""
        half_life = self.images
        if self.ramp is not None:
            half_life = min(half_life, self.ramp * updates * images)
        return float(0.5 ** (images / half_life))


class ExponentialAverage(AveragedModel):
    """Averaged copy of a network, buffers included, without gradients and in evaluation mode.

    Update number n keeps `min(decay, (1 + n) / (10 + n))` of the average, as TensorFlow's averages
    of [DDPM] do when given the number of updates, so that a short run forgets its random
    start; or what a `Decay` says. The host counts the updates too, so that an update waits for no
    device.

    Args:
        network: Network to copy.
        decay: Share of the average that an update keeps, in [0, 1); 0 copies the network.

    Attributes:
        module: The copy.
        n_averaged: Number of updates, int64, as checkpoints hold it; changed by `restart` only.

    Raises:
        ValueError: If `decay` lies outside [0, 1).
    """

    n_averaged: Tensor

    def __init__(self, network: nn.Module, decay: float | Decay) -> None:
        if not isinstance(decay, Decay) and not 0 <= decay < 1:
            raise ValueError(
                f"ema_decay must lie in [0, 1), got {decay}: 0.9999 suits 800k updates, 0.999 "
                "some 10k"
            )
        super().__init__(network, use_buffers=True)
        self.decay = decay
        self._count: int | None = None
        self._places: _Places | None = None
        # Frozen, so that neither DDP nor the optimiser takes the copy for something to train.
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module, images: int = 1) -> None:
        """Move the average towards the network's present values; the first update copies them.

        Args:
            model: The network.
            images: Images of the update, on all devices; only a `HalfLife` asks.
        """
        if self._count is None:
            self._count = int(self.n_averaged)
        n = self._count
        keep = self._kept(n, images) if n else 0.0
        if self._places is None or self._places.network is not model:
            self._places = _Places(model, _places(self.module), _places(model))
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for (ours, name), (theirs, _) in zip(*self._places[1:], strict=True):
            average, value = ours[name], theirs[name]
            group = groups.setdefault((average.device, average.dtype), ([], []))
            group[0].append(average)
            group[1].append(value)
        for (_, dtype), (averages, values) in groups.items():
            if keep and dtype.is_floating_point:
                torch._foreach_lerp_(averages, values, 1 - keep)
            else:
                torch._foreach_copy_(averages, values)
        self.n_averaged += 1
        self._count = n + 1

    def _kept(self, n: int, images: int) -> float:
        if isinstance(self.decay, Decay):
            return self.decay.kept(n, images)
        return min(self.decay, (1 + n) / (10 + n))

    def restart(self) -> None:
        """Forget the updates: the next one copies the network."""
        self.n_averaged.zero_()
        self._count = 0

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Read the count of a checkpoint at the next update."""
        super()._load_from_state_dict(*args, **kwargs)
        self._count = None


def choose_average(state: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """The state of a module with another of its averages in the place of the first.

    Args:
        state: The module's state.
        index: 0 for the first, or 1 for the first of `more_averages`.
    """
    start = f"more_averages.{index - 1}."
    chosen = {name: value for name, value in state.items() if index and name.startswith(start)}
    return {**state, **{f"average.{name[len(start) :]}": each for name, each in chosen.items()}}


class _Places(NamedTuple):
    """Where the values of a network and of its average are found, in one order.

    To walk through the modules again takes several times as long as an update. The places hold
    also when values are replaced, as buffers are when a module moves to another device.
    """

    network: nn.Module
    average: list["_Place"]
    values: list["_Place"]


_Place = tuple[dict[str, Any], str]


def _places(network: nn.Module) -> list[_Place]:
    """The places of all parameters and buffers, each tensor once."""
    places: dict[int, _Place] = {}
    for kind in ("_parameters", "_buffers"):
        for module in network.modules():
            held = getattr(module, kind)
            for name, value in held.items():
                if value is not None:
                    places.setdefault(id(value), (held, name))
    return list(places.values())
