"""Denoising diffusion training ([DDPM]).

The network learns to undo noise: `z_t = alpha_t x + sigma_t eps` at a random level `t`, loss
`w(t) ||x - x_hat(z_t, t)||^2`. With eps-prediction and `w = SNR` that is `||eps - eps_hat||^2`.
The noise may be of any law, see `ddim_pl.noise`: with Gamma noise this is the training of Nachmani
et al. 2021.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from ddim_pl.checks import check_one_of
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.prediction import (
    LossWeight,
    check_loss_weight,
    has_unit_weight,
    output_error_weight,
    target,
)
from ddim_pl.rng import StepGenerators
from ddim_pl.samplers import Sampler
from ddim_pl.scales import expand_like
from ddim_pl.schedules import DiscreteSchedule, NoiseSchedule
from ddim_pl.training.augmentation import NUM_LABELS, Augmentation
from ddim_pl.training.base import Batch, DiffusionModule, LossKind, make_average
from ddim_pl.training.ema import Decay, ExponentialAverage, HalfLife, choose_average
from ddim_pl.training.finite import check_finite_weights
from ddim_pl.training.hyperparameters import INSTANTIATOR, describe, import_path
from ddim_pl.training.origin import KEY
from ddim_pl.transitions import q_sample

LevelSampling = Literal["uniform", "antithetic", "log_normal"]

LOG_NORMAL = (-1.2, 1.2)
"""Mean and standard deviation of `ln(sigma / alpha)` in training ([EDM], table 1)."""


def draw_levels(
    schedule: NoiseSchedule,
    count: int,
    method: LevelSampling,
    generator: torch.Generator,
    *,
    mean: float = LOG_NORMAL[0],
    std: float = LOG_NORMAL[1],
) -> Tensor:
    """Random levels, `(count,)` float64: 1..T of a discrete schedule, (0, T] of a continuous one.

    Args:
        schedule: Noise schedule.
        count: Number of levels.
        method: "uniform" draws them independently; "antithetic" pairs each level u with its mirror
            image 1 - u, which evens out the batch (the DDIM authors' code does so). "log_normal"
            draws `ln(sigma / alpha)` from a normal law ([EDM], section 5), of a discrete schedule
            to the nearest level. What lies beyond the schedule becomes its end. EDM keeps all
            draws; beyond 80, where `EDMSchedule` ends, lie two in a million, and below its
            sigma_min the schedule goes on.
        generator: Source of randomness, on the CPU.
        mean: Mean of "log_normal".
        std: Standard deviation of "log_normal".
    """
    is_discrete = isinstance(schedule, DiscreteSchedule)
    if method == "log_normal":
        normal = torch.randn(count, generator=generator, dtype=torch.float64)
        t = schedule.level_at(-2 * (mean + std * normal))
        t = t.round() if is_discrete else t
    else:
        half = count if method == "uniform" else (count + 1) // 2
        u = torch.rand(half, generator=generator, dtype=torch.float64)
        if method == "antithetic":
            u = torch.cat([u, 1 - u])[:count]
        t = (1 - u) * schedule.num_levels  # u in [0, 1) gives (0, T]
        t = t.ceil() if is_discrete else t
    return t.clamp(min=_lowest_level(schedule))


def _lowest_level(schedule: NoiseSchedule) -> float:
    """The least level to train at; level 0 holds nothing to learn."""
    if isinstance(schedule, DiscreteSchedule):
        return 1
    return torch.finfo(torch.float32).eps * schedule.num_levels


def _log_normal(
    schedule: NoiseSchedule, method: LevelSampling, mean: float | None, std: float | None
) -> tuple[float, float]:
    """Mean and deviation of "log_normal", checked.

    Raises:
        ValueError: If one is given for another method, or out of range.
    """
    for name, value in (("level_mean", mean), ("level_std", std)):
        if method != "log_normal" and value is not None:
            raise ValueError(
                f"{name} must be None for level_sampling={method!r}, got {value}: only "
                "'log_normal' has it"
            )
    mean, std = LOG_NORMAL[0] if mean is None else mean, LOG_NORMAL[1] if std is None else std
    if not 0 < std < math.inf:
        raise ValueError(f"level_std must be positive and finite, got {std}: EDM has 1.2")
    ends = torch.tensor([_lowest_level(schedule), float(schedule.num_levels)])
    low, high = (-schedule(ends).log_snr / 2).tolist()
    if method == "log_normal" and not low < mean < high:
        raise ValueError(
            f"level_mean must lie in ({low:.3g}, {high:.3g}), the logarithms of {schedule}'s "
            f"noise, got {mean}: EDM has -1.2"
        )
    return mean, std


def drop_labels(label: Tensor, null_class: int, share: float, host: torch.Generator) -> Tensor:
    """Labels `(B,)` of which each is the null class with this probability ([CFG], algorithm 1).

    Args:
        label: Class labels, `(B,)`.
        null_class: Number of the null class.
        share: The probability.
        host: Source of randomness, on the CPU.
    """
    dropped = torch.rand(len(label), generator=host) < share
    return label.masked_fill(dropped.to(label.device), null_class)


def denoising_loss(
    denoiser: NetworkDenoiser,
    x: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    weight: LossWeight,
    gamma: float = 5.0,
    loss: LossKind = "l2",
) -> Tensor:
    """Weighted error of the denoiser, per image and averaged over its dimensions.

    Args:
        denoiser: Network to judge.
        x: Clean images, `(B, ...)`.
        t: Levels, `(B,)`.
        eps: Standardised noise, `(B, ...)`.
        weight: Weight on the squared error of x, see `ddim_pl.prediction.x_error_weight`.
        gamma: Bound of "min_snr".
        loss: "l2", or "l1" for the absolute error, weighted by the square root.

    Returns:
        Losses, `(B,)`.
    """
    scales = denoiser.schedule(t)
    output = denoiser.output(q_sample(x, eps, scales), t)
    sigma_data = denoiser.sigma_data
    error = output - target(denoiser.prediction, scales, x, eps, sigma_data=sigma_data)
    errors = (error.abs() if loss == "l1" else error.square()).flatten(1).mean(1)
    if has_unit_weight(denoiser.prediction, weight):
        return errors
    weights = output_error_weight(
        denoiser.prediction, weight, scales, gamma=gamma, sigma_data=sigma_data
    )
    return expand_like(weights.sqrt() if loss == "l1" else weights, errors) * errors


class DDPM(DiffusionModule):
    """Train a diffusion teacher.

    Args:
        network: As in `DiffusionModule`.
        schedule: As in `DiffusionModule`.
        loss_weight: Weight on the squared error of x: "snr" (with eps-prediction the simple loss
            of DDPM), "truncated_snr", "snr_plus_one" (with v-prediction the plain v loss),
            "min_snr", "uniform", "edm" (with edm-prediction the plain loss of its output).
        min_snr_gamma: Bound of "min_snr".
        loss: "l2", the squared error, or "l1", the absolute one. [Gamma] write l1 for
            Gamma noise, and their code has l2.
        level_sampling: "uniform", "antithetic" or "log_normal", see `draw_levels`.
        label_dropout: Probability of training an image without its label, as of the network's null
            class; [CFG] have 0.1. In validation and test no label is dropped.
        level_mean: Mean of `ln(sigma / alpha)` for "log_normal"; by default -1.2.
        level_std: Its standard deviation; by default 1.2.
        augment_probability: Of random changes of the images in training, in [0, 1], see
            `Augmentation`. A network with `num_augment_labels=9` is told of them, and evaluation
            and sampling know none. 0 leaves images as they are; [EDM] has 0.12 for CIFAR-10.
        more_ema_decays: Decays of further averages, which a fit keeps beside that of `ema_decay`.
        average: Which average a checkpoint is read with: 0 is that of `ema_decay`, 1 the first of
            `more_ema_decays`. A fit has 0.
        distilled_steps: Steps that the network was distilled for, in the checkpoint of a student;
            None for a model that knows all levels.
        distilled_sampler: Sampler whose steps they are; by default the deterministic one of the
            noise.
        **kwargs: Arguments of `DiffusionModule`.

    Raises:
        ValueError: If an argument is out of range or does not fit another.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule | None = None,
        *,
        loss_weight: LossWeight = "snr",
        min_snr_gamma: float = 5.0,
        loss: LossKind = "l2",
        level_sampling: LevelSampling = "uniform",
        label_dropout: float = 0.0,
        level_mean: float | None = None,
        level_std: float | None = None,
        augment_probability: float = 0.0,
        more_ema_decays: Sequence[float | Decay] | None = None,
        average: int = 0,
        distilled_steps: int | None = None,
        distilled_sampler: Sampler | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, schedule, **kwargs)
        check_loss_weight(self.prediction, loss_weight)
        if min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma must be positive, got {min_snr_gamma}: 5 is usual")
        check_one_of(LevelSampling, level_sampling=level_sampling)
        check_one_of(LossKind, loss=loss)
        self.loss_weight = loss_weight
        self.min_snr_gamma = min_snr_gamma
        self.loss_kind: LossKind = loss
        self.level_sampling = level_sampling
        self.distilled_steps, self.distilled_sampler = distilled_steps, distilled_sampler
        self.label_dropout = check_label_dropout(label_dropout, self.null_class)
        _ = self.sampling_guidance  # known now to fit a student, or not
        self.level_law = _log_normal(self.schedule, level_sampling, level_mean, level_std)
        self.augmentation = Augmentation(augment_probability) if augment_probability else None
        self.average_index = average
        self.more_averages = nn.ModuleList(make_average(network, d) for d in more_ema_decays or ())
        self._check_network()

    def _check_network(self) -> None:
        """Check the network that augmentation needs, and which average is read."""
        if self.distilled_sampler is not None and self.distilled_steps is None:
            raise ValueError(
                f"distilled_sampler must be left out without distilled_steps, got "
                f"{self.distilled_sampler}: it is the sampler of those steps"
            )
        told = getattr(self.network, "num_augment_labels", None)
        if self.augmentation is not None and told != NUM_LABELS:
            raise ValueError(
                f"augment_probability must be 0 for a network without num_augment_labels="
                f"{NUM_LABELS}, got {self.augmentation.probability} and {told}: it would draw the "
                "changes too; SongUNet can have these labels"
            )
        if not 0 <= self.average_index <= len(self.more_averages):
            raise ValueError(
                f"average must lie in [0, {len(self.more_averages)}], got {self.average_index}: 0 "
                "is that of ema_decay, and more_ema_decays keeps others"
            )

    @property
    def averages(self) -> list[ExponentialAverage]:
        """That of `ema_decay` and those of `more_ema_decays`."""
        return [self.average, *(cast(ExponentialAverage, each) for each in self.more_averages)]

    def check_data(self, datamodule: L.LightningDataModule | None) -> None:
        """Check that a fit is asked for nothing that has no effect on it.

        Raises:
            ValueError: If it is.
        """
        if getattr(self.network, "num_augment_labels", None) and self.augmentation is None:
            raise ValueError(
                "num_augment_labels of the network must be None without augmentation, got "
                f"{self.network.num_augment_labels}: set augment_probability, or leave both out"
            )
        if self.denoiser.guidance_range is not None:
            raise ValueError(
                "guidance_range of the network must be left out for DDPM, got "
                f"{self.denoiser.guidance_range}: images do not say what is guided; "
                "GuidanceDistillation learns it from a teacher"
            )
        if self.null_class is not None and not self.label_dropout:
            raise ValueError(
                "label_dropout must be positive for a network with a null class, which is trained "
                "by the images without a label, got 0.0: 0.1 is usual; or set null_class to False"
            )
        if self.average_index:
            raise ValueError(
                f"average must be 0 in a fit, which keeps all, got {self.average_index}: give it "
                "to test, sample or export"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the average that is asked for.

        Raises:
            ValueError: If the checkpoint holds another number of averages, or in a fit, if another
                than the first is asked for.
        """
        names = [name.split(".") for name in checkpoint["state_dict"]]
        held = len({parts[1] for parts in names if parts[0] == "more_averages"})
        if held != len(self.more_averages):
            raise ValueError(
                f"more_ema_decays must hold {held} decays, one for each further average of the "
                f"checkpoint, got {len(self.more_averages)}: begin a new run to change that"
            )
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.check_data(None)
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = choose_average(state, self.average_index)
        self.average.decay = self.averages[self.average_index].decay

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the weights, then all averages."""
        super().optimizer_step(*args, **kwargs)
        for average in self.averages[1:] if self._update_is_good else []:
            average.update_parameters(self.network, self._images_per_update)

    def loss(self, denoiser: NetworkDenoiser, batch: Batch, generators: StepGenerators) -> Tensor:
        """Denoising loss of each image at a random level, `(B,)`."""
        x = batch[0]
        mean, std = self.level_law
        t = draw_levels(
            self.schedule, len(x), self.level_sampling, generators.host, mean=mean, std=std
        )
        if self.augmentation is not None and denoiser.network.training:
            x, labels = self.augmentation(x, generators.host)
            denoiser = replace(denoiser, augment=labels)
        eps = self.noise.draw(x.shape, self.schedule(t), generators.device, x)
        if self.label_dropout and denoiser.label is not None and denoiser.network.training:
            assert self.null_class is not None
            arguments = self.null_class, self.label_dropout, generators.host
            denoiser = denoiser.condition(drop_labels(denoiser.label, *arguments))
        return denoising_loss(
            denoiser,
            x,
            t,
            eps,
            weight=self.loss_weight,
            gamma=self.min_snr_gamma,
            loss=self.loss_kind,
        )


def check_label_dropout(share: float, null_class: int | None) -> float:
    """Return the probability of dropping a label, once it is known to be one.

    Raises:
        ValueError: If it is not, or the network has no null class.
    """
    if not 0 <= share < 1:
        raise ValueError(f"label_dropout must lie in [0, 1), got {share}: 0.1 is usual")
    if share and null_class is None:
        raise ValueError(
            f"label_dropout must be 0 for a network without a null class, got {share}: give the "
            "network num_classes and null_class: true"
        )
    return share


def averaged_checkpoint(module: DiffusionModule, **changes: Any) -> dict[str, Any]:
    """The averaged weights of any module, as a checkpoint of a plain `DDPM`.

    Args:
        module: The module.
        **changes: Arguments of the `DDPM` that are not the module's.

    Raises:
        NotFiniteError: If a weight is not finite.
    """
    weights = module.average.module.state_dict()
    check_finite_weights(weights, "lower the rate or clip the gradients")
    state = {f"network.{name}": value for name, value in weights.items()}
    # The same tensors: a file holds them once.
    state |= {f"average.module.{name}": value for name, value in weights.items()}
    names = ["network", "schedule", "noise", "prediction", "time_input", "sigma_data"]
    names += ["image_shape", "clip", "sampler", "timesteps", "num_steps", "last_level", "seed"]
    names += ["noise_source", "distilled_steps", "distilled_sampler", "sampling_precision"]
    names += ["guidance", "guidance_interval"]
    names += [name for name in ("loss_weight",) if hasattr(module, name)]
    arguments = {name: describe(getattr(module, name)) for name in names}
    decay = module.average.decay
    if type(decay) in (float, int, HalfLife):  # a class of the user's own would be needed to load
        arguments["ema_decay"] = describe(decay)
    arguments |= changes
    return {
        "pytorch-lightning_version": L.__version__,
        "epoch": module.current_epoch,
        "global_step": module.global_step,
        KEY: [*module.origin],
        "state_dict": state | {"average.n_averaged": module.average.n_averaged},
        "hyper_parameters": {
            **arguments,
            "_class_path": import_path(DDPM),
            "_instantiator": INSTANTIATOR,
        },
    }
