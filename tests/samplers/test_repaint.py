"""RePaint on a correlated Gaussian, whose conditional law is known."""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim_pl import timesteps
from ddim_pl.denoiser import Denoiser
from ddim_pl.noise import latents
from ddim_pl.prediction import Prediction
from ddim_pl.rng import NoiseSource, image_generators
from ddim_pl.samplers import RePaint
from ddim_pl.samplers.repaint import visits
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule

MEAN = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=torch.float64)
PLACES = torch.arange(4)
COVARIANCE = 0.16 * 0.8 ** (PLACES[:, None] - PLACES).abs().double()
KNOWN = torch.tensor([True, False, False, True])
VALUES = torch.tensor([0.6, math.nan, math.nan, -0.4], dtype=torch.float64)  # NaN: not looked at

every_schedule = pytest.mark.parametrize(
    "schedule", [LinearSchedule(), CosineLogSNRSchedule()], ids=["linear", "cosine"]
)


@dataclass
class Correlated(Denoiser):
    """Exact denoiser of four dimensions, `N(MEAN, COVARIANCE)`: linear, with all of its rows."""

    schedule: NoiseSchedule
    calls: list[float] = field(default_factory=list)

    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        self.calls.append(t.item())
        alpha, sigma = self.schedule(t)
        variance = alpha**2 * COVARIANCE + sigma**2 * torch.eye(4, dtype=torch.float64)
        flat = z.double().reshape(-1, 4)
        centred = torch.linalg.solve(variance, (flat - alpha * MEAN).T).T
        x, eps = MEAN + alpha * centred @ COVARIANCE, sigma * centred
        return Prediction(x.reshape(z.shape).to(z), eps.reshape(z.shape).to(z))


def conditional() -> tuple[Tensor, Tensor]:
    """Mean and covariance of the unknown dimensions given the known ones."""
    to_known = COVARIANCE[~KNOWN][:, KNOWN]
    gain = to_known @ torch.linalg.inv(COVARIANCE[KNOWN][:, KNOWN])
    mean = MEAN[~KNOWN] + gain @ (VALUES - MEAN)[KNOWN]
    return mean, COVARIANCE[~KNOWN][:, ~KNOWN] - gain @ to_known.T


def paint(
    sampler: RePaint,
    schedule: NoiseSchedule,
    num_steps: int,
    indices: range,
    dtype: torch.dtype,
    source: NoiseSource = "generators",
) -> Tensor:
    """Images `(B, 1, 2, 2)`, each from its own generator."""
    z, generators = latents(0, indices, (1, 2, 2), noise_source=source)
    return sampler(
        Correlated(schedule),
        z.to(dtype),
        timesteps.linear(1000, num_steps),
        image=VALUES.reshape(1, 2, 2).expand(len(z), 1, 2, 2),
        mask=KNOWN.reshape(2, 2),
        generator=generators,
    )


# Law


def test_resampling_leads_to_the_conditional_law() -> None:
    """4,000 images, seed 0: a standard error of 0.0034 of a mean, 0.0010 of a variance.

    With 20,000 images the largest errors were 0.065, 0.024 and 0.009 of the mean and 0.020, 0.005
    and 0.004 of the covariance, for 1, 3 and 10 resamplings: the rest at 10 is that of 200 steps
    of DDPM, whose posterior variance is too small. The bounds add 4 standard errors.
    """
    count = 4000
    levels = timesteps.linear(1000, 200)
    generator = torch.Generator().manual_seed(0)
    mean, covariance = conditional()
    errors = {}
    for num_resamples in (1, 3, 10):
        images = RePaint(1.0, 10, num_resamples)(
            Correlated(CosineLogSNRSchedule()),
            torch.randn(count, 4, generator=generator).double(),
            levels,
            image=VALUES.expand(count, 4),
            mask=KNOWN,
            generator=generator,
        )
        found = images[:, ~KNOWN]
        errors[num_resamples] = torch.stack(
            [(found.mean(0) - mean).abs().max(), (found.T.cov() - covariance).abs().max()]
        )
    bound = torch.tensor([0.009 + 4 * 0.0034, 0.004 + 4 * 0.0010])
    assert (errors[10] < bound).all(), errors
    assert (errors[1] > 2 * errors[10]).all(), errors
    assert (errors[1] > 1.5 * errors[3]).all(), errors


