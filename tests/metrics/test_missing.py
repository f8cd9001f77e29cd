"""What helps without the weights of an extractor, for who asks for it."""

from functools import partial

import pytest
from command_runs import trainer
from tiny import tiny_ddpm

from callbacks import FrechetDistance
from ddim_pl.commands.measure import make_extractor
from ddim_pl.metrics.dinov2 import DINOv2Features
from ddim_pl.metrics.inception import InceptionFeatures

EXTRACTORS = [InceptionFeatures, DINOv2Features]


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_the_remedy_is_of_who_asks(kind, tmp_path):
    missing = str(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match=r"/checkpoints, or give its path as weights_path$"):
        kind(missing)
    with pytest.raises(ValueError, match="/checkpoints, or give its path as --weights, or anoth"):
        make_extractor(kind, missing)
    callback = FrechetDistance(partial(kind, missing))
    with pytest.raises(ValueError, match="/checkpoints, or give its path as weights_path of the"):
        callback.check_settings("test")
    with pytest.raises(ValueError, match="/checkpoints, or give other features, such as --feat"):
        trainer(tmp_path).sweep(tiny_ddpm(), features=partial(kind, missing))
