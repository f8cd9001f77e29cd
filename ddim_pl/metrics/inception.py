"""Inception-v3 with the weights that published FIDs use, and the three ways to resize for it."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d
from torchmetrics.image.fid import NoTrainInceptionV3

from ddim_pl.checks import check_one_of
from ddim_pl.damage import read_weights, reason_of
from ddim_pl.metrics.missing import MissingWeightsError
from ddim_pl.metrics.resizing import pil_bicubic

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""The file, whose name among pytorch-fid's is pt_inception-2015-12-05-6726825d.pth."""

SIDE = 299

Resize = Literal["tensorflow", "pytorch", "clean"]
RESIZES = {
    "tensorflow": "bilinear to 299x299 as TensorFlow 1, without antialiasing; (x - 128) / 128",
    "pytorch": "bilinear to 299x299 as pytorch-fid, without antialiasing; x / 127.5 - 1",
    "clean": "bicubic to 299x299 by PIL in float32, antialiased, as clean-fid; (x - 128) / 128",
}
"""What each does with pixels from 0 to 255."""


class InceptionFeatures(nn.Module):
    """Pool features of Inception-v3, as in the FID of [FID].

    The weights are torch-fidelity's conversion of the TensorFlow ones; pytorch-fid's file of them
    is read as well. Batch normalisation is folded into the convolutions, in float64, which moves
    features by float32's rounding.

    Distances of another `resize` are other numbers: the extractor is called "inception" with
    TensorFlow's, else "inception_pytorch" or "inception_clean".

    Args:
        weights_path: File of the weights; by default they are downloaded to PyTorch's hub cache.
        resize: How images become 299x299 pixels. "tensorflow" as in the FID of [FID], EDM,
            guided-diffusion and torch-fidelity, "pytorch" as in pytorch-fid, "clean" as in
            clean-fid ([CleanFID]), slower, on the CPU.

    Raises:
        MissingWeightsError: If the weights cannot be downloaded or read.
        ValueError: If `resize` is unknown.
    """

    name = "inception"
    num_features = 2048

    def __init__(self, weights_path: str | None = None, *, resize: Resize = "tensorflow") -> None:
        super().__init__()
        check_one_of(Resize, resize=resize)
        self.name = "inception" if resize == "tensorflow" else f"inception_{resize}"
        self.resize = resize
        self.preparation = RESIZES[resize]
        try:
            with _safe(weights_path) as path:
                self.network = NoTrainInceptionV3(
                    name="inception-v3-compat",
                    features_list=[str(self.num_features)],
                    feature_extractor_weights_path=path,
                    antialias=False,
                )
        except (OSError, RuntimeError, ValueError) as error:  # URLError is an OSError
            raise MissingWeightsError(_no_weights(weights_path, error)) from error
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
            images = images.expand(-1, 3, -1, -1)
            return self.network(images) if self.resize == "tensorflow" else self._resized(images)

    def _resized(self, images: Tensor) -> Tensor:
        """Features of images that the network itself does not resize."""
        if self.resize == "pytorch":
            x = F.interpolate(images.float() / 255, (SIDE, SIDE), mode="bilinear")
            x = 2 * x - 1
        else:
            x = (pil_bicubic(images, SIDE) - 128) / 128
        *layers, _ = self.network.children()  # in their order, the classifier last
        for layer in layers:
            x = layer(x)
        return x.flatten(1)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and class logits `(B, 1008)`.

        The logits are without the last layer's bias, as in published Inception scores: the
        "logits_unbiased" of torch-fidelity.
        """
        features = self(images)
        return features, features @ self.network.fc.weight.T


@contextmanager
def _safe(path: str | None) -> Iterator[str | None]:
    """A file of the tensors of a given one alone: torch-fidelity's reading may run its code."""
    if path is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "weights.pth")
        torch.save(read_weights(path), copy)
        yield str(copy)


def _no_weights(given: str | None, error: Exception) -> str:
    what = f"read from {given}" if given else "downloaded"
    return (
        f"the Inception weights could not be {what} ({reason_of(error)}): "
        f"download {WEIGHTS} from the releases of torch-fidelity, and put it in "
        f"{torch.hub.get_dir()}/checkpoints"
    )


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
