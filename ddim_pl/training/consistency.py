"""Consistency models ([CM]), trained as in [ECT].

A consistency function `D(y, s)` takes every state of a trajectory of the probability-flow ODE to
its clean end. With noise in units of the signal, `s = sigma_t / alpha_t`, and `y = z / alpha_t`,
it is a denoiser that is the identity without noise, `D(y, 0) = y`. It is compared with itself at
less noise `r < s` of the same trajectory:

    ||D(y_s, s) - sg D(y_r, r)|| / (s - r),        y_s = x + s eps.

In "training" `y_r = x + r eps`, of the same eps. In "distillation" it is where an Euler step of a
teacher leads from `y_s`, which is our deterministic DDIM step; with r = 0 that is the teacher's
estimate of x. All of it is written for the states `z` and levels of any schedule.
"""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from ddim_pl.checks import check_at_least, check_one_of
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.prediction import PredictionType
from ddim_pl.rng import StepGenerators, replayed
from ddim_pl.samplers import Consistency
from ddim_pl.scales import expand_like, unsqueeze_like
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.training.base import Batch, DiffusionModule
from ddim_pl.training.distillation import (
    Distillation,
    copy_weights,
    draw_guidance,
    student_network,
)
from ddim_pl.transitions import ddim_step, q_sample

Method = Literal["training", "distillation"]

PREDICTIONS = ("v", "both", "edm")
"""Those whose estimate of x becomes the state itself as the noise vanishes."""

FINEST = 2**16
"""The most that `q^num_stages` may be: steps from s to r that float32 tells apart."""


def earlier_noise(s: Tensor, q: float, stage: int) -> Tensor:
    """Noise r, at least 0, that noise s is compared with ([ECT], the mapping function).

    `s (1 - q^-(k + 1) (1 + 8 sigmoid(-s)))` in stage k, counted from 0; where that is negative, 0.

    Args:
        s: Noise in units of the signal, positive, of any shape.
        q: Factor by which the steps from s to r become shorter with each stage, above 1.
        stage: The stage k.
    """
    return (s * (1 - q ** -(stage + 1) * (1 + 8 * torch.sigmoid(-s)))).clamp(min=0)


