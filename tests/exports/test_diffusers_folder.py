"""Folders for DDIMPipeline: the images are ours, in a process that has diffusers alone."""

import functools
import json

import pytest
import torch
from diffusers import UNet2DModel
from foreign import CIFAR10, OWN_DEFAULTS, TINY, random_unet, random_weights
from safetensors.torch import load_file
from tiny import NETWORK, tiny_ddpm, tiny_unet
from torch import nn
from without_ddim_pl import pipeline_images

from ddim_pl.clipping import DynamicThreshold
from ddim_pl.exports.diffusers_folder import check_label, unet2d_arguments, write_pipeline
from ddim_pl.exports.scheduler import ddim_settings
from ddim_pl.networks.diffusers import DiffusersUNet
from ddim_pl.networks.unet import UNet
from ddim_pl.rng import randn
from ddim_pl.samplers import DDIM, Ancestral
from ddim_pl.schedules import CosineLogSNRSchedule, ImprovedCosineSchedule, ZeroTerminalSNR
from ddim_pl.teachers.diffusers_folder import DEFAULTS, native_arguments, read_folder
from ddim_pl.training import DDPM

SALIMANS = {  # as configs/digits/teacher.yaml
    "schedule": CosineLogSNRSchedule(),
    "time_input": "log_snr",
    "prediction": "v",
    "timesteps": "linear",
}
FILM = {"scale_shift": True, "resample": "block", "head_width": 4, "embedding_width": 12}


def student(steps, **settings):
    return {**settings, "num_steps": steps, "distilled_steps": steps}


MODELS = {
    "teacher of DDPM": ({"num_steps": 50}, {}),
    "leading": ({"num_steps": 10, "timesteps": "leading", "prediction": "v"}, {}),
    "last level": ({"num_steps": 10, "timesteps": "leading", "last_level": 1.0}, {}),
    "quadratic": ({"num_steps": 10, "timesteps": "quadratic", "clip": False}, {}),
    "steps that do not divide": ({"num_steps": 7, "timesteps": "linear", "prediction": "x"}, {}),
    "last level of a list": ({"timesteps": [990.0, 412.5, 30.0], "last_level": 7.5}, {}),
    "one step to a last level": ({"timesteps": [1000.0], "last_level": 7.5}, {}),
    "DynamicThreshold": ({"num_steps": 8, "clip": DynamicThreshold(0.9)}, {}),
    "sampler that clips": ({"num_steps": 8, "clip": False, "sampler": DDIM(clip=True)}, {}),
    "eta": ({"num_steps": 8, "sampler": DDIM(0.5), "timesteps": "quadratic"}, {}),
    "DDPM's sampler": ({"num_steps": 8, "sampler": Ancestral(), "prediction": "v"}, {}),
    "DDPM's sampler of a cosine": (
        {"schedule": ImprovedCosineSchedule(), "num_steps": 8, "sampler": Ancestral()}
        | {"prediction": "v"},
        {},
    ),
    "cosine": ({"schedule": ImprovedCosineSchedule(), "num_steps": 8, "prediction": "v"}, {}),
    "other cosine": ({"schedule": ImprovedCosineSchedule(offset=0.02), "num_steps": 8}, {}),
    "zero SNR": ({"schedule": ZeroTerminalSNR(), "num_steps": 8, "prediction": "v"}, {}),
    "teacher of Salimans & Ho": ({**SALIMANS, "num_steps": 64}, FILM),
    **{f"student of {n} steps": (student(n, **SALIMANS), FILM) for n in (8, 4, 2, 1)},
    **{
        f"DDPM's student of {n} steps": (student(n, timesteps="linear", prediction="v"), {})
        for n in (8, 4, 2, 1)
    },
    "student of a class": (student(4, **SALIMANS), {"num_classes": 3}),
    "diffusers' own network": (student(4, **SALIMANS), None),
}
SIZES = {"image_size": 8, "in_channels": 1, "channels": 8, "groups": 4, "dropout": 0.0}
NETWORKS = {
    "as DDPM": {},
    "as Salimans & Ho": {**FILM, "attention": [4, 8]},
    "no attention": {"attention": [], "multipliers": [1]},
    "heads": {"num_heads": 2, "multipliers": [1, 1]},
    "blocks": {"num_blocks": 2, "multipliers": [1, 2, 1], "attention": [8, 2]},
    "both": {"out_channels": 2},
    "no attention, by blocks": {"attention": [], "resample": "block"},
}


def made(settings, network):
    net = DiffusersUNet(OWN_DEFAULTS) if network is None else tiny_unet(**network)
    random_weights(net)
    return tiny_ddpm(network=net, ema_decay=0.0, **settings).eval()


