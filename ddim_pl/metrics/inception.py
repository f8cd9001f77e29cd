"""Inception-v3 with the weights that published FIDs use."""

import pickle

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3


class InceptionFeatures(nn.Module):
    """Pool features of Inception-v3, as in the FID of [FID].

    The weights are torch-fidelity's conversion of the TensorFlow ones. Images are resized as
    TensorFlow 1 did, without antialiasing.

    Args:
        weights_path: File of the weights; by default they are downloaded to PyTorch's hub cache.

    Raises:
        ValueError: If the weights cannot be downloaded or read.
    """

    name = "inception"
    num_features = 2048

    def __init__(self, weights_path: str | None = None) -> None:
        super().__init__()
        try:
            if weights_path is not None:
                # torch-fidelity would read a pickle, which may run code.
                torch.load(weights_path, map_location="cpu", weights_only=True)
            self.network = NoTrainInceptionV3(
                name="inception-v3-compat",
                features_list=[str(self.num_features)],
                feature_extractor_weights_path=weights_path,
                antialias=False,
            )
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:  # URLError too
            raise ValueError(
                f"the Inception weights could not be {'read' if weights_path else 'downloaded'} "
                f"({error}): download weights-inception-2015-12-05-6726825d.pth from the releases "
                "of torch-fidelity, and give its path as the weights_path of InceptionFeatures, "
                "or leave FrechetDistance out of the callbacks"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Return features `(B, 2048)` of uint8 images `(B, C, H, W)`; gray is repeated to RGB."""
        return self.network(images.expand(-1, 3, -1, -1))

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and class logits `(B, 1008)`.

        The logits are without the last layer's bias, as in published Inception scores: the
        "logits_unbiased" of torch-fidelity.
        """
        features = self(images)
        return features, features @ self.network.fc.weight.T
