"""Feature extraction of FID: images a second through Inception-v3 with random weights.

A stage of `gpu.py`. The images are uint8 of 32x32, as those of CIFAR-10, and are resized within.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from measuring import Bench, Row

from ddim_pl.metrics.inception import InceptionFeatures
from ddim_pl.metrics.quality import SampleQuality


def features(bench: Bench) -> None:
    """Features alone, and with the running sums of FID, as `FrechetDistance` has them."""
    batch = 2 if bench.tiny else 250 if bench.device == "cuda" else 8
    bench.case(f"32x32, batch {batch}", partial(_features, bench, batch))


@contextlib.contextmanager
def random_weights() -> Iterator[None]:
    """Inception with the weights that its layers draw, in place of a download."""
    extractor = fidelity.FeatureExtractorInceptionV3
    with (
        mock.patch.object(fidelity, "load_state_dict_from_url", return_value={}),
        mock.patch.object(extractor, "load_state_dict", return_value=None),
    ):
        yield


@torch.no_grad()
def _features(bench: Bench, batch: int) -> list[Row]:
    torch.manual_seed(0)
    with random_weights():
        quality = SampleQuality(InceptionFeatures(), ("fd",)).to(bench.device)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    contenders = {  # both without TF32, whatever the switches say
        "features, float32": partial(quality.features, images),
        "features and sums, float32": partial(quality.update, images, real=False),
    }
    return bench.in_turn(contenders, work=batch, unit="images")
