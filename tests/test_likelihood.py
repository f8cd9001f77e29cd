"""The bound and the ODE's likelihood against entropies, densities and divergences in closed form.

A value `mean + std` or `mean - std` has `-log p` equal to the entropy of `N(mean, std^2)`, and the
errors of the exact denoiser at both average to its mean squared error. Standard noise in the terms
of the bound, which are of degree 2, can be replaced by signs. So two values and two signs give the
bound's expectation over data and noise without Monte Carlo.
"""

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from exact import ExactGaussian, ExactMixture
from scipy.stats import norm
from tiny import tiny_unet
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

from ddim_pl.denoiser import Denoiser, NetworkDenoiser
from ddim_pl.likelihood import (
    BITS_PER_BIN,
    log_discretised,
    ode_bits_per_dim,
    ode_levels,
    variational_bound,
)
from ddim_pl.noise import GaussianNoise
from ddim_pl.prediction import Prediction
from ddim_pl.rng import image_generators
from ddim_pl.samplers import DDIM
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule
from ddim_pl.transitions import posterior

GRID = torch.arange(256, dtype=torch.float64) / 127.5 - 1
MEAN = GRID[[110, 128, 150]].reshape(3, 1, 1)
STD = torch.tensor([26, 36, 46], dtype=torch.float64).reshape(3, 1, 1) / 127.5
SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64)
X = (MEAN + STD * SIGNS[:, None]).expand(3, 2, 2)[None]  # on the grid, (1, 3, 2, 2)
NOISE = SIGNS.expand(1, 3, 2, 2)
ENTROPY = (0.5 * math.log2(2 * math.pi * math.e) + STD.log2()).mean().item()
COSINE = CosineLogSNRSchedule()


def law(schedule: NoiseSchedule) -> ExactGaussian:
    return ExactGaussian(schedule, MEAN, STD)


def generators(count: int, start: int = 0) -> list[torch.Generator]:
    return image_generators(0, range(start, start + count))


def fine_levels(schedule: NoiseSchedule, count: int, sigma: float) -> Tensor:
    """From a deviation of the noise on, evenly spaced in log(1 + SNR), where the terms are."""
    top = -2 * math.log(sigma)
    lowest = schedule(schedule.num_levels).snr.log1p().item()
    return schedule.level_at(torch.linspace(top, lowest, count).double().expm1().log())


def expected_diffusion(schedule: NoiseSchedule, levels: Tensor) -> float:
    """In bits, with the mean squared error `1 / (SNR + 1 / std^2)` of the exact denoiser."""
    snr = schedule(levels).snr[:, None, None, None]
    terms = (snr[:-1] - snr[1:]) / 2 / (snr[1:] + STD**-2)
    return terms.sum(0).mean().item() / math.log(2)


@pytest.fixture
def signs_for_noise(monkeypatch):
    monkeypatch.setattr(GaussianNoise, "draw", lambda self, shape, t, generator, like: NOISE)


# The bound


@pytest.mark.parametrize("schedule", [LinearSchedule(), COSINE], ids=["linear", "cosine"])
def test_a_term_is_the_divergence_of_the_two_posteriors(schedule):
    z, xhat = torch.full((1, 1), 0.4).double(), torch.full((1, 1), -0.2).double()
    x = torch.full((1, 1), 0.1).double()
    for t, s in [(1000, 999), (500, 300), (2, 1)]:
        t, s = schedule(t), schedule(s)
        (mean, std), (mean_hat, _) = posterior(z, x, t, s), posterior(z, xhat, t, s)
        divergence = kl_divergence(Normal(mean, std), Normal(mean_hat, std))
        torch.testing.assert_close(
            divergence, (s.snr - t.snr) / 2 * (x - xhat).square(), rtol=1e-6, atol=1e-12
        )


