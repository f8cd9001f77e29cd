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
    if model.denoiser.guidance_range is not None:
        raise ValueError(
            f"format must be checkpoint for a model whose network takes the weight of guidance as "
            f"an input, got {format}: what is written has no such input"
        )
    if model.sampling_guidance is not None and not model.sampling_guidance.is_plain:
        raise ValueError(
            f"guidance must be null for format {format}, got {model.sampling_guidance}: what is "
            "written evaluates the network with the class alone; give --model.guidance null "
            "--model.guidance_interval null for the plain model, or format checkpoint"
        )
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
        "from diffusers import DDIMPipeline\nfrom diffusers.utils import make_image_grid\n\n"
        'pipeline = DDIMPipeline.from_pretrained("{folder}")\n'
        f"images = pipeline(\n    {arguments}\n).images\n"
        'make_image_grid(images, rows=2, cols=8).save("images.png")',
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
        _use_loader(model),
        f"PyTorch 2 and safetensors{_for_picture(model)}",
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
        usage(model, len(steps), stochastic),
        ("onnxruntime, or another program that reads ONNX" if onnx else "PyTorch, as new as below")
        + _for_picture(model),
        "onnx" if onnx else None,
        ["onnx" if onnx else "pytorch"],
        [note],
    )


def _use_loader(model: DiffusionModule) -> str:
    labels = _labels(model)
    return f"""import sys

import torch
{_import_for_picture(model)}
folder = "{{folder}}"  # where this folder is
sys.path.insert(0, folder)
from loader import load, sample

z = torch.randn(16, {_shape(model)})
images = sample(load(folder), z{labels and f", {labels}"})  # about [-1, 1]
{_picture(model, "images.numpy()")}"""


def _use_program(model: DiffusionModule, num_steps: int, stochastic: bool) -> str:
    labels = _labels(model)
    more = (", torch.randn_like(z)" if stochastic else "") + (f", {labels}" if labels else "")
    return f"""import torch
{_import_for_picture(model)}
folder = "{{folder}}"  # where this folder is
step = torch.export.load(f"{{{{folder}}}}/step.pt2").module()
z = torch.randn(16, {_shape(model)})
with torch.no_grad():
    for k in range({num_steps}):
        z = step(z, torch.tensor(k){more})
images = z  # about [-1, 1]
{_picture(model, "images.numpy()")}"""


def _use_onnx(model: DiffusionModule, num_steps: int, stochastic: bool) -> str:
    labels = _labels(model)
    more = ', "noise": draw(z.shape, "float32")' if stochastic else ""
    more += f', "label": {labels.replace("torch", "np")}' if labels else ""
    return f"""import numpy as np
import onnxruntime
{_import_for_picture(model)}
folder = "{{folder}}"  # where this folder is
step = onnxruntime.InferenceSession(f"{{{{folder}}}}/step.onnx")
draw = np.random.default_rng(0).standard_normal
z = draw((16, {_shape(model)}), "float32")
for k in range({num_steps}):
    (z,) = step.run(None, {{{{"z": z, "k": np.array(k){more}}}}})
images = z  # about [-1, 1]
{_picture(model, "images")}"""


def _shape(model: DiffusionModule) -> str:
    return ", ".join(map(str, model.image_shape))


def _labels(model: DiffusionModule) -> str:
    """Labels of 16 images, in code."""
    return "" if model.num_classes is None else f"torch.arange(16) % {model.num_classes}"


def _for_picture(model: DiffusionModule) -> str:
    return "; Pillow for the picture" if _has_picture(model) else ""


def _import_for_picture(model: DiffusionModule) -> str:
    return "from PIL import Image\n" if _has_picture(model) else ""


def _has_picture(model: DiffusionModule) -> bool:
    return model.image_shape[0] in (1, 3)


def _picture(model: DiffusionModule, array: str) -> str:
    """Code that writes images, a NumPy array (16, C, H, W), side by side; of 1 or 3 channels."""
    if not _has_picture(model):
        return ""
    row = "row[:, :, 0]" if model.image_shape[0] == 1 else "row"
    return f"""pixels = (({array}.clip(-1, 1) + 1) * 127.5).round().astype("uint8")
row = pixels.transpose(2, 0, 3, 1).reshape({model.image_shape[1]}, -1, {model.image_shape[0]})
Image.fromarray({row}).save("images.png")"""
