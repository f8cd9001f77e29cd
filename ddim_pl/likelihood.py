"""Likelihood of images in bits per dimension: a variational bound, and the ODE's value.

A denoiser defines two models. The Markov chain of ancestral sampling has a variational bound on
`-log2 P(x)`, the probability of a discrete image ([DDPM]). The probability-flow ODE has an exact
density `p(x)` ([SDE]).

Pixels are on the grid of uint8 images, `x = k / 127.5 - 1` with `k = 0 ... 255`, with bins of
width `1 / 127.5`. All numbers are negative log-likelihoods in bits per dimension, that is nats
over `D ln 2`, D being the number of values in an image: lower is better.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddim_pl.checks import check_at_least, check_one_of
from ddim_pl.denoiser import Denoiser
from ddim_pl.noise import Noise
from ddim_pl.noise.reverse import reverse_model, sum_images
from ddim_pl.rng import Generators, uniform
from ddim_pl.scales import Scales, expand_like, float64
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.transitions import Variance, q_sample, transition_variance

DecoderVariance = Literal["transition", "posterior"]

BITS_PER_BIN = math.log2(127.5)
"""Bits per dimension from a density on [-1, 1] to the probability of a bin: -log2 of its width."""


class Bound(NamedTuple):
    """A variational bound and its three parts, in bits per dimension, float64 `(B,)` each.

    Attributes:
        prior: `L_T`, of the last state.
        diffusion: The sum of `L_{t-1}` over all transitions between states.
        decoder: `L_0`, of the image given the first state.
    """

    prior: Tensor
    diffusion: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """The bound on `-log2 P(x) / D`, `(B,)`."""
        return self.prior + self.diffusion + self.decoder


@torch.no_grad()
def variational_bound(
    denoiser: Denoiser,
    x: Tensor,
    *,
    generator: Generators,
    levels: Tensor | None = None,
    num_terms: int | None = None,
    variance: Variance = "small",
    decoder_variance: DecoderVariance = "transition",
    noise: Noise | None = None,
    gaussian_share: float | None = None,
    progress: bool = False,
) -> Bound:
    """Unbiased estimate of the variational bound on `-log2 P(x) / D` ([DDPM], eq. 5).

    The latents are the states at the levels `t_1 < ... < t_n`. The model is ancestral sampling
    through them, by default with small variance (`Ancestral("small")`): `p(z_s | z_t)` is the
    posterior `q(z_s | z_t, xhat)`. It has the variance of `q(z_s | z_t, x)`, and its mean differs
    by `alpha_s var_ts / sigma_t^2 (x - xhat)` with `var_ts = sigma_t^2 - alpha_t^2 sigma_s^2 /
    alpha_s^2`. So the divergence of the two is ([VDM], eq. 13)

        L_{t-1} = (SNR_s - SNR_t) / 2 ||x - xhat(z_t, t)||^2.

    With large variance, `var_ts` in place of `r var_ts`, `r = sigma_s^2 / sigma_t^2`, it is `r` of
    this and `(r - 1 - log r) / 2` for each dimension.

    The prior `N(0, I)` has `L_T = 1/2 sum(alpha^2 x^2 - alpha^2 - log sigma^2)` at `t_n`. The
    decoder is `N(xhat(z, t_1), v)` integrated over the bins ([DDPM], eq. 13). The small variance
    is 0 there, which gives an infinite bound. `v = sigma_{t_1}^2` is the variance of the
    transition from the clean image (`beta_1` in [DDPM]), and that of x given z for Gaussian data
    of variance 1. The authors' code takes the posterior's from `t_2` to `t_1` (`betatilde_2`);
    their published figures have it, and the large variance.

    For Gamma noise the posterior is `thinning_step`, the forward process is Gamma's, and the
    integrals of the divergences are numeric ([Report], eq. 20). As they are infinite wherever
    `xhat > x`, a share of each model step is Gaussian, see `thinning_divergence`. Begin at a level
    whose shape is above 1: below, the densities have poles, and the bound is large.

    There is no state at level 0. The bound holds for any denoiser, clipped or not, and for any
    levels. A grid even in t is coarse near the data, where the log-SNR changes fastest: with 1,000
    levels and exact denoisers of Gaussians, the bound exceeds the entropy by 0.64 bits (linear)
    and 2.27 bits (cosine log-SNR schedule), but by 0.01 bits on a grid even in log(1 + SNR) from
    sigma = 0.03 on, see `NoiseSchedule.level_at`.

    Args:
        denoiser: Estimates of the clean image.
        x: Images on the grid of uint8, `(B, ...)`.
        generator: One generator, or one per image, which makes images independent of each other.
        levels: Rising levels in (0, T], `(n,)`; by default `1 ... T`.
        num_terms: Number of diffusion terms to draw for each image, at most n - 1; by default all
            are summed. They are drawn by systematic sampling in proportion to the terms of
            Gaussian data of variance 1, and divided by their probability: no bias.
        variance: That of the model's steps, as in `Ancestral`; Gamma steps have none to choose.
        decoder_variance: "transition" for the one from clean data to `t_1`, "posterior" for the
            one from `t_2` to `t_1`, which needs two levels.
        noise: Law of the noise; by default Gaussian.
        gaussian_share: For Gamma noise, the share of the Gaussian step in each step of the model
            and in the prior, in (0, 1]; by default 0.001.
        progress: Show a progress bar.

    Returns:
        The parts for each image, after n network evaluations, or `num_terms + 1`.

    Raises:
        ValueError: If the pixels are not on the grid, or an argument does not fit.
    """
    _check_pixels(x)
    if levels is None:
        levels = torch.arange(1, denoiser.schedule.num_levels + 1)
    levels = _check_levels(denoiser.schedule, levels, least=1)
    if levels[0] == 0:
        raise ValueError(
            "levels must be above 0 for the bound, which has no state there, got 0 as the first: "
            "leave it out"
        )
    model = reverse_model(noise, variance, gaussian_share)
    scales = denoiser.schedule(levels)
    deviation = _decoder_deviation(scales, decoder_variance)
    first, last = Scales(*(c[0] for c in scales)), Scales(*(c[-1] for c in scales))
    prior = model.prior(x, last)

    z = q_sample(x, model.noise.draw(x.shape, first, generator, x), first)
    decoder = -sum_images(log_discretised(x, denoiser(z, levels[0]).x, deviation))

    terms = _choose(scales.snr, len(x), num_terms, generator)
    diffusion = torch.zeros_like(decoder) + model.constant(scales) * x[0].numel()
    for index, factor in tqdm(terms, desc="bound", disable=not progress, leave=False):
        t, s = (Scales(scales.alpha[i], scales.sigma[i]) for i in (index + 1, index))
        eps = model.noise.draw(x.shape, t, generator, x)
        z = q_sample(x, eps, t)
        error = denoiser(z, levels[index + 1]).x - x
        diffusion += model.term(eps, error, t, s, factor)
    return Bound(*(part / (x[0].numel() * math.log(2)) for part in (prior, diffusion, decoder)))


def _decoder_deviation(scales: Scales, kind: DecoderVariance) -> Tensor:
    """Standard deviation of the decoder, `()`, see `variational_bound`."""
    check_one_of(DecoderVariance, decoder_variance=kind)
    if kind == "transition":
        return scales.sigma[0]
    if len(scales.sigma) < 2:
        raise ValueError(
            "decoder_variance must be 'transition' with one level, got 'posterior': that is of "
            "the step from the second level to the first"
        )
    s, t = (Scales(scales.alpha[i], scales.sigma[i]) for i in (0, 1))
    return s.sigma / t.sigma * transition_variance(t, s).sqrt()


def log_discretised(x: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """Log-probability of pixels under a Gaussian integrated over their bins.

    The bins of the darkest and the brightest value extend to infinity, so that the 256
    probabilities sum to 1 ([DDPM], eq. 13). Accurate far in both tails.

    Args:
        x: Pixels on the grid of uint8, `(B, ...)`.
        mean: Means, broadcast to `x`.
        std: Standard deviation.

    Returns:
        Natural logarithms in float64, of the shape of `x`.
    """
    k = (float64(x) * 127.5 + 127.5).round()
    centre = k / 127.5 - 1 - float64(mean)
    low = torch.where(k > 0, (centre - 0.5 / 127.5) / std, -torch.inf)
    high = torch.where(k < 255, (centre + 0.5 / 127.5) / std, torch.inf)
    # Mirrored to the left tail, where both integrals are small and keep their digits.
    low, high = torch.where(centre > 0, -high, low), torch.where(centre > 0, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return upper + torch.log(-torch.expm1(lower - upper))


def ode_bits_per_dim(
    denoiser: Denoiser,
    x: Tensor,
    levels: Tensor,
    *,
    generator: Generators | None,
    num_probes: int = 1,
    exact_trace: bool = False,
    dequantise: bool = False,
    progress: bool = False,
) -> Tensor:
    """Negative log-likelihood of the probability-flow ODE, in bits per dimension.

    In the angle `phi = arctan(sigma / alpha)`, `0 <= phi <= pi / 2`, the ODE is `dz / dphi = v =
    alpha eps - sigma x` ([PD], appendix D; equal to `dy / dr = eps` in `y = z / alpha`, `r = sigma
    / alpha`), smooth up to both ends and the same for all schedules. Densities satisfy `d log p(z)
    / dphi = -div v` ([NeuralODE]), and so

        log p(x) = log N(z_n; 0, I) + integral of div v dphi + D log alpha_1

    from `z_1 = alpha_1 x` at the first level to the last. The solver is the classical Runge-Kutta
    method of order 4, with 4 forward and backward passes of the network per step.

    This is the density of `z / alpha` at the first level, where z solves the ODE from `N(0, I)` at
    the last level. At a first level above 0 the images have noise left: choose a level with less
    noise than a bin, but on which the network is trained.

    Args:
        denoiser: Estimates without clipping, differentiable with respect to z.
        x: Images, `(B, ...)`; the states have their dtype.
        levels: Rising levels, `(S + 1,)`, from that of the images to that of the prior.
        generator: One generator, or one per image, which makes images independent of each other;
            None only if no random numbers are needed.
        num_probes: Number of random sign vectors e for the divergence, the same in all steps:
            `div v` is the mean of `e^T (dv / dz) e` ([FFJORD]). Unbiased; exact for a diagonal
            Jacobian.
        exact_trace: Sum the D derivatives instead, with D backward passes in place of one.
        dequantise: Treat x as discrete images on the grid of uint8: add noise uniform over a bin,
            and `BITS_PER_BIN`, 6.99, for its width. The mean is a bound on `-log2 P(x) / D`,
            comparable with `variational_bound` and published figures ([Theis]).
        progress: Show a progress bar.

    Returns:
        `-log2 p(x) / D` of each image, float64 `(B,)`.

    Raises:
        ValueError: If the denoiser clips, or an argument does not fit.
    """
    # A clipped estimate has kinks, and its field grows without bound towards level 0.
    denoiser.check_unclipped("whose derivatives are 0 where it clips")
    check_at_least(1, num_probes=num_probes)
    if generator is None and (dequantise or not exact_trace):
        raise ValueError(
            "generator must be given for random probes and dequantisation, got None: only "
            "exact_trace=True with dequantise=False needs none"
        )
    if dequantise:
        _check_pixels(x)
    levels = _check_levels(denoiser.schedule, levels, least=2)
    # Lightning evaluates in inference mode, whose tensors autograd does not accept.
    with torch.inference_mode(False), torch.enable_grad():
        if denoiser.label is not None:
            denoiser = denoiser.condition(denoiser.label.clone())
        y = x.detach().clone()
        if dequantise:
            y = y + (uniform(x.shape, generator, x) - 0.5) / 127.5
        probes = None
        if not exact_trace:
            draws = (uniform(y.shape, generator, y) for _ in range(num_probes))
            probes = [torch.where(each < 0.5, -1, 1).to(y) for each in draws]
        log_density = _log_density(denoiser, y, levels, probes, progress)
        bits = -log_density / (x[0].numel() * math.log(2))
        return bits + BITS_PER_BIN if dequantise else bits


def ode_levels(num_levels: int, num_steps: int) -> Tensor:
    """Levels for `ode_bits_per_dim`, from 1 to `num_levels`, evenly spaced in `sqrt(t)`.

    Level 1 is the least noisy on which a network of a discrete schedule is trained. Dense near the
    data, where linear schedules change fastest; for cosine schedules it matters little.

    >>> ode_levels(100, 3).tolist()
    [1.0, 16.0, 49.0, 100.0]

    Raises:
        ValueError: If there are fewer than 2 levels or there is no step.
    """
    check_at_least(2, num_levels=num_levels)
    check_at_least(1, num_steps=num_steps)
    levels = torch.linspace(1, math.sqrt(num_levels), num_steps + 1, dtype=torch.float64) ** 2
    levels[-1] = num_levels  # the squared root may be above by rounding
    return levels


def _log_density(
    denoiser: Denoiser, y: Tensor, levels: Tensor, probes: list[Tensor] | None, progress: bool
) -> Tensor:
    """Natural logarithm of the density of `y = z / alpha` at the first level, float64 `(B,)`."""
    schedule = denoiser.schedule
    scales = schedule(levels)
    angles = torch.atan2(scales.sigma, scales.alpha)
    middles = schedule.level_at(-2 * torch.tan((angles[:-1] + angles[1:]) / 2).log())
    z = scales.alpha[0] * y
    integral = torch.zeros_like(sum_images(float64(y)))
    steps = zip(levels[:-1], middles, levels[1:], angles.diff(), strict=True)
    bar = tqdm(steps, total=len(middles), desc="ODE", disable=not progress, leave=False)
    for t, m, s, h in bar:
        v1, d1 = _field(denoiser, z, t, probes)
        v2, d2 = _field(denoiser, z + h / 2 * v1, m, probes)
        v3, d3 = _field(denoiser, z + h / 2 * v2, m, probes)
        v4, d4 = _field(denoiser, z + h * v3, s, probes)
        z = z + h / 6 * (v1 + 2 * (v2 + v3) + v4)
        integral += h / 6 * (d1 + 2 * (d2 + d3) + d4)
    size = y[0].numel()
    prior = -(sum_images(float64(z).square()) + size * math.log(2 * math.pi)) / 2
    return prior + integral + size * scales.alpha[0].log()


def _field(
    denoiser: Denoiser, z: Tensor, t: Tensor, probes: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Velocity `v = alpha eps - sigma x`, `(B, ...)`, and its divergence, float64 `(B,)`."""
    scales = denoiser.schedule(t)
    z = z.detach().requires_grad_()
    x, eps = denoiser(z, t)
    v = expand_like(scales.alpha, z) * eps - expand_like(scales.sigma, z) * x
    # autograd.grad leaves the parameters' `grad` unchanged.
    if probes is not None:
        parts = [
            sum_images(float64(probe * torch.autograd.grad(v, z, probe, retain_graph=True)[0]))
            for probe in probes
        ]
        return v.detach(), torch.stack(parts).mean(0)
    total = torch.zeros_like(sum_images(float64(v.detach())))
    for i in range(z[0].numel()):
        value = v.flatten(1)[:, i].sum()  # images are independent
        total += float64(torch.autograd.grad(value, z, retain_graph=True)[0].flatten(1)[:, i])
    return v.detach(), total


