"""Features of a small classifier that this package ships, for Fréchet distances."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ddim_pl.damage import read_weights, reason_of


class Classifier(nn.Module):
    """A network in two parts, which subclasses make: images to features, features to logits."""

    trunk: nn.Sequential
    head: nn.Linear

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(B, classes)` of float images `(B, C, H, W)` in [-1, 1]."""
        return self.head(self.trunk(images))


class ClassifierFeatures(nn.Module):
    """Frozen features of a classifier: uint8 (B, C, H, W) to float32 (B, `num_features`).

    The features are the activations before the last linear layer. With `num_features`, it fits
    torchmetrics' `FrechetInceptionDistance(feature=...)`. Subclasses say which classifier.

    Args:
        weights: File of the weights; by default the one shipped with this package.

    Attributes:
        num_features: Number of features.

    Raises:
        ValueError: If the file cannot be read, or is of another classifier.
    """

    name: str
    image_shape: ClassVar[tuple[int, int, int]]
    shipped: ClassVar[Path]
    make_classifier: ClassVar[Callable[[], Classifier]]

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        # On the meta device the initial weights use no global random state.
        with torch.device("meta"):
            self.classifier = type(self).make_classifier()
        try:
            state = read_weights(weights or self.shipped)
            plain = {name: value.float() for name, value in state.items()}
            self.classifier.load_state_dict(plain, assign=True)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"weights must be a file of those of {type(self).__name__}, got {weights} "
                f"({reason_of(error)}): give another, or leave them out"
            ) from error
        self.num_features = self.classifier.head.in_features
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever the `mode` of a surrounding module."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 features (B, `num_features`) of uint8 images (B, C, H, W).

        Raises:
            ValueError: If the images are not uint8 or not of `image_shape`.
        """
        x = self._normalised(images)
        # The features of a training run in bfloat16 are computed in float32 too.
        with torch.autocast(images.device.type, enabled=False):
            return self.classifier.trunk(x).float()

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and class logits (B, classes), float32; errors as in `forward`."""
        features = self(images)
        with torch.autocast(images.device.type, enabled=False):
            logits = self.classifier.head(features.to(self.classifier.head.weight.dtype))
        return features, logits.float()

    def logits(self, images: Tensor) -> Tensor:
        """Return class logits (B, classes) of uint8 images; errors as in `forward`."""
        return self.features_and_logits(images)[1]

    def _normalised(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be torch.uint8, 0 to 255, got {images.dtype}")
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            shape = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"images must have shape (B, {shape}), got {tuple(images.shape)}: other sizes "
                "need another extractor"
            )
        return images.to(self.classifier.head.weight.dtype) / 127.5 - 1