class ConsistencyModel(Distillation):
    """Learn to go from any noise to the image in one step.

    The averaged network is sampled by `Consistency` from the noises in `sampling_sigmas`: one
    network evaluation for each.

    Args:
        network: By default a copy of the teacher's; without a teacher it is trained from noise.
        schedule: By default the teacher's.
        method: "training" on images alone; or "distillation", in which the states with less noise
            are those that `teacher` leads to.
        q: Factor by which the steps from s to r become shorter with each stage. [ECT] has 2 with 8
            stages, and 256 with one for its preset of an hour.
        num_stages: Number of stages; the last one lasts until the end of the fit.
        stage_updates: Updates of each stage, if there are several.
        mean_log_sigma: Mean of `ln s` in training.
        std_log_sigma: Its standard deviation.
        sampling_sigmas: Noises, in units of the signal, that the sampler estimates the image at,
            the largest first; the latent is the noise of the first. By default 80 and 0.821, the
            two steps of [ECT]; `[80.0]` is one step.
        prediction: "v", "both" or "edm"; by default the teacher's if it is one of these, and else
            "v". The weights of a teacher that predicts something else are no more than a start,
            for which the first stages with `q = 2` are good: they train a denoiser.
        teacher_prediction: What the teacher of a distillation predicts; needed only if `network`
            is given.
        **kwargs: Arguments of `Distillation`. `teacher` is the checkpoint to begin with, for
            either method. [ECT] has RAdam with rate 1e-4, a dropout of 0.2, and an `ema_decay` of
            0.9999.

    Raises:
        ValueError: If the teacher cannot be read or does not fit, the noise is not Gaussian, or an
            argument is out of range or does not fit another.
    """

    distilled_sampler = Consistency()

    def __init__(
        self,
        network: nn.Module | None = None,
        schedule: NoiseSchedule | None = None,
        *,
        method: Method = "training",
        q: float = 256.0,
        num_stages: int = 1,
        stage_updates: int | None = None,
        mean_log_sigma: float = -1.1,
        std_log_sigma: float = 2.0,
        sampling_sigmas: list[float] | None = None,
        prediction: PredictionType | None = None,
        teacher_prediction: PredictionType | None = None,
        **kwargs: Any,
    ) -> None:
        check_one_of(Method, method=method)
        check_at_least(0, std_log_sigma=std_log_sigma)
        _check_stages(q, num_stages, stage_updates)
        _check_teacher(method, network, kwargs.get("teacher"), teacher_prediction)
        self.method, self.q = method, q
        self.num_stages, self.stage_updates = num_stages, stage_updates
        self.mean_log_sigma, self.std_log_sigma = mean_log_sigma, std_log_sigma
        self.sampling_sigmas = [80.0, 0.821] if sampling_sigmas is None else [*sampling_sigmas]
        self.given_teacher_prediction = teacher_prediction
        super().__init__(
            network,
            schedule,
            prediction=prediction,
            sampler=Consistency(),
            timesteps="linear",  # in place of which come the levels of `sampling_sigmas`
            num_steps=len(self.sampling_sigmas),
            last_level=0.0,
            **kwargs,
        )
        if method == "distillation":
            self.teacher = student_network(self, 0.0).requires_grad_(False).eval()
            self.record_arguments(teacher_prediction=self.first_prediction)

    def _check_and_record(self) -> None:
        if not self.noise.is_gaussian:
            raise ValueError(
                f"noise must be Gaussian for a consistency model, got {self.noise}: its states at "
                "two levels share one eps, or one trajectory of the Gaussian ODE"
            )
        if self.prediction not in PREDICTIONS:
            reason = (
                "eps says nothing of the image at the last level"
                if self.prediction == "eps"
                else "its estimate of x must become the state itself as the noise vanishes"
            )
            raise ValueError(
                "prediction must be 'v', 'both' or 'edm' for a consistency model, got "
                f"{self.prediction!r}: {reason}"
            )
        if self.method == "training" and getattr(self.network, "guidance_range", None):
            raise ValueError(
                "method must be 'distillation' for a network that takes the weight of guidance as "
                "an input, got 'training': images do not say what is guided"
            )
        self.timesteps = _levels_of(self.schedule, self.sampling_sigmas)
        super()._check_and_record()

    @staticmethod
    def prediction_from(teacher: PredictionType) -> PredictionType:
        """As the teacher's, but "v" where that would be no consistency function."""
        return teacher if teacher in PREDICTIONS else "v"

    @property
    def networks(self) -> list[nn.Module]:
        """The student's networks and its teacher's, if it has one."""
        return [*super().networks, *([self.teacher] if hasattr(self, "teacher") else [])]

    @property
    def distilled_steps(self) -> int:  # type: ignore[override]
        """Steps that it has noises for."""
        return len(self.sampling_sigmas)

    @property
    def stage(self) -> int:
        """The present stage, counted from 0; it follows from the number of updates made."""
        if self.stage_updates is None:
            return 0
        updates = max(self.global_step, self.checkpoint_step)
        return min(updates // self.stage_updates, self.num_stages - 1)

    def check_teacher(self, teacher: DiffusionModule) -> None:
        """Check that this model can begin from a teacher's weights, and learn from it."""
        super().check_teacher(teacher)
        if self.method == "distillation":
            self.check_first_prediction(teacher)

    def check_steps(self, teacher: DiffusionModule) -> None:
        """Check that the teacher of a distillation knows all levels; training needs only a start.

        Raises:
            ValueError: If it was distilled to some steps.
        """
        if self.method == "distillation" and teacher.distilled_steps is not None:
            raise ValueError(
                f"teacher {self.teacher_path!r} was distilled to {teacher.distilled_steps} steps "
                "and not trained at other levels, but this distillation steps between any two: "
                "give a teacher of all levels, or method 'training'"
            )

    def load_weights_from(self, teacher: DiffusionModule) -> None:
        """Begin with a teacher's weights."""
        super().load_weights_from(teacher)
        if self.method == "distillation":
            copy_weights(teacher.average.module, self.teacher)

    def settings_of_origin(self) -> dict[str, Any]:
        """The method and its stages."""
        names = ("method", "q", "num_stages", "stage_updates")
        return {name: getattr(self, name) for name in names}

    # ---- what the method is -------------------------------------------------------------------

    @property
    def teacher_denoiser(self) -> NetworkDenoiser:
        """The teacher of a distillation; its estimates are not clipped."""
        own = self._denoiser(self.teacher)
        return replace(own, prediction=self.first_prediction, clip=False)

    def loss(self, denoiser: NetworkDenoiser, batch: Batch, generators: StepGenerators) -> Tensor:
        """Distance of the estimates at two noises of a trajectory, over their difference, `(B,)`.

        A distance is the root of the sum of squares over an image.
        """
        x = batch[0]
        denoiser = draw_guidance(denoiser.without_clipping(), len(x), generators.host)
        s, r = self._draw_noises(len(x), generators.host)
        t, u = self._levels_at(s, r)
        eps = self.noise.draw(x.shape, self.schedule(t), generators.device, x)
        z = q_sample(x, eps, self.schedule(t))
        target = self._target(denoiser, x, eps, z, t, u)
        # Not the root of a sum, whose gradient is not finite where there is no error.
        distances = torch.linalg.vector_norm((denoiser(z, t).x - target).flatten(1), dim=1)
        return expand_like(1 / (s - r), distances) * distances

    @torch.no_grad()
    def _target(
        self, denoiser: NetworkDenoiser, x: Tensor, eps: Tensor, z: Tensor, t: Tensor, u: Tensor
    ) -> Tensor:
        """Estimate of x from the states with less noise, with the dropout of the next pass."""
        start, end = self.schedule(t), self.schedule.step_end(u)
        if self.method == "training":
            earlier = q_sample(x, eps, end)
        else:
            teacher = self.teacher_denoiser.as_told(denoiser)
            earlier = ddim_step(teacher(z, t), start, end)
        # Without noise the function is the identity, and the network, never trained there, is fed
        # some other level.
        is_clean = u == 0
        with replayed(x.device):
            estimate = denoiser(earlier, torch.where(is_clean, t, u)).x
        return torch.where(unsqueeze_like(is_clean, x), earlier, estimate)

    def _draw_noises(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noises s within the schedule and r < s, `(count,)` float64; r is 0 below the schedule's.

        The scales of level 0 may have some noise, but a step to that level ends in clean data.
        """
        least, most = _noise_range(self.schedule)
        normal = torch.randn(count, generator=generator, dtype=torch.float64)
        s = (self.mean_log_sigma + self.std_log_sigma * normal).exp().clamp(least, most)
        r = earlier_noise(s, self.q, self.stage)
        return s, torch.where(r > least, r, 0)

    def _levels_at(self, s: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """The levels that have these noises."""
        t, u = self.schedule.level_at(-2 * torch.stack([s, r]).log()).unbind()
        return t, torch.where(r > 0, u, 0)

    # ---- Lightning ----------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "ConsistencyModel":
        """Set the student's mode; the teacher is only evaluated."""
        super().train(mode)
        if hasattr(self, "teacher"):
            self.teacher.eval()
        return self

    def check_data(self, datamodule: L.LightningDataModule | None) -> None:
        """Check that the checkpoint to begin with can be read, and that there is one to distil."""
        if self.teacher_path is not None or self.method == "distillation":
            self.read_teacher()


def _check_stages(q: float, num_stages: int, stage_updates: int | None) -> None:
    check_at_least(1, num_stages=num_stages, stage_updates=stage_updates)
    if not 1 < q < math.inf or q**num_stages > FINEST:
        raise ValueError(
            f"q must be above 1, and q^num_stages at most {FINEST}, got {q} with {num_stages} "
            "stages: 2 with 8, or 256 with 1"
        )
    if num_stages > 1 and stage_updates is None:
        raise ValueError(
            f"stage_updates must be given for {num_stages} stages: an eighth of the fit's updates "
            "for 8"
        )
    if num_stages == 1 and stage_updates is not None:
        raise ValueError(
            f"stage_updates must be left out for a single stage, got {stage_updates}: it lasts "
            "until the end of the fit"
        )


def _check_teacher(
    method: Method,
    network: nn.Module | None,
    teacher: str | None,
    teacher_prediction: PredictionType | None,
) -> None:
    if network is None and teacher is None:
        raise ValueError(
            "network or teacher must be given: a network to train from noise, or a checkpoint to "
            "begin with"
        )
    if method == "training" and teacher_prediction is not None:
        raise ValueError(
            f"teacher_prediction must be left out for method 'training', got "
            f"{teacher_prediction!r}: its teacher only gives the first weights"
        )


def _noise_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """The noise, in units of the signal, at level 0 and at the last level."""
    ends = schedule(torch.tensor([0.0, schedule.num_levels]))
    least, most = (ends.sigma / ends.alpha).tolist()
    return least, most


def _levels_of(schedule: NoiseSchedule, sigmas: list[float]) -> list[float]:
    """Levels of falling noises, of which the first may be that of the last level, up to rounding.

    Raises:
        ValueError: If they do not fall, or one lies outside of the schedule.
    """
    least, most = _noise_range(schedule)
    falls = all(after < before for before, after in pairwise(sigmas))
    if not sigmas or not falls or sigmas[0] > most * (1 + 1e-9) or not sigmas[-1] > least:
        raise ValueError(
            f"sampling_sigmas must fall strictly, from at most {most:g} to above {least:g}, the "
            f"noises of {schedule}, got {sigmas}: [80.0, 0.821] are usual"
        )
    levels = schedule.level_at(-2 * torch.tensor(sigmas, dtype=torch.float64).log()).tolist()
    if sigmas[0] > most * (1 - 1e-9):
        levels[0] = float(schedule.num_levels)
    return levels
