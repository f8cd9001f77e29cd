"""Schedulers of diffusers: each entry in one of ours, or refused."""

import inspect
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ddim_pl.clipping import ClipRange, DynamicThreshold
from ddim_pl.samplers import DDIM, Ancestral
from ddim_pl.schedules import ZeroTerminalSNR
from ddim_pl.teachers.scheduler import DEFAULTS, settings_of
from ddim_pl.timesteps import make_levels


def settings(kind: str = "DDIM", **entries: Any) -> dict[str, Any]:
    return settings_of({"_class_name": f"{kind}Scheduler", **entries})


def test_the_defaults_are_those_of_diffusers():
    theirs: dict[str, Any] = {}
    for kind in (DDPMScheduler, DDIMScheduler):
        parameters = inspect.signature(kind.__init__).parameters
        theirs |= {name: each.default for name, each in parameters.items() if name != "self"}
    assert theirs == DEFAULTS


@pytest.mark.parametrize("beta", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_the_schedule_has_the_variances_of_diffusers(beta, rescale):
    entries = {"beta_schedule": beta, "num_train_timesteps": 200, "beta_end": 0.03}
    entries["rescale_betas_zero_snr"] = rescale
    schedule = settings(**entries, prediction_type="v_prediction")["schedule"]
    theirs = DDIMScheduler(**entries)
    assert isinstance(schedule, ZeroTerminalSNR) == rescale
    t = torch.arange(1, 201, dtype=torch.float64)
    expected = theirs.alphas_cumprod.double()
    torch.testing.assert_close(schedule(t).alpha ** 2, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_levels_are_those_of_diffusers(spacing, offset):
    found = settings(timestep_spacing=spacing, steps_offset=offset)
    theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(50)
    levels = make_levels(found["timesteps"], found["schedule"], found["num_steps"])
    assert levels.tolist() == [*(theirs.timesteps + 1).tolist(), 0]


@pytest.mark.parametrize(
    ("entries", "clip"),
    [
        ({}, True),
        ({"clip_sample": False}, False),
        ({"clip_sample_range": 2.0}, ClipRange(-2, 2)),
        ({"thresholding": True}, DynamicThreshold(0.995, 1.0)),
        ({"thresholding": True, "sample_max_value": 3.0}, DynamicThreshold(0.995, 3.0)),
    ],
)
def test_clipping_is_taken_over(entries, clip):
    assert settings(**entries)["clip"] == clip


def test_samplers_are_those_of_the_pipelines():
    found = settings("DDPM", variance_type="fixed_large", num_train_timesteps=100)
    assert (found["sampler"], found["num_steps"]) == (Ancestral("large"), 100)
    assert settings("DDPM")["sampler"] == Ancestral("small")
    assert (settings()["sampler"], settings()["num_steps"]) == (DDIM(), 50)
    assert settings(set_alpha_to_one=False)["last_level"] == 1.0
    assert "last_level" not in settings("DDPM", set_alpha_to_one=False)  # it has no such entry


def test_predictions_have_our_names():
    kinds = ("epsilon", "sample", "v_prediction")
    found = [settings(prediction_type=kind)["prediction"] for kind in kinds]
    assert found == ["eps", "x", "v"]


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        ("EulerDiscrete", {}, "scheduler must be a DDPMScheduler or DDIMScheduler, got Euler"),
        ("DDIM", {"beta_schedule": "sigmoid"}, "beta_schedule must be linear, .* got 'sigmoid'"),
        ("DDIM", {"trained_betas": [0.1]}, "trained_betas must be None"),
        ("DDIM", {"prediction_type": "flow"}, "prediction_type must be one of epsilon, .* 'flow'"),
        ("DDPM", {"variance_type": "learned_range"}, "variance_type must be one of fixed_small"),
        ("DDIM", {"timestep_spacing": "odd"}, "timestep_spacing must be one of leading, .* 'odd'"),
        ("DDIM", {"beta_start": 2.0}, "beta_start"),
        ("DDIM", {"num_train_timesteps": 0}, "num_train_timesteps must be at least 1, got 0"),
        ("DDIM", {"steps_offset": 40}, "steps_offset must leave the levels below 1000, got 40"),
    ],
)
def test_what_ours_cannot_express_is_refused(kind, entries, message):
    with pytest.raises(ValueError, match=message):
        settings(kind, **entries)
