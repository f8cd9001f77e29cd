"""The formats of an export: what each can hold, how it is written, and how it is used."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from ddim_pl.exports.diffusers_folder import check_label, unet2d_arguments, write_pipeline
from ddim_pl.exports.graphs import check_onnx, write_graphs
from ddim_pl.exports.safetensors_folder import check_clip, check_network, write_weights
from ddim_pl.exports.scheduler import ddim_settings
from ddim_pl.exports.steps import step_numbers
from ddim_pl.training import DiffusionModule

Format = Literal["diffusers", "safetensors", "onnx", "torch_export"]


@dataclass(frozen=True)
class Export:
    """A model that can be written.

    Args:
        write: Writes its files into an empty folder.
        usage: Code that draws images, Python, with `{folder}` for the folder.
        needs: What the code needs, in words.
        library: Name of the library for the Hub's metadata, if it knows one.
        tags: Tags for the Hub's metadata.
        notes: What else a user should know, a sentence each.
        label: The class that it draws, if it draws one alone.
    """

    write: Callable[[Path], None]
    usage: str
    needs: str
    library: str | None
    tags: list[str]
    notes: list[str] = field(default_factory=list)
    label: int | None = None


def make_export(model: DiffusionModule, format: Format, label: int | None = None) -> Export:
    """See whether a format can hold a model.

    Args:
        model: The model with its weights, of which the average is written.
        format: The format.
        label: The class to draw, for format diffusers and a network with classes.

    Raises:
        ValueError: If it cannot; says why, and what can.
    """
    if format == "diffusers":
        return _diffusers(model, label)
    if label is not None:
        raise ValueError(
            f"label must be left out for format {format}, got {label}: what is written takes the "
            "labels of each image"
        )
    return _safetensors(model) if format == "safetensors" else _graphs(model, format)


def _diffusers(model: DiffusionModule, label: int | None) -> Export:
    network, settings = model.average.module, ddim_settings(model)
    unet2d_arguments(network)
    check_label(network, label)
    call = {
        "batch_size": 16,
        "num_inference_steps": settings.num_steps,
        "eta": settings.eta,
        **({"use_clipped_model_output": True} if settings.clips else {}),
    }
    arguments = ", ".join(f"{name}={value}" for name, value in call.items())
    notes = [f"Class {label} alone: a pipeline takes no labels."] if label is not None else []
    if settings.clips:
        notes.append(
            "`use_clipped_model_output=True` derives the noise anew from a clipped image, as in "
            "the papers; without it the images are others."
        )
    if model.distilled_steps is not None:
        notes.append(f"It was distilled to {model.distilled_steps} steps; others are worse.")
    elif settings.times is not None:
        count = settings.config["num_train_timesteps"]
        notes.append(
            f"The timesteps are {count} levels of its own schedule; numbers of steps that divide "
            f"{count} visit them evenly."
        )
    return Export(
        partial(write_pipeline, network=network, settings=settings, label=label),
        "from diffusers import DDIMPipeline\n\n"
        'pipeline = DDIMPipeline.from_pretrained("{folder}")\n'
        f"images = pipeline(\n    {arguments}\n).images",
        "diffusers 0.35 or newer",
        "diffusers",
        ["diffusers"],
        notes,
        label,
    )


def _safetensors(model: DiffusionModule) -> Export:
    network, steps, clip = model.average.module, step_numbers(model), model.sampling_clip
    check_network(network)
    check_clip(clip)
    return Export(
        partial(write_weights, network=network, steps=steps, clip=clip),
        _use_loader(_shape(model), _labels(model)),
        "PyTorch 2 and safetensors",
        None,
        ["safetensors", "pytorch"],
        [
            "`loader.py` reads weights and samples; `code` has the network. They are files of "
            "ddim_pl, Apache-2.0."
        ],
    )


def _graphs(model: DiffusionModule, format: Format) -> Export:
    onnx = format == "onnx"
    if onnx:
        check_onnx()
    steps = step_numbers(model)
    write = partial(
        write_graphs,
        network=model.average.module,
        image_shape=model.image_shape,
        steps=steps,
        clip=model.sampling_clip,
        onnx=onnx,
    )
    stochastic = any(step["noise_weight"] for step in steps)
    usage = _use_onnx if onnx else _use_program
    note = (
        "`network` maps a state, its times and labels to the network's output; `step` is a whole "
        f"step of the sampler, numbered from 0 to {len(steps) - 1}."
    )
    return Export(
        write,
        usage(_shape(model), len(steps), stochastic, _labels(model)),
        "onnxruntime, or another program that reads ONNX" if onnx else "PyTorch, as new as below",
        "onnx" if onnx else None,
        ["onnx" if onnx else "pytorch"],
        [note],
    )


def _use_loader(shape: str, labels: str) -> str:
    return f"""import sys

import torch

sys.path.insert(0, "{{folder}}")
from loader import load, sample

z = torch.randn(16, {shape})
images = sample(load("{{folder}}"), z{labels and f", {labels}"})  # about [-1, 1]"""


def _use_program(shape: str, num_steps: int, stochastic: bool, labels: str) -> str:
    more = (", torch.randn_like(z)" if stochastic else "") + (f", {labels}" if labels else "")
    return f"""import torch

step = torch.export.load("{{folder}}/step.pt2").module()
z = torch.randn(16, {shape})
with torch.no_grad():
    for k in range({num_steps}):
        z = step(z, torch.tensor(k){more})
images = z  # about [-1, 1]"""


def _use_onnx(shape: str, num_steps: int, stochastic: bool, labels: str) -> str:
    more = ', "noise": draw(z.shape, "float32")' if stochastic else ""
    more += f', "label": {labels.replace("torch", "np")}' if labels else ""
    return f"""import numpy as np
import onnxruntime

step = onnxruntime.InferenceSession("{{folder}}/step.onnx")
draw = np.random.default_rng(0).standard_normal
z = draw((16, {shape}), "float32")
for k in range({num_steps}):
    (z,) = step.run(None, {{{{"z": z, "k": np.array(k){more}}}}})
images = z  # about [-1, 1]"""


def _shape(model: DiffusionModule) -> str:
    return ", ".join(map(str, model.image_shape))


def _labels(model: DiffusionModule) -> str:
    """Labels of 16 images, in code."""
    return "" if model.num_classes is None else f"torch.arange(16) % {model.num_classes}"
