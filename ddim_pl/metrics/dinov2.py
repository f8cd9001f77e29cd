"""DINOv2's vision transformer as a feature extractor, for FD-DINOv2 ([FlawsFID], [EDM2]).

Tokens are the image's patches of 14x14 pixels, each mapped to a vector, and one more for the
class. To each is added a learned position; those of 37x37 patches are interpolated to the 16x16
of the 224x224 pixels here. Each block adds attention and a small network to the tokens, both of
normalised tokens and scaled by a learned vector (LayerScale):

    h = h + gamma_1 * attention(norm_1(h));  h = h + gamma_2 * mlp(norm_2(h)).

The features are the normalised class token after the last block. The parameters have the names of
the published files ([DINOv2]), which load as they are.
"""

from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddim_pl.checks import check_one_of
from ddim_pl.damage import read_weights, reason_of
from ddim_pl.metrics.missing import MissingWeightsError
from ddim_pl.metrics.resizing import pil_bicubic_rounded

HOME = "https://dl.fbaipublicfiles.com/dinov2"
"""Where the authors keep their files."""

SIDE = 224
PATCH = 14
TRAINED_SIDE = 518
"""Side of the images whose positions the weights hold."""

OFFSET = 0.1
"""Added to the number of patches in the scale of the positions: the authors' code does so, and the
features that papers use depend on it."""

EPS = 1e-6
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of the pixels of ImageNet, from 0 to 1."""

Size = Literal["small", "base", "large"]
Resize = Literal["torch", "pil"]
RESIZES = {
    "torch": "bicubic to 224x224 by PyTorch in float32, antialiased, as EDM2; ImageNet scale",
    "pil": "bicubic to 224x224 by PIL in uint8, antialiased, as dgm-eval; ImageNet scale",
}


class Shape(NamedTuple):
    """Width, number of blocks and of heads."""

    width: int
    depth: int
    heads: int


SHAPES = {"small": Shape(384, 12, 6), "base": Shape(768, 12, 12), "large": Shape(1024, 24, 16)}


class VisionTransformer(nn.Module):
    """DINOv2's network, from normalised images `(B, 3, H, W)` to class tokens `(B, width)`.

    Args:
        shape: Its sizes.
        patch: Side of a patch; H and W are multiples.
        trained_side: Side of the images that the positions are made for.
    """

    def __init__(
        self, shape: Shape, *, patch: int = PATCH, trained_side: int = TRAINED_SIDE
    ) -> None:
        super().__init__()
        width = shape.width
        self.patch = patch
        self.trained = trained_side // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.trained**2, width))
        self.patch_embed = _PatchEmbedding(width, patch)
        self.blocks = nn.Sequential(*(_Block(width, shape.heads) for _ in range(shape.depth)))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised class tokens."""
        h = self.patch_embed(x)
        positions = self.positions(*h.shape[-2:])
        tokens = h.flatten(2).transpose(1, 2)
        first = self.cls_token.expand(len(x), -1, -1)
        h = self.blocks(torch.cat([first, tokens], dim=1) + positions)
        return self.norm(h[:, 0])

    def positions(self, height: int, width: int) -> Tensor:
        """Positions of the class token and of `height` x `width` patches, `(1, 1 + H W, D)`."""
        if (height, width) == (self.trained, self.trained):
            return self.pos_embed
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = rest.unflatten(1, (self.trained, self.trained)).permute(0, 3, 1, 2)
        scale = tuple((side + OFFSET) / self.trained for side in (height, width))
        found = F.interpolate(square, scale_factor=scale, mode="bicubic")
        assert found.shape[-2:] == (height, width)
        return torch.cat([first, found.flatten(2).transpose(1, 2)], dim=1)


class _PatchEmbedding(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = _Attention(width, heads)
        self.ls1 = _LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = _MLP(width)
        self.ls2 = _LayerScale(width)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.ls1(self.attn(self.norm1(h)))
        return h + self.ls2(self.mlp(self.norm2(h)))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, h: Tensor) -> Tensor:
        return self.gamma * h


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(h)))


class DINOv2Features(nn.Module):
    """Class tokens of DINOv2: uint8 images of any size to float32 `(B, num_features)`.

    Papers' FD-DINOv2 takes the large network, with 1024 features; distances of the small (384) and
    base (768) one are other numbers. The extractor is called "dinov2" with the large network and
    the "torch" resize; another size or resize is part of its name.

    Args:
        weights_path: The authors' file of the weights, such as `dinov2_vitl14_pretrain.pth`; by
            default it is downloaded to PyTorch's hub cache.
        size: "small", "base" or "large", of 22, 87 and 304 million parameters.
        resize: "torch" as in EDM2, or "pil" as in dgm-eval, slower, on the CPU.

    Raises:
        ValueError: If the weights cannot be downloaded or read, or an argument is unknown.
    """

    name = "dinov2"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        weights_path: str | None = None,
        *,
        size: Size = "large",
        resize: Resize = "torch",
    ) -> None:
        super().__init__()
        check_one_of(Size, size=size)
        check_one_of(Resize, resize=resize)
        self.name = "dinov2"
        self.name += "" if size == "large" else f"_{size}"
        self.name += "" if resize == "torch" else f"_{resize}"
        self.num_features = SHAPES[size].width
        self.resize = resize
        self.preparation = RESIZES[resize]
        # On the meta device the initial weights use no global random state.
        with torch.device("meta"):
            self.network = VisionTransformer(SHAPES[size])
        _load(self.network, weights_path, size)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever the `mode` of a surrounding module."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features `(B, num_features)` of uint8 images `(B, C, H, W)`; gray becomes RGB."""
        images = images.expand(-1, 3, -1, -1)
        if self.resize == "torch":
            size = (SIDE, SIDE)
            x = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
        else:
            x = pil_bicubic_rounded(images, SIDE).float()
        # The features of a training run in bfloat16 are computed in float32 too.
        with torch.autocast(images.device.type, enabled=False):
            return self.network((x / 255 - self.mean) / self.std)


def _load(network: VisionTransformer, path: str | None, size: Size) -> None:
    """Load a published file; it runs no code."""
    model = f"dinov2_vit{size[0]}14"
    file = f"{model}_pretrain.pth"
    given = f"read from {path}" if path else "downloaded"
    try:
        state: dict[str, Any] = (
            read_weights(path)
            if path
            else torch.hub.load_state_dict_from_url(
                f"{HOME}/{model}/{file}", map_location="cpu", weights_only=True
            )
        )
        state.pop("mask_token", None)  # for training alone
        network.load_state_dict({name: each.float() for name, each in state.items()}, assign=True)
    except (OSError, RuntimeError, ValueError) as error:  # URLError is an OSError
        raise MissingWeightsError(
            f"the weights of DINOv2's {size} network could not be {given} "
            f"({reason_of(error)}): download {file} from its authors, and put "
            f"it in {torch.hub.get_dir()}/checkpoints"
        ) from error