def test_without_known_pixels_it_draws_from_the_data() -> None:
    """And resampling does no harm: means to 4 standard errors, 0.0063 each."""
    count = 4000
    generator = torch.Generator().manual_seed(1)
    images = RePaint(1.0, 5, 2)(
        Correlated(CosineLogSNRSchedule()),
        torch.randn(count, 4, generator=generator).double(),
        timesteps.linear(1000, 100),
        image=torch.zeros(count, 4),
        mask=torch.zeros(4),
        generator=generator,
    )
    assert (images.mean(0) - MEAN).abs().max() < 4 * 0.4 / math.sqrt(count)
    # DDPM's variance at 100 steps is a few per cent too small.
    torch.testing.assert_close(images.T.cov(), COVARIANCE, rtol=0, atol=0.03)


# Images


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_known_pixels_are_exact(schedule: NoiseSchedule, dtype: torch.dtype, eta: float) -> None:
    images = paint(RePaint(eta, 2, 2), schedule, 10, range(3), dtype)
    assert images.dtype == dtype
    assert images.isfinite().all()
    known = images.reshape(3, 4)[:, KNOWN]
    assert torch.equal(known, VALUES[KNOWN].to(dtype).expand(3, 2))
    assert len(images.reshape(3, 4)[:, 1].unique()) == 3


@pytest.mark.parametrize("source", ["generators", "philox"])
def test_an_image_does_not_depend_on_its_batch(source: NoiseSource) -> None:
    """To rounding: the denoiser solves for a whole batch at once."""
    sampler, schedule = RePaint(1.0, 3, 3), LinearSchedule()
    together = paint(sampler, schedule, 10, range(5), torch.float64, source)
    alone = [
        paint(sampler, schedule, 10, range(i, i + 1), torch.float64, source) for i in range(5)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-10)


