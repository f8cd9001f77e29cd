"""Evaluating a denoiser on many states at many levels, in pieces and on several processes."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim_pl.denoiser import Denoiser

_MEMORY = Path("/proc/meminfo")  # Linux; what it calls free leaves out what the cache would give


def check_max_batch(max_batch: int | None) -> None:
    """See that it is a number of states.

    Raises:
        ValueError: If it is less than 1.
    """
    if max_batch is not None and max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}: null takes all at once")


def free_memory(device: torch.device) -> float:
    """Bytes that tensors can still take on a device; infinite where nobody can tell."""
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
    """A denoiser's estimates of the clean image for any states of the samples of its batch.

    Args:
        denoiser: Estimates of the clean image and the noise, for a batch of samples.
        max_batch: Most states in one evaluation of the network; by default all. Halved, with a
            warning, as often as the device's memory is too small.
        split: Evaluate a share of the states in each process, and exchange them.
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
            samples: Which sample of the batch each belongs to, `(N,)` int64.
        """
        if not self.split:
            return self._in_pieces(z, t, samples)
        if torch.is_grad_enabled() and z.requires_grad:
            raise ValueError("split_levels has no gradients: set it to false")
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        share = -(-len(z) // world)
        # The last share may be short, but all must send as much.
        mine = torch.arange(rank * share, (rank + 1) * share).clamp(max=len(z) - 1)
        x = self._in_pieces(z[mine], t[mine], samples[mine]).contiguous()
        parts = [torch.empty_like(x) for _ in range(world)]
        torch.distributed.all_gather(parts, x)
        return torch.cat(parts)[: len(z)]

    def of_chain(self, states: Tensor, levels: Tensor) -> Tensor:
        """Estimates from states `(B, N, ...)`, those of all samples at the same levels `(N,)`."""
        batch, count = states.shape[:2]
        samples = torch.arange(batch).repeat_interleave(count)
        x = self(states.flatten(0, 1), levels.repeat(batch), samples)
        return x.unflatten(0, (batch, count))

    def _in_pieces(self, z: Tensor, t: Tensor, samples: Tensor) -> Tensor:
        while True:
            size = min(self.max_batch or len(z), len(z))
            try:
                pieces = [slice(start, start + size) for start in range(0, len(z), size)]
                return torch.cat([self._evaluate(z[i], t[i], samples[i]) for i in pieces])
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            # Outside the handler, where the error would keep alive the tensors that did not fit.
            self.max_batch = -(-size // 2)
            warnings.warn(
                f"{size} states of a chain do not fit into the device's memory at once: going on "
                f"with max_batch={self.max_batch}, set it to spare the attempt",
                stacklevel=2,
            )

    def _evaluate(self, z: Tensor, t: Tensor, samples: Tensor) -> Tensor:
        return self.denoiser.select(samples)(z, t).x


def in_processes() -> bool:
    """Whether this is one of several processes that can talk to one another."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


def same_everywhere(z: Tensor, levels: Tensor, label: Tensor | None, problem: str | None) -> None:
    """See that all processes have the same chain before them; all raise, or none.

    Args:
        z: Start states.
        levels: Levels.
        label: Classes, if there are any.
        problem: Why this process cannot go on, if it cannot.

    Raises:
        ValueError: If one has a problem, or other states, levels or classes than the rest.
    """
    mine = (tuple(z.shape), digest(z), digest(levels), None if label is None else digest(label))
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, (problem, mine))
    problems = [each for each, _ in every if each is not None]
    if problems:
        raise ValueError(problems[0])
    if any(each != every[0][1] for _, each in every):
        raise ValueError(
            "split_levels needs the same latents, levels and classes in every process, and these "
            "differ: set it to false where processes draw images of their own, as `sample` does"
        )


def digest(values: Tensor) -> bytes:
    """The bytes of a tensor, shortened."""
    flat = values.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).digest()
