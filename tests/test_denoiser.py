"""The denoiser: what the network is fed, clipping, labels; and the tests' exact denoisers."""

import dataclasses
import math
from collections.abc import Callable
from itertools import product
from typing import get_args

import pytest
import torch
from exact import ExactGaussian, ExactMixture
from tiny import some_ddpm, tiny_unet
from torch import Tensor, nn

from ddim_pl.clipping import DynamicThreshold
from ddim_pl.denoiser import Denoiser, NetworkDenoiser, TimeInput
from ddim_pl.noise import latents
from ddim_pl.prediction import PredictionType
from ddim_pl.scales import expand_like
from ddim_pl.schedules import CosineLogSNRSchedule, EDMSchedule, LinearSchedule, ZeroTerminalSNR
from ddim_pl.training.ddpm import denoising_loss
from ddim_pl.transitions import ddim_step, q_sample

KINDS = get_args(PredictionType)


class Recorder(nn.Module):
    """Returns `scale * z`, for "both" twice, and remembers its arguments."""

    def __init__(self, scale: float = 2.0, kind: PredictionType = "eps") -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.copies = 2 if kind == "both" else 1
        self.seen: list[tuple[Tensor, ...]] = []

    def forward(self, z: Tensor, t: Tensor, *label: Tensor) -> Tensor:
        self.seen.append((z, t, *label))
        return torch.cat([self.scale * z] * self.copies, dim=1)


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t = 1 + 999 * torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.randn(count, 3, 4, 4, generator=generator), t


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_explain_the_state_also_after_clipping(kind: PredictionType, clip: bool) -> None:
    """Float32: 6e-8 of terms up to alpha x = 3, so 1e-5 is a wide bound."""
    z, t = batch(100)
    t[:2] = torch.tensor([1.0, 1000.0])
    schedule = LinearSchedule()
    x, eps = NetworkDenoiser(Recorder(kind=kind), schedule, kind, clip=clip)(z, t)
    assert x.dtype == eps.dtype == z.dtype
    torch.testing.assert_close(q_sample(x, eps, schedule(t)), z, rtol=0, atol=1e-5)
    assert (x.abs().max() <= 1) == clip


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_leaves_estimates_inside_the_range_alone(kind: PredictionType) -> None:
    z, t = batch()
    network = Recorder(0.5, kind)
    denoisers = [NetworkDenoiser(network, LinearSchedule(), kind, clip=c) for c in (True, False)]
    clipped, free = (denoiser(z.double(), t) for denoiser in denoisers)
    inside = free.x.abs() <= 1
    assert inside.any()
    assert not inside.all()
    torch.testing.assert_close(clipped.x, free.x.clamp(-1, 1), rtol=0, atol=0)
    torch.testing.assert_close(clipped.eps[inside], free.eps[inside], rtol=1e-9, atol=1e-9)


def test_one_level_for_all_is_that_level_for_each() -> None:
    z, t = batch()
    denoiser = NetworkDenoiser(Recorder(), LinearSchedule())
    for one, each in zip(denoiser(z, t[0]), denoiser(z, t[:1].expand(len(z))), strict=True):
        torch.testing.assert_close(one, each)
    for number, tensor in zip(denoiser(z, 500), denoiser(z, torch.tensor(500.0)), strict=True):
        assert torch.equal(number, tensor)


@pytest.mark.parametrize("time_input", get_args(TimeInput))
def test_the_network_gets_one_float32_time_per_image(time_input: TimeInput) -> None:
    z, t = batch()
    network = Recorder()
    denoiser = NetworkDenoiser(network, LinearSchedule(), time_input=time_input)
    denoiser(z, t)
    denoiser(z, t[2])
    for _, time in network.seen:
        assert time.shape == (len(z),)
        assert time.dtype == torch.float32
    assert (network.seen[1][1] == network.seen[0][1][2]).all()