def _choose(
    snr: Tensor, batch: int, num_terms: int | None, generator: Generators
) -> list[tuple[Tensor, Tensor]]:
    """Indices of transitions and the factors that make their sum unbiased, `()` or `(B,)` each."""
    count = len(snr) - 1
    if num_terms is None:
        return [(i, torch.ones((), dtype=torch.float64)) for i in torch.arange(count)]
    if not 1 <= num_terms <= count:
        raise ValueError(
            f"num_terms must lie in [1, {count}], the number of diffusion terms, got {num_terms}: "
            "None sums them all"
        )
    # For data of variance 1 the mean error is 1 / (1 + SNR), and a short term d log(1 + SNR) / 2.
    shares = -torch.log1p(snr).diff()
    shares = shares / shares.sum()
    edges = shares.cumsum(0)
    # Systematic sampling: one random number per image, then equal distances.
    start = uniform((batch, 1), generator, torch.empty(0, dtype=torch.float64))[:, 0]
    terms = []
    for k in range(num_terms):
        index = torch.searchsorted(edges, (start + k) / num_terms, right=True)
        index = index.clamp(max=count - 1)  # the last edge is 1 up to rounding
        terms.append((index, 1 / (num_terms * shares[index])))
    return terms


def _check_pixels(x: Tensor) -> None:
    k = float64(x) * 127.5 + 127.5
    # float32 has the grid to 1e-5 of its spacing; 1e-3 is not rounding.
    if not ((k - k.round()).abs() < 1e-3).all() or not ((k > -0.5) & (k < 255.5)).all():
        raise ValueError(
            "x must hold images on the uint8 grid k / 127.5 - 1, got values off it within "
            f"[{x.min().item():g}, {x.max().item():g}]: see ddim_pl.images.from_uint8"
        )


def _check_levels(schedule: NoiseSchedule, levels: Tensor, *, least: int) -> Tensor:
    levels = torch.as_tensor(levels, dtype=torch.float64, device="cpu")
    if levels.ndim != 1 or len(levels) < least:
        raise ValueError(
            f"levels must be a vector of at least {least}, got shape {tuple(levels.shape)}"
        )
    falls = (levels.diff() <= 0).nonzero()
    if len(falls):
        t, s = levels[falls[0, 0] :][:2].tolist()
        raise ValueError(
            f"levels must rise strictly, got {t:g} before {s:g}: reverse a sampler's with flip(0)"
        )
    if levels[0] < 0 or levels[-1] > schedule.num_levels:
        raise ValueError(
            f"levels must lie in [0, {schedule.num_levels}], got [{levels[0]:g}, {levels[-1]:g}]"
        )
    return levels
