"""Pickles of EDM: the same answers, the same images, and what ours cannot express."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_edm import NCSN, TINY, edm_denoised, edm_output, edm_weights, save_edm

from ddim_pl.networks.songunet import SongUNet
from ddim_pl.samplers import DDIM, Heun
from ddim_pl.schedules import EDMSchedule
from ddim_pl.teachers.edm import read_edm
from ddim_pl.timesteps import make_levels
from ddim_pl.training import DDPM

KINDS = pytest.mark.parametrize("arguments", [TINY, NCSN], ids=["DDPM++", "NCSN++"])


def read(tmp_path, arguments=TINY, weights=None, **more):
    weights = edm_weights(**arguments) if weights is None else weights
    return read_edm(save_edm(tmp_path / "network-snapshot-000000.pkl", arguments, weights, **more))


def labels_of(arguments, dtype=torch.float32):
    """Classes as ours takes them and as theirs does."""
    if not arguments["label_dim"]:
        return None, None
    label = torch.tensor([2, 0, 1])
    return label, F.one_hot(label, 3).to(dtype)


@KINDS
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["32", "64"]
)
def test_the_network_answers_the_same(arguments, dtype, tolerance, tmp_path):
    teacher = read(tmp_path, arguments)
    network = teacher.network.to(dtype)
    assert isinstance(network, SongUNet)
    assert not network.training
    z = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    time = torch.tensor([-1.55, 0.0, 1.09], dtype=dtype)
    label, one_hot = labels_of(arguments, dtype)
    weights = {name: value.to(dtype) for name, value in edm_weights(**arguments).items()}
    with torch.no_grad():
        expected = edm_output(weights, z, time, one_hot)
        actual = network(z, time, *(() if label is None else (label,)))
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@KINDS
def test_the_denoiser_is_theirs(arguments, tmp_path):
    """`D(y; sigma)` at single levels of noise, in double precision but for the time."""
    teacher = read(tmp_path, arguments)
    model = DDPM(teacher.network.double(), **teacher.settings)
    weights = {name: value.double() for name, value in edm_weights(**arguments).items()}
    label, one_hot = labels_of(arguments, torch.float64)
    denoiser = model.denoiser.condition(label)
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, 3, 3, 8, 8, generator=generator).double()
    for sigma in (0.003, 0.5, 79.0):
        y = x / 2 + sigma * noise
        level = model.schedule.level_at(-2 * math.log(sigma))
        alpha = 1 / math.sqrt(1 + sigma**2)
        with torch.no_grad():
            expected = edm_denoised(weights, y, sigma, one_hot)
            actual = denoiser(alpha * y, level).x
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def edm_sampler(weights, latents, one_hot, num_steps, *, heun, low=0.002, high=80.0):
    """[EDM], algorithm 1, over the levels of eq. 5; without Heun's correction it is DDIM."""
    roots = torch.linspace(high ** (1 / 7), low ** (1 / 7), num_steps, dtype=torch.float64)
    sigmas = [*(roots**7).tolist(), 0.0]
    y = sigmas[0] * latents
    for now, then in pairwise(sigmas):
        slope = (y - edm_denoised(weights, y, now, one_hot)) / now
        ahead = y + (then - now) * slope
        if heun and then > 0:
            second = (ahead - edm_denoised(weights, ahead, then, one_hot)) / then
            ahead = y + (then - now) * (slope + second) / 2
        y = ahead
    return y


