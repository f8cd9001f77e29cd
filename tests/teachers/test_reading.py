"""A source is told by looking at it, and no code in it is run."""

import os
import pickle

import pytest
import torch
from foreign import ddim_weights, random_unet, save_pipeline
from foreign_edm import TINY, edm_weights, save_edm

from ddim_pl.teachers.reading import read_source


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_folders_and_files_are_told_apart(tmp_path):
    folder = save_pipeline(tmp_path / "pipeline", random_unet())
    assert read_source(str(folder)).network.in_channels == 1
    torch.save(ddim_weights(), tmp_path / "model-790000.ckpt")
    assert read_source(str(tmp_path / "model-790000.ckpt")).network.in_channels == 3
    # As PyTorch saved it when the published files were made.
    before = tmp_path / "ckpt.pth"
    torch.save([ddim_weights(), {}, 0, 1], before, _use_new_zipfile_serialization=False)
    teacher = read_source(str(before), str(folder / "scheduler"), image_size=32)
    assert teacher.settings["num_steps"] == 50


@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_pickle_would_run_is_named_and_not_run(zipped, tmp_path):
    path, made = tmp_path / "ckpt.pth", tmp_path / "made"
    content = [ddim_weights(), Evil(str(made))]
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"names posix.mkdir, which is refused"):
        read_source(str(path))
    folder = save_pipeline(tmp_path / "pipeline", random_unet())
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    path.rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"names posix.mkdir, which is refused"):
        read_source(str(folder))
    assert not made.exists()


def test_pickles_of_edm_are_told_by_their_beginning_and_not_run(tmp_path):
    save_edm(tmp_path / "network-snapshot-000000.pkl", TINY, edm_weights(**TINY))
    path = tmp_path / "renamed"
    (tmp_path / "network-snapshot-000000.pkl").rename(path)
    teacher = read_source(str(path))
    assert teacher.settings["prediction"] == "edm"
    for name, value in {"image_size": 8, "scheduler": "x.json"}.items():
        with pytest.raises(ValueError, match=f"{name} must be left out for a pickle of EDM"):
            read_source(str(path), **{name: value})
    path, made = tmp_path / "other.pkl", tmp_path / "made"
    path.write_bytes(pickle.dumps({"ema": Evil(str(made))}))
    with pytest.raises(ValueError, match=r"names posix.mkdir, which is refused"):
        read_source(str(path))
    assert not made.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}, "hyper_parameters": {}}, "a checkpoint already"),
        ({"time_embedding.linear_1.weight": torch.zeros(1)}, "give the folder that it lies in"),
        ({"a": torch.zeros(1)}, "of another program"),
        (3, "of another program"),
        ([3], "must hold the weights of a Model"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        read_source(str(tmp_path / "x.pt"))


def test_damaged_files_are_refused(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"not a file of weights")
    with pytest.raises(ValueError, match="it is damaged, or of another program"):
        read_source(str(tmp_path / "x.pth"))


def test_a_place_where_nothing_is(tmp_path):
    with pytest.raises(ValueError, match="must be a folder, a file or a name on the Hugging Face"):
        read_source(str(tmp_path / "nothing"))
