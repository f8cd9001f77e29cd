"""What every training method shares: a network, its average, and how to sample it."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerConfig, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ddim_pl.checks import check_at_least, check_one_of
from ddim_pl.clipping import Clipping, clipping_of
from ddim_pl.damage import read_archive
from ddim_pl.data.batches import BatchReader
from ddim_pl.denoiser import Denoiser, NetworkDenoiser, TimeInput
from ddim_pl.guidance import Guidance, guidance_of, with_guidance
from ddim_pl.lightning_internals import callbacks_of, constructor_arguments, forget_foreign_files
from ddim_pl.networks.unet import UNet
from ddim_pl.noise import GaussianNoise, Noise, latents
from ddim_pl.prediction import PredictionType
from ddim_pl.rng import (
    ImageNoise,
    NoiseSource,
    StepGenerators,
    derive_seed,
    image_noise,
    seed_default_generators,
    step_generators,
)
from ddim_pl.samplers import Sampler
from ddim_pl.samplers.gamma import default_sampler
from ddim_pl.schedules import LinearSchedule, NoiseSchedule
from ddim_pl.timesteps import make_levels
from ddim_pl.training.classes import compare_classes, record_classes
from ddim_pl.training.ema import Decay, ExponentialAverage
from ddim_pl.training.finite import UpdateCheck, check_finite_weights, drop_gradients
from ddim_pl.training.fused import keep_layout, use_fused_kernels
from ddim_pl.training.guard import RunGuard
from ddim_pl.training.hyperparameters import (
    BUILDER,
    INSTANTIATOR,
    NotPlainError,
    describe,
    import_path,
)
from ddim_pl.training.image_shape import image_shape_of
from ddim_pl.training.origin import KEY, Origin, read_origin
from ddim_pl.training.reduced import NetworkPrecision, ReducedCopy
from ddim_pl.training.resuming import apply_settings
from ddim_pl.training.warmup import Warmup

OptimizerCallable = Callable[[Iterable[nn.Parameter]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]
Batch = tuple[Tensor, ...]
LossKind = Literal["l2", "l1"]


class DiffusionModule(L.LightningModule, ABC):
    """A network in training, the average of its weights, and the sampler that evaluates it.

    Validation, test, prediction and `sample` use the average. Subclasses implement `loss`.

    Args:
        network: Module `forward(z, t)`; with `num_classes` set on it, `forward(z, t, label)`.
        schedule: Noise schedule; by default that of DDPM, linear with 1000 levels.
        noise: Law of the noise; by default Gaussian. Latents have the same law.
        prediction: What the network predicts: "eps", "x", "v", "residual", "edm", or "both" x and
            eps, for which it needs twice the output channels; see `ddim_pl.prediction`.
        time_input: What the network is fed for a level, see `NetworkDenoiser`.
        sigma_data: Standard deviation of the images, by which the network's input is scaled and
            "edm" is read; 1 scales nothing, and EDM has 0.5. See `NetworkDenoiser`.
        image_shape: `(C, H, W)` of an image; by default read off the network.
        clip: Clip estimates of the clean image to [-1, 1], or by a rule of `ddim_pl.clipping`,
            when sampling, unless the sampler has a `clip` of its own.
        sampler: Sampler for evaluation; by default the deterministic one of the noise, which for
            Gaussian noise is DDIM with eta = 0.
        timesteps: Name of a strategy in `ddim_pl.timesteps`, a `.json` file that `main.py levels`
            wrote, or the levels themselves.
        num_steps: Steps of the sampler; not used when `timesteps` is a list, or a strategy with a
            length of its own.
        last_level: Level that sampling ends at, in place of 0; levels at or below it are left out.
            1 is `set_alpha_to_one: false` of diffusers.
        guidance: Weight of classifier-free guidance when images are drawn, see `ddim_pl.guidance`;
            needs a network with a null class. Encoding, likelihoods and losses are without.
        guidance_interval: Ratios `sigma / alpha` between which to guide; by default everywhere.
        optimizer: Makes the optimiser from the parameters; by default Adam with rate 2e-4. A
            `functools.partial` of a class is stored in checkpoints, a lambda is not.
        lr_scheduler: Makes a learning-rate schedule, stepped once per update; stored likewise.
        warmup_steps: Updates over which the rate grows linearly from 0; multiplies `lr_scheduler`.
        ema_decay: Decay of the weights' average, see `ExponentialAverage`, or a `HalfLife`.
        skip_bad_batches: How many updates in a row are left out because their loss or gradients
            are not finite, before the fit stops; by default none. "train/skipped_batches" counts
            them since the fit began.
        sampling_precision: 32, or "bf16": images are drawn with a bfloat16 copy of the averaged
            weights, see `ddim_pl.training.reduced`. Encoding, likelihoods and losses are not.
        compile: Compile the network with `torch.compile`. "auto": in a fit on a CUDA device, and
            not where that fails. True: wherever the model is used, with what "philox" draws with;
            a command that is given a checkpoint alone does not take it from there.
        seed: Seed of all noise in training and of the sampled images.
        noise_source: Where the noise of sampled images comes from: "generators", one on the CPU
            for each image, or "philox", one kernel on the module's device. The images differ.

    Raises:
        ValueError: If an argument is out of range or does not fit another.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule | None = None,
        *,
        noise: Noise | None = None,
        prediction: PredictionType = "eps",
        time_input: TimeInput = "index",
        sigma_data: float = 1.0,
        image_shape: tuple[int, int, int] | None = None,
        clip: bool | Clipping = True,
        sampler: Sampler | None = None,
        timesteps: str | list[float] = "trailing",
        num_steps: int = 50,
        last_level: float = 0.0,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        ema_decay: float | Decay = 0.9999,
        skip_bad_batches: int = 0,
        sampling_precision: NetworkPrecision = 32,
        compile: bool | Literal["auto"] = "auto",
        seed: int = 0,
        noise_source: NoiseSource = "generators",
    ) -> None:
        super().__init__()
        self._arguments = constructor_arguments(DiffusionModule)
        self.schedule, self.noise = schedule or LinearSchedule(), noise or GaussianNoise()
        self.sampler = sampler or default_sampler(self.noise)
        self.timesteps, self.num_steps, self.last_level = timesteps, num_steps, last_level
        self.image_shape = image_shape_of(network, image_shape)
        self.network, self.average = network, make_average(network, ema_decay)
        self.guidance, self.clip, self.compile_network = guidance, clip, compile
        self.guidance_interval, self.sampling_precision = guidance_interval, sampling_precision
        self.prediction, self.optimizer, self.lr_scheduler = prediction, optimizer, lr_scheduler
        self.sigma_data, self.time_input, self.warmup_steps = sigma_data, time_input, warmup_steps
        self.noise_source, self.seed, self.skip_bad_batches = noise_source, seed, skip_bad_batches
        self._check_and_record()

    def _check_and_record(self) -> None:
        """Find what is wrong now, not after hours of training; then keep the arguments."""
        self.compiles, self._reduced = self.compile_network is True, ReducedCopy()
        check_at_least(0, warmup_steps=self.warmup_steps, seed=self.seed)
        check_at_least(0, skip_bad_batches=self.skip_bad_batches)
        check_one_of(NetworkPrecision, sampling_precision=self.sampling_precision)
        self.image_noise(())  # says what is wrong
        self._update_check = UpdateCheck(self.skip_bad_batches)
        self._update_is_good = True
        self._warned_of: set[Sampler] = set()
        self.check_noise(self.sampler)
        _ = self.levels, self.sampling_guidance
        channels = self.image_shape[0] * (2 if self.prediction == "both" else 1)
        found = getattr(self.network, "out_channels", channels)
        if found != channels:
            raise ValueError(
                f"prediction={self.prediction!r} reads {channels} channels but the network has "
                f"out_channels={found}: 'both' takes twice the channels of an image, every other "
                "as many"
            )
        _ = self.denoiser
        if not self.noise.is_gaussian and self.schedule.ends_without_signal:
            raise ValueError(
                f"noise must be Gaussian for {self.schedule}, got {self.noise}, whose scale is 0 "
                "where there is no signal: use the schedule without ZeroTerminalSNR"
            )
        self.record_arguments()

    origin: Origin = ()
    """Where the weights come from; of a distillation, with what it has done itself."""

    distilled_steps: int | None = None
    """Steps that the averaged network was distilled to; None if it was trained at all levels."""

    distilled_sampler: Sampler | None = None
    """Sampler whose steps they are; None is the deterministic one of the noise."""

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Any, map_location: Any = None, **changes: Any
    ) -> Self:
        """As Lightning's; but a checkpoint builds no class that `ddim_pl.trust` does not allow.

        Args:
            checkpoint_path: The file.
            map_location: Where its tensors go.
            **changes: Arguments of the constructor in place of the checkpoint's, and `strict`.

        Raises:
            UntrustedError: If the checkpoint names another class.
            DamagedError: If the file does not match its checksums.
        """
        if isinstance(checkpoint_path, str | Path) and Path(checkpoint_path).is_file():
            read_archive(checkpoint_path)  # says what is damaged
        changes |= {"weights_only": True, "_instantiator": BUILDER}
        return super().load_from_checkpoint(checkpoint_path, map_location, **changes)

    # ---- what the method is -------------------------------------------------------------------

    @abstractmethod
    def loss(self, denoiser: NetworkDenoiser, batch: Batch, generators: StepGenerators) -> Tensor:
        """Loss of each image, `(B,)`.

        Args:
            denoiser: The network, in training or averaged, with the batch's labels.
            batch: Images in [-1, 1], `(B, C, H, W)`, their labels `(B,)`, and what else the data
                module gives.
            generators: Sources of all noise.
        """

    def check_data(self, datamodule: L.LightningDataModule | None) -> None:
        """Check, before a fit writes anything, that the data is of the kind that `loss` needs.

        Raises:
            ValueError: If it is not.
        """

    @cached_property
    def read_batch(self) -> BatchReader:
        """Brings the batches of any loader into the form that `loss` takes."""
        return BatchReader(self.image_shape, self.num_classes)

    # ---- how to sample it ---------------------------------------------------------------------

    @property
    def levels(self) -> Tensor:
        """Levels that the sampler visits, `(S + 1,)`."""
        return make_levels(self.timesteps, self.schedule, self.num_steps, self.last_level)

    @property
    def sampling_clip(self) -> Clipping | None:
        """The rule by which estimates are clipped when sampling; the sampler's comes first."""
        return clipping_of(self.clip if self.sampler.clip is None else self.sampler.clip)

    @property
    def sampling_guidance(self) -> Guidance | None:
        """How images are guided when they are drawn."""
        return self.guidance_by(self.guidance)

    def guidance_by(self, weight: float | None) -> Guidance | None:
        """How images are guided with this weight, in this model's interval.

        Raises:
            ValueError: If it cannot be guided so.
        """
        return guidance_of(
            weight,
            self.guidance_interval,
            null_class=self.null_class,
            distilled_steps=self.distilled_steps,
            guidance_range=self.denoiser.guidance_range,
        )

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The averaged network as a denoiser, in the precision of its weights."""
        return self._denoiser(self.average.module)

    @property
    def sampling_denoiser(self) -> NetworkDenoiser:
        """The averaged network as a denoiser, in `sampling_precision`: the one to sample from."""
        if self.sampling_precision == 32:
            return self.denoiser
        return self._denoiser(self._reduced.of(self.average.module))

    @property
    def num_classes(self) -> int | None:
        """Number of classes the network is conditioned on, if any."""
        return getattr(self.network, "num_classes", None)

    @property
    def null_class(self) -> int | None:
        """Label of an image without one, if the network has a class for it."""
        return self.num_classes if getattr(self.network, "null_class", False) else None

    def _denoiser(self, network: nn.Module) -> NetworkDenoiser:
        return NetworkDenoiser(
            network,
            self.schedule,
            self.prediction,
            self.clip,
            self.time_input,
            sigma_data=self.sigma_data,
        )

    @torch.no_grad()
    def sample(
        self,
        indices: Iterable[int],
        *,
        label: Tensor | None = None,
        sampler: Sampler | None = None,
        levels: Tensor | None = None,
        guidance: Guidance | None = None,
        seed: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw images with the averaged network.

        Image `i` is a function of seed, `noise_source` and `i` alone, up to rounding: it does not
        depend on the batch or the device.

        Args:
            indices: Which images, B numbers.
            label: Classes `(B,)`; by default class `i mod num_classes`, so that all are
                equally frequent.
            sampler: By default this module's.
            levels: Levels to visit, `(S + 1,)`; by default this module's.
            guidance: By default this module's.
            seed: By default this module's.
            progress: Show a progress bar over the steps.

        Returns:
            Images `(B, C, H, W)`, float32 about [-1, 1].
        """
        indices = [int(i) for i in indices]
        levels = self.levels if levels is None else levels
        z, generators = self.latents(indices, levels[0], seed=seed)
        if label is None:
            label = self.label_of(indices)
        if sampler is not None:
            self.check_noise(sampler)
        return (sampler or self.sampler)(
            self.conditioned(label, sampling=True, guidance=guidance),
            z,
            levels,
            generator=generators,
            progress=progress,
        )

    def latents(
        self, indices: Iterable[int], level: Tensor | float, *, seed: int | None = None
    ) -> tuple[Tensor, list[torch.Generator] | ImageNoise]:
        """Start noise `(B, C, H, W)` of the noise's law on the device, and the images' generators.

        Args:
            indices: Which images, B numbers.
            level: Level that sampling starts at.
            seed: By default this module's.
        """
        return latents(
            self.seed if seed is None else seed,
            indices,
            self.image_shape,
            noise=self.noise,
            scales=self.schedule(level),
            noise_source=self.noise_source,
            device=self.device,
            compile=self.compiles,
        )

    def image_noise(
        self, indices: Iterable[int], *, seed: int | None = None
    ) -> list[torch.Generator] | ImageNoise:
        """Fresh generators of images, as `latents` begins with; arguments as there."""
        return image_noise(
            self.noise_source,
            self.seed if seed is None else seed,
            indices,
            device=self.device,
            compile=self.compiles,
        )

    def label_of(self, indices: Iterable[int]) -> Tensor | None:
        """Class of the images `indices`, `(B,)`, if the network has classes: all in turn."""
        if self.num_classes is None:
            return None
        return torch.tensor([int(i) % self.num_classes for i in indices])

    def conditioned(
        self, label: Tensor | None, *, sampling: bool = False, guidance: Guidance | None = None
    ) -> Denoiser:
        """The averaged network as a denoiser of images of these classes `(B,)`, on its device.

        Args:
            label: The classes; not used if the network has none.
            sampling: To draw images, in `sampling_precision` and with guidance.
            guidance: By default this module's; without `sampling` there is none.
        """
        denoiser: Denoiser = self.sampling_denoiser if sampling else self.denoiser
        if sampling:
            guidance = guidance or self.sampling_guidance
            denoiser = with_guidance(denoiser, guidance, self.null_class)
        if self.num_classes is None or label is None:
            return denoiser
        return denoiser.condition(label.to(self.device))

    # ---- Lightning ----------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Set the network's mode; the average, which is only evaluated, stays without dropout."""
        super().train(mode)
        self.average.eval()
        return self

    def configure_callbacks(self) -> list[L.Callback]:
        """What guards a fit, once."""
        has_one = any(isinstance(callback, RunGuard) for callback in callbacks_of(self.trainer))
        return [] if has_one else [RunGuard()]

    average_index: int = 0
    """Which average a checkpoint is read with, where it has several."""

    checkpoint_step: int = 0
    """Updates of the checkpoint that a trainer has read, also where it does not train."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the number of updates, unless the weights are spoiled; keep the settings given."""
        check_finite_weights(checkpoint["state_dict"], "give an earlier checkpoint")
        check_meaning_of_guidance(self.denoiser, checkpoint)
        self.checkpoint_step = checkpoint.get("global_step", 0)
        if KEY in checkpoint:
            self.origin = read_origin(checkpoint)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            apply_settings(self, checkpoint)
            compare_classes(self, checkpoint)
            forget_foreign_files(self.trainer, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the files before, if the weights are spoiled or the last update was not made."""
        checkpoint[KEY] = [*self.origin]
        record_classes(self, checkpoint)
        self._update_check.finish(self)
        check_finite_weights(checkpoint["state_dict"], "lower the rate or clip the gradients")

    def setup(self, stage: str) -> None:
        """Lay out and compile the networks in place, so that checkpoints keep their names."""
        in_fit = stage == "fit" and self._trainer is not None
        if in_fit and str(self.trainer.precision).startswith("bf16"):
            for network in self.networks:
                channels_last(network)
        self.compiles = self.compile_network is True or (
            self.compile_network == "auto" and stage == "fit" and _trains_on_cuda(self)
        )
        if self.compile_network == "auto" and self.compiles and self._suppressed is None:
            config: Any = torch._dynamo.config
            self._suppressed = config.suppress_errors
            config.suppress_errors = True  # without a compiler it goes on without
        if self.compiles and not (self._trainer and _trains_on_cuda(self)):
            rank_zero_info("Compiling the network takes a minute or more on a CPU")
        for network in self.networks if self.compiles else []:
            network.compile()

    def teardown(self, stage: str) -> None:
        """After a fit that compiled by itself, go on without, and tell others why they cannot."""
        if self._suppressed is not None:
            config: Any = torch._dynamo.config
            config.suppress_errors, self._suppressed = self._suppressed, None
            self.compiles = False
            for network in self.networks:
                network._compiled_call_impl = None

    _suppressed: bool | None = None
    compiles: bool
    """Whether the networks, and what draws noise, are compiled."""

    @property
    def networks(self) -> list[nn.Module]:
        """All networks: that in training, its average, and what a method adds."""
        return [self.network, self.average.module]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert; on a CUDA device the channels of all networks are last."""
        super()._apply(fn, recurse)
        for network in self.networks:
            if any(weight.is_cuda for weight in network.parameters()):
                channels_last(network)
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean loss of the batch."""
        # With accumulated gradients several batches share one global step.
        part = batch_idx % self.trainer.accumulate_grad_batches
        seed = derive_seed(self.seed, self.global_step, part, self.global_rank)
        # Dropout draws from the global generator; seeding it makes a resumed run exact.
        seed_default_generators(seed, self.device)
        batch = self.read_batch(batch)
        parts = self.trainer.world_size * self.trainer.accumulate_grad_batches
        self._images_per_update = len(batch[0]) * parts
        loss = self._mean_loss(self.network, batch, seed)
        self._update_check.add(batch, seed, loss)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    _images_per_update: int = 1

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the weights, then their average."""
        super().optimizer_step(*args, **kwargs)
        if self._update_is_good:
            self.average.update_parameters(self.network, self._images_per_update)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make no update of what is not finite."""
        self._update_is_good = self._update_check.passes(self, optimizer)
        if not self._update_is_good:
            drop_gradients(self.network)
        if self.skip_bad_batches:
            self.log("train/skipped_batches", float(self._update_check.skipped))

    def on_train_start(self) -> None:
        """Begin to look at updates."""
        self._update_check.begin()

    def on_train_end(self) -> None:
        """See whether the last update was made."""
        self._update_check.finish(self)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the averaged network's loss, with the same noise every time."""
        self._log_loss("val/loss", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the averaged network's loss, with the same noise every time."""
        self._log_loss("test/loss", batch, batch_idx)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Draw the images whose indices `(B,)` the batch holds."""
        return self.sample(batch.tolist())

    def configure_optimizers(self) -> OptimizerConfig | OptimizerLRSchedulerConfig:
        """Optimiser over the network in training; the schedule steps once per update."""
        make = self.optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=2e-4))
        optimizer = make(self.network.parameters())
        use_fused_kernels(optimizer)
        keep_layout(optimizer)
        schedule = self.lr_scheduler(optimizer) if self.lr_scheduler else None
        if self.warmup_steps:
            schedule = Warmup(optimizer, self.warmup_steps, schedule)
        if schedule is None:
            return {"optimizer": optimizer}
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    # ---- parts --------------------------------------------------------------------------------

    def check_noise(self, sampler: Sampler) -> None:
        """Warn, once, of a sampler that is made for another law of noise."""
        if sampler.noise == self.noise or sampler in self._warned_of:
            return
        self._warned_of.add(sampler)
        rank_zero_warn(
            f"{sampler} is made for {sampler.noise}, but the model is one of {self.noise}: its "
            f"steps do not keep that law; use {default_sampler(self.noise)}, or another sampler "
            "of the same noise"
        )

    def _mean_loss(self, network: nn.Module, batch: Batch, seed: int) -> Tensor:
        denoiser = self._denoiser(network)
        if self.num_classes is not None:
            denoiser = denoiser.condition(batch[1])
        return self.loss(denoiser, batch, step_generators(seed, batch[0].device)).mean()

    def _log_loss(self, name: str, batch: Any, batch_idx: int) -> None:
        batch = self.read_batch(batch)
        seed = derive_seed(self.seed, batch_idx, self.global_rank)
        loss = self._mean_loss(self.average.module, batch, seed)
        self.log(name, loss, sync_dist=True, batch_size=len(batch[0]), prog_bar=True)

    def record_arguments(self, **found: Any) -> None:
        """Store the constructor's arguments as plain data, where Lightning puts them in files.

        Args:
            **found: What a constructor took from elsewhere where an argument was not given, such
                as the teacher's network.
        """
        given = {name: value for name, value in self._arguments.items() if value is not None}
        plain: dict[str, Any] = {}
        for name, value in (found | given).items():
            try:
                plain[name] = describe(value)
            except NotPlainError as error:
                # The command line makes these factories and describes them itself, see cli.py.
                if name not in ("optimizer", "lr_scheduler"):
                    rank_zero_warn(
                        f"{name} is not stored in checkpoints ({error}): pass it again to "
                        f"load_from_checkpoint(path, {name}=...)"
                    )
        with contextlib.suppress(NotPlainError):  # a class that no file can name
            plain["_class_path"] = import_path(type(self))
        self.save_hyperparameters({**plain, "_instantiator": INSTANTIATOR}, logger=False)


def check_meaning_of_guidance(denoiser: NetworkDenoiser, checkpoint: Mapping[str, Any]) -> None:
    """Check that a network's input for guidance means what it did: the weights do not tell.

    Raises:
        ValueError: If the checkpoint's has another range.
    """
    found: Any = checkpoint
    for name in ("hyper_parameters", "network", "init_args", "guidance_range"):
        found = found.get(name) if isinstance(found, Mapping) else None
    if found is not None and found != denoiser.guidance_range:
        raise ValueError(
            f"guidance_range must be {found}, with which the checkpoint's weights were trained, "
            f"got {denoiser.guidance_range}: leave it out, or begin a new run"
        )


def channels_last(network: nn.Module) -> None:
    """Let the channels of a `UNet` be last in memory, which is faster."""
    if isinstance(network, UNet):
        network.to(memory_format=torch.channels_last)


def make_average(network: nn.Module, decay: float | Decay) -> ExponentialAverage:
    """The average, its channels last.

    Not those of a network in training in float32: on a CPU its layout decides which activations a
    dropout drops and gains little, and runs of before go on as they would have.
    """
    average = ExponentialAverage(network, decay)
    channels_last(average.module)
    return average


def _trains_on_cuda(module: DiffusionModule) -> bool:
    return module.trainer.strategy.root_device.type == "cuda"
