"""Teachers for tests of distillation."""

import pytest
from ladders import save
from luhman_runs import saved
from tiny import some_ddpm, tiny_unet

from ddim_pl.schedules import CosineLogSNRSchedule


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    module = some_ddpm(network=tiny_unet(num_classes=10))
    return saved(module, folder / "teacher.ckpt"), module


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Checkpoint of a v-teacher on the cosine schedule."""
    module = some_ddpm(
        schedule=CosineLogSNRSchedule(),
        network=tiny_unet(dropout=0.1),
        prediction="v",
        loss_weight="snr_plus_one",
        time_input="log_snr",
        clip=False,
    )
    return save(module, tmp_path_factory.mktemp("teacher") / "v.ckpt")


@pytest.fixture(scope="module")
def eps_teacher(tmp_path_factory):
    return save(some_ddpm(), tmp_path_factory.mktemp("teacher") / "eps.ckpt")