def test_a_ddpm_network_gets_the_index_below_the_level() -> None:
    denoiser = NetworkDenoiser(Recorder(), LinearSchedule())
    t = torch.tensor([0, 0.5, 1, 1.5, 1000], dtype=torch.float64)
    assert denoiser.network_time(t).tolist() == [0, 0, 0, 0.5, 999]


def test_a_log_snr_network_gets_the_angle_of_the_level() -> None:
    """Of a right angle in thousandths; under the cosine schedule it is linear in the level."""
    t = torch.linspace(0, 1000, 101, dtype=torch.float64)
    time = NetworkDenoiser(Recorder(), CosineLogSNRSchedule(), time_input="log_snr").network_time(
        t
    )
    end = 2000 / math.pi * math.atan(math.exp(-10))
    assert time[50].item() == pytest.approx(500, abs=1e-9)
    torch.testing.assert_close(
        time, torch.linspace(end, 1000 - end, 101, dtype=torch.float64), rtol=0, atol=1e-9
    )
    # The discrete schedule has no noise at level 0: the log-SNR is bounded.
    linear = NetworkDenoiser(Recorder(), LinearSchedule(), time_input="log_snr").network_time(t)
    assert linear[0].item() == pytest.approx(end, abs=1e-12)
    assert (linear.diff() > 0).all()


@pytest.mark.parametrize("one_level", [True, False])
def test_an_edm_network_is_fed_as_in_the_paper(one_level: bool) -> None:
    """`D = c_skip y + c_out F(c_in y, ln(s) / 4)` in its variables y, s ([EDM], eq. 7)."""
    z, t = batch()
    schedule, network = EDMSchedule(), Recorder()
    t = t[0] if one_level else t
    x, eps = NetworkDenoiser(network, schedule, "edm", False, "log_sigma", sigma_data=0.5)(z, t)
    alpha, sigma = (each.expand(len(z)) for each in schedule(t))
    s = (sigma / alpha)[:, None, None, None]
    y = (z / alpha[:, None, None, None]).double()
    root = (s**2 + 0.25).sqrt()
    fed, time = network.seen[0]
    torch.testing.assert_close(fed.double(), y / root, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(time, (s.flatten().log() / 4).float(), rtol=1e-6, atol=0)
    expected = 0.25 / root**2 * y + 0.5 * s / root * 2 * y / root
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q_sample(x, eps, schedule(t)), z, rtol=0, atol=1e-5)


def test_sigma_data_scales_the_input_for_any_prediction() -> None:
    z, t = batch()
    network = Recorder()
    plain, scaled = (
        NetworkDenoiser(network, LinearSchedule(), "v", sigma_data=each) for each in (1.0, 0.5)
    )
    plain(z, t)
    scaled(z, t)
    level = LinearSchedule()(t)
    factor = expand_like(1 / (level.alpha**2 / 4 + level.sigma**2).sqrt(), z)
    assert network.seen[0][0] is z
    torch.testing.assert_close(network.seen[1][0], factor * z)


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, math.inf, math.nan])
def test_sigma_data_is_a_standard_deviation(sigma_data: float) -> None:
    with pytest.raises(ValueError, match="sigma_data must be positive and finite"):
        NetworkDenoiser(Recorder(), LinearSchedule(), sigma_data=sigma_data)


def test_labels_reach_the_network_only_when_given() -> None:
    z, t = batch()
    network, label = Recorder(), torch.arange(6)
    plain = NetworkDenoiser(network, LinearSchedule(), clip=False)
    labelled = plain.condition(label)
    plain(z, t)
    labelled(z, t)
    labelled.condition(None)(z, t)
    assert [len(seen) for seen in network.seen] == [2, 3, 2]
    assert network.seen[1][2] is label
    assert plain.label is None
    assert labelled.network is network
    assert not labelled.clip


