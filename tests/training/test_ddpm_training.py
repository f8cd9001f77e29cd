import math

import pytest
import torch
from lightning import seed_everything
from tiny import tiny_ddpm, tiny_unet
from torch import nn

from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.prediction import x_error_weight
from ddim_pl.rng import step_generators
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule
from ddim_pl.training.ddpm import denoising_loss, draw_levels
from ddim_pl.training.ema import exponential_average
from ddim_pl.training.warmup import Warmup
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


def test_a_step_depends_on_its_seed_alone():
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    module = tiny_ddpm()
    denoiser = module.denoiser
    losses = []
    for seed, disturbance in ((5, 0), (5, 1), (6, 0)):
        torch.manual_seed(disturbance)
        losses.append(module.loss(denoiser, (x,), step_generators(seed, x.device)))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert not torch.equal(losses[0], losses[2])


def test_average_follows_its_recurrence_and_copies_buffers():
    network = nn.BatchNorm1d(3)
    average = exponential_average(network, 0.5)
    expected = None
    for n in range(12):
        with torch.no_grad():
            network.weight.normal_(generator=torch.Generator().manual_seed(n))
            network.running_mean.fill_(float(n))
            network.num_batches_tracked.fill_(n)
        average.update_parameters(network)
        current = network.weight.detach().clone()
        keep = min(0.5, (1 + n) / (10 + n))
        expected = current if expected is None else keep * expected + (1 - keep) * current
    torch.testing.assert_close(average.module.weight, expected)
    assert average.module.num_batches_tracked == 11
    assert not any(p.requires_grad for p in average.parameters())


def test_average_stays_in_evaluation_mode():
    module = tiny_ddpm()
    module.train()
    assert module.network.training
    assert not any(part.training for part in module.average.modules())


def test_same_index_same_image_for_any_split():
    seed_everything(0, verbose=False)
    module = tiny_ddpm(timesteps="linear", num_steps=3)
    for parameter in module.average.parameters():
        nn.init.normal_(parameter, std=0.1)
    together = module.sample(range(5))
    apart = torch.cat([module.sample([0, 1]), module.sample([2]), module.sample([3, 4])])
    # Convolutions of another batch size may sum in another order.
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_classes_reach_the_network_in_training_and_sampling():
    module = tiny_ddpm(network=tiny_unet(num_classes=3), clip=False)
    for parameter in module.average.parameters():
        nn.init.normal_(parameter, std=0.1)
    free = module.sample([0, 1, 2, 3])
    torch.testing.assert_close(free, module.sample(range(4), label=torch.tensor([0, 1, 2, 0])))
    other = module.sample(range(4), label=torch.tensor([1, 1, 2, 0]))
    assert not torch.allclose(free[0], other[0])
    torch.testing.assert_close(free[1:], other[1:])


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2.0, total_steps=30),
    ],
)
def test_warm_up_multiplies_any_schedule_and_resumes(make):
    def rates(warmup, stop=None):
        seen, optimizer = [], torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = Warmup(optimizer, warmup, make(optimizer))
        for step in range(20):
            if step == stop:
                saved = optimizer.state_dict(), schedule.state_dict()
                optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
                schedule = Warmup(optimizer, warmup, make(optimizer))
                schedule.load_state_dict(saved[1])
                optimizer.load_state_dict(saved[0])
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return seen

    expected = [min(1, (k + 1) / 5) * rate for k, rate in enumerate(rates(0))]
    assert rates(4) == pytest.approx(expected)
    assert rates(4, stop=2) == pytest.approx(expected)
    assert rates(4, stop=9) == pytest.approx(expected)


def test_learning_rate_warms_up_then_follows_the_schedule():
    module = tiny_ddpm(
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=20),
        warmup_steps=4,
    )
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(21):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [min(1, (i + 1) / 5) * (1 - i / 20) for i in range(21)]
    assert rates == pytest.approx(expected, abs=1e-9)
    assert configured["lr_scheduler"]["interval"] == "step"


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
        ({"prediction": "noise"}, "prediction must be one of"),
        ({"time_input": "seconds"}, "time_input must be one of"),
        ({"network": nn.Identity()}, "image_shape must be given"),
        ({"seed": -1}, "seed"),
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
