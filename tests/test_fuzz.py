"""Whatever lies in folders, manifests and checkpoints is read, or refused in one line."""

import io
import json
import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import some_ddpm

from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.data.teacher_pairs import PairStore
from ddim_pl.runs import checkpoint_config
from ddim_pl.training.hyperparameters import CONFIG_KEY
from ddim_pl.training.loading import load

pytestmark = pytest.mark.slow

many = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def refused_in_one_line(function):
    """Call it; whatever it raises must be an error for a user."""
    message = "nothing is wrong"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function()
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
    assert message
    assert "\n" not in message


def picture(kind, mode, size):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


pictures = st.builds(
    picture,
    st.sampled_from(["PNG", "TIFF"]),
    st.sampled_from(["1", "L", "P", "RGB", "RGBA", "I;16"]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
damaged = st.builds(lambda data, at: data[: at % len(data)], pictures, st.integers(0))
contents = st.one_of(pictures, damaged, st.binary(max_size=64))
names = st.sampled_from(["a", "b", "train", "val", ".hidden", "é", "a b"])
files = st.builds(
    lambda folders, name, ending: "/".join([*folders, name + ending]),
    st.lists(names, max_size=3),
    names,
    st.sampled_from([".png", ".PNG", ".tif", ".gif", ".jfif", ".txt", ".tga", ""]),
)
links = st.dictionaries(names, st.sampled_from(["..", ".", "a", "nowhere", "/"]), max_size=2)


@many
@given(st.dictionaries(files, contents, max_size=6), links, st.booleans())
def test_folders(tree, loops, resize):
    with tempfile.TemporaryDirectory() as place:
        root = Path(place, "root")
        root.mkdir()
        for name, data in tree.items():
            path = root / name
            if not any(each.is_file() for each in path.parents) and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        for name, target in loops.items():
            if not os.path.lexists(root / name):
                (root / name).symlink_to(target)

        def read():
            data = ImageFolderDataModule(str(root), 4, resize=resize)
            data.setup()
            indices = torch.arange(len(data.train_set))
            assert data.train_set.images(indices).shape[1:] == (3, 4, 4)
            assert (data.train_set.labels(indices) < data.num_classes).all()

        refused_in_one_line(read)


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
RECIPE = {"seed": 3, "shape": [1, 8, 8]}


@many
@given(
    st.one_of(
        st.binary(max_size=40),
        plain.map(lambda value: json.dumps(value).encode()),
        st.dictionaries(st.sampled_from([*RECIPE, "sha256", "shard_size"]), plain).map(
            lambda value: json.dumps({**RECIPE, **value}).encode()
        ),
    )
)
def test_manifests(content):
    with tempfile.TemporaryDirectory() as place:
        Path(place, "manifest.json").write_bytes(content)
        refused_in_one_line(lambda: PairStore(Path(place), RECIPE, num_pairs=4, shard_size=4))


MODEL = some_ddpm()
WHOLE = {
    "state_dict": MODEL.state_dict(),
    "hyper_parameters": dict(MODEL.hparams),
    "pytorch-lightning_version": "2.6.6",
    "epoch": 0,
    "global_step": 0,
    CONFIG_KEY: "model: {class_path: ddim_pl.training.DDPM}",
}
ARGUMENTS = sorted(WHOLE["hyper_parameters"])


def checkpoint(changes, arguments, gone):
    found = {**WHOLE, "hyper_parameters": {**WHOLE["hyper_parameters"], **arguments}, **changes}
    return {key: value for key, value in found.items() if key not in gone}


checkpoints = st.one_of(
    plain,
    st.builds(
        checkpoint,
        st.dictionaries(st.sampled_from(sorted(WHOLE)), plain, max_size=2),
        st.dictionaries(st.sampled_from(ARGUMENTS), plain, max_size=2),
        st.sets(st.sampled_from(sorted(WHOLE)), max_size=2),
    ),
)


@many
@given(checkpoints)
def test_checkpoints(content):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "a.ckpt")
        torch.save(content, path)
        refused_in_one_line(lambda: load(path))
        for command in ("fit", "sample"):
            refused_in_one_line(lambda command=command: checkpoint_config(path, command))