def test_estimates_are_differentiable_in_the_network_and_the_state() -> None:
    z, t = batch()
    network = Recorder()
    NetworkDenoiser(network, LinearSchedule(), clip=False)(
        z.requires_grad_(), t
    ).x.sum().backward()
    assert z.grad is not None
    assert network.scale.grad is not None


def test_half_precision_output_is_read_in_the_dtype_of_the_state() -> None:
    class Half(nn.Module):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return z.bfloat16()

    z, t = batch()
    assert NetworkDenoiser(Half(), LinearSchedule())(z, t).x.dtype == torch.float32


@pytest.mark.parametrize("field", ["prediction", "time_input"])
def test_unknown_names_list_the_known_ones(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be one of \(.*'nonsense'"):
        NetworkDenoiser(Recorder(), LinearSchedule(), **{field: "nonsense"})


def test_a_denoiser_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NetworkDenoiser(Recorder(), LinearSchedule()).clip = False


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_level_0_gives_numbers_or_an_error(kind: PredictionType, clip: bool) -> None:
    """`sigma_0 = 0` leaves the noise of x-prediction, or of a clipped image, undetermined."""
    z, _ = batch()
    try:
        prediction = NetworkDenoiser(Recorder(), LinearSchedule(), kind, clip=clip)(z, 0.0)
    except ValueError:
        return
    finite = [estimate.isfinite().all().item() for estimate in prediction]
    assert finite == [True, True]


# The exact denoisers, on which the tests of the samplers rest


def gaussian_log_density(denoiser: ExactGaussian) -> Callable[[Tensor, Tensor], Tensor]:
    def log_density(z: Tensor, t: Tensor) -> Tensor:
        mean, std = denoiser.marginal(t, z)
        return -(((z - mean) / std) ** 2) / 2

    return log_density


def mixture_log_density(denoiser: ExactMixture) -> Callable[[Tensor, Tensor], Tensor]:
    def log_density(z: Tensor, t: Tensor) -> Tensor:
        level = denoiser.schedule(t)
        alpha, sigma = expand_like(level.alpha, z), expand_like(level.sigma, z)
        density = torch.zeros_like(z)
        for w, m, s in zip(denoiser.weights, denoiser.means, denoiser.stds, strict=True):
            std = (alpha**2 * s**2 + sigma**2).sqrt()
            density = density + w / std * torch.exp(-(((z - alpha * m) / std) ** 2) / 2)
        return density.log()

    return log_density


@pytest.mark.parametrize("one_level", [True, False])
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_exact_denoisers_are_the_score_of_their_marginal(
    name: str, one_level: bool, gaussian: ExactGaussian, mixture: ExactMixture
) -> None:
    """`eps = -sigma d/dz log p_t(z)` (Tweedie), and `z = alpha x + sigma eps`."""
    denoiser = gaussian if name == "gaussian" else mixture
    log_density = (
        gaussian_log_density(gaussian) if name == "gaussian" else mixture_log_density(mixture)
    )
    z, t = batch()
    t = t[0] if one_level else t
    z = z.double().requires_grad_()
    x, eps = denoiser(z, t)
    level = denoiser.schedule(t)
    (score,) = torch.autograd.grad(log_density(z, t).sum(), z)
    torch.testing.assert_close(eps, -expand_like(level.sigma, z) * score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q_sample(x, eps, level), z, rtol=1e-12, atol=1e-12)
    assert denoiser(z.float(), t).x.dtype == torch.float32


@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_exact_flows_solve_the_probability_flow_equation(
    name: str, gaussian: ExactGaussian, mixture: ExactMixture
) -> None:
    """`d(z / alpha) / d(sigma / alpha) = eps`, by central differences of 1e-3 levels, to 1e-5."""
    denoiser: ExactGaussian | ExactMixture = gaussian if name == "gaussian" else mixture
    z = batch()[0].double()
    for t in (150.5, 500.5, 850.5):
        y, r = [], []
        for s in (t - 1e-3, t + 1e-3):
            level = denoiser.schedule(s)
            y.append(denoiser.flow(z, t, s) / level.alpha)
            r.append(level.sigma / level.alpha)
        slope = (y[1] - y[0]) / (r[1] - r[0])
        eps = denoiser(z, torch.tensor(t)).eps
        torch.testing.assert_close(slope, eps, rtol=0, atol=1e-5)
        back = denoiser.flow(denoiser.flow(z, t, 3.0), 3.0, t)
        torch.testing.assert_close(back, z, rtol=0, atol=1e-5)


def test_exact_denoisers_fit_the_protocol(gaussian: ExactGaussian, mixture: ExactMixture) -> None:
    denoisers: list[Denoiser] = [gaussian, mixture, NetworkDenoiser(Recorder(), LinearSchedule())]
    assert all(denoiser.schedule.num_levels == 1000 for denoiser in denoisers)


def test_eps_is_refused_where_the_last_level_has_no_signal() -> None:
    """There eps is the state itself, and x would be 0 / 0."""
    schedule = ZeroTerminalSNR()
    with pytest.raises(ValueError, match="prediction must be 'v' or 'x' for ZeroTerminalSNR"):
        NetworkDenoiser(nn.Identity(), schedule, "eps")


@pytest.mark.parametrize("kind", ["v", "x", "residual", "both"])
@pytest.mark.parametrize("time_input", get_args(TimeInput))
def test_every_other_prediction_is_finite_without_signal(
    kind: PredictionType, time_input: TimeInput
) -> None:
    """x follows from the network's output, half of z, alone; eps is the state."""
    z = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    network = Recorder(0.5, kind)
    x, eps = NetworkDenoiser(network, ZeroTerminalSNR(), kind, False, time_input)(z, 1000)
    assert torch.isfinite(network.seen[0][1]).all()
    torch.testing.assert_close(eps, z)
    torch.testing.assert_close(x, -z / 2 if kind == "v" else z / 2)


GRAPHS = product(
    [LinearSchedule(), CosineLogSNRSchedule(), EDMSchedule()],
    [("eps", True), ("v", False), ("both", DynamicThreshold()), ("edm", False)],
)


@pytest.mark.parametrize(
    ("schedule", "prediction", "clip"),
    [
        # Each schedule and each prediction at least once: compiling takes seconds.
        pytest.param(schedule, *case, marks=[] if place in (0, 5, 10, 11) else [pytest.mark.slow])
        for place, (schedule, case) in enumerate(GRAPHS)
    ],
)
def test_a_step_and_a_loss_are_one_graph_each(schedule, prediction, clip):
    """Nothing in them depends on a value in a way that a compiler cannot follow."""
    channels = 2 if prediction == "both" else 1
    settings = {"sigma_data": 0.5, "time_input": "log_sigma"} if prediction == "edm" else {}
    network = tiny_unet(out_channels=channels)
    denoiser = some_ddpm(network=network, prediction=prediction, **settings).denoiser
    denoiser = dataclasses.replace(denoiser, schedule=schedule, clip=clip)

    def step(z, t, s):
        return ddim_step(denoiser(z, t), denoiser.schedule(t), denoiser.schedule.step_end(s))

    def loss(x, t, eps):
        return denoising_loss(denoiser, x, t, eps, weight="min_snr")

    z, eps = latents(0, range(4), (1, 8, 8))[0].split(2)
    levels = torch.tensor([900.0, 300.0, 0.0], dtype=torch.float64)
    torch._dynamo.reset()
    for function, arguments in [
        (step, (z, levels[0], levels[1])),
        (step, (z, levels[1], levels[2])),
        (loss, (z, levels[:2], eps)),
    ]:
        # First: a schedule keeps its table at its first call, which Python 3.11 locks.
        expected = function(*arguments)
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*arguments), expected, rtol=1e-5, atol=1e-5)
