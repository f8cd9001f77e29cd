"""Pickles of EDM's persistent classes are data: nothing in them is run."""

import collections
import os
import pickle

import numpy as np
import pytest
import torch
from foreign_edm import TINY, edm_weights, save_edm

from ddim_pl.teachers.persistence import (
    ALLOWED,
    Record,
    is_persistence,
    read_persistence,
)


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def written(path, content):
    path.write_bytes(pickle.dumps(content))
    return path


def test_a_pickle_becomes_records_with_their_tensors(tmp_path):
    """The source text in each of its objects would end the process."""
    weights = edm_weights(**TINY)
    path = save_edm(tmp_path / "x.pkl", TINY, weights)
    assert b"raise SystemExit" in path.read_bytes()
    assert is_persistence(path)
    content = read_persistence(path)
    assert [*content] == ["ema", "loss_fn", "augment_pipe", "dataset_kwargs"]
    outer = content["ema"]
    assert (outer.class_name, content["loss_fn"].class_name) == ("EDMPrecond", "EDMLoss")
    assert type(outer.state["_init_kwargs"]) is dict
    assert outer.state["sigma_data"] == 0.5
    model = outer.module("model")
    found = dict(model.tensors())
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert {f"model.{name}" for name in weights} == dict(outer.tensors()).keys()
    layer = model.module("map_layer0")
    assert layer.state["skip_scale"] == pytest.approx(0.5**0.5)
    assert type(layer.state["skip_scale"]) is float
    assert outer.module("nothing") is None


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_is_read_in_every_protocol(protocol, tmp_path):
    """3 is the least with bytes; Python 3.7 wrote it by default, later ones 4."""
    content = {"a": [1, 2.5, "x", None, (True, b"y")], "b": collections.OrderedDict(c={1, 2})}
    content |= {"t": torch.arange(6.0).view(2, 3).T, "p": torch.nn.Parameter(torch.ones(2))}
    content |= {"n": np.float32(0.25), "i": np.int64(-7), "f": np.bool_(True)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_persistence(tmp_path / "x.pkl")
    for name in content.keys() - {"t", "p"}:
        assert found[name] == content[name]
    assert torch.equal(found["t"], content["t"])
    assert torch.equal(found["p"], torch.ones(2))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ((os.mkdir, "{made}"), "posix.mkdir"),
        ((eval, "__import__('os').mkdir('{made}')"), "builtins.eval"),
        ((exec, "__import__('os').mkdir('{made}')"), "builtins.exec"),
        ((getattr, torch, "load"), "builtins.getattr"),
        ((torch.load, "{made}"), "torch.serialization.load"),
        ((pickle.loads, b"x"), "_pickle.loads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_pickle_would_run_is_named_and_not_run(call, name, tmp_path):
    made = tmp_path / "made"
    call = [part.format(made=made) if isinstance(part, str) else part for part in call]
    if call[0] is getattr:
        call[1] = "x"
    weights = edm_weights(**TINY)
    paths = [written(tmp_path / "alone.pkl", {"ema": Evil(*call)})]
    # Also behind all that is good.
    paths.append(save_edm(tmp_path / "last.pkl", TINY, weights, dataset_kwargs=Evil(*call)))
    for path in paths:
        with pytest.raises(ValueError, match=f"names {name}, which is refused"):
            read_persistence(path)
    assert not made.exists()


def test_a_storage_within_is_read_as_data_too(tmp_path):
    """A tensor's numbers are a file of `torch.save`, which could name things of its own."""
    made, inner = tmp_path / "made", tmp_path / "inner.pt"
    torch.save(Evil(os.mkdir, str(made)), inner, _use_new_zipfile_serialization=False)
    path = written(tmp_path / "x.pkl", Evil(torch.storage._load_from_bytes, inner.read_bytes()))
    with pytest.raises(ValueError, match=r"names posix.mkdir, which is refused"):
        read_persistence(path)
    assert not made.exists()


def tensor_of_four(path, offset, size, stride):
    """A tensor in a storage of four ones."""
    storage = torch.ones(4).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float, _internal=True)
    place = storage, offset, size, stride, False, collections.OrderedDict()
    return written(path, Evil(torch._utils._rebuild_tensor_v2, *place))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (5,), (1,)), (1, (4,), (1,)), (4, (), ()), (1000, (1,), (1,)), (0, (2, 2), (3, 2))],
)
def test_a_tensor_beyond_its_numbers_is_refused(tmp_path, offset, size, stride):
    """PyTorch would show what is in memory behind them."""
    path = tensor_of_four(tmp_path / "x.pkl", offset, size, stride)
    with pytest.raises(ValueError, match="a tensor beyond its numbers"):
        read_persistence(path)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (4,), (1,)), (3, (), ()), (1, (2, 2), (1, 1)), (0, (9,), (0,)), (4, (0, 3), (3, 1))],
)
def test_a_tensor_within_its_numbers_is_read(tmp_path, offset, size, stride):
    path = tensor_of_four(tmp_path / "x.pkl", offset, size, stride)
    assert torch.equal(read_persistence(path), torch.ones(size))


def test_numbers_of_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"names numpy.dtype\('O8'\), which is refused"):
        read_persistence(written(tmp_path / "x.pkl", np.dtype(object)))


def test_a_pickle_cannot_change_a_stand_in_for_the_next(tmp_path):
    """BUILD with slots sets attributes on whatever is on the stack, also on a function."""
    name = b"ctorch._utils\n_rebuild_parameter\n"
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02" + name + b"N}X\x01\x00\x00\x00aK\x01s\x86b.")
    assert read_persistence(path).a == 1
    path.write_bytes(b"\x80\x02" + name + b".")
    assert not hasattr(read_persistence(path), "a")
    assert not hasattr(ALLOWED["torch._utils._rebuild_parameter"], "a")
    path.write_bytes(
        b"\x80\x02ctorch.nn.modules.container\nModuleDict\nN}X\x01\x00\x00\x00aK\x01s\x86b."
    )
    with pytest.raises(ValueError, match="cannot be read as one"):
        read_persistence(path)
    assert not hasattr(Record, "a")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b"\x80\x04\x95",
        pickle.dumps({"a": 1})[:-3],
        b"\x80\x02X\x01\x00\x00\x00aQ.",
    ],
    ids=["empty", "text", "cut", "end", "persistent id"],
)
def test_damaged_files_are_refused(content, tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="it is damaged, or of another program"):
        read_persistence(path)
    assert not is_persistence(path)
