"""Names for what results depend on: digests of tensors and of models."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ddim_pl.damage import read_archive
from ddim_pl.training.base import DiffusionModule
from ddim_pl.training.ema import choose_average


def digest_of(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """A fingerprint of tensors with their names, and of a text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: DiffusionModule, state: Mapping[str, Tensor] | None = None) -> str:
    """A name for a model's averaged weights and what reads them.

    Args:
        model: The model.
        state: Its state, if that is not loaded yet.
    """
    state = model.state_dict() if state is None else state
    average = {name: values for name, values in state.items() if name.startswith("average.")}
    # In the words of version 0.1.0, so that pairs and finished cells of before are found again.
    text = (
        f"Denoiser(network=Identity(), schedule={model.schedule!r}, "
        f"prediction={model.prediction!r}, clip={model.clip}, time_input={model.time_input!r}, "
        "label=None)"
    )
    if not model.noise.is_gaussian:
        text += repr(model.noise)
    if model.sigma_data != 1:
        text += f"sigma_data={model.sigma_data}"
    if model.denoiser.guidance_range is not None:
        text += f"guidance_range={model.denoiser.guidance_range}"
    if model.sampling_precision != 32:
        text += f"sampling_precision={model.sampling_precision}"
    return digest_of(average, text)


def fingerprint_of_file(model: DiffusionModule, ckpt_path: str | None) -> str:
    """The fingerprint that a model will have once a checkpoint's weights are loaded into it.

    Args:
        model: The model.
        ckpt_path: The checkpoint; None takes the weights that the model has.
    """
    if ckpt_path is None:
        return fingerprint(model)
    state = read_archive(ckpt_path, "ckpt_path")["state_dict"]
    return fingerprint(model, choose_average(state, model.average_index))
