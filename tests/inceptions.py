"""Random weights of Inception-v3 in the format of the real ones, which tests cannot download."""

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from torch import nn
from torchmetrics.image.fid import NoTrainInceptionV3


def random_inception(*features):
    """torch-fidelity's network, whose activations neither vanish nor explode."""
    with pytest.MonkeyPatch.context() as patch:
        network = fidelity.FeatureExtractorInceptionV3
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(network, "load_state_dict", lambda *_, **__: None)
        theirs = NoTrainInceptionV3("inception-v3-compat", list(features))
    theirs.use_antialias = False
    generator = torch.Generator().manual_seed(0)
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.running_var):
                values.uniform_(0.5, 1.5, generator=generator)
            for values in (module.bias, module.running_mean):
                values.normal_(std=0.3, generator=generator)
    return theirs
