"""Features of CIFAR-10's photographs, for Fréchet distances where there are no Inception weights.

`CIFARFeatures` is a classifier of 32x32 photographs, trained by `ddim_pl.metrics.train_cifar`; its
features are the activations before the last linear layer. Distances of these features cannot be
compared with an FID of Inception features, and are never called that.
"""

import copy
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

WEIGHTS = Path(__file__).with_name("cifar.safetensors")
IMAGE_SHAPE = (3, 32, 32)
NUM_CLASSES = 10
NUM_FEATURES = 96

# The share of the 5,000 images held out by `train_cifar.cifar_split` that the shipped weights
# classify correctly.
HELDOUT_ACCURACY = 0.8928


class CIFARClassifier(nn.Module):
    """A small residual network for 32x32 photographs.

    Args:
        norm: Whether each convolution is followed by batch normalisation, as in training; without,
            that is folded into the convolutions, see `folded`.
    """

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.norm = norm
        # GELU has no flat half-line, so that no feature dies and their covariance has full rank.
        self.trunk = nn.Sequential(
            self._block(3, 32),
            self._block(32, 64, nn.MaxPool2d(2)),
            Residual(self._block(64, 64)),
            self._block(64, 128, nn.MaxPool2d(2)),
            Residual(self._block(128, 128)),
            self._block(128, 192, nn.MaxPool2d(2)),
            Residual(self._block(192, 192)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(192, NUM_FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def _block(self, in_width: int, width: int, pool: nn.Module | None = None) -> nn.Sequential:
        norm = nn.BatchNorm2d(width) if self.norm else nn.Identity()
        conv = nn.Conv2d(in_width, width, 3, padding=1, bias=not self.norm)
        return nn.Sequential(conv, norm, pool or nn.Identity(), nn.GELU())

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(B, 10)` of float images `(B, 3, 32, 32)` in [-1, 1]."""
        return self.head(self.trunk(images))


class Residual(nn.Module):
    """A block, added to its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        return h + self.block(h)


@torch.no_grad()
def folded(network: CIFARClassifier) -> CIFARClassifier:
    """The network in evaluation mode without batch normalisation: the same function."""
    plain = copy.deepcopy(network).eval()
    for block in plain.modules():
        if not isinstance(block, nn.Sequential) or not isinstance(block[0], nn.Conv2d):
            continue
        if isinstance(block[1], nn.BatchNorm2d):
            block[0] = fuse_conv_bn_eval(block[0], block[1])
            block[1] = nn.Identity()
    return plain


class CIFARFeatures(nn.Module):
    """Frozen features of photographs: uint8 (B, 3, 32, 32) to float32 (B, `num_features`).

    With `num_features`, it fits torchmetrics' `FrechetInceptionDistance(feature=...)`.

    Args:
        weights: Safetensors file of the weights; by default the one shipped with this package.
    """

    name = "cifar"

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.num_features = NUM_FEATURES
        # On the meta device the initial weights use no global random state.
        with torch.device("meta"):
            self.classifier = CIFARClassifier()
        state = {name: value.float() for name, value in load_file(weights or WEIGHTS).items()}
        self.classifier.load_state_dict(state, assign=True)
        self.classifier.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever the `mode` of a surrounding module."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 features (B, `num_features`) of uint8 images (B, 3, 32, 32).

        Raises:
            ValueError: If the images are not uint8 or not of that shape.
        """
        x = self._normalised(images)
        # The features of a training run in bfloat16 are computed in float32 too.
        with torch.autocast(images.device.type, enabled=False):
            return self.classifier.trunk(x).float()

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and class logits (B, 10), float32; errors as in `forward`."""
        features = self(images)
        with torch.autocast(images.device.type, enabled=False):
            logits = self.classifier.head(features.to(self.classifier.head.weight.dtype))
        return features, logits.float()

    def logits(self, images: Tensor) -> Tensor:
        """Return class logits (B, 10) of uint8 images (B, 3, 32, 32); errors as in `forward`."""
        return self.features_and_logits(images)[1]

    def _normalised(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be torch.uint8, 0 to 255, got {images.dtype}")
        if images.ndim != 4 or tuple(images.shape[1:]) != IMAGE_SHAPE:
            raise ValueError(
                f"images must have shape (B, 3, 32, 32), got {tuple(images.shape)}: other sizes "
                "need another extractor"
            )
        return images.to(self.classifier.head.weight.dtype) / 127.5 - 1
