"""Prediction types of a network, and weights of its errors.

A network output `F` estimates `a x + b eps`: eps-prediction has the row `(a, b) = (0, 1)`,
x-prediction `(1, 0)`, v-prediction `(-sigma_t, alpha_t)` ([PD], appendix D), and "residual", `F =
z - x`, the row `(alpha_t - 1, sigma_t)` ([KD], section 3). A network that predicts "both" x and
eps, in twice the channels, is read as their v, `alpha_t eps_hat - sigma_t x_hat`, which decodes to
`sigma_t^2 x_hat + alpha_t (z - sigma_t eps_hat)` ([PD], section 4).

"edm" is the preconditioned output of [EDM], eq. 7, for images of standard deviation `sigma_data`:
with `r_t = sqrt(alpha_t^2 sigma_data^2 + sigma_t^2)`, the standard deviation of a state, it has
the row `(sigma_t / (sigma_data r_t), -alpha_t sigma_data / r_t)`, and its target has variance 1 at
every level. With `sigma_data = 1` it is -v.

With `z = alpha x + sigma eps` the row gives both `x` and `eps`: with `d = alpha b - sigma a`,

    x = (b z - sigma F) / d        eps = (alpha F - a z) / d.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ddim_pl.scales import Scales, add_scaled, combine, expand_like

PredictionType = Literal["eps", "x", "v", "residual", "both", "edm"]
LossWeight = Literal["snr", "truncated_snr", "snr_plus_one", "min_snr", "uniform", "edm"]


class Prediction(NamedTuple):
    """Estimates of the clean image `x` and of the standardised noise `eps`, each `(B, ...)`."""

    x: Tensor
    eps: Tensor


def state_std(scales: Scales, sigma_data: float) -> Tensor:
    """Standard deviation of a state whose images have `sigma_data`, of the scales' shape."""
    return (scales.alpha**2 * sigma_data**2 + scales.sigma**2).sqrt()


