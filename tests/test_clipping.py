"""Clipping: each rule by its closed form and against diffusers."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from ddim_pl.clipping import Clipping, ClipRange, DynamicThreshold, clipping_of


def images(scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(3, 3, 8, 8, generator=generator)


def test_a_setting_is_a_rule_or_none() -> None:
    assert clipping_of(True) == ClipRange(-1, 1)
    assert clipping_of(False) is None
    assert clipping_of(DynamicThreshold()) == DynamicThreshold()


@pytest.mark.parametrize("rule", [ClipRange(), DynamicThreshold()])
def test_a_rule_is_frozen_and_keeps_what_is_within_the_range(rule: Clipping) -> None:
    x = images().clamp(-1, 1)
    torch.testing.assert_close(rule(x), x, rtol=0, atol=0)
    assert hash(rule) == hash(type(rule)())
    with pytest.raises(FrozenInstanceError):
        rule.high = 2.0  # type: ignore[attr-defined]


def test_a_range_is_clipped_to() -> None:
    x = images()
    torch.testing.assert_close(ClipRange(-0.5, 2)(x), x.clamp(-0.5, 2), rtol=0, atol=0)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("most", [1.0, 1.5, 100.0])
def test_dynamic_thresholding_is_that_of_diffusers(quantile: float, most: float) -> None:
    scheduler = DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=most
    )
    x = images()
    ours = DynamicThreshold(quantile, most)(x)
    torch.testing.assert_close(ours, scheduler._threshold_sample(x), rtol=1e-6, atol=1e-6)
    assert ours.abs().max() <= 1


def test_each_image_has_a_threshold_of_its_own() -> None:
    """One within the range stays; one of constant 4 becomes 1."""
    x = torch.stack([torch.full((1, 4, 4), 0.5), torch.full((1, 4, 4), 4.0)]).double()
    found = DynamicThreshold()(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found[0], x[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], torch.ones_like(x[1]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "arguments", "named"),
    [
        (ClipRange, {"low": 1.0}, "high must be above low"),
        (ClipRange, {"high": math.nan}, "high must be above low"),
        (DynamicThreshold, {"quantile": 0.0}, r"quantile must lie in \(0, 1\]"),
        (DynamicThreshold, {"quantile": 1.1}, r"quantile must lie in \(0, 1\]"),
        (DynamicThreshold, {"most": 0.5}, "most must be at least 1"),
    ],
)
def test_bad_arguments_are_named(
    kind: type[Clipping], arguments: dict[str, float], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        kind(**arguments)
