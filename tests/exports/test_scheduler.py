"""Which scheduler a model gets, and which models get none."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import tiny_ddpm, tiny_unet

from ddim_pl.clipping import ClipRange
from ddim_pl.exports.scheduler import ddim_settings
from ddim_pl.noise import GammaNoise
from ddim_pl.samplers import DDIM, Ancestral, Consistency, DPMSolverPP
from ddim_pl.schedules import (
    CosineLogSNRSchedule,
    ImprovedCosineSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
    ZeroTerminalSNR,
)
from ddim_pl.teachers.scheduler import settings_of

COSINE = {"schedule": CosineLogSNRSchedule(), "time_input": "log_snr", "prediction": "v"}


@pytest.mark.parametrize(
    "schedule",
    [
        LinearSchedule(),
        LinearSchedule(200, 1e-3, 0.05),
        ScaledLinearSchedule(),
        ImprovedCosineSchedule(),
        ZeroTerminalSNR(ScaledLinearSchedule()),
    ],
    ids=str,
)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_import_reads_what_export_wrote(schedule, spacing):
    model = tiny_ddpm(schedule=schedule, timesteps=spacing, num_steps=50, prediction="v")
    settings = ddim_settings(model)
    assert settings.times is None
    read = settings_of(settings.config)
    for name in ("schedule", "prediction", "clip", "sampler", "timesteps", "num_steps"):
        assert read[name] == getattr(model, name), name


def test_a_student_cannot_be_called_with_more_steps_than_its_timesteps():
    """DDIMPipeline takes 50 steps if it is not told otherwise."""
    settings = ddim_settings(tiny_ddpm(num_steps=4, distilled_steps=4))
    scheduler = DDIMScheduler.from_config(settings.config)
    with pytest.raises(ValueError, match="num_inference_steps"):
        scheduler.set_timesteps(50)
    scheduler.set_timesteps(settings.num_steps)
    assert scheduler.timesteps.tolist() == [3, 2, 1, 0]
    assert settings.times.tolist() == [249, 499, 749, 999]


def test_a_teacher_of_even_levels_takes_other_steps_too():
    """Of 64 steps it has the levels of 16 as well, and those of a fourth of the step."""
    model = tiny_ddpm(**COSINE, timesteps="linear", num_steps=64)
    scheduler = DDIMScheduler.from_config(ddim_settings(model).config)
    times = ddim_settings(model).times
    for steps in (16, 256):
        scheduler.set_timesteps(steps)
        other = tiny_ddpm(**COSINE, timesteps="linear", num_steps=steps)
        alphas = scheduler.alphas_cumprod[scheduler.timesteps].sqrt()
        levels = other.levels[:-1]
        torch.testing.assert_close(
            alphas.double(), model.schedule(levels).alpha, rtol=0, atol=2e-5
        )
        torch.testing.assert_close(
            times[scheduler.timesteps], other.denoiser.network_time(levels), rtol=1e-9, atol=1e-9
        )


def test_float32_keeps_the_alpha_of_a_student_of_one_step():
    """The variance of a step from almost no signal is 1 in float32: it takes more of them."""
    model = tiny_ddpm(**COSINE, timesteps="linear", num_steps=1, distilled_steps=1)
    assert torch.tensor(1 - float(model.schedule(1000.0).alpha) ** 2) == 1
    settings = ddim_settings(model)
    assert 1 < settings.config["num_train_timesteps"] < 50
    found = DDIMScheduler.from_config(settings.config).alphas_cumprod[-1].sqrt()
    assert float(found) == pytest.approx(4.54e-5, abs=1e-5)


def test_ddpms_sampler_is_ddim_with_eta_1():
    assert ddim_settings(tiny_ddpm(sampler=Ancestral())).eta == 1
    assert ddim_settings(tiny_ddpm(sampler=DDIM(0.3))).eta == 0.3


def test_a_single_step_of_a_consistency_model_is_that_of_ddim():
    student = {"distilled_steps": 2, "distilled_sampler": Consistency(), "sampler": Consistency()}
    settings = ddim_settings(tiny_ddpm(timesteps=[950.0], prediction="v", **student))
    assert (settings.eta, settings.num_steps) == (0.0, 1)
    for several in ({"timesteps": [950.0, 300.0]}, {"num_steps": 1, "last_level": 1.0}):
        with pytest.raises(ValueError, match="levels of Consistency must be one and 0 for format"):
            ddim_settings(tiny_ddpm(prediction="v", **{**student, **several}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": DPMSolverPP()}, "sampler must be DDIM, or Ancestral with the small"),
        ({"sampler": Ancestral("large")}, "sampler must be DDIM, or Ancestral with the small"),
        ({"prediction": "residual"}, "prediction must be one of eps, x, v .* got 'residual'"),
        ({"prediction": "both", "network": tiny_unet(out_channels=2)}, "prediction must be"),
        ({"clip": ClipRange(-1, 2)}, "clip must be a range from -r to r"),
        ({"timesteps": [1000.0, 1e-6], "prediction": "v"}, "levels must have alphas that float32"),
    ],
)
def test_what_ddim_pipeline_cannot_do_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ddim_settings(tiny_ddpm(**settings))


def test_gamma_noise_is_refused():
    model = tiny_ddpm(sampler=None, noise=GammaNoise())
    with pytest.raises(ValueError, match="noise must be Gaussian for format diffusers"):
        ddim_settings(model)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(CosineLogSNRSchedule(), 4), (ImprovedCosineSchedule(), 4), (ZeroTerminalSNR(), 8)],
)
def test_noise_whose_scale_float32_loses_is_refused(schedule, steps):
    """A pipeline would draw NaN there, or give the known noise a wrong scale."""
    model = {"schedule": schedule, "num_steps": steps, "prediction": "v"}
    with pytest.raises(ValueError, match=r"sampler must be deterministic .* from level 1000 of"):
        ddim_settings(tiny_ddpm(**model, sampler=Ancestral()))
    ddim_settings(tiny_ddpm(**model))