def coefficients(
    kind: PredictionType, scales: Scales, *, sigma_data: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Coefficients `(a, b)` of the predicted combination `a x + b eps` at a level.

    Args:
        kind: What the network predicts.
        scales: Scales, of any shape.
        sigma_data: Standard deviation of the images; only "edm" depends on it.

    Raises:
        ValueError: If `kind` is unknown.
    """
    zero, one = torch.zeros_like(scales.alpha), torch.ones_like(scales.alpha)
    match kind:
        case "eps":
            return zero, one
        case "x":
            return one, zero
        case "v" | "both":
            return -scales.sigma, scales.alpha
        case "residual":
            return scales.alpha - 1, scales.sigma
        case "edm":
            r = state_std(scales, sigma_data)
            return scales.sigma / (sigma_data * r), -scales.alpha * sigma_data / r
    raise ValueError(f"prediction must be one of {get_args(PredictionType)}, got {kind!r}")


def merge_both(scales: Scales, output: Tensor) -> Tensor:
    """The v, `(B, C, ...)`, of a network output `(B, 2 C, ...)` that holds x and then eps.

    Raises:
        ValueError: If the number of channels is odd.
    """
    if output.shape[1] % 2:
        raise ValueError(
            f"output must have an even number of channels for prediction='both', got "
            f"{output.shape[1]}: set the network's out_channels to twice its in_channels"
        )
    x, eps = output.chunk(2, dim=1)
    return target("v", scales, x, eps)


def target(
    kind: PredictionType, scales: Scales, x: Tensor, eps: Tensor, *, sigma_data: float = 1.0
) -> Tensor:
    """Regression target `a x + b eps` of shape `(B, ...)`."""
    a, b = coefficients(kind, scales, sigma_data=sigma_data)
    return combine(a, x, b, eps)


def decode_x(
    kind: PredictionType, scales: Scales, z: Tensor, output: Tensor, *, sigma_data: float = 1.0
) -> Tensor:
    """The estimate of `x` alone; arguments as for `decode`."""
    if kind in ("x", "residual"):  # the general form is 0 / 0 at a level without noise
        return output if kind == "x" else z - output
    a, b = coefficients(kind, scales, sigma_data=sigma_data)
    d = scales.alpha * b - scales.sigma * a
    return combine(b / d, z, -scales.sigma / d, output)


def decode(
    kind: PredictionType, scales: Scales, z: Tensor, output: Tensor, *, sigma_data: float = 1.0
) -> Prediction:
    """Decode a network output to estimates of `x` and `eps`.

    Args:
        kind: What the network predicts.
        scales: Scales of `z`, shape `()` or `(B,)`.
        z: Noisy states, `(B, ...)`.
        output: Network output, `(B, ...)`; for "both" after `merge_both`.
        sigma_data: Standard deviation of the images, for "edm".

    Returns:
        Estimates that satisfy `z = alpha x + sigma eps`.
    """
    x = decode_x(kind, scales, z, output, sigma_data=sigma_data)
    if kind in ("x", "residual"):
        return Prediction(x, eps_from_x(scales, z, x))
    if kind == "eps":
        return Prediction(x, output)
    a, b = coefficients(kind, scales, sigma_data=sigma_data)
    d = scales.alpha * b - scales.sigma * a
    return Prediction(x, combine(scales.alpha / d, output, -a / d, z))


def eps_from_x(scales: Scales, z: Tensor, x: Tensor) -> Tensor:
    """Noise `(z - alpha x) / sigma` of a state `z` of the clean image `x`.

    At a level without noise it is undefined; the result is 0, its mean.
    """
    inverse = torch.where(scales.sigma > 0, 1 / scales.sigma, 0)
    return add_scaled(z, -scales.alpha, x) * expand_like(inverse, z)


def x_error_weight(
    weight: LossWeight, scales: Scales, *, gamma: float = 5.0, sigma_data: float = 1.0
) -> Tensor:
    """Weight of `||x - x_hat||^2` at a level.

    Args:
        weight: "snr" (the simple eps loss of [DDPM]), "truncated_snr" `max(SNR, 1)` and
            "snr_plus_one" (the v loss; both [PD], section 4), "min_snr" `min(SNR, gamma)`
            ([MinSNR]), "uniform" (1) or "edm" `SNR + 1 / sigma_data^2` ([EDM], section 5).
        scales: Scales, shape `()` or `(B,)`.
        gamma: Bound of "min_snr".
        sigma_data: Standard deviation of the images, for "edm".

    Returns:
        Float64 weights of the scales' shape.

    Raises:
        ValueError: If the weight is unknown.
    """
    match weight:
        case "snr":
            return scales.snr
        case "truncated_snr":
            return scales.snr.clamp(min=1)
        case "snr_plus_one":
            return scales.snr + 1
        case "min_snr":
            return scales.snr.clamp(max=gamma)
        case "uniform":
            return torch.ones_like(scales.alpha)
        case "edm":
            return scales.snr + sigma_data**-2
    raise ValueError(f"loss_weight must be one of {get_args(LossWeight)}, got {weight!r}")


def has_unit_weight(kind: PredictionType, weight: LossWeight) -> bool:
    """Whether `output_error_weight` is 1 at every level: the plain loss of the output."""
    plain = {("eps", "snr"), ("v", "snr_plus_one"), ("both", "snr_plus_one"), ("edm", "edm")}
    return (kind, weight) in plain | {("x", "uniform"), ("residual", "uniform")}


def output_error_weight(
    kind: PredictionType,
    weight: LossWeight,
    scales: Scales,
    *,
    gamma: float = 5.0,
    sigma_data: float = 1.0,
) -> Tensor:
    """Weight of the squared error of the network output that equals `weight` on the error of `x`.

    By `x = (b z - sigma F) / d` a squared error of the output counts `(sigma / d)^2` times in `x`.
    Eps-prediction with "snr", v-prediction with "snr_plus_one" and "edm" with "edm" give exactly 1
    at every level, even where the SNR is infinite.

    Returns:
        Float64 weights of the scales' shape.
    """
    of_x = x_error_weight(weight, scales, gamma=gamma, sigma_data=sigma_data)
    if kind in ("x", "residual"):  # the output has the error of x
        return of_x
    if has_unit_weight(kind, weight):
        return torch.ones_like(scales.alpha)
    a, b = coefficients(kind, scales, sigma_data=sigma_data)
    factor = (scales.sigma / (scales.alpha * b - scales.sigma * a)) ** 2
    return of_x * factor


def check_loss_weight(kind: PredictionType, weight: LossWeight) -> None:
    """Check that a pair of prediction and weight can be trained.

    Raises:
        ValueError: If a name is unknown, or for eps-prediction with a weight of the x error that
            does not vanish with the SNR: computing x from eps divides by alpha, which is almost 0
            at the last level, and the loss diverges there ([PD], section 4).
    """
    half = Scales(*torch.full((2,), 0.5, dtype=torch.float64).sqrt().unbind())
    output_error_weight(kind, weight, half)
    if kind == "eps" and weight not in ("snr", "min_snr"):
        raise ValueError(
            f"loss_weight must be 'snr' or 'min_snr' for prediction='eps', got {weight!r}, which "
            "diverges at the last level: prediction 'x' and 'v' allow it"
        )
