"""Inception-v3 with the weights that published FIDs use."""

import pickle
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d
from torchmetrics.image.fid import NoTrainInceptionV3


class InceptionFeatures(nn.Module):
    """Pool features of Inception-v3, as in the FID of [FID].

    The weights are torch-fidelity's conversion of the TensorFlow ones. Images are resized as
    TensorFlow 1 did, without antialiasing. Batch normalisation is folded into the convolutions,
    in float64, which moves features by float32's rounding.

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
        fold(self.network)
        self._order()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._order()
        return self

    def _order(self) -> None:
        """Lay the weights out as the device's convolutions like them.

        Channels last takes two thirds of the time on a CPU. On a GPU that is made for 16 bits.
        """
        on_cpu = self.network.fc.weight.device.type == "cpu"
        order = torch.channels_last if on_cpu else torch.contiguous_format
        self.network.to(memory_format=order)

    def forward(self, images: Tensor) -> Tensor:
        """Return features `(B, 2048)` of uint8 images `(B, C, H, W)`; gray is repeated to RGB."""
        # The features of a training run in bfloat16 are computed in float32 too.
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images.expand(-1, 3, -1, -1))

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and class logits `(B, 1008)`.

        The logits are without the last layer's bias, as in published Inception scores: the
        "logits_unbiased" of torch-fidelity.
        """
        features = self(images)
        return features, features @ self.network.fc.weight.T


@torch.no_grad()
def fold(network: nn.Module) -> None:
    """Scale each convolution by the batch normalisation behind it, which then does nothing.

    Computed in float64 and rounded once.

    Args:
        network: Changed in place; its blocks are torch-fidelity's `BasicConv2d`.
    """
    for block in network.modules():
        if isinstance(block, BasicConv2d):
            dtype = block.conv.weight.dtype
            folded = fuse_conv_bn_eval(block.conv.double().eval(), block.bn.double().eval())
            block.conv, block.bn = folded.to(dtype).requires_grad_(False), nn.Identity()
