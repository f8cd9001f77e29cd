"""Features of 8x8 digits, for Fréchet distances.

Inception-v3 is made for 299x299 photographs; scikit-learn's digits are 8x8 scans. `DigitsFeatures`
is a classifier of those scans, trained by `ddim_pl.metrics.train_digits`; its features are the
activations before the last linear layer. Distances of these features cannot be compared with an
FID of Inception features.
"""

from pathlib import Path

from torch import nn

from ddim_pl.metrics.classifier import Classifier, ClassifierFeatures

WEIGHTS = Path(__file__).with_name("digits.safetensors")
IMAGE_SHAPE = (1, 8, 8)
NUM_CLASSES = 10
NUM_FEATURES = 32

# The shipped weights classify 358 of the 360 images that `digits_split` holds out correctly.
HELDOUT_ACCURACY = 358 / 360


class DigitsClassifier(Classifier):
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


class DigitsFeatures(ClassifierFeatures):
    """Frozen features of digits: uint8 (B, 1, 8, 8) to float32 (B, 32)."""

    name = "digits"
    image_shape = IMAGE_SHAPE
    shipped = WEIGHTS
    make_classifier = DigitsClassifier