def test_a_call_repeats_and_leaves_its_arguments_and_the_global_state_alone() -> None:
    z, generators = latents(0, range(2), (1, 2, 2))
    image, mask = torch.full_like(z, 0.5), torch.tensor([[1, 0], [0, 1]])
    levels = timesteps.linear(1000, 10)
    kept = [tensor.clone() for tensor in (z, image, mask, levels)]
    before = torch.get_rng_state()
    sampler, denoiser = RePaint(1.0, 2, 2), Correlated(LinearSchedule())
    first, again = (
        sampler(denoiser, z, levels, image=image, mask=mask, generator=generators)
        for generators in (generators, image_generators(0, range(2)))
    )
    assert not torch.equal(first, again)  # the first generators had drawn the latents
    _, generators = latents(0, range(2), (1, 2, 2))
    again = sampler(denoiser, z, levels, image=image, mask=mask, generator=generators)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    for tensor, copy in zip((z, image, mask, levels), kept, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("shape", [(2, 1, 2, 2), (1, 1, 2, 2), (2, 2), (2, 3, 2, 2), (2, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_broadcasts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = torch.zeros(shape, dtype=dtype)
    mask.reshape(-1)[0] = 1
    z, generators = latents(0, range(2), (3, 2, 2))
    image = torch.full_like(z, 0.25)
    images = RePaint(1.0, 1, 2)(
        Correlated(LinearSchedule()),
        z,
        timesteps.linear(1000, 4),
        image=image,
        mask=mask,
        generator=generators,
    )
    known = mask.bool().expand(z.shape)
    assert (images[known] == 0.25).all()
    assert (images[~known] != 0.25).all()


def test_gradients_do_not_flow_through_a_call() -> None:
    z, generators = latents(0, range(2), (1, 2, 2))
    image = torch.zeros_like(z).requires_grad_()
    images = RePaint(1.0, 1, 1)(
        Correlated(LinearSchedule()),
        z.requires_grad_(),
        timesteps.linear(1000, 4),
        image=image,
        mask=torch.ones(2, 2),
        generator=generators,
    )
    assert not images.requires_grad


# Visits


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("jump_length", [1, 3, 10])
@pytest.mark.parametrize("num_resamples", [1, 2, 5])
def test_the_visits_are_those_of_the_authors_code(
    num_steps: int, jump_length: int, num_resamples: int
) -> None:
    """Their `get_schedule_jump`, whose ways back go one level at a time; 0-based, clean is -1."""
    jumps = dict.fromkeys(range(0, num_steps - jump_length, jump_length), num_resamples - 1)
    t, want = num_steps, []
    while t >= 1:
        t -= 1
        want.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump_length):
                t += 1
                want.append(t)
    want.append(-1)
    found = [0]
    for i, j in pairwise(visits(num_steps, jump_length, num_resamples)):
        found += range(i + 1, j + 1) if j > i else range(i - 1, j - 1, -1)
    assert [num_steps - 1 - i for i in found] == want


@pytest.mark.parametrize(("num_steps", "jump_length", "num_resamples"), [(1, 10, 1), (10, 3, 4)])
def test_the_network_is_called_as_often_as_promised_and_at_the_levels(
    num_steps: int, jump_length: int, num_resamples: int
) -> None:
    sampler, denoiser = RePaint(1.0, jump_length, num_resamples), Correlated(LinearSchedule())
    levels = timesteps.quadratic(1000, num_steps)
    z, generators = latents(0, range(2), (1, 2, 2))
    image, mask = torch.zeros_like(z), torch.ones(2, 2)
    sampler(denoiser, z, levels, image=image, mask=mask, generator=generators)
    assert len(denoiser.calls) == sampler.num_evaluations(levels)
    turns = len(range(num_steps - 1, jump_length - 1, -jump_length))
    assert len(denoiser.calls) == num_steps + turns * (num_resamples - 1) * jump_length
    assert set(denoiser.calls) == set(levels[:-1].tolist())


def test_progress_is_shown_only_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    z, generators = latents(0, range(2), (1, 2, 2))
    arguments: dict[str, Any] = {"image": torch.zeros_like(z), "mask": torch.ones(2, 2)}
    levels = timesteps.linear(1000, 4)
    for progress in (False, True):
        RePaint(1.0, 1, 1)(
            Correlated(LinearSchedule()),
            z,
            levels,
            generator=generators,
            progress=progress,
            **arguments,
        )
        out, err = capsys.readouterr()
        assert out == ""
        assert ("RePaint" in err) == progress


# Wrong inputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": 1.1}, r"eta must lie in \[0, 1\], got 1.1"),
        ({"jump_length": 0}, "jump_length must be at least 1, got 0"),
        ({"num_resamples": 0}, "num_resamples must be at least 1, got 0"),
    ],
)
def test_wrong_hyperparameters_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RePaint(**arguments)


Z = torch.zeros(2, 3, 2, 2)
RIGHT: dict[str, Any] = {"levels": timesteps.linear(1000, 4), "image": Z, "mask": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"levels": [1000.0, 500.0]}, "levels must be a vector that decreases strictly to 0"),
        ({"levels": [0.0, 500.0]}, "decreases strictly to 0"),
        ({"levels": [500.0, 600.0, 0.0]}, "decreases strictly to 0"),
        ({"levels": [math.nan, 0.0]}, "decreases strictly to 0"),
        ({"levels": [0.0]}, "decreases strictly to 0"),
        ({"levels": []}, "decreases strictly to 0"),
        ({"levels": 0.0}, "decreases strictly to 0"),
        ({"levels": [2000.0, 500.0, 0.0]}, r"t must lie in \[0, 1000\]"),
        ({"levels": [1000.0, 0.0]}, "jump_length must be less than the number of steps, 1, got 1"),
        ({"image": Z[:1]}, r"image must have the shape of z, \(2, 3, 2, 2\), got \(1, 3, 2, 2\)"),
        ({"image": Z + 1.5}, r"image must lie in \[-1, 1\] where known, got values in \[1.5, 1.5"),
        ({"image": Z * math.nan}, r"image must lie in \[-1, 1\] where known"),
        ({"mask": torch.ones(3, 3)}, r"mask must broadcast to the shape of z, \(2, 3, 2, 2\)"),
        ({"mask": torch.ones(1, 2, 3, 2, 2)}, "mask must broadcast to the shape of z"),
        ({"mask": torch.full((2, 2), 0.5)}, "mask must hold only 0 and 1, got values in"),
        ({"mask": torch.full((2, 2), math.nan)}, "mask must hold only 0 and 1"),
        ({"mask": torch.full((2, 2), 255)}, "mask must hold only 0 and 1, got values in"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    arguments = {**RIGHT, **wrong}
    levels = torch.as_tensor(arguments.pop("levels"))
    with pytest.raises(ValueError, match=message):
        RePaint(1.0, 1, 2)(Correlated(LinearSchedule()), Z, levels, **arguments)


def test_one_generator_for_each_image_or_one_for_all() -> None:
    generators = image_generators(0, range(3))
    with pytest.raises(ValueError, match="generator must hold one generator per image"):
        RePaint(1.0, 1, 2)(Correlated(LinearSchedule()), Z, generator=generators, **RIGHT)
