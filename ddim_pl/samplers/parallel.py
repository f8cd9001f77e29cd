"""Evaluation of a denoiser on the states of a chain, in pieces and on several processes."""

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim_pl.denoiser import Denoiser
from ddim_pl.samplers.base import State
from ddim_pl.transitions import implied_x

_MEMORY = Path("/proc/meminfo")  # Linux; "available" includes what the page cache would free


def free_memory(device: torch.device) -> float:
    """Bytes that are free for tensors on a device; infinite if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and _MEMORY.is_file():
        for line in _MEMORY.read_text().splitlines():
            name, _, size = line.partition(":")
            if name == "MemAvailable":
                return 1024.0 * int(size.split()[0])
    return float("inf")


class Estimates:
    """Estimates of the clean image for any states of the samples of a batch.

    Args:
        denoiser: Estimates of the clean image and the noise, for a batch of samples.
        max_batch: Maximum number of states in one network evaluation; by default all. Halved, with
            a warning, while the device's memory is too small.
        split: Evaluate a share of the states in each process, and exchange the estimates.
    """

    def __init__(
        self, denoiser: Denoiser, *, max_batch: int | None = None, split: bool = False
    ) -> None:
        self.denoiser = denoiser
        self.max_batch = max_batch
        self.split = split and in_processes()

    def __call__(self, z: Tensor, t: Tensor, samples: Tensor) -> Tensor:
        """Estimate the clean images, `(N, ...)`.

        Args:
            z: States, `(N, ...)`.
            t: Their levels, `(N,)`.
            samples: Index of the sample each belongs to, `(N,)` int64.

        Raises:
            ValueError: If the states are split over processes and need a gradient.
        """
        if not self.split:
            return self._in_pieces(z, t, samples)
        if torch.is_grad_enabled() and z.requires_grad:
            raise ValueError("split_levels must be False where gradients are needed, got True")
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        share = -(-len(z) // world)
        # The last share may be short, but all processes must send the same number.
        mine = torch.arange(rank * share, (rank + 1) * share).clamp(max=len(z) - 1)
        x = self._in_pieces(z[mine], t[mine], samples[mine]).contiguous()
        parts = [torch.empty_like(x) for _ in range(world)]
        torch.distributed.all_gather(parts, x)
        return torch.cat(parts)[: len(z)]

    def first(self, z: Tensor, levels: Tensor) -> Tensor:
        """Estimates `(B, 1, ...)` at the first level, the same bits in every process."""
        first = self.denoiser(z, levels[0]).x[:, None]
        if self.split:  # the last bit may differ between devices
            first = first.contiguous()
            torch.distributed.broadcast(first, 0)
        return first

    def of_chain(self, states: Tensor, levels: Tensor) -> Tensor:
        """Estimates from states `(B, N, ...)` of all samples at the same levels `(N,)`."""
        batch, count = states.shape[:2]
        samples = torch.arange(batch).repeat_interleave(count)
        x = self(states.flatten(0, 1), levels.repeat(batch), samples)
        return x.unflatten(0, (batch, count))

    def _in_pieces(self, z: Tensor, t: Tensor, samples: Tensor) -> Tensor:
        while True:
            size = min(self.max_batch or len(z), len(z))
            try:
                pieces = [slice(start, start + size) for start in range(0, len(z), size)]
                return torch.cat([self.denoiser.select(samples[i])(z[i], t[i]).x for i in pieces])
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            # Not in the handler, where the exception would keep tensors alive.
            self.max_batch = -(-size // 2)
            warnings.warn(
                f"{size} states of a chain do not fit into the device's memory at once: "
                f"continuing with max_batch={self.max_batch}; set it to avoid the attempt",
                stacklevel=2,
            )


def trajectory_of(
    denoiser: Denoiser, z: Tensor, states: Tensor, levels: Tensor
) -> Iterator[State]:
    """Yield the states of a solved chain, each with the x of the DDIM step that leads to it.

    Args:
        denoiser: Estimates of the clean image and the noise.
        z: Start states, `(B, ...)`.
        states: States at all levels but the first, `(B, S, ...)`.
        levels: Falling levels, `(S + 1,)`.
    """
    schedule = denoiser.schedule
    for k, s in enumerate(levels[1:]):
        state = states[:, k]
        yield State(s, state, implied_x(z, state, schedule(levels[k]), schedule.step_end(s)))
        z = state


def in_processes() -> bool:
    """Whether this is one of several processes of `torch.distributed`."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


def same_everywhere(z: Tensor, levels: Tensor, label: Tensor | None, problem: str | None) -> None:
    """Check that all processes solve the same chain; either all raise, or none.

    Args:
        z: Start states.
        levels: Levels.
        label: Class labels, if there are any.
        problem: Error message of this process, if it cannot continue.

    Raises:
        ValueError: If a process has a problem, or its states, levels or labels differ.
    """
    mine = (tuple(z.shape), digest(z), digest(levels), None if label is None else digest(label))
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, (problem, mine))
    problems = [each for each, _ in every if each is not None]
    if problems:
        raise ValueError(problems[0])
    if any(each != every[0][1] for _, each in every):
        raise ValueError(
            "split_levels must have the same latents, levels and labels in every process, got "
            "different ones: set it to False where each process samples its own images"
        )


def digest(values: Tensor) -> bytes:
    """Hash of a tensor's bytes."""
    flat = values.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).digest()