@pytest.mark.parametrize("schedule", [LinearSchedule(), COSINE], ids=["linear", "cosine"])
def test_the_parts_have_their_closed_forms(schedule, signs_for_noise):
    levels = torch.arange(1.0, 1001).double()
    bound = variational_bound(law(schedule), X, generator=torch.Generator())
    last, first = schedule(1000.0), schedule(1.0)
    prior = kl_divergence(Normal(last.alpha * X, last.sigma), Normal(0, 1)).mean().item()
    assert bound.prior.item() == pytest.approx(prior / math.log(2), rel=1e-6, abs=1e-12)
    assert bound.diffusion.item() == pytest.approx(expected_diffusion(schedule, levels), rel=1e-9)
    xhat = law(schedule)(first.alpha * X + first.sigma * NOISE, torch.tensor(1.0)).x
    k = (X * 127.5 + 127.5).round()
    edges = [(k + d) / 127.5 - 1 for d in (-0.5, 0.5)]
    below, above = (norm.cdf(e, xhat, first.sigma) for e in edges)
    decoder = -torch.from_numpy(above - below).log2().mean().item()
    assert bound.decoder.item() == pytest.approx(decoder, abs=1e-9)
    assert torch.equal(bound.total, bound.prior + bound.diffusion + bound.decoder)


def test_the_bound_tends_to_the_entropy_at_first_order(signs_for_noise):
    """From noise of 0.03 on: the decoder's variance is then right to 2%, its cost to 1e-4."""
    gaps = []
    for count in (250, 500, 1000, 16_000):
        levels = fine_levels(COSINE, count, 0.03)
        bound = variational_bound(law(COSINE), X, generator=torch.Generator(), levels=levels)
        gaps.append(bound.total.item() - ENTROPY - BITS_PER_BIN)
    assert gaps == pytest.approx([0.0364, 0.0181, 0.0091, 0.0007], abs=6e-5)
    floor = gaps[-1] - (gaps[-2] - gaps[-1]) / 15  # what the decoder costs
    orders = [math.log2((a - floor) / (b - floor)) for a, b in pairwise(gaps[:3])]
    assert orders == pytest.approx([1, 1], abs=0.02)


def test_the_bound_has_its_expectation_under_real_noise():
    """Monte Carlo, 300 images of 12 values; 4 standard errors."""
    x, schedule = X.expand(300, -1, -1, -1), LinearSchedule()
    bound = variational_bound(law(schedule), x, generator=generators(300))
    want = expected_diffusion(schedule, torch.arange(1.0, 1001).double())
    assert abs(bound.diffusion.mean() - want) < 4 * bound.diffusion.std() / 300**0.5
    # The decoder alone is the entropy at level 1, where its variance is almost exact.
    want = 0.5 * math.log2(2 * math.pi * math.e * schedule(1.0).sigma ** 2) + BITS_PER_BIN
    assert abs(bound.decoder.mean() - want) < 4 * bound.decoder.std() / 300**0.5


@pytest.mark.parametrize("num_terms", [1, 7])
def test_a_few_terms_estimate_the_sum_without_bias(num_terms):
    """4,000 draws for one image; 4 standard errors."""
    x, schedule = X.expand(4000, -1, -1, -1), LinearSchedule()
    part = variational_bound(law(schedule), x, generator=generators(4000), num_terms=num_terms)
    want = expected_diffusion(schedule, torch.arange(1.0, 1001).double())
    error = part.diffusion.std() / 4000**0.5
    assert error < 0.02 * want
    assert abs(part.diffusion.mean() - want) < 4 * error


def test_few_terms_are_all_the_same_to_a_denoiser_of_unit_variance(monkeypatch):
    """There a fine term is what the draw expects, and any draw gives the sum but for O(1/T)."""
    denoiser = ExactGaussian(COSINE, 0.0, 1.0)
    x = torch.tensor([[-1.0, 1.0]]).double()[..., None].expand(1, 2, 2)
    x = x.expand(50, 2, 2)
    noise = SIGNS.expand(50, 2, 2)
    monkeypatch.setattr(GaussianNoise, "draw", lambda self, shape, t, generator, like: noise)
    levels = fine_levels(COSINE, 2000, 0.03)
    few, whole = (
        variational_bound(denoiser, x, generator=generators(50), levels=levels, num_terms=n)
        for n in (3, None)
    )
    torch.testing.assert_close(few.diffusion, whole.diffusion, rtol=1e-3, atol=0)
    assert few.diffusion.std() < 1e-3
    assert torch.equal(few.decoder, whole.decoder)


@dataclass(frozen=True)
class Counting(Denoiser):
    denoiser: Denoiser
    calls: list[int]

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        self.calls.append(len(z))
        return self.denoiser(z, t)


