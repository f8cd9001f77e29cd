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
from ddim_pl.rng import step_generators

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


class UpdateCheck:
    """Looks at each update before it is made.

    On a GPU this waits for the device once per update. So does the average of the weights, which
    needs the number of its updates.

    Args:
        skip: How many updates in a row may be left out.
    """

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.in_a_row = 0
        self.skipped = 0
        self._parts: list[_Part] = []

    def add(self, batch: "Batch", seed: int, loss: Tensor) -> None:
        """Note a batch of the next update."""
        self._parts.append(_Part(batch, seed, loss.detach()))

    def passes(self, module: "DiffusionModule", optimizer: Optimizer) -> bool:
        """Whether the update can be made; False if it is to be left out.

        Raises:
            NotFiniteError: If it cannot be made, and may not be left out either.
        """
        parts, self._parts = self._parts, []
        numbers = [part.loss.float() for part in parts]
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        gradients = [gradient for gradient in gradients if gradient is not None]
        # A scaler of float16 gradients skips those that overflow by itself.
        if gradients and not scales_gradients(module.trainer):
            numbers += [norm.float() for norm in torch._foreach_norm(gradients)]
        bad = bool(numbers) and not torch.stack(numbers).isfinite().all()
        if self.skip and module.trainer.world_size > 1:
            bad = module.trainer.strategy.reduce_boolean_decision(bad, all=False)
        if not bad:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        message = _describe(module, parts)
        if self.in_a_row > self.skip:
            raise NotFiniteError(
                f"{message}: lower the rate or clip the gradients, or let skip_bad_batches leave "
                f"out single batches; the last good checkpoint is {_last_good(module)}"
            )
        self.skipped += 1
        rank_zero_warn(f"{message}: left out, {self.skipped} by now")
        return False


def _describe(module: "DiffusionModule", parts: Iterable[_Part]) -> str:
    """Say at which images and levels a loss is not finite; the parts are computed once more."""
    found, parts = [], list(parts)
    first = batches_consumed(module.trainer) - len(parts) + 1
    for number, part in enumerate(parts, first):
        losses, levels = _losses_of(module, part)
        indices = indices_of_batch(module.trainer, number)
        for i in (~losses.isfinite()).nonzero().flatten().tolist():
            level = levels.expand(len(losses))[i]
            image = f"image {int(indices[i])}" if indices is not None else f"number {i}"
            found.append(f"{image} of batch {number} at level {level:g}")
    rates = ", ".join(f"{group['lr']:g}" for group in module.trainer.optimizers[0].param_groups)
    more = f" and {len(found) - MOST_IMAGES} more" if len(found) > MOST_IMAGES else ""
    what = "; ".join(found[:MOST_IMAGES]) + more
    return (
        f"loss and gradients must be finite, got nan or inf in update {module.global_step + 1}, "
        f"with rate {rates}, " + (f"from {what}" if found else "in the gradients alone")
    )


@torch.no_grad()
def _losses_of(module: "DiffusionModule", part: _Part) -> tuple[Tensor, Tensor]:
    """Loss of each image `(B,)`, and the levels that they were computed at, `()` or `(B,)`."""
    levels = [torch.tensor(torch.nan)]

    class Recorder(NetworkDenoiser):
        def output(self, z: Tensor, t: Tensor) -> Tensor:
            levels.append(t.cpu())
            return super().output(z, t)

    torch.manual_seed(part.seed)
    settings = module.schedule, module.prediction, module.clip, module.time_input
    denoiser: NetworkDenoiser = Recorder(module.network, *settings)
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
