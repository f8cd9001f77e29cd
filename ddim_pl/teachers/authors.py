"""The files of weights of the code of [DDIM], and of DDPM's weights for PyTorch.

Both hold a `Model`, which is `UNet` layer by layer. The files hold no sizes of images and no
schedule: both codes have the linear one with 1000 levels, and attention at 16x16.
"""

from typing import Any

from torch import Tensor

from ddim_pl.networks.unet import UNet
from ddim_pl.networks.unet_names import DDIM_NAMES, load_weights
from ddim_pl.samplers import DDIM
from ddim_pl.schedules import LinearSchedule
from ddim_pl.teachers.base import Teacher

ATTENTION_AT = 16
"""Resolution that attends in all published models of both codes."""

SETTINGS: dict[str, Any] = {
    "schedule": LinearSchedule(),
    "prediction": "eps",
    "loss_weight": "snr",
    "clip": True,
    "sampler": DDIM(eta=0.0, clip=False),
    "timesteps": "leading",
    "num_steps": 100,
}
"""As in the code of [DDIM]: its steps do not clip."""

STATES = 4
"""Entries of a list of the code of [DDIM] before that of the average."""


def is_authors(content: Any) -> bool:
    """Whether a file holds a `Model` of either code."""
    return isinstance(content, dict) and "temb.dense.0.weight" in _plain_names(content)


def read_authors(
    content: Any,
    image_size: int | None = None,
    settings: dict[str, Any] | None = None,
    name: str = "source",
) -> Teacher:
    """Read what a file of either code holds.

    Args:
        content: A state dict; or the list of model, optimiser, epoch, step and, if there is one,
            average, of which the average is taken.
        image_size: Height and width of the images. By default such that the one level with
            attention has 16x16.
        settings: Arguments of `DDPM` beside the network; by default those of both codes.
        name: The file, for the errors.

    Raises:
        ValueError: If it is no such file, or the size of the images is not known.
    """
    weights, note = _weights(content, name)
    try:
        arguments = _arguments(weights, image_size)
        network = UNet(**arguments)
        load_weights(network, weights, DDIM_NAMES)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"source {name!r} must hold the Model of the code of DDIM, got one without {error}: "
            "give another file"
        ) from None
    except ValueError as error:
        raise ValueError(f"source {name!r}: {error}") from None
    size = arguments["image_size"]
    chosen = f"images: {size}x{size}" + ("" if image_size else ", as attention is at 16x16")
    shape = {"image_shape": (arguments["in_channels"], size, size)}
    return Teacher(network, {**(settings or SETTINGS), **shape}, [note, chosen])


def _weights(content: Any, name: str) -> tuple[dict[str, Tensor], str]:
    """The averaged weights if there are some, by plain names, and which were taken."""
    note = "weights: the only ones in the file"
    if isinstance(content, list | tuple):
        averaged = len(content) > STATES
        found = content[STATES] if averaged else next(iter(content), None)
        note = (
            f"weights: {'the average' if averaged else 'those in training: no average is there'}"
        )
        content = found
    if not is_authors(content) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(
            f"source {name!r} must hold the weights of a Model of the code of DDIM or DDPM, got "
            "something else: give another file"
        )
    return {key: value.float() for key, value in _plain_names(content).items()}, note


def _plain_names(content: dict[str, Any]) -> dict[str, Any]:
    """Names without what training on several devices puts before them."""
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _arguments(weights: dict[str, Tensor], image_size: int | None) -> dict[str, Any]:
    """Arguments of `UNet`, read off the weights."""
    channels, in_channels = weights["conv_in.weight"].shape[:2]
    levels = _count(weights, "down.{}.block.0.conv1.weight")
    widths = [weights[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    attends = [i for i in range(levels) if f"down.{i}.attn.0.q.weight" in weights]
    if image_size is None:
        if len(attends) != 1:
            raise ValueError(
                f"image_size must be given: attention is at {len(attends)} levels, and the size "
                "is only known where it is at one"
            )
        image_size = ATTENTION_AT << attends[0]
    return {
        "image_size": image_size,
        "in_channels": in_channels,
        "out_channels": weights["conv_out.weight"].shape[0],
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "num_blocks": _count(weights, "down.0.block.{}.conv1.weight"),
        "attention": [image_size >> level for level in attends],
        "embedding_width": weights["temb.dense.0.weight"].shape[0],
        "initialisation": "torch",
    }


def _count(weights: dict[str, Tensor], name: str) -> int:
    """How many names of this form there are, from 0 on."""
    number = 0
    while name.format(number) in weights:
        number += 1
    return number
