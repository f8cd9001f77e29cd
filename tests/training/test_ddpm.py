"""Training a diffusion teacher."""

import math

import pytest
import torch
from tiny import tiny_ddpm, tiny_unet
from torch import nn

from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.prediction import x_error_weight
from ddim_pl.rng import step_generators
from ddim_pl.schedules import CosineLogSNRSchedule, EDMSchedule, LinearSchedule
from ddim_pl.training.ddpm import averaged_checkpoint, denoising_loss, draw_levels, drop_labels
from ddim_pl.transitions import q_sample


@pytest.mark.parametrize("method", ["uniform", "antithetic"])
def test_discrete_levels_are_uniform_over_one_to_t(method):
    schedule = LinearSchedule(num_levels=10)
    t = draw_levels(schedule, 100_000, method, torch.Generator().manual_seed(0))
    counts = torch.bincount(t.long(), minlength=11)
    assert counts[0] == 0
    # Binomial(1e5, 0.1) has standard deviation 95; five of them.
    assert (counts[1:] - 10_000).abs().max() < 475


def test_antithetic_levels_come_in_mirrored_pairs():
    t = draw_levels(CosineLogSNRSchedule(), 7, "antithetic", torch.Generator().manual_seed(0))
    torch.testing.assert_close(t[:3] + t[4:], torch.full((3,), 1000.0, dtype=torch.float64))
    assert len(t) == 7


CONTINUOUS = [EDMSchedule(), CosineLogSNRSchedule()]


@pytest.mark.parametrize("schedule", CONTINUOUS, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.5, 0.3)])
def test_log_normal_levels_have_the_noise_that_edm_draws(schedule, mean, std):
    """Each is the draw of the same generator, in the schedule's levels ([EDM], their loss)."""
    t = draw_levels(
        schedule, 1000, "log_normal", torch.Generator().manual_seed(0), mean=mean, std=std
    )
    scales = schedule(t)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1000, generator=generator, dtype=torch.float64) * std + mean
    torch.testing.assert_close(scales.sigma / scales.alpha, drawn.exp(), rtol=1e-9, atol=0)


def test_log_normal_levels_of_a_discrete_schedule_are_the_nearest():
    schedule = LinearSchedule()
    t = draw_levels(schedule, 1000, "log_normal", torch.Generator().manual_seed(0))
    assert torch.equal(t, t.round())
    assert t.min() >= 1
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1000, generator=generator, dtype=torch.float64) * 1.2 - 1.2
    inside = (t > 1) & (t < schedule.num_levels)
    logs = [-schedule(t[inside] + shift).log_snr / 2 for shift in (-0.5, 0.5)]
    assert (logs[0] <= drawn[inside]).all()
    assert (drawn[inside] <= logs[1]).all()


def test_log_normal_levels_beyond_the_schedule_are_its_end():
    """But for `EDMSchedule`, which reaches down to no noise."""
    wide = {"mean": 0.0, "std": 20.0}
    for schedule in (*CONTINUOUS, LinearSchedule()):
        t = draw_levels(schedule, 1000, "log_normal", torch.Generator().manual_seed(0), **wide)
        assert t.max() == schedule.num_levels
        assert t.min() > 0
        assert (-schedule(t).log_snr / 2).isfinite().all()


def test_a_model_draws_its_levels_by_its_own_law(monkeypatch):
    laws = []
    monkeypatch.setattr(
        "ddim_pl.training.ddpm.draw_levels",
        lambda *args, **law: laws.append((args[2], law)) or draw_levels(*args, **law),
    )
    x = torch.zeros(3, 1, 8, 8)
    for given in ({}, {"level_mean": 0.4, "level_std": 1.6}):
        module = tiny_ddpm(level_sampling="log_normal", **given)
        module.loss(module.denoiser, (x,), step_generators(0, x.device))
    default, other = {"mean": -1.2, "std": 1.2}, {"mean": 0.4, "std": 1.6}
    assert laws == [("log_normal", default), ("log_normal", other)]


@pytest.mark.parametrize("prediction", ["eps", "x", "v"])
@pytest.mark.parametrize("weight", ["snr", "min_snr", "truncated_snr", "snr_plus_one", "uniform"])
def test_loss_is_the_weighted_error_of_x(prediction, weight):
    torch.manual_seed(0)
    schedule = LinearSchedule()
    network = tiny_unet().eval()
    for parameter in network.parameters():  # the zero-initialised output would hide errors
        nn.init.normal_(parameter, std=0.1)
    denoiser = NetworkDenoiser(network, schedule, prediction, clip=False)
    x, eps = torch.randn(2, 6, 1, 8, 8)
    t = torch.tensor([1.0, 2, 50, 300, 600, 900])
    with torch.no_grad():
        loss = denoising_loss(denoiser, x, t, eps, weight=weight)
        estimate = denoiser(q_sample(x, eps, schedule(t)), t).x
    weights = x_error_weight(weight, schedule(t))
    expected = weights * (x - estimate).double().square().flatten(1).mean(1)
    # Recovering x from eps in float32 loses about sigma / alpha <= 60 units in the last place.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weight", ["edm", "snr_plus_one", "truncated_snr"])