@KINDS
@pytest.mark.parametrize("sampler", [Heun(), DDIM()], ids=["Heun", "DDIM"])
def test_the_images_are_those_of_their_sampler(arguments, sampler, tmp_path):
    """In double precision; the times, in float32, are equal up to rounding."""
    teacher = read(tmp_path, arguments)
    assert teacher.settings["sampler"] == Heun()
    model = DDPM(teacher.network.double(), **{**teacher.settings, "num_steps": 6})
    label, one_hot = labels_of(arguments, torch.float64)
    z = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    weights = {name: value.double() for name, value in edm_weights(**arguments).items()}
    with torch.no_grad():
        theirs = edm_sampler(weights, z, one_hot, 6, heun=sampler == Heun())
    first = model.schedule(model.levels[0])
    ours = sampler(model.denoiser.condition(label), first.sigma * z, model.levels)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_range_of_noise_is_what_both_allow(tmp_path):
    assert read(tmp_path).settings["schedule"] == EDMSchedule()
    narrow = {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.6}
    settings = read(tmp_path, preconditioning=narrow).settings
    assert settings["schedule"] == EDMSchedule(sigma_min=0.01, sigma_max=50.0)
    assert settings["sigma_data"] == 0.6
    levels = make_levels("karras", settings["schedule"], settings["num_steps"])
    assert len(levels) == 19
    scales = settings["schedule"](levels)
    ratio = (scales.sigma / scales.alpha).numpy()
    assert ratio[[0, -2, -1]] == pytest.approx([50, 0.01, 0])
    roots = ratio[:-1] ** (1 / 7)
    assert np.diff(roots) == pytest.approx(np.diff(roots)[0])


def test_it_says_what_is_left_out(tmp_path):
    notes = read(tmp_path, {**TINY, "label_dim": 3, "label_dropout": 0.1}).notes
    assert notes[0] == "network: SongUNet (the same layers as in EDM)"
    assert "augmentation: left out" in notes[1]
    assert "null class, for guidance, is kept" in notes[2]
    plain = {**TINY, "augment_dim": 0}
    assert len(read(tmp_path, plain).notes) == 1


def test_theirs_may_attend_where_there_is_no_level(tmp_path):
    """Their code asks for 16x16 also of smaller images."""
    network = read(tmp_path, {**TINY, "attn_resolutions": [16, 4]}).network
    assert network.init_args["attention"] == [4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "VEPrecond"}, "holds a VEPrecond around SongUNet: supported is an EDMPrecond"),
        ({"arguments": {"decoder_type": "skip"}}, r"decoder_type must be one of .* got 'skip'"),
        ({"arguments": {"encoder_type": "skip"}}, r"encoder_type must be one of .* got 'skip'"),
        ({"arguments": {"depth": 3}}, r"arguments that are not known here: \['depth'\]"),
        ({"arguments": {"dropout": 2.0}}, r"dropout must be in \[0, 1\)"),
        ({"arguments": {"channel_mult": "ab"}}, "channel_mult|other arguments|invalid literal"),
        ({"arguments": {"channel_mult": None}}, "with other arguments"),
        ({"preconditioning": {"sigma_min": 90}}, "sigma_min and sigma_max must satisfy"),
        ({"ema": None}, "must hold the averaged network of EDM under 'ema'"),
        ({"ema": {"model": 3}}, "must hold the averaged network of EDM under 'ema'"),
    ],
)
def test_what_ours_cannot_express_is_refused(change, message, tmp_path):
    arguments = {**TINY, **change.pop("arguments", {})}
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, arguments, edm_weights(**TINY), **change)
    assert "network-snapshot-000000.pkl" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dec.8x8_block0.new.weight", torch.zeros(1), "1 left over: dec.8x8_block0.new.weight"),
        (
            "enc.8x8_block0.conv1.weight",
            torch.zeros(8, 8, 1, 1),
            r"has shape \(8, 8, 1, 1\), not \(8, 8, 3, 3\)",
        ),
        ("enc.4x4_down.skip.resample_filter", torch.ones(1, 1, 2, 2), "is not the filter"),
        ("map_layer0.bias", None, "1 missing: map_layer0.bias"),
    ],
)
def test_every_weight_is_used(name, value, message, tmp_path):
    changed = {**edm_weights(**TINY), name: value}
    weights = {name: value for name, value in changed.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        read(tmp_path, weights=weights)


def test_modules_that_hold_themselves_are_refused(tmp_path):
    def loop(network):
        network.add_module("again", network)

    with pytest.raises(ValueError, match=r"with other arguments \(RecursionError"):
        read(tmp_path, change=loop)
