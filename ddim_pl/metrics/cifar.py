"""Features of CIFAR-10's photographs, for Fréchet distances where there are no Inception weights.

`CIFARFeatures` is a classifier of 32x32 photographs, trained by `ddim_pl.metrics.train_cifar`; its
features are the activations before the last linear layer. Distances of these features cannot be
compared with an FID of Inception features, and are never called that.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from ddim_pl.metrics.classifier import Classifier, ClassifierFeatures

WEIGHTS = Path(__file__).with_name("cifar.safetensors")
IMAGE_SHAPE = (3, 32, 32)
NUM_CLASSES = 10
NUM_FEATURES = 96

# The share of the 5,000 images held out by `train_cifar.cifar_split` that the shipped weights
# classify correctly.
HELDOUT_ACCURACY = 0.8928


class CIFARClassifier(Classifier):
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
        if not isinstance(block, nn.Sequential):
            continue
        conv, norm = block[0], block[1]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            block[0], block[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return plain


class CIFARFeatures(ClassifierFeatures):
    """Frozen features of photographs: uint8 (B, 3, 32, 32) to float32 (B, 96)."""

    name = "cifar"
    image_shape = IMAGE_SHAPE
    shipped = WEIGHTS
    make_classifier = CIFARClassifier

    def __init__(self, weights: str | None = None) -> None:
        super().__init__(weights)
        self.classifier.to(memory_format=torch.channels_last)
