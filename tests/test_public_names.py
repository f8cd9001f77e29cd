"""`import ddim_pl` is enough for a notebook, and costs nothing until a name is used."""

import inspect
import subprocess
import sys

import pytest
from walk import concrete_classes

import ddim_pl
from ddim_pl import timesteps
from ddim_pl.clipping import Clipping
from ddim_pl.data.base import ImageDataModule
from ddim_pl.denoiser import Denoiser
from ddim_pl.noise import Noise
from ddim_pl.samplers import Sampler
from ddim_pl.schedules import NoiseSchedule
from ddim_pl.training import DiffusionModule


@pytest.mark.parametrize(
    "base", [NoiseSchedule, Clipping, Denoiser, Noise, Sampler, DiffusionModule, ImageDataModule]
)
def test_every_class_of_a_kind_is_public(base):
    for kind in (base, *concrete_classes(base)):
        assert getattr(ddim_pl, kind.__name__) is kind


def test_every_strategy_of_levels_is_public():
    for name in timesteps.strategies():
        assert getattr(ddim_pl, name) is getattr(timesteps, name)


def test_dir_lists_the_names_and_they_are_all_there():
    assert set(dir(ddim_pl)) == set(ddim_pl.__all__)
    for name in dir(ddim_pl):
        value = getattr(ddim_pl, name)
        assert inspect.isclass(value) or callable(value) or name == "__version__"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'DDMP'"):
        _ = ddim_pl.DDMP


def test_the_import_loads_neither_torch_nor_lightning():
    code = (
        "import sys, ddim_pl; "
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules); "
        "assert len(dir(ddim_pl)) > 40"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_old_names_lead_to_what_took_their_place():
    from ddim_pl import samplers
    from ddim_pl.renamed import RENAMED

    for old, new in RENAMED.items():
        home, _, name = old.rpartition(".")
        kind = getattr(sys.modules[home], name)
        assert f"{kind.__module__}.{kind.__name__}".startswith(new.rpartition(".")[0])
        assert kind.__name__ == new.rpartition(".")[2]
    with pytest.raises(AttributeError, match="no attribute 'DDMP'"):
        _ = samplers.DDMP
