"""Programs of a network and of a step: they draw our images, in batches of any size."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from foreign import OWN_DEFAULTS, random_weights
from tiny import tiny_ddpm, tiny_unet
from torch import nn
from without_ddim_pl import run

from ddim_pl.clipping import DynamicThreshold
from ddim_pl.exports.graphs import check_onnx, write_graphs
from ddim_pl.exports.steps import step_numbers
from ddim_pl.networks.diffusers import DiffusersUNet
from ddim_pl.samplers import Ancestral
from ddim_pl.schedules import CosineLogSNRSchedule

PROGRAMS = """
step = torch.export.load(given["folder"] + "/step.pt2").module()
network = torch.export.load(given["folder"] + "/network.pt2").module()
z = given["z"]
for k, more in enumerate(given["more"]):
    z = step(z, torch.tensor(k), *more)
result = z, network(given["z"], *given["times"])
"""
ONNX = """
import onnxruntime

def session(name):
    return onnxruntime.InferenceSession(given["folder"] + f"/{name}.onnx")

def call(session, *inputs):
    names = [each.name for each in session.get_inputs()]
    values = [each.numpy() for each in inputs]
    return torch.from_numpy(session.run(None, dict(zip(names, values, strict=True)))[0])

step, z = session("step"), given["z"]
for k, more in enumerate(given["more"]):
    z = call(step, z, torch.tensor(k), *more)
result = z, call(session("network"), given["z"], *given["times"])
"""
SALIMANS = {
    "schedule": CosineLogSNRSchedule(),
    "time_input": "log_snr",
    "prediction": "v",
    "timesteps": "linear",
}

SETTINGS = [
    {"num_steps": 2, "clip": DynamicThreshold(0.9)},
    {"num_steps": 2, "sampler": Ancestral(), "sigma_data": 0.5, "loss_weight": "uniform"},
]


def written(folder, *, onnx, **settings):
    """A model of classes whose programs are in a folder, what they are given, and what is ours."""
    network = tiny_unet(num_classes=3)
    random_weights(network)
    model = tiny_ddpm(network=network, ema_decay=0.0, **SALIMANS, **settings).eval()
    steps = step_numbers(model)
    average = model.average.module
    write_graphs(folder, average, model.image_shape, steps, model.sampling_clip, onnx=onnx)
    z, noise = model.latents(range(5), model.levels[0])
    label, more = model.label_of(range(5)), []
    for _ in steps:
        draw = torch.stack([torch.randn(z.shape[1:], generator=each) for each in noise])
        more.append((label,) if model.sampler.is_deterministic else (draw, label))
    times = torch.tensor([0.0, 11.5, 200.0, 640.0, 999.0]), label
    given = {"folder": str(folder), "z": z, "more": more, "times": times}
    with torch.no_grad():
        return given, (model.sample(range(5)), average(z, *times))


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_programs_of_pytorch_draw_the_same_images(settings, tmp_path):
    given, ours = written(tmp_path, onnx=False, **settings)
    assert ours[0].std() > 0.1
    for wanted, found in zip(ours, run(PROGRAMS, given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the converter
@pytest.mark.parametrize("settings", SETTINGS)
def test_onnx_draws_the_same_images(settings, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    given, ours = written(tmp_path, onnx=True, **settings)
    place = Path(runtime.__file__).parents[1]
    for wanted, found in zip(ours, run(ONNX, given, places=[place]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the converter
@pytest.mark.parametrize("onnx", [False, True])
def test_a_network_of_diffusers_takes_any_number_of_images(onnx, tmp_path):
    """diffusers branches on 64 images."""
    pytest.importorskip("onnxscript" if onnx else "diffusers")
    network = DiffusersUNet(OWN_DEFAULTS).eval()
    random_weights(network)
    model = tiny_ddpm(network=network, num_steps=2)
    write_graphs(tmp_path, network, (1, 8, 8), step_numbers(model), None, onnx=onnx)
    if onnx:
        session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "network.onnx")
    else:
        program = torch.export.load(tmp_path / "network.pt2").module()
    for count in (1, 70):
        z, t = torch.randn(count, 1, 8, 8), torch.linspace(0, 999, count)
        with torch.no_grad():
            wanted = network(z, t)
            if onnx:
                (found,) = session.run(None, {"z": z.numpy(), "t": t.numpy()})
                found = torch.from_numpy(found)
            else:
                found = program(z, t)
        assert wanted.std() > 0.1
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class Values(nn.Module):
    """What no graph can hold."""

    def forward(self, z, t):
        return z if z.sum() > 0 else -z


class Count(nn.Module):
    """What a graph can hold for some numbers of images alone."""

    def forward(self, z, t):
        return z if len(z) < 64 else -z


class Failing(nn.Module):
    def forward(self, z, t):
        raise RuntimeError("no such weights")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Values, r"got Values .*: its forward branches on values of tensors; change it, or use"),
        (Count, r"got Count .*: its forward branches on that number; change it, or use format ch"),
        (Failing, r"got Failing \(.*no such weights.*\): use format checkpoint"),
    ],
)
def test_a_network_that_cannot_be_traced_is_refused_with_the_reason(kind, message, tmp_path):
    steps = step_numbers(tiny_ddpm())
    with pytest.raises(ValueError, match="(?s)can trace for any number of images, " + message):
        write_graphs(tmp_path, kind(), (1, 8, 8), steps, None, onnx=False)


def test_without_onnx_the_error_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    missing = "ddim_pl.exports.graphs.find_spec"
    monkeypatch.setattr(missing, lambda name: None if name == "onnxscript" else find("sys"))
    with pytest.raises(ValueError, match=r"needs onnxscript, .* pip install 'ddim_pl\[onnx\]'"):
        check_onnx()
    monkeypatch.setattr(missing, lambda name: sys.__spec__ or True)
    check_onnx()
