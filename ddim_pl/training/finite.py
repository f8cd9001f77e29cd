"""Losses, gradients and weights that are finite numbers: what is not spoils all that follows."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.lightning_internals import batches_consumed, indices_of_batch, scales_gradients
from ddim_pl.rng import seed_default_generators, step_generators

if TYPE_CHECKING:
    from ddim_pl.training.base import Batch, DiffusionModule

MOST_IMAGES = 5
"""Images that a message lists at most."""


class NotFiniteError(ValueError):
    """A loss, a gradient or a weight is NaN or infinite."""


def check_finite_weights(state: Mapping[str, Any], remedy: str) -> None:
    """Check the tensors of a `state_dict`.

    Raises:
        NotFiniteError: If one holds a number that is not finite.
    """
    for name, value in state.items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            raise NotFiniteError(f"the weights must be finite, got nan or inf in {name}: {remedy}")


class _Part(NamedTuple):
    """A batch of an update; several where gradients are accumulated."""

    batch: "Batch"
    seed: int
    loss: Tensor


class _Update(NamedTuple):
    """What a message says of an update, whenever it is written."""

    number: int
    rates: str
    first_batch: int
    parts: list[_Part]


class _Flag:
    """A boolean of the device, on its way to the host."""

    def __init__(self, value: Tensor) -> None:
        # Without an event to wait for, the copy itself waits.
        self._value = value.to("cpu", non_blocking=value.is_cuda)
        self._event = None
        if value.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._value)


class UpdateCheck:
    """Looks at each update before it is made.

    A fused optimiser leaves an update out by itself if it is told so on the device. Then nobody
    waits for the device: the host learns of it at the next update, at the end, and before a
    checkpoint is saved, and the weights are still those before. Other optimisers wait.

    Args:
        skip: How many updates in a row may be left out; where it is not 0 the host always waits.
    """

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.in_a_row = 0
        self.skipped = 0
        self._parts: list[_Part] = []
        self._pending: tuple[_Update, _Flag] | None = None

    def begin(self) -> None:
        """Forget what a fit before has left."""
        self.in_a_row, self._parts, self._pending = 0, [], None

    def __deepcopy__(self, memo: dict[int, Any]) -> "UpdateCheck":
        """A copy of a module has no update under way."""
        return UpdateCheck(self.skip)

    def __reduce__(self) -> tuple[Any, ...]:
        """Nor has one in another process."""
        return UpdateCheck, (self.skip,)

    def add(self, batch: "Batch", seed: int, loss: Tensor) -> None:
        """Note a batch of the next update."""
        self._parts.append(_Part(batch, seed, loss.detach()))

    def passes(self, module: "DiffusionModule", optimizer: Optimizer) -> bool:
        """Whether the update can be made; False if it is to be left out.

        Raises:
            NotFiniteError: If it or the one before cannot be made, and may not be left out either.
        """
        self.finish(module)
        parts, self._parts = self._parts, []
        update = _present(module, optimizer, parts)
        bad = _has_bad(module, optimizer, parts)
        if not self.skip and all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self._pending = update, _Flag(bad)
            return True
        is_bad = bool(bad)
        if self.skip and module.trainer.world_size > 1:
            is_bad = module.trainer.strategy.reduce_boolean_decision(is_bad, all=False)
        if not is_bad:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        message = _describe(module, update)
        if self.in_a_row > self.skip:
            raise _error(message, module)
        self.skipped += 1
        rank_zero_warn(f"{message}: left out, {self.skipped} by now")
        return False

    def finish(self, module: "DiffusionModule") -> None:
        """See whether the update before was made.

        Raises:
            NotFiniteError: If it was not.
        """
        if self._pending is None:
            return
        update, flag = self._pending
        if flag.read():
            raise _error(_describe(module, update), module)
        self._pending = None


def _has_bad(module: "DiffusionModule", optimizer: Optimizer, parts: Iterable[_Part]) -> Tensor:
    """Whether a loss or a gradient is not finite, on the device."""
    numbers = [part.loss.float() for part in parts]
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    gradients = [gradient for gradient in gradients if gradient is not None]
    # A scaler of float16 gradients skips those that overflow by itself.
    if gradients and not scales_gradients(module.trainer):
        numbers += [norm.float() for norm in torch._foreach_norm(gradients)]
    if not numbers:
        return torch.tensor(False)
    return ~torch.stack(numbers).isfinite().all()


def _present(module: "DiffusionModule", optimizer: Optimizer, parts: list[_Part]) -> _Update:
    rates = ", ".join(f"{group['lr']:g}" for group in optimizer.param_groups)
    first = batches_consumed(module.trainer) - len(parts) + 1
    return _Update(module.global_step + 1, rates, first, parts)


def _error(message: str, module: "DiffusionModule") -> NotFiniteError:
    return NotFiniteError(
        f"{message}: lower the rate or clip the gradients, or let skip_bad_batches leave out "
        f"single batches; the last good checkpoint is {_last_good(module)}"
    )


def _describe(module: "DiffusionModule", update: _Update) -> str:
    """Say at which images and levels a loss is not finite; the parts are computed once more."""
    found = []
    for number, part in enumerate(update.parts, update.first_batch):
        losses, levels = _losses_of(module, part)
        indices = indices_of_batch(module.trainer, number)
        for i in (~losses.isfinite()).nonzero().flatten().tolist():
            level = levels.expand(len(losses))[i]
            image = f"image {int(indices[i])}" if indices is not None else f"number {i}"
            found.append(f"{image} of batch {number} at level {level:g}")
    more = f" and {len(found) - MOST_IMAGES} more" if len(found) > MOST_IMAGES else ""
    what = "; ".join(found[:MOST_IMAGES]) + more
    return (
        f"loss and gradients must be finite, got nan or inf in update {update.number}, "
        f"with rate {update.rates}, " + (f"from {what}" if found else "in the gradients alone")
    )


@torch.no_grad()
def _losses_of(module: "DiffusionModule", part: _Part) -> tuple[Tensor, Tensor]:
    """Loss of each image `(B,)`, and the levels that they were computed at, `()` or `(B,)`."""
    levels = [torch.tensor(torch.nan)]

    class Recorder(NetworkDenoiser):
        def output(self, z: Tensor, t: Tensor) -> Tensor:
            levels.append(t.cpu())
            return super().output(z, t)

    seed_default_generators(part.seed, module.device)
    settings = module.schedule, module.prediction, module.clip, module.time_input
    denoiser: NetworkDenoiser = Recorder(module.network, *settings, sigma_data=module.sigma_data)
    if module.num_classes is not None:
        denoiser = denoiser.condition(part.batch[1])
    generators = step_generators(part.seed, part.batch[0].device)
    with module.trainer.precision_plugin.forward_context():
        losses = module.loss(denoiser, part.batch, generators)
    return losses.cpu(), levels[-1]


def _last_good(module: "DiffusionModule") -> str:
    """The newest checkpoint of the run, all of which hold finite weights."""
    callbacks = module.trainer.checkpoint_callbacks
    names = ("last_model_path", "best_model_path")
    paths = [getattr(each, name, "") for each in callbacks for name in names]
    files = [Path(path) for path in (*paths, module.trainer.ckpt_path) if path]
    files = [file for file in files if file.is_file()]
    return str(max(files, key=lambda file: file.stat().st_mtime)) if files else "none"


def drop_gradients(network: nn.Module) -> None:
    """Leave nothing for the optimiser to do."""
    for parameter in network.parameters():
        parameter.grad = None
