"""Features of 8x8 digits, for Fréchet distances.

Inception-v3 is made for 299x299 photographs; scikit-learn's digits are 8x8 scans. `DigitsFeatures`
is a classifier of those scans, trained by `ddim_pl.metrics.train_digits`; its features are the
activations before the last linear layer. Distances of these features cannot be compared with an
FID of Inception features.
"""

from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("digits.safetensors")
IMAGE_SHAPE = (1, 8, 8)
NUM_CLASSES = 10
NUM_FEATURES = 32

# The shipped weights classify 358 of the 360 images that `digits_split` holds out correctly.
HELDOUT_ACCURACY = 358 / 360


class DigitsClassifier(nn.Module):
    """A small convolutional classifier of 8x8 digits, without batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        # GELU has no flat half-line, so no feature dies and the features' covariance has full
        # rank: 32 on all digits, with a condition number of 365.
        self.trunk = nn.Sequential(
            nn.Conv2d(IMAGE_SHAPE[0], 24, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(24, 32, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 2 * 2, NUM_FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 10) of float images (B, 1, 8, 8) in [-1, 1]."""
        return self.head(self.trunk(images))


class DigitsFeatures(nn.Module):
    """Frozen features of digits: uint8 (B, 1, 8, 8) to float32 (B, `num_features`).

    With `num_features`, it fits torchmetrics' `FrechetInceptionDistance(feature=...)`.

    Args:
        weights: Safetensors file of the weights; by default the one shipped with this package.
    """

    name = "digits"

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.num_features = NUM_FEATURES
        # On the meta device the initial weights use no global random state.
        with torch.device("meta"):
            self.classifier = DigitsClassifier()
        self.classifier.load_state_dict(load_file(weights or WEIGHTS), assign=True)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever the `mode` of a surrounding module."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 features (B, `num_features`) of uint8 images (B, 1, 8, 8).

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
        """Return class logits (B, 10) of uint8 images (B, 1, 8, 8); errors as in `forward`."""
        return self.features_and_logits(images)[1]

    def _normalised(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be torch.uint8, 0 to 255, got {images.dtype}")
        if images.ndim != 4 or tuple(images.shape[1:]) != IMAGE_SHAPE:
            raise ValueError(
                f"images must have shape (B, 1, 8, 8), got {tuple(images.shape)}: other sizes "
                "need another extractor"
            )
        return images.to(self.classifier.head.weight.dtype) / 127.5 - 1