def write(model, folder, label=None):
    folder.mkdir()
    settings = ddim_settings(model)
    write_pipeline(folder, model.average.module, settings, label)
    call = {"num_inference_steps": settings.num_steps, "eta": settings.eta}
    return {**call, "use_clipped_model_output": settings.clips}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The images of every model, ours and diffusers', in [0, 1]."""
    folder, calls, ours = tmp_path_factory.mktemp("pipelines"), {}, {}
    for number, (name, arguments) in enumerate(MODELS.items()):
        model = made(*arguments)
        label = None if model.num_classes is None else 2
        z, sources = model.latents([0, 1, 2], model.levels[0])
        noise = [randn(z.shape, sources, z) for _ in model.levels[1:]]
        place = folder / str(number)
        calls[place] = z, write(model, place, label), noise
        labels = None if label is None else torch.full((3,), label)
        ours[name] = (model.sample([0, 1, 2], label=labels) / 2 + 0.5).clamp(0, 1)
    theirs = pipeline_images(calls)
    return {name: (ours[name], theirs[str(folder / str(i))]) for i, name in enumerate(MODELS)}


@pytest.mark.parametrize("name", MODELS)
def test_a_pipeline_without_this_package_draws_the_same_images(name, drawn):
    ours, theirs = drawn[name]
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_the_same_there(name, tmp_path):
    network = UNet(**{**NETWORK, **SIZES, **NETWORKS[name]}).eval()
    random_weights(network)
    write_pipeline(tmp_path, network, ddim_settings(tiny_ddpm()))
    theirs = UNet2DModel.from_pretrained(tmp_path / "unet")
    z, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 371
    with torch.no_grad():
        found, wanted = theirs(z, t).sample, network(z, torch.full((3,), float(t)))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_arguments_are_those_that_import_reads(name):
    network = UNet(**{**NETWORK, **SIZES, **NETWORKS[name]})
    read = UNet(**native_arguments(DEFAULTS | unet2d_arguments(network)))
    assert {k: v.shape for k, v in read.state_dict().items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }


NARROW = {**CIFAR10, "block_out_channels": [32, 64, 64, 64]}


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(TINY, id="tiny"),
        pytest.param(NARROW, id="CIFAR-10, narrow"),
        pytest.param(CIFAR10, id="CIFAR-10", marks=pytest.mark.slow),
    ],
)
def test_a_published_network_comes_back_as_it_went(arguments, tmp_path):
    """Its output is the same before import, after it, and after export."""
    before = random_unet(**arguments)
    before.save_pretrained(tmp_path / "unet")
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    teacher = read_folder(tmp_path)
    model = DDPM(teacher.network, **teacher.settings)
    assert type(model.network) is UNet
    (tmp_path / "new").mkdir()
    write_pipeline(tmp_path / "new", model.average.module, ddim_settings(model))
    after = UNet2DModel.from_pretrained(tmp_path / "new" / "unet")
    side, channels = arguments["sample_size"], arguments["in_channels"]
    z = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = before(z, 371).sample
        ours = model.average.module(z, torch.full((2,), 371.0))
        theirs = after(z, 371).sample
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs, wanted, rtol=1e-5, atol=1e-5)


def test_what_diffusers_wrote_is_written_again(tmp_path):
    """The same weights by the same names; no diffusers is needed to write them."""
    before = random_unet()
    network = DiffusersUNet(TINY).eval()
    network.unet.load_state_dict(before.state_dict())
    write_pipeline(tmp_path, network, ddim_settings(tiny_ddpm()))
    found = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == before.state_dict().keys()
    assert all(torch.equal(found[name], each) for name, each in before.state_dict().items())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (functools.partial(nn.Conv2d, 1, 1, 1), "network must be a UNet or DiffusersUNet"),
        (functools.partial(tiny_unet, patch_size=2, attention=[2]), "patch_size must be 1"),
        (functools.partial(tiny_unet, multipliers=[2, 2]), "multipliers must begin with 1"),
        (functools.partial(tiny_unet, num_heads=2, attention=[4, 8]), "num_heads must be 1"),
    ],
)
def test_what_a_unet2d_lacks_is_refused(network, message):
    with pytest.raises(ValueError, match=message):
        unet2d_arguments(network())


@pytest.mark.parametrize(
    ("classes", "label", "message"),
    [
        (None, 1, "label must be left out"),
        (3, None, "label must be given for format diffusers"),
        (3, 3, r"label must lie in \[0, 2\]"),
    ],
)
def test_a_label_is_given_where_there_are_classes(classes, label, message):
    with pytest.raises(ValueError, match=message):
        check_label(tiny_unet(num_classes=classes), label)