def test_number_of_network_calls():
    for arguments, calls in [
        ({}, 1000),
        ({"num_terms": 5}, 6),
        ({"levels": torch.tensor([1.0, 10.0, 500.0])}, 3),
        ({"levels": torch.tensor([700.0])}, 1),
    ]:
        counting = Counting(law(LinearSchedule()), [])
        variational_bound(counting, X, generator=torch.Generator(), **arguments)
        assert len(counting.calls) == calls
    counting = Counting(law(LinearSchedule()), [])
    ode_bits_per_dim(counting, X, ode_levels(1000, 6), generator=None, exact_trace=True)
    assert len(counting.calls) == 24


def test_one_level_is_a_bound_too():
    """Prior and decoder only; with this little noise the prior pays for all of the image."""
    level = torch.tensor([300.0])
    bound = variational_bound(law(COSINE), X, generator=torch.Generator(), levels=level)
    assert (bound.diffusion == 0).all()
    assert bound.total > ENTROPY + BITS_PER_BIN


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_published_quantity_is_that_of_ddpms_script(variance, signs_for_noise):
    """Its arithmetic in betas: KL of normals, and the decoder with betatilde_2, not beta_1."""
    schedule = LinearSchedule(20)
    model = ExactGaussian(schedule, MEAN, STD)
    betas = schedule.betas()
    product = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1).double(), product[:-1]])
    tilde = betas * (1 - before) / (1 - product)
    true_variance = torch.cat([tilde[1:2], tilde[1:]])
    kinds = {"small": true_variance, "large": torch.cat([tilde[1:2], betas[1:]])}
    total = torch.zeros(()).double()
    for i in range(20):
        z = product[i].sqrt() * X + (1 - product[i]).sqrt() * NOISE
        xhat = model(z, torch.tensor(i + 1.0)).x
        from_x = betas[i] * before[i].sqrt() / (1 - product[i])
        std_q, std_p = true_variance[i].sqrt(), kinds[variance][i].sqrt()
        if i:
            term = kl_divergence(Normal(from_x * X, std_q), Normal(from_x * xhat, std_p))
        else:
            k = (X * 127.5 + 127.5).round() / 127.5 - 1
            edges = [(k + d / 127.5 - xhat) / std_p for d in (-0.5, 0.5)]
            term = -(torch.special.ndtr(edges[1]) - torch.special.ndtr(edges[0])).log()
        total = total + term.mean()
    last = product[-1]
    total += kl_divergence(Normal(last.sqrt() * X, (1 - last).sqrt()), Normal(0, 1)).mean()
    for arguments in ({}, {"num_terms": 19}):
        bound = variational_bound(
            model,
            X,
            generator=torch.Generator(),
            variance=variance,
            decoder_variance="posterior",
            **arguments,
        )
        if arguments:  # drawn with replacement: the constant is exact, the rest an estimate
            assert bound.total.item() == pytest.approx(total.item() / math.log(2), rel=0.2)
        else:
            assert bound.total.item() == pytest.approx(total.item() / math.log(2), rel=1e-9)


# The decoder


