"""Weights with their code: PyTorch alone draws our images."""

import functools

import pytest
import torch
from foreign import TINY, random_weights
from tiny import tiny_ddpm, tiny_unet
from torch import nn
from without_ddim_pl import run

from ddim_pl.clipping import Clipping, DynamicThreshold
from ddim_pl.exports.safetensors_folder import check_clip, check_network, write_weights
from ddim_pl.exports.steps import step_numbers
from ddim_pl.networks.diffusers import DiffusersUNet
from ddim_pl.networks.songunet import SongUNet
from ddim_pl.schedules import CosineLogSNRSchedule, EDMSchedule

CODE = """
import sys

sys.modules["diffusers"] = None
result = []
for folder, z, label in given:
    sys.path.insert(0, folder)
    from loader import load, sample  # the first one's, which reads any folder

    result.append(sample(load(folder), z, label))
assert len([name for name in sys.modules if name.startswith("code_") and "." not in name]) == 6
"""
MODELS = {
    "student of Salimans & Ho": {
        "schedule": CosineLogSNRSchedule(),
        "time_input": "log_snr",
        "prediction": "v",
        "timesteps": "linear",
        "num_steps": 2,
        "network": {"num_classes": 3, "scale_shift": True, "resample": "block"},
    },
    "patches": {"num_steps": 3, "network": {"patch_size": 2, "attention": [2]}},
    "both": {"num_steps": 3, "prediction": "both", "network": {"out_channels": 2}},
    "residual": {"num_steps": 1, "prediction": "residual", "clip": False},
    "threshold": {"num_steps": 3, "clip": DynamicThreshold(0.9, most=1.5)},
    "EDM": {
        "schedule": EDMSchedule(),
        "time_input": "log_sigma",
        "prediction": "edm",
        "sigma_data": 0.5,
        "loss_weight": "uniform",
        "num_steps": 3,
        "clip": DynamicThreshold(0.9),
        "image_shape": (3, 8, 8),
        "network": SongUNet(8, channels=8, multipliers=[1, 2], num_blocks=1, attention=[4]),
    },
}


def test_the_loader_draws_the_same_images(tmp_path):
    given, ours = [], []
    for name, settings in MODELS.items():
        network = settings.get("network", {})
        network = tiny_unet(**network) if isinstance(network, dict) else network
        random_weights(network)
        model = tiny_ddpm(**{**settings, "network": network, "ema_decay": 0.0}).eval()
        folder = tmp_path / name
        folder.mkdir()
        write_weights(folder, model.average.module, step_numbers(model), model.sampling_clip)
        z, _ = model.latents([0, 1, 2], model.levels[0])
        given.append((str(folder), z, model.label_of([0, 1, 2])))
        ours.append(model.sample([0, 1, 2]))
    theirs = run(CODE, given)
    for name, wanted, found in zip(MODELS, ours, theirs, strict=True):
        assert wanted.std() > 0.1, name
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("network", "other"),
    [
        (functools.partial(nn.Conv2d, 1, 1, 1), "torch_export or onnx"),
        (functools.partial(DiffusersUNet, TINY), "diffusers"),
    ],
)
def test_networks_whose_code_needs_more_are_refused(network, other):
    message = f"network must be a UNet or SongUNet for format safetensors.*use format {other}$"
    with pytest.raises(ValueError, match=message):
        check_network(network())


class Halved(Clipping):
    """A rule of a user's own."""

    def __call__(self, x):
        return x / 2


def test_a_rule_of_ones_own_is_refused():
    with pytest.raises(
        ValueError, match=r"clip must be .* got .*Halved.*: use format torch_export"
    ):
        check_clip(Halved())
