"""Any `UNet2DModel` of diffusers as a network.

It is for what `UNet` lacks: other embeddings of the time, other blocks. Needs the extra
`ddim_pl[diffusers]`.
"""

from functools import partial
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional as F

from ddim_pl.checks import check_at_least
from ddim_pl.networks.unet import check_null_class

__all__ = ["DiffusersUNet"]


class DiffusersUNet(nn.Module):
    """diffusers' `UNet2DModel`, whose output is an object and whose sizes are in a config.

    Args:
        arguments: Those of `UNet2DModel`, with a `sample_size`; entries that begin with "_", as a
            `config.json` has, are left out.
        dropout: Probability in [0, 1) of dropping an activation, in place of an entry of
            `arguments`.
        null_class: Whether the last of `num_class_embeds` is the null class, for no label.

    Attributes:
        init_args: The constructor's arguments as plain data, for checkpoints.

    Raises:
        ValueError: If diffusers is not installed, or takes no such arguments.
    """

    def __init__(
        self, arguments: dict[str, Any], dropout: float = 0.0, null_class: bool = False
    ) -> None:
        super().__init__()
        kept = {name: value for name, value in arguments.items() if not name.startswith("_")}
        kept.pop("dropout", None)
        _check(kept)
        classes = kept.get("num_class_embeds")
        check_null_class(null_class, classes)
        check_at_least(1 + null_class, num_class_embeds=classes)
        self.init_args: dict[str, Any] = {"arguments": kept, "dropout": dropout}
        self.init_args |= {"null_class": True} if null_class else {}
        self.unet = _made(kept, dropout)
        config = self.unet.config
        self.in_channels: Final[int] = config.in_channels
        self.out_channels: Final[int] = config.out_channels
        self.num_classes: Final[int | None] = classes and classes - null_class
        self.null_class: Final = null_class
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        if height == width:
            self.image_size: Final[int] = height

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Map images, each with its time, to images of the same size.

        Args:
            z: Images, (B, in_channels, height, width).
            t: Times, (B,).
            label: Classes, (B,) int64, if the network has classes; `num_classes` is the null
                class.

        Returns:
            (B, out_channels, height, width).
        """
        output: Tensor = self.unet(z, t, class_labels=label).sample
        return output

    def take_any_batch(self) -> None:
        """Leave out what ties a traced graph to a number of images, without another output.

        diffusers' upsampling copies batches of 64 images and more, for old versions of PyTorch. A
        graph traced with fewer would refuse those.
        """
        from diffusers.models.upsampling import Upsample2D

        for each in self.unet.modules():
            if type(each) is Upsample2D and each.norm is None and not each.use_conv_transpose:
                each.forward = partial(_upsampled, each)


def _check(arguments: dict[str, Any]) -> None:
    """Check what diffusers would take and we could not use."""
    time = arguments.get("time_embedding_type", "positional")
    if time != "positional":
        raise ValueError(
            f"time_embedding_type must be 'positional', got {time!r}: its network is not fed the "
            "index of a level of DDPM"
        )
    embedding = arguments.get("class_embed_type")
    if embedding is not None:
        raise ValueError(
            f"class_embed_type must be None, got {embedding!r}: labels go through a table, with "
            "num_class_embeds"
        )
    if arguments.get("sample_size") is None:
        raise ValueError(
            "sample_size must be the height and width of the images, got None: give one number "
            "or both"
        )


def _made(arguments: dict[str, Any], dropout: float) -> Any:
    try:
        from diffusers import UNet2DModel
    except ImportError:
        raise ValueError(
            "network DiffusersUNet needs the package diffusers, which is not installed: pip "
            "install 'ddim_pl[diffusers]'"
        ) from None
    try:
        return UNet2DModel(**arguments, dropout=dropout)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"arguments must be those of diffusers' UNet2DModel, got {arguments}: {error}"
        ) from None


def _upsampled(module: Any, z: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
    """`Upsample2D.forward` of diffusers without its copies."""
    if module.interpolate and output_size is None:
        z = F.interpolate(z, scale_factor=2.0, mode="nearest")
    elif module.interpolate:
        z = F.interpolate(z, size=output_size, mode="nearest")
    if module.use_conv:
        z = module.conv(z) if module.name == "conv" else module.Conv2d_0(z)
    return z
