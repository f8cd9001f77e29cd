"""Likelihood of the validation images, in bits per dimension, in `test` and `validate`."""

from typing import cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ddim_pl.checks import check_at_least, check_one_of
from ddim_pl.data.base import shared_batches
from ddim_pl.evaluation.worker import Worker, check_images
from ddim_pl.images import from_uint8
from ddim_pl.lightning_internals import datamodule_of
from ddim_pl.likelihood import (
    DecoderVariance,
    ode_bits_per_dim,
    ode_levels,
    variational_bound,
)
from ddim_pl.noise import GammaNoise
from ddim_pl.noise.reverse import reverse_model
from ddim_pl.training import DiffusionModule
from ddim_pl.transitions import Variance


class BitsPerDim(L.Callback):
    """Measure the likelihood of the validation images under the averaged network.

    Logs means over the images, see `ddim_pl.likelihood`: "bits_per_dim", the variational bound of
    ancestral sampling over all levels, its parts "bits_prior", "bits_diffusion" and
    "bits_decoder", and with `ode` "bits_per_dim_ode", the value of the probability-flow ODE for
    dequantised images. Runs in `test` and `validate`, not in `fit`. The ranks share the images. An
    image's noise depends on the module's seed and its index: batch size and devices change only
    the rounding.

    Args:
        num_images: Images at most, evenly spaced over the validation set; None takes all.
        batch_size: Images in a batch, on each device.
        num_terms: Terms of the bound to draw for each image, an unbiased estimate; by default all
            are summed, which takes as many network calls for a batch as there are levels.
        first_level: Level of the bound's first state. A model of Gamma noise needs one whose shape
            is at least 1: the densities of cleaner levels have poles.
        variance: That of the model's steps: "small", or "large" as in [DDPM]'s figures of
            CIFAR-10.
        decoder_variance: That of the last step: "transition" from clean data, or "posterior" as in
            [DDPM]'s figures, see `variational_bound`.
        gaussian_share: For Gamma noise, see `variational_bound`; by default 0.001.
        ode: Measure the ODE as well, in float32 whatever the trainer's precision, and without
            clipping, which the ODE does not allow.
        ode_steps: Steps of the ODE, 4 network calls and 4 backward passes each.
        ode_probes: Random directions for its divergence.

    Raises:
        ValueError: If a number is too small, or a variance unknown.
    """

    def __init__(
        self,
        num_images: int | None = 256,
        *,
        batch_size: int = 128,
        num_terms: int | None = None,
        first_level: int = 1,
        variance: Variance = "small",
        decoder_variance: DecoderVariance = "transition",
        gaussian_share: float | None = None,
        ode: bool = False,
        ode_steps: int = 50,
        ode_probes: int = 1,
    ) -> None:
        check_at_least(
            1,
            num_images=num_images,
            batch_size=batch_size,
            num_terms=num_terms,
            first_level=first_level,
            ode_steps=ode_steps,
            ode_probes=ode_probes,
        )
        check_one_of(Variance, variance=variance)
        check_one_of(DecoderVariance, decoder_variance=decoder_variance)
        self.num_images = num_images
        self.batch_size = batch_size
        self.num_terms = num_terms
        self.first_level = first_level
        self.variance = variance
        self.decoder_variance = decoder_variance
        self.gaussian_share = gaussian_share
        self.ode = ode
        self.ode_steps = ode_steps
        self.ode_probes = ode_probes

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there will be images and terms to measure, before the run begins.

        Raises:
            ValueError: If the data module has no images, or an argument does not fit the model.
        """
        if stage not in ("validate", "test"):
            return
        check_images(datamodule_of(trainer))
        assert isinstance(pl_module, DiffusionModule)
        reverse_model(pl_module.noise, self.variance, self.gaussian_share)
        if pl_module.sampling_guidance is not None:
            rank_zero_info("Bits per dimension are those of the network without guidance")
        most = pl_module.schedule.num_levels - self.first_level
        if most < 1:
            raise ValueError(
                f"first_level must be below {pl_module.schedule.num_levels}, the schedule's last, "
                f"got {self.first_level}"
            )
        if self.num_terms is not None and self.num_terms > most:
            raise ValueError(
                f"num_terms must be at most {most}, one less than the bound's levels, got "
                f"{self.num_terms}: None sums all terms"
            )
        if isinstance(pl_module.noise, GammaNoise):
            self._check_gamma(pl_module)

    def _check_gamma(self, pl_module: DiffusionModule) -> None:
        noise, schedule = pl_module.noise, pl_module.schedule
        assert isinstance(noise, GammaNoise)
        if self.ode:
            raise ValueError(
                f"ode must be False for {noise}, got True: the differential equation is that of "
                "Gaussian noise"
            )
        shapes = noise.concentration(schedule(torch.arange(1.0, schedule.num_levels + 1)))
        least = int((shapes < 1).sum()) + 1
        if self.first_level < least:
            raise ValueError(
                f"first_level must be at least {least} for {noise}, got {self.first_level}: the "
                "shapes of cleaner levels are below 1, and the densities have poles"
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, unless this validation belongs to training."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._measure(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure."""
        self._measure(trainer, pl_module, "test")

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, DiffusionModule)
        val_set = check_images(datamodule_of(trainer)).val_set
        count = min(self.num_images or len(val_set), len(val_set))
        chosen = torch.arange(count) * len(val_set) // count
        names = ["bits_per_dim", "bits_prior", "bits_diffusion", "bits_decoder"]
        names += ["bits_per_dim_ode"] if self.ode else []
        worker = Worker(trainer, pl_module)
        device = worker.device
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)  # the last counts
        batches = shared_batches(count, self.batch_size, worker.rank, worker.world_size)
        for batch in worker.progress(batches, len(batches), "bits per dimension"):
            indices = chosen[batch]
            x = from_uint8(val_set.images(indices)).to(pl_module.device)
            label = None if pl_module.num_classes is None else val_set.labels(indices)
            values = self._bits(worker, x, label, indices)
            ones = torch.ones(len(x), dtype=torch.float64, device=device)
            sums += torch.stack([*values, ones]).sum(1)
        sums = cast(Tensor, trainer.strategy.reduce(sums, reduce_op="sum"))
        for name, value in zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True):
            pl_module.log(f"{stage}/{name}", value, rank_zero_only=False)

    def _bits(
        self, worker: Worker, x: Tensor, label: Tensor | None, indices: Tensor
    ) -> list[Tensor]:
        """The numbers to be averaged, `(B,)` each."""
        module = worker.model
        denoiser = module.conditioned(label)
        images = indices.tolist()
        with worker.precision():  # as images are sampled
            bound = variational_bound(
                denoiser,
                x,
                generator=module.image_noise(images),
                levels=torch.arange(self.first_level, module.schedule.num_levels + 1),
                num_terms=self.num_terms,
                variance=self.variance,
                decoder_variance=self.decoder_variance,
                noise=module.noise,
                gaussian_share=self.gaussian_share,
                progress=worker.shows_progress,
            )
        values = [bound.total, *bound]
        if self.ode:
            values.append(
                ode_bits_per_dim(
                    denoiser.without_clipping(),
                    x,
                    ode_levels(module.schedule.num_levels, self.ode_steps),
                    generator=module.image_noise(images),
                    num_probes=self.ode_probes,
                    dequantise=True,
                    progress=worker.shows_progress,
                )
            )
        return values
