"""Distances and scatter that are known otherwise, and the methods whose time is taken."""

import argparse

import pytest
import torch
from claim_measures import batches, distance, draw, evaluations, nearest, scatter, support, ways

from ddim_pl.networks.unet import UNet
from ddim_pl.noise import GammaNoise
from ddim_pl.samplers import DDIM, DEQ
from ddim_pl.timesteps import linear
from ddim_pl.training import DDPM


def points(count, scale, seed):
    return scale * torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def test_scatter_of_precision_is_that_of_a_share():
    """Precision is a mean over the generated images: sqrt(p (1 - p) / N)."""
    real, fake = points(400, 1, 0), points(600, 2, 1)
    share = support(real, fake)["precision"]
    expected = (share * (1 - share) / 600) ** 0.5
    assert 0.2 < share < 0.9
    # The deviation of 300 deviates by a twenty-fourth.
    assert scatter(real, fake, 300)["precision scatter"] == pytest.approx(expected, rel=0.2)


def test_scatter_is_the_same_every_time():
    real, fake = points(50, 1, 0), points(60, 1, 1)
    assert scatter(real, fake, 5) == scatter(real, fake, 5)


def test_distances():
    a = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    b = torch.tensor([[0.0, 1.0], [3.0, 4.0]])
    assert distance(a, b) == 0.5
    assert nearest(torch.tensor([[0.0, 2.0], [3.0, 5.0]]), b) == 1.0


def tiny(**arguments):
    network = UNet(
        image_size=8, in_channels=1, channels=8, multipliers=[1], attention=[], groups=4
    )
    return DDPM(network, num_steps=2, **arguments).eval()


def test_images_do_not_depend_on_the_batches():
    assert batches(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    model, levels = tiny(), linear(1000, 2)
    whole, parts = (draw(model, 5, size, DDIM(), levels) for size in (5, 2))
    torch.testing.assert_close(whole, parts, atol=1, rtol=0)  # a grey level of rounding


def test_evaluations_of_a_solved_chain_are_those_that_it_made():
    model, levels = tiny(), linear(1000, 4)
    assert evaluations(model, DDIM(), levels, 2) == 4
    found = evaluations(model, DEQ(), levels, 2)
    assert 4 <= found <= DEQ().num_evaluations(levels)


def test_the_first_method_is_ddpm_and_students_come_last(monkeypatch):
    models = {"eps": tiny(), "teacher": tiny(), "gamma": tiny(noise=GammaNoise(0.1))}
    models["Luhman, 1"] = tiny()
    monkeypatch.setattr("claim_measures.load", models.__getitem__)
    options = argparse.Namespace(
        models=[(name, name) for name in models], steps=[10, 20], full=1000, pair_steps=5
    )
    found = ways(options)
    assert [*found] == [
        *("DDPM, 1000", "DDIM, 20", "DDIM, 10", "DPM-Solver++, 5", "DEQ-DDIM, 20"),
        *("ParaDiGMS, 1000", "Gamma, 20", "Luhman, 1"),
    ]
    assert len(found["DDPM, 1000"][2]) == 1001
    assert found["Luhman, 1"][0] is models["Luhman, 1"]