def test_the_edm_loss_is_that_of_the_paper(weight):
    """`(s^2 + 1/4) / (s / 2)^2 ||D(x + s n; s) - x||^2` in its variables ([EDM], eq. 2)."""
    torch.manual_seed(0)
    network = tiny_unet(dropout=0.0)
    for weights in network.parameters():
        weights.data += 0.1 * torch.randn(weights.shape)
    schedule = EDMSchedule()
    denoiser = NetworkDenoiser(network, schedule, "edm", False, "log_sigma", sigma_data=0.5)
    x, eps = torch.randn(2, 6, 1, 8, 8)
    t = torch.tensor([1.0, 20, 50, 300, 600, 1000])
    scales = schedule(t)
    s = (scales.sigma / scales.alpha)[:, None, None, None]
    y, total = x + s * eps, s**2 + 1 / 4
    with torch.no_grad():
        loss = denoising_loss(denoiser, x, t, eps, weight=weight)
        output = network((y / total.sqrt()).float(), (s.flatten().log() / 4).float())
    denoised = y / 4 / total + s / 2 / total.sqrt() * output
    weights = total / (s / 2) ** 2 if weight == "edm" else 1 / s**2 + 1
    weights = (1 / s**2).clamp(min=1) if weight == "truncated_snr" else weights
    expected = (weights * (denoised - x) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:network is not stored in checkpoints")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 1001}, "num_steps must lie in"),
        ({"timesteps": "quadratc"}, "quadratic"),
        ({"ema_decay": 1.0}, "ema_decay must lie in"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"loss_weight": "truncated_snr"}, "diverges at the last level"),
        ({"level_sampling": "sobol"}, "antithetic"),
        ({"level_mean": -1.2}, "level_mean must be None for level_sampling='uniform', got -1.2"),
        ({"level_sampling": "antithetic", "level_std": 1.0}, "level_std must be None for"),
        ({"level_sampling": "log_normal", "level_std": 0.0}, "level_std must be positive"),
        ({"level_sampling": "log_normal", "level_mean": 5.1}, "level_mean must lie in .* got 5.1"),
        ({"level_sampling": "log_normal", "level_mean": -9.0}, "level_mean must lie in"),
        ({"prediction": "noise"}, "prediction must be one of"),
        ({"time_input": "seconds"}, "time_input must be one of"),
        ({"sigma_data": 0.0}, "sigma_data must be positive and finite"),
        ({"loss_weight": "edm"}, "loss_weight must be 'snr' or 'min_snr' .* got 'edm'"),
        ({"network": nn.Identity()}, "image_shape must be given"),
        ({"seed": -1}, "seed"),
        ({"label_dropout": 1.0}, r"label_dropout must lie in \[0, 1\), got 1.0"),
        ({"label_dropout": math.nan}, r"label_dropout must lie in \[0, 1\), got nan"),
        ({"label_dropout": 0.1}, "label_dropout must be 0 for a network without a null class"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_ddpm(**arguments)


def test_training_lowers_the_loss():
    # Not a benchmark: 60 updates on one batch must do better than predicting nothing, whose simple
    # loss is the variance of eps, 1.
    module = tiny_ddpm(network=tiny_unet(dropout=0.0))
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    optimizer = torch.optim.Adam(module.network.parameters(), lr=3e-3)
    denoiser = NetworkDenoiser(module.network, module.schedule)
    for step in range(60):
        loss = module.loss(denoiser, (x,), step_generators(step, x.device)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert math.isfinite(loss.item())
    assert loss.item() < 0.8


def test_labels_are_dropped_with_the_stated_probability():
    label = torch.arange(100_000) % 7
    dropped = drop_labels(label, 7, 0.1, torch.Generator().manual_seed(0))
    gone = dropped == 7
    assert torch.equal(dropped[~gone], label[~gone])
    counts = torch.bincount(label[gone], minlength=7)
    # Binomial(1e5, 0.1) has standard deviation 95, a seventh of it 36; five of them.
    assert abs(int(gone.sum()) - 10_000) < 475
    assert (counts - 10_000 / 7).abs().max() < 180


def with_null_class(**changes):
    torch.manual_seed(0)
    network = tiny_unet(num_classes=3, null_class=True, dropout=0.0)
    return tiny_ddpm(**{"network": network, "label_dropout": 0.5, **changes})


def labels_seen(module, network, seed=0):
    """Labels that a network is fed, and the levels, of one batch of 64 images of class 1."""
    seen = []
    hook = network.register_forward_pre_hook(lambda _, given: seen.append(given[1:]))
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        module._mean_loss(network, (x, torch.ones(64, dtype=torch.long)), seed)
    hook.remove()
    return seen[0][1], seen[0][0]


def test_labels_are_dropped_in_training_alone_and_by_the_step():
    module = with_null_class()
    label, levels = labels_seen(module, module.network)
    assert 16 < (label == 3).sum() < 48  # 4 standard deviations about 32
    assert ((label == 3) | (label == 1)).all()
    assert torch.equal(labels_seen(module, module.network)[0], label)
    assert not torch.equal(labels_seen(module, module.network, seed=1)[0], label)
    assert (labels_seen(module, module.average.module)[0] == 1).all()
    plain = with_null_class(label_dropout=0.0)
    kept, same_levels = labels_seen(plain, plain.network)
    assert (kept == 1).all()
    assert torch.equal(same_levels, levels)  # no random number moves


def test_a_null_class_that_no_image_would_train_is_refused():
    with_null_class().check_data(None)
    tiny_ddpm().check_data(None)
    with pytest.raises(ValueError, match="label_dropout must be positive for a network with a nu"):
        with_null_class(label_dropout=0.0).check_data(None)


def test_an_export_has_the_guidance_of_the_model():
    module = with_null_class(guidance=2.0, guidance_interval=(0.1, 5.0))
    arguments = averaged_checkpoint(module)["hyper_parameters"]
    assert (arguments["guidance"], arguments["guidance_interval"]) == (2.0, [0.1, 5.0])
    assert averaged_checkpoint(tiny_ddpm())["hyper_parameters"]["guidance"] is None
