"""Folders of diffusers: a pipeline of an unconditional model, or a `UNet2DModel` alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim_pl.networks.diffusers import DiffusersUNet
from ddim_pl.networks.unet import UNet
from ddim_pl.networks.unet_names import DIFFUSERS_NAMES, check_keys, load_weights
from ddim_pl.teachers.base import Teacher, read_json, read_tensors_of
from ddim_pl.teachers.scheduler import settings_of

PIPELINE, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS = tuple(f"diffusion_pytorch_model.{end}" for end in ("safetensors", "bin"))
"""Files of weights; the first that is there is read."""

SUPPORTED = (
    "supported are pipelines of images from noise: a UNet2DModel with a DDPMScheduler or a "
    "DDIMScheduler"
)
ATTENTION_BEFORE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of an attention's layers in the files of before, as in google/ddpm-cifar10-32."""

DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""What diffusers takes for an argument of `UNet2DModel` that a config has not."""

FIXED = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (1,),
    "flip_sin_to_cos": (False,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-6,),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}
"""Values of those arguments that `UNet` has too."""


def is_diffusers(folder: Path) -> bool:
    """Whether a folder looks like one of diffusers, whether or not it can be read."""
    return any((folder / name).is_file() for name in (PIPELINE, CONFIG, f"unet/{CONFIG}"))


def read_folder(
    folder: Path, scheduler: Path | None = None, image_size: int | None = None
) -> Teacher:
    """Read a folder of diffusers.

    Args:
        folder: A pipeline's folder, with the network in `unet` or in the folder itself, or the
            folder of a network alone.
        scheduler: A `scheduler_config.json` or its folder, in place of the pipeline's own.
        image_size: Height and width of the images where the config has none.

    Raises:
        ValueError: If it is another kind of folder or model, or does not fit together.
    """
    _check_pipeline(folder)
    place = _component(folder, "unet", CONFIG)
    config = read_json(place / CONFIG)
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"source {str(folder)!r} holds a {kind}: {SUPPORTED}")
    settings = settings_of(_scheduler_config(folder, scheduler))
    arguments = _arguments(config, image_size)
    return _teacher(arguments, _weights(place), settings, place)


def native_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `UNet` with which it is a `UNet2DModel`.

    Args:
        arguments: All arguments of the `UNet2DModel`.

    Raises:
        ValueError: If `UNet` lacks something; the message names all of that.
    """
    blocks = _read_blocks(arguments)
    lacking = [*_lacking(arguments, blocks), *blocks.lacking]
    if lacking:
        raise ValueError("; ".join(lacking))
    size, widths = arguments["sample_size"], arguments["block_out_channels"]
    side = size if isinstance(size, int) else size[0]
    return {
        "image_size": side,
        "in_channels": arguments["in_channels"],
        "out_channels": arguments["out_channels"],
        "channels": widths[0],
        "multipliers": [each // widths[0] for each in widths],
        "num_blocks": arguments["layers_per_block"],
        "attention": [side >> level for level, has in enumerate(blocks.attends) if has],
        "head_width": arguments["attention_head_dim"],
        "dropout": arguments["dropout"],
        "num_classes": arguments["num_class_embeds"],
        "scale_shift": arguments["resnet_time_scale_shift"] == "scale_shift",
        "resample": blocks.resample,
        "groups": arguments["norm_num_groups"],
        "embedding_width": arguments["time_embedding_dim"],
    }


@dataclass(frozen=True)
class _Blocks:
    """What the types of blocks say.

    Args:
        attends: Whether each level attends.
        resample: How all resample: "conv" or "block".
        lacking: What `UNet` has not.
    """

    attends: list[bool]
    resample: str
    lacking: list[str]


def _lacking(arguments: dict[str, Any], blocks: _Blocks) -> Iterator[str]:
    """What `UNet` has not, but for types of blocks."""
    for name, values in FIXED.items():
        if arguments[name] not in values:
            yield f"{name}: {arguments[name]}"
    size, widths = arguments["sample_size"], arguments["block_out_channels"]
    if not isinstance(size, int) and size[0] != size[1]:
        yield f"sample_size: {size}"
    if any(each % widths[0] for each in widths):
        yield f"block_out_channels: {widths}, which are no multiples of the first"
    of_middle = arguments["attn_norm_num_groups"]
    film = arguments["resnet_time_scale_shift"] == "scale_shift"
    if of_middle != arguments["norm_num_groups"] and (film or of_middle is not None):
        yield f"attn_norm_num_groups: {of_middle}"
    padding = arguments["downsample_padding"]
    if blocks.resample == "conv" and len(widths) > 1 and padding != 0:
        yield f"downsample_padding: {padding}"
    head_width = arguments["attention_head_dim"]
    attending = [each for each, has in zip(widths, blocks.attends, strict=True) if has]
    if head_width is not None and any(each % head_width for each in [*attending, widths[-1]]):
        yield f"attention_head_dim: {head_width}, which divides no width"


def _read_blocks(arguments: dict[str, Any]) -> _Blocks:
    """Read the types of blocks of each level, on the way down and on that up."""
    down, up = arguments["down_block_types"], [*reversed(arguments["up_block_types"])]
    attends, kinds, lacking = list[bool](), set[str](), list[str]()
    for level, pair in enumerate(zip(down, up, strict=True)):
        has = [each.startswith("Attn") for each in pair]
        if has[0] != has[1]:
            lacking.append(f"{pair[0]} on the way down and {pair[1]} on that up")
        attends.append(has[0])
        for way, name in zip(("Down", "Up"), pair, strict=True):
            kind = {
                f"{way}Block2D": "conv",
                f"Resnet{way}sampleBlock2D": "resnet",
                f"Attn{way}Block2D": arguments[f"{way.lower()}sample_type"],
            }.get(name)
            if kind not in ("conv", "resnet"):
                lacking.append(f"{name} with {way.lower()}sampling by {kind}")
            elif level < len(down) - 1 if way == "Down" else level > 0:  # it resamples
                kinds.add(kind)
    if len(kinds) > 1:
        lacking.append("levels that resample in two ways")
    return _Blocks(attends, "block" if kinds == {"resnet"} else "conv", [*dict.fromkeys(lacking)])


def _teacher(
    arguments: dict[str, Any], weights: dict[str, Tensor], settings: dict[str, Any], place: Path
) -> Teacher:
    network: UNet | DiffusersUNet
    try:
        native, lacking = native_arguments(arguments), None
    except ValueError as error:
        native, lacking = {}, str(error)
    try:
        if lacking is None:
            network = UNet(**native)
            load_weights(network, weights, DIFFUSERS_NAMES)
        else:
            network = DiffusersUNet(arguments, arguments["dropout"])
            load_into_wrapper(network, weights)
    except ValueError as error:
        raise ValueError(f"source {str(place)!r}: {error}") from None
    note = f"UNet has no {lacking}" if lacking else "the same layers as in diffusers"
    size = arguments["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    settings = {**settings, "image_shape": (arguments["in_channels"], height, width)}
    return Teacher(network, settings, [f"network: {type(network).__name__} ({note})"])


def load_into_wrapper(network: DiffusersUNet, weights: dict[str, Tensor]) -> None:
    """Give a `DiffusersUNet` the weights of its `UNet2DModel`.

    Raises:
        ValueError: If a name or a shape does not fit; it is named.
    """
    ours = network.unet.state_dict()
    check_keys(set(ours), weights)
    for name, value in ours.items():
        if weights[name].shape != value.shape:
            raise ValueError(
                f"weight {name} has shape {tuple(weights[name].shape)} in place of "
                f"{tuple(value.shape)}"
            )
        value.copy_(weights[name])


def _check_pipeline(folder: Path) -> None:
    """Check that a folder is of diffusers, and of a model of images from noise."""
    index = folder / PIPELINE
    if not index.is_file():
        if not (folder / CONFIG).is_file() and not (folder / "unet" / CONFIG).is_file():
            raise ValueError(
                f"source must be a folder of diffusers, got {str(folder)!r}, which has neither "
                f"{PIPELINE} nor {CONFIG}: {SUPPORTED}"
            )
        return
    parts = {
        name: value[1]
        for name, value in read_json(index).items()
        if isinstance(value, list) and len(value) == 2 and value[1]
    }
    others = {name: kind for name, kind in parts.items() if name not in ("unet", "scheduler")}
    if others or parts.get("unet") != "UNet2DModel":
        what = ", ".join(f"{name} ({kind})" for name, kind in (others or parts).items())
        latent = any("vae" in name or "vq" in name for name in others)
        texts = any("text" in name or "token" in name for name in others)
        reason = " of latents" * latent + " and" * (latent and texts) + " of texts" * texts
        raise ValueError(f"source {str(folder)!r} is a pipeline{reason} with {what}: {SUPPORTED}")


def _component(folder: Path, name: str, file: str) -> Path:
    """Where a component lies: in a folder of its name, or in the pipeline's own folder."""
    place = folder / name if (folder / name).is_dir() else folder
    if not (place / file).is_file():
        raise ValueError(f"source {str(folder)!r} has no {file} for its {name}: give it all files")
    return place


def given_scheduler(given: Path) -> dict[str, Any]:
    """Content of a `scheduler_config.json`.

    Args:
        given: It, or a folder that has it.

    Raises:
        ValueError: If there is none.
    """
    path = given / SCHEDULER if given.is_dir() else given
    if not path.is_file():
        raise ValueError(
            f"scheduler must be a {SCHEDULER} or its folder, got {str(given)!r}, which is none: "
            "give another"
        )
    return read_json(path)


def _scheduler_config(folder: Path, given: Path | None) -> dict[str, Any]:
    if given is not None:
        return given_scheduler(given)
    beside = [folder / "scheduler", folder]
    found = next((each for each in beside if (each / SCHEDULER).is_file()), None)
    if found is None:
        raise ValueError(
            f"source {str(folder)!r} has no {SCHEDULER}: give the one that the network was "
            "trained with by --scheduler"
        )
    return read_json(found / SCHEDULER)


def _arguments(config: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    """All arguments of the `UNet2DModel`."""
    arguments = DEFAULTS | {n: value for n, value in config.items() if not n.startswith("_")}
    unknown = sorted(set(arguments) - set(DEFAULTS))
    if unknown:
        raise ValueError(
            f"{CONFIG} must be that of a UNet2DModel, got the unknown entry {unknown[0]!r}: it is "
            "of another model, or of a newer version"
        )
    size = arguments["sample_size"]
    if image_size is not None and size not in (None, image_size, [image_size] * 2):
        raise ValueError(
            f"image_size must be {size}, as in {CONFIG}, got {image_size}: leave it out"
        )
    if size is None and image_size is None:
        raise ValueError(f"image_size must be given: {CONFIG} has no sample_size")
    return arguments | {"sample_size": image_size if size is None else size}


def _weights(place: Path) -> dict[str, Tensor]:
    """The weights, in float32, by the names of now."""
    found = next((place / name for name in WEIGHTS if (place / name).is_file()), None)
    if found is None:
        raise ValueError(f"source {str(place)!r} has no weights: put {' or '.join(WEIGHTS)} there")
    weights = read_tensors_of(found)
    if not isinstance(weights, dict) or not all(map(_is_tensor, weights.values())):
        raise ValueError(f"source {str(found)!r} must hold tensors by name: give another file")
    return {_name_of_now(name): value.float() for name, value in weights.items()}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _name_of_now(name: str) -> str:
    head, _, part = name.rpartition(".")
    owner, _, layer = head.rpartition(".")
    if ".attentions." in f".{head}." and layer in ATTENTION_BEFORE:
        return f"{owner}.{ATTENTION_BEFORE[layer]}.{part}"
    return name
