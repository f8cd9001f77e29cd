"""Folders have the distances of other tools, with the same images and Inception weights."""

from importlib import import_module

import pytest
import torch
from fid_agreement import TOOLS, ours, random_weights, write_images

MODULES = {"torch-fidelity": "torch_fidelity", "pytorch-fid": "pytorch_fid.fid_score"}
MODULES |= {"clean-fid": "cleanfid.fid"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    random_weights(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.filterwarnings("ignore")
def test_the_distance_of_two_folders_is_that_of_another_tool(tmp_path, weights, name):
    try:
        import_module(MODULES[name])
    except ImportError:
        pytest.skip(f"{name} is not installed")
    resize, tool = TOOLS[name]
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        write_images(folder, 6, 24, seed)
    with torch.no_grad():
        found, expected = ours(*folders, weights, resize), tool(*folders, weights)
    # Their features are averaged in float32, and their batch norm is not folded.
    assert found == pytest.approx(expected, rel=1e-6)
