"""A folder that diffusers' `DDIMPipeline.from_pretrained` reads, written without diffusers."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ddim_pl.exports.scheduler import DDIMSettings
from ddim_pl.networks.diffusers import DiffusersUNet
from ddim_pl.networks.sinusoid import sinusoidal_embedding
from ddim_pl.networks.unet import UNet
from ddim_pl.networks.unet_names import DIFFUSERS_NAMES, renamed_weights
from ddim_pl.teachers.diffusers_folder import CONFIG, PIPELINE, SCHEDULER, WEIGHTS

CLASSES, TIME_BIAS = "class_embedding.weight", "time_embedding.linear_2.bias"
"""What diffusers calls the table of classes, and the bias of what it is added to."""


def unet2d_arguments(network: nn.Module) -> dict[str, Any]:
    """Arguments with which a `UNet2DModel` computes what a network does.

    Args:
        network: A `UNet` or `DiffusersUNet`.

    Raises:
        ValueError: If it has what `UNet2DModel` lacks, or is another network; names it.
    """
    if isinstance(network, DiffusersUNet):
        return {**network.init_args["arguments"], "dropout": network.init_args["dropout"]}
    if not isinstance(network, UNet):
        raise ValueError(
            f"network must be a UNet or DiffusersUNet for format diffusers, got "
            f"{type(network).__name__}, which it does not know: use format torch_export or onnx"
        )
    given = network.init_args
    for name, value in (
        ("patch_size", given["patch_size"]),
        ("multipliers", given["multipliers"][0]),
    ):
        if value != 1:
            raise ValueError(
                f"{name} must {'be' if name == 'patch_size' else 'begin with'} 1 for format "
                f"diffusers, got {given[name]}: UNet2DModel has no other; use format safetensors"
            )
    sides = [given["image_size"] >> level for level in range(len(given["multipliers"]))]
    attends = [side in given["attention"] for side in sides]
    widths = [given["channels"] * multiplier for multiplier in given["multipliers"]]
    return {
        "sample_size": given["image_size"],
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "block_out_channels": widths,
        "layers_per_block": given["num_blocks"],
        "attention_head_dim": _head_width(given, widths, attends),
        "norm_num_groups": given["groups"],
        # As many as elsewhere: with scale_shift the default of UNet2DModel is another.
        "attn_norm_num_groups": given["groups"] if given["scale_shift"] else None,
        "resnet_time_scale_shift": "scale_shift" if given["scale_shift"] else "default",
        "time_embedding_dim": given["embedding_width"],
        "num_class_embeds": network.num_classes,
        "dropout": given["dropout"],
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        **_blocks(attends, given["resample"]),
    }


def check_label(network: nn.Module, label: int | None) -> None:
    """Check that a class is named if and only if the network has classes.

    Raises:
        ValueError: If not.
    """
    classes = getattr(network, "num_classes", None)
    if classes is None and label is not None:
        raise ValueError(f"label must be left out for a model without classes, got {label}")
    if classes is not None and label is None:
        raise ValueError(
            f"label must be given for format diffusers and a network of {classes} classes: "
            "DDIMPipeline gives a network no labels, so that the folder is of one class; or use "
            "format safetensors, onnx or torch_export, which take labels"
        )
    if classes is not None and label is not None and not 0 <= label < classes:
        raise ValueError(f"label must lie in [0, {classes - 1}], got {label}")


def write_pipeline(
    folder: Path, network: nn.Module, settings: DDIMSettings, label: int | None = None
) -> None:
    """Write a pipeline: its network, its scheduler and what binds them.

    Args:
        folder: An empty folder.
        network: The network with its weights.
        settings: The scheduler.
        label: The class that the pipeline draws, of a network with classes.

    Raises:
        ValueError: As `unet2d_arguments`, and `check_label`.
    """
    arguments = unet2d_arguments(network)
    check_label(network, label)
    weights = _weights(network)
    if label is not None:  # the embedding of a class is added to that of the time
        weights[TIME_BIAS] = weights[TIME_BIAS] + weights.pop(CLASSES)[label]
        arguments["num_class_embeds"] = None
    if settings.times is not None:
        weights["time_proj.weight"] = _embeddings(network, settings.times)
        count = {"num_train_timesteps": len(settings.times)}
        arguments |= {"time_embedding_type": "learned", **count}
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    _write(folder / PIPELINE, {"_class_name": "DDIMPipeline", **parts})
    _write(folder / "scheduler" / SCHEDULER, settings.config)
    _write(folder / "unet" / CONFIG, {"_class_name": "UNet2DModel", **arguments})
    plain = {name: value.float().cpu().contiguous() for name, value in weights.items()}
    save_file(plain, folder / "unet" / WEIGHTS[0], metadata={"format": "pt"})


def _blocks(attends: list[bool], resample: str) -> dict[str, Any]:
    """Kinds of the levels, and how they resample."""
    if resample == "conv":
        names = {"Down": "DownBlock2D", "Up": "UpBlock2D"}
        settings: dict[str, Any] = {"downsample_padding": 0}
    else:
        names = {"Down": "ResnetDownsampleBlock2D", "Up": "ResnetUpsampleBlock2D"}
        settings = {"downsample_type": "resnet", "upsample_type": "resnet"}
    kinds = {
        way: [f"Attn{way}Block2D" if each else name for each in attends]
        for way, name in names.items()
    }
    up = [*reversed(kinds["Up"])]
    return settings | {"down_block_types": kinds["Down"], "up_block_types": up}


def _head_width(given: dict[str, Any], widths: list[int], attends: list[bool]) -> int | None:
    """Channels of an attention head; None where each attention has one."""
    if given["head_width"] or (given["num_heads"] or 1) == 1:
        return given["head_width"]
    attending = [width for width, each in zip(widths, attends, strict=True) if each] + widths[-1:]
    found = {width // given["num_heads"] for width in attending}
    if len(found) > 1:
        raise ValueError(
            f"num_heads must be 1 for format diffusers where widths with attention differ, got "
            f"{given['num_heads']}: UNet2DModel has heads of one width; use format safetensors"
        )
    return found.pop()


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Weights by diffusers' names."""
    if isinstance(network, UNet):
        return renamed_weights(network, DIFFUSERS_NAMES)
    assert isinstance(network, DiffusersUNet)
    return dict(network.unet.state_dict())


def _embeddings(network: nn.Module, times: Tensor) -> Tensor:
    """What enters the layers of the time, for each timestep `(N, channels)`."""
    times = times.float()
    if isinstance(network, UNet):
        return sinusoidal_embedding(times, network.time_in.in_features)
    assert isinstance(network, DiffusersUNet)
    embedded: Tensor = network.unet.time_proj(times)
    return embedded


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