@pytest.mark.parametrize("mean", [-1.5, -1.0, -0.013, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("std", [1e-3, 0.01, 0.3, 10.0])
def test_the_decoder_is_a_law_of_256_values(mean, std):
    logs = log_discretised(GRID[:, None], torch.tensor(mean).double(), std)
    assert logs.dtype == torch.float64
    assert logs.isfinite().all()
    assert abs(logs.logsumexp(0).item()) < 1e-12


def test_the_decoder_agrees_with_scipy_and_keeps_its_digits_in_the_tails():
    mean, std = torch.tensor(0.1).double(), 0.2
    low, high = GRID - 0.5 / 127.5, GRID + 0.5 / 127.5
    low[0], high[-1] = -torch.inf, torch.inf
    want = norm.cdf(high, mean, std) - norm.cdf(low, mean, std)
    torch.testing.assert_close(
        log_discretised(GRID, mean, std).exp(), torch.from_numpy(want), rtol=1e-9, atol=1e-16
    )
    # 1,900 deviations away, where scipy's difference is 0; symmetric.
    far = log_discretised(GRID[[1, 254]], -GRID[[1, 254]], 1e-3)
    nearest = abs(2 * GRID[1]) - 0.5 / 127.5
    assert far[0] == pytest.approx(norm.logcdf(-nearest.item() / 1e-3), rel=1e-9)
    assert far[0] == pytest.approx(far[1].item(), rel=1e-12)


# The ODE


def exact_bits(denoiser: ExactGaussian, x: Tensor, first: float) -> Tensor:
    """By the exact flow, from a state `alpha x` to the prior at level 1000."""
    z = denoiser.schedule(first).alpha * x
    (_, before), (_, after) = denoiser.marginal(first, z), denoiser.marginal(1000.0, z)
    end = denoiser.flow(z, first, 1000.0)
    density = Normal(0, 1).log_prob(end) + (after / before * denoiser.schedule(first).alpha).log()
    return -density.flatten(1).mean(1) / math.log(2)


@pytest.mark.parametrize("first", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("exact_trace", [True, False])
def test_ode_on_a_gaussian(gaussian, first, exact_trace):
    """Random signs are exact where the Jacobian is diagonal."""
    x = gaussian.mean + gaussian.std * torch.linspace(-2, 2, 3).double()[:, None, None, None]
    levels = ode_levels(1000, 60)
    levels = torch.cat([torch.tensor([first]).double(), levels[levels > first]])
    bits = ode_bits_per_dim(gaussian, x, levels, generator=generators(3), exact_trace=exact_trace)
    assert bits.dtype == torch.float64
    torch.testing.assert_close(bits, exact_bits(gaussian, x, first), rtol=0, atol=1e-5)


def test_ode_gives_the_entropy_and_a_wrong_model_more():
    """To 1e-6; the prior's mismatch at the last level of the cosine schedule is 1e-9."""
    levels = torch.cat([torch.zeros(1), ode_levels(1000, 100)])
    bits = ode_bits_per_dim(law(COSINE), X, levels, generator=generators(1))
    assert bits.item() == pytest.approx(ENTROPY, abs=1e-6)
    wrong = ExactGaussian(COSINE, MEAN, 1.2 * STD)
    bits = ode_bits_per_dim(wrong, X, levels, generator=generators(1))
    divergence = kl_divergence(Normal(MEAN, STD), Normal(MEAN, 1.2 * STD)).mean().item()
    assert bits.item() == pytest.approx(ENTROPY + divergence / math.log(2), abs=1e-6)


def test_the_bound_lies_above_the_ode_and_this_above_the_entropy(signs_for_noise):
    for schedule, gap in [(LinearSchedule(), 0.64), (COSINE, 2.27)]:
        bound = variational_bound(law(schedule), X, generator=torch.Generator()).total
        assert bound.item() == pytest.approx(ENTROPY + BITS_PER_BIN + gap, abs=0.005)
        levels = torch.cat([torch.zeros(1), ode_levels(1000, 100)])
        ode = ode_bits_per_dim(law(schedule), X, levels, generator=None, exact_trace=True)
        assert bound > ode + BITS_PER_BIN
        # An exact score, but the linear schedule's last state is not quite N(0, 1).
        assert ENTROPY - 1e-6 < ode < ENTROPY + 1e-4


def mixture_log_density(mixture: ExactMixture, z: Tensor, t: float) -> Tensor:
    alpha, sigma = mixture.schedule(t)
    means, stds = (torch.tensor(v, dtype=torch.float64) for v in (mixture.means, mixture.stds))
    components = Normal(alpha * means, (alpha**2 * stds**2 + sigma**2).sqrt())
    weights = Categorical(torch.tensor(mixture.weights, dtype=torch.float64))
    return MixtureSameFamily(weights, components).log_prob(z)[:, 0]


def test_ode_on_a_mixture_is_its_density_at_fourth_order(mixture: ExactMixture):
    """To 1e-5 that of the data; beyond, the last level's mean, 2e-6, tells it from N(0, 1)."""
    x = torch.linspace(-1.6, 1.6, 33, dtype=torch.float64)[:, None]
    z = mixture.flow(x, 0.0, 1000.0)
    density = mixture_log_density(mixture, x, 0.0)
    mismatch = Normal(0, 1).log_prob(z)[:, 0] - mixture_log_density(mixture, z, 1000.0)
    assert mismatch.abs().max() < 1e-5
    errors = []
    for num_steps in (20, 40, 80):
        levels = torch.linspace(0, 1000, num_steps + 1)
        bits = ode_bits_per_dim(mixture, x, levels, generator=generators(33))
        errors.append((bits * math.log(2) + density + mismatch).abs().max())
    orders = [(a / b).log2().item() for a, b in pairwise(errors)]
    assert orders == pytest.approx([4, 4], abs=0.2)
    assert errors[-1] < 1e-6


@dataclass(frozen=True)
class CorrelatedGaussian(Denoiser):
    """Data `N(0, covariance)`: the Jacobian is full."""

    schedule: NoiseSchedule
    covariance: Tensor

    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        level = self.schedule(t)
        total = level.alpha**2 * self.covariance + level.sigma**2 * torch.eye(z.shape[1])
        whitened = torch.linalg.solve(total, z.T).T
        return Prediction(level.alpha * whitened @ self.covariance, level.sigma * whitened)


@pytest.fixture
def correlated() -> CorrelatedGaussian:
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return CorrelatedGaussian(COSINE, root @ root.T / 10 + 0.05 * torch.eye(5))


def test_exact_trace_and_random_probes_with_correlated_values(correlated):
    """Monte Carlo, 1,000 sets of probes; 4 standard errors."""
    law = torch.distributions.MultivariateNormal(torch.zeros(5).double(), correlated.covariance)
    x = torch.linspace(-0.5, 0.4, 5, dtype=torch.float64)[None]
    want = -law.log_prob(x).item() / 5 / math.log(2)
    levels = torch.linspace(0, 1000, 41)
    exact = ode_bits_per_dim(correlated, x, levels, generator=None, exact_trace=True)
    assert exact.item() == pytest.approx(want, abs=1e-4)
    spread = []
    for num_probes in (1, 4):
        estimates = ode_bits_per_dim(
            correlated,
            x.expand(1000, 5),
            levels,
            generator=generators(1000),
            num_probes=num_probes,
        )
        assert abs(estimates.mean() - exact.item()) < 4 * estimates.std() / 1000**0.5
        spread.append(estimates.std())
    assert spread[0] / spread[1] == pytest.approx(2, rel=0.15)


def test_dequantised_images_are_measured_in_bits_of_the_discrete_image():
    """400 draws; 4 standard errors. On average above -log2 P by the spread within a bin, tiny."""
    x = X.expand(400, -1, -1, -1)
    levels = torch.cat([torch.zeros(1), ode_levels(1000, 30)])
    bits = ode_bits_per_dim(law(COSINE), x, levels, generator=generators(400), dequantise=True)
    want = -log_discretised(X, MEAN, STD).mean() / math.log(2)
    assert bits.std() > 0
    assert abs(bits.mean() - want) < 4 * bits.std() / 20 + 1e-4


def test_ode_levels_rise_from_the_first_trained_level_to_the_last():
    levels = ode_levels(1000, 50)
    assert levels.dtype == torch.float64
    assert levels[[0, -1]].tolist() == [1, 1000]
    assert (levels.diff().diff() > 0).all()
    with pytest.raises(ValueError, match="num_levels must be at least 2, got 1"):
        ode_levels(1, 5)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        ode_levels(1000, 0)


# Networks


class Mixed(nn.Module):
    """Mixes the values of an image and, with a label, shifts them."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.shift = nn.Embedding(3, 12)

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        h = self.linear(z.flatten(1)) + self.shift(label) + t[:, None] / 1000
        return torch.tanh(h).reshape(z.shape)


def denoiser(clip: bool = False, count: int = 4) -> NetworkDenoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Mixed()
    return NetworkDenoiser(network, LinearSchedule(20), "v", clip, label=torch.arange(count) % 3)


def both(
    model: NetworkDenoiser, x: Tensor, sources: list[torch.Generator], num_terms=None
) -> Tensor:
    ode = ode_bits_per_dim(
        dataclasses.replace(model, clip=False),
        x,
        ode_levels(20, 3),
        generator=sources,
        dequantise=True,
    )
    bound = variational_bound(model, x, generator=sources, num_terms=num_terms)
    return torch.stack([ode, *bound, bound.total])


@pytest.mark.parametrize("num_terms", [None, 3])
def test_an_image_does_not_depend_on_its_batch(num_terms):
    x = GRID[torch.arange(48) * 5].reshape(4, 3, 2, 2).float()
    together = both(denoiser(True), x, generators(4), num_terms)
    alone = [
        both(
            denoiser(True).condition(torch.tensor([i % 3])),
            x[i : i + 1],
            generators(1, i),
            num_terms,
        )
        for i in range(4)
    ]
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-5, atol=1e-6)
    assert together[0].std() > 0.01


def test_inference_mode_and_gradients():
    x = GRID[torch.arange(48) * 5].reshape(4, 3, 2, 2).float()
    model, state = denoiser(), torch.get_rng_state()
    want = both(model, x, generators(4))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            inside = denoiser().condition((torch.arange(4) % 3).clone())
            inside = dataclasses.replace(
                inside, network=model.network, schedule=LinearSchedule(20)
            )
            inside.schedule(3.0)  # its table is made, and kept, in this mode
            got = both(inside, x.clone(), generators(4))
        assert torch.equal(got, want)
        assert not got.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.network.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not want.requires_grad


def test_a_unet_in_inference_mode():
    network = tiny_unet(num_classes=3).eval()
    nn.init.constant_(network.conv_out.weight, 0.01)
    x = GRID[torch.arange(128)].reshape(2, 1, 8, 8).float()
    with torch.inference_mode():
        model = NetworkDenoiser(network, LinearSchedule(20), "eps", False, label=torch.arange(2))
        bits = both(model, x, generators(2))
    assert bits.isfinite().all()
    assert all(p.grad is None for p in network.parameters())


def test_ode_and_ddim_agree_on_the_flow():
    """The last state of many small DDIM steps up has the prior density that the ODE reports."""
    model = law(COSINE)
    levels = torch.linspace(0, 1000, 4001)
    z = DDIM()(model, X, levels)
    (_, before), (_, after) = model.marginal(0.0, X), model.marginal(1000.0, X)
    want = -(Normal(0, 1).log_prob(z) + (after / before).log()).mean() / math.log(2)
    bits = ode_bits_per_dim(model, X, levels[::40], generator=None, exact_trace=True)
    assert bits.item() == pytest.approx(want.item(), abs=2e-3)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X + 0.001}, "x must hold images on the uint8 grid"),
        ({"x": X + 1.2}, "x must hold images on the uint8 grid"),
        ({"levels": torch.tensor([0.0, 5.0])}, "levels must be above 0"),
        ({"levels": torch.tensor([5.0, 2.0])}, "levels must rise strictly"),
        ({"levels": torch.tensor([5.0, 1001.0])}, r"levels must lie in \[0, 1000\]"),
        ({"levels": torch.empty(0)}, "levels must be a vector of at least 1"),
        ({"num_terms": 0}, r"num_terms must lie in \[1, 999\].*got 0"),
        ({"num_terms": 1000}, r"num_terms must lie in \[1, 999\].*got 1000"),
        ({"decoder_variance": "beta"}, "decoder_variance must be one of .*got 'beta'"),
        (
            {"decoder_variance": "posterior", "levels": torch.tensor([5.0])},
            "decoder_variance must be 'transition' with one level, got 'posterior'",
        ),
        ({"generator": generators(2)}, "one generator per image, got 2"),
        ({"generator": generators(2), "num_terms": 2}, "one generator per image, got 2"),
    ],
)
def test_wrong_arguments_of_the_bound(arguments, message):
    arguments = {"x": X, "generator": generators(1), **arguments}
    with pytest.raises(ValueError, match=message):
        variational_bound(law(LinearSchedule()), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"denoiser": denoiser(clip=True)}, "denoiser must not clip"),
        ({"num_probes": 0}, "num_probes must be at least 1, got 0"),
        ({"generator": None}, "generator must be given"),
        ({"generator": None, "exact_trace": True, "dequantise": True}, "generator must be given"),
        ({"generator": generators(2)}, "one generator per image, got 2"),
        ({"x": X + 0.001, "dequantise": True}, "x must hold images on the uint8 grid"),
        ({"levels": torch.tensor([1000.0, 0.0])}, "levels must rise strictly"),
        ({"levels": torch.tensor([1000.0])}, "levels must be a vector of at least 2"),
    ],
)
def test_wrong_arguments_of_the_ode(arguments, message):
    defaults = {
        "denoiser": law(LinearSchedule()),
        "x": X,
        "levels": ode_levels(1000, 3),
        "generator": generators(1),
    }
    with pytest.raises(ValueError, match=message):
        ode_bits_per_dim(**{**defaults, **arguments})
