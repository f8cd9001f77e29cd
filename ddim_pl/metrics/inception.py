"""Inception-v3 with the weights that published FIDs use."""

import pickle

from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3


class InceptionFeatures(nn.Module):
    """Pool features of Inception-v3, as in the FID of Heusel et al. 2017.

    The weights are torch-fidelity's conversion of the TensorFlow ones, loaded on the first use of
    PyTorch's hub cache; images are resized as TensorFlow 1 did, without antialiasing.

    Args:
        weights_path: File of the weights; by default they are downloaded and cached.

    Raises:
        ValueError: If the weights cannot be downloaded or read.
    """

    name = "inception"
    num_features = 2048

    def __init__(self, weights_path: str | None = None) -> None:
        super().__init__()
        try:
            self.network = NoTrainInceptionV3(
                name="inception-v3-compat",
                features_list=[str(self.num_features)],
                feature_extractor_weights_path=weights_path,
                antialias=False,
            )
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:  # URLError too
            raise ValueError(
                f"the Inception weights could not be {'read' if weights_path else 'downloaded'} "
                f"({error}): fetch weights-inception-2015-12-05-6726825d.pth from the releases "
                "of torch-fidelity where there is a network, and give its place as the "
                "weights_path of InceptionFeatures, or leave FrechetDistance out of the callbacks"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Features `(B, 2048)` of uint8 images `(B, C, H, W)`; grey images are repeated to RGB."""
        return self.network(images.expand(-1, 3, -1, -1))

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features, as `forward` gives them, and class logits `(B, 1008)` of the same pass.

        The logits are without the last layer's bias, as published Inception scores take them; this
        is what torch-fidelity calls "logits_unbiased".
        """
        features = self(images)
        return features, features @ self.network.fc.weight.T
