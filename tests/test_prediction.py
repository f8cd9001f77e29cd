"""Targets and outputs of a network: round trips, and weights that count the same error once."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from ddim_pl.prediction import (
    LossWeight,
    PredictionType,
    check_loss_weight,
    coefficients,
    decode,
    eps_from_x,
    merge_both,
    output_error_weight,
    state_std,
    target,
    x_error_weight,
)
from ddim_pl.scales import Scales
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule, NoiseSchedule
from ddim_pl.transitions import q_sample

KINDS = get_args(PredictionType)
WEIGHTS = get_args(LossWeight)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_weight = pytest.mark.parametrize("weight", WEIGHTS)
every_schedule = pytest.mark.parametrize(
    "schedule", [LinearSchedule(), CosineLogSNRSchedule()], ids=["linear", "cosine"]
)


def states(count: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, both ends among them, images and noise, in float64."""
    generator = torch.Generator().manual_seed(seed)
    t = 1000 * torch.rand(count, generator=generator, dtype=torch.float64)
    t[:4] = torch.tensor([1e-3, 1.0, 999.9, 1000.0])
    x, eps = torch.randn(2, count, 3, 2, 2, generator=generator, dtype=torch.float64)
    return t, x, eps


@every_kind
@every_schedule
def test_decoding_the_target_gives_image_and_noise(
    kind: PredictionType, schedule: NoiseSchedule
) -> None:
    """Float64 rounds at 1e-16 and alpha or sigma, 4.5e-5 at least, divide that once."""
    t, x, eps = states()
    level = schedule(t)
    z = q_sample(x, eps, level)
    decoded = decode(kind, level, z, target(kind, level, x, eps))
    torch.testing.assert_close(decoded.x, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(decoded.eps, eps, rtol=0, atol=1e-10)


@every_kind
@every_schedule
def test_any_output_decodes_to_estimates_that_explain_the_state(
    kind: PredictionType, schedule: NoiseSchedule
) -> None:
    t, z, output = states(seed=1)
    level = schedule(t)
    decoded = decode(kind, level, z, output)
    torch.testing.assert_close(q_sample(*decoded, level), z, rtol=0, atol=1e-11)
    torch.testing.assert_close(target(kind, level, *decoded), output, rtol=0, atol=1e-10)


@every_kind
def test_one_level_for_all_is_that_level_for_each(kind: PredictionType) -> None:
    t, z, output = states(seed=2)
    one, each = LinearSchedule()(t[9]), LinearSchedule()(t[9].expand(len(t)))
    for ours, theirs in zip(
        decode(kind, one, z, output), decode(kind, each, z, output), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
    assert decode(kind, one, z.float(), output.float()).x.dtype == torch.float32
    assert decode(kind, each, z.float(), output.float()).x.dtype == torch.float32


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_a_clean_state_is_its_own_image(kind: PredictionType) -> None:
    _, z, output = states(seed=3)
    decoded = decode(kind, LinearSchedule()(0), z, output)
    torch.testing.assert_close(decoded.x, z, rtol=0, atol=0)
    torch.testing.assert_close(decoded.eps, output, rtol=0, atol=0)


def test_rows_are_those_of_the_papers() -> None:
    level = LinearSchedule()(torch.tensor([250.0, 750.0]))
    assert torch.equal(coefficients("v", level)[0], -level.sigma)
    assert torch.equal(coefficients("v", level)[1], level.alpha)
    t, x, eps = states()
    level = LinearSchedule()(t)
    assert torch.equal(target("eps", level, x, eps), eps)
    assert torch.equal(target("x", level, x, eps), x)


@every_kind
@every_weight
@every_schedule
def test_a_weight_counts_the_error_of_the_output_as_that_of_the_image(
    kind: PredictionType, weight: LossWeight, schedule: NoiseSchedule
) -> None:
    """Seed 4. The error of x is a difference: 1e-16 |x| / |error of x|, down to 4e-5: 1e-9."""
    t, z, output = states(seed=4)
    level = schedule(t)
    error = 1 + torch.rand(z.shape, generator=torch.Generator().manual_seed(4)).double()
    x_error = decode(kind, level, z, output + error).x - decode(kind, level, z, output).x
    of_output = output_error_weight(kind, weight, level, gamma=3.0) * error[:, 0, 0, 0] ** 2
    of_image = x_error_weight(weight, level, gamma=3.0) * x_error[:, 0, 0, 0] ** 2
    torch.testing.assert_close(of_output, of_image, rtol=1e-9, atol=0)


def test_weights_are_those_of_the_papers() -> None:
    level = Scales(*(torch.tensor([v], dtype=torch.float64).sqrt() for v in (0.9, 0.1)))
    want = {"snr": 9, "truncated_snr": 9, "snr_plus_one": 10, "min_snr": 5, "uniform": 1}
    want["edm"] = 10  # with sigma_data = 1
    assert set(want) == set(WEIGHTS)
    noisy = Scales(level.sigma, level.alpha)
    want_noisy = {**dict.fromkeys(WEIGHTS, 1 / 9), "truncated_snr": 1, "uniform": 1}
    want_noisy["snr_plus_one"] = want_noisy["edm"] = 10 / 9
    for weight in WEIGHTS:
        assert x_error_weight(weight, level).item() == pytest.approx(want[weight], rel=1e-12)
        assert x_error_weight(weight, noisy).item() == pytest.approx(want_noisy[weight], rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "weight"),
    [("eps", "snr"), ("v", "snr_plus_one"), ("x", "uniform"), ("edm", "edm")],
)
def test_the_plain_losses_have_weight_one_even_at_clean_data(
    kind: PredictionType, weight: LossWeight
) -> None:
    t = torch.tensor([0, 1e-9, 500, 1000], dtype=torch.float64)
    assert (output_error_weight(kind, weight, LinearSchedule()(t)) == 1).all()


@every_kind
@every_weight
def test_pairs_that_are_not_refused_have_bounded_weights(
    kind: PredictionType, weight: LossWeight
) -> None:
    """At the noisy end; at the clean end the SNR of an x error is large in any case."""
    refused = kind == "eps" and weight not in ("snr", "min_snr")
    if refused:
        with pytest.raises(ValueError, match=rf"loss_weight must be .*'eps', got '{weight}'"):
            check_loss_weight(kind, weight)
    else:
        check_loss_weight(kind, weight)
    last = output_error_weight(kind, weight, CosineLogSNRSchedule()(1000)).item()
    assert (last > 1e8) == refused
    assert math.isfinite(last)


def test_unknown_names_list_the_known_ones() -> None:
    level = LinearSchedule()(1)
    with pytest.raises(
        ValueError, match=r"\('eps', 'x', 'v', 'residual', 'both', 'edm'\).*'noise'"
    ):
        coefficients("noise", level)
    with pytest.raises(ValueError, match=r"'snr', 'truncated_snr'.*'flat'"):
        x_error_weight("flat", level)
    with pytest.raises(ValueError, match="'noise'"):
        check_loss_weight("noise", "snr")
    with pytest.raises(ValueError, match="'flat'"):
        check_loss_weight("x", "flat")


def test_noise_of_an_image_explains_the_state() -> None:
    t, x, z = states(seed=5)
    level = LinearSchedule()(t)
    torch.testing.assert_close(q_sample(x, eps_from_x(level, z, x), level), z)


@every_schedule
def test_both_estimates_merge_as_in_the_paper(schedule: NoiseSchedule) -> None:
    """[PD], section 4: `x = sigma^2 x_hat + alpha (z - sigma eps_hat)`."""
    t, x, eps = states()
    level = schedule(t)
    z = q_sample(x, eps, level)
    x_hat, eps_hat = torch.randn(
        2, *x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    decoded = decode("both", level, z, merge_both(level, torch.cat([x_hat, eps_hat], 1)))
    alpha, sigma = (each.reshape(-1, 1, 1, 1) for each in level)
    wanted = sigma**2 * x_hat + alpha * (z - sigma * eps_hat)
    torch.testing.assert_close(decoded.x, wanted, rtol=1e-12, atol=1e-12)


def test_an_odd_number_of_channels_cannot_hold_both() -> None:
    level = LinearSchedule()(torch.tensor([5.0]))
    with pytest.raises(ValueError, match="out_channels"):
        merge_both(level, torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
@every_schedule
def test_edm_is_the_preconditioning_of_the_paper(
    sigma_data: float, schedule: NoiseSchedule
) -> None:
    """Written in its variables: `y = x + s n` with `s = sigma / alpha`; its table 1 and eq. 7."""
    t, x, eps = states(seed=5)
    level = schedule(t)
    s = (level.sigma / level.alpha)[:, None, None, None]
    y, total = x + s * eps, s**2 + sigma_data**2
    c_skip, c_out = sigma_data**2 / total, s * sigma_data / total.sqrt()
    z = q_sample(x, eps, level)
    output = torch.randn(x.shape, generator=torch.Generator().manual_seed(6)).double()
    decoded = decode("edm", level, z, output, sigma_data=sigma_data)
    torch.testing.assert_close(decoded.x, c_skip * y + c_out * output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q_sample(*decoded, level), z, rtol=0, atol=1e-10)
    wanted = target("edm", level, x, eps, sigma_data=sigma_data)
    torch.testing.assert_close(wanted * c_out, x - c_skip * y, rtol=1e-9, atol=1e-9)
    variance = sigma_data**2 * level.alpha**2 + level.sigma**2
    torch.testing.assert_close(state_std(level, sigma_data) ** 2, variance, rtol=1e-12, atol=0)
    weight = output_error_weight("edm", "edm", level, sigma_data=sigma_data)
    loss = x_error_weight("edm", level, sigma_data=sigma_data)
    of_paper = (total / (s * sigma_data) ** 2).flatten()
    torch.testing.assert_close(loss, of_paper, rtol=1e-9, atol=0)
    torch.testing.assert_close(of_paper * c_out.flatten() ** 2, weight, rtol=1e-9, atol=0)


@every_weight
def test_weights_with_sigma_data_count_the_same_error_once(weight: LossWeight) -> None:
    t, z, output = states(seed=4)
    level = LinearSchedule()(t)
    outputs = output, output + 1
    one, other = (decode("edm", level, z, each, sigma_data=0.5).x for each in outputs)
    of_output = output_error_weight("edm", weight, level, sigma_data=0.5)
    of_image = x_error_weight(weight, level, sigma_data=0.5) * (other - one)[:, 0, 0, 0] ** 2
    torch.testing.assert_close(of_output, of_image, rtol=1e-9, atol=0)


def test_edm_with_sigma_data_1_is_minus_v() -> None:
    t, x, eps = states()
    level = LinearSchedule()(t)
    minus_v = -target("v", level, x, eps)
    torch.testing.assert_close(target("edm", level, x, eps), minus_v, rtol=0, atol=1e-12)
