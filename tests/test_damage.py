"""Damage of any kind to any file is one line that names it, or an honest redo."""

import io
import json
import pickle
import random
import re
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ladders import save
from safetensors.torch import save_file
from tiny import some_ddpm, tiny_config, write_config

from ddim_pl.cli import main
from ddim_pl.commands.invert import _read_latents
from ddim_pl.damage import (
    DamagedError,
    check_archive,
    read_archive,
    read_sealed,
    read_tensors,
    read_weights,
    seal_of,
    sealed,
)
from ddim_pl.data.teacher_pairs import PairStore
from ddim_pl.evaluation.cells import read_cell
from ddim_pl.images import read_png, write_png
from ddim_pl.metrics.digits import DigitsFeatures
from ddim_pl.metrics.dinov2 import DINOv2Features
from ddim_pl.metrics.inception import InceptionFeatures
from ddim_pl.metrics.statistics import contents_of
from ddim_pl.runs import read_checkpoint
from ddim_pl.schedules import LinearSchedule
from ddim_pl.teachers.reading import read_source
from ddim_pl.timesteps import linear, load_levels, save_levels
from ddim_pl.training import DDPM
from ddim_pl.training.fingerprint import fingerprint, fingerprint_of_file
from ddim_pl.training.loading import load

RECIPE = {"seed": 3, "shape": [1, 8, 8], "levels": [1000, 500.5, 0]}
IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
MODEL = some_ddpm()


def pairs(folder):
    return PairStore(folder, RECIPE, num_pairs=4, shard_size=4)


def make_pairs(path):
    store = pairs(path.parent)
    store.begin()
    store.write(0, IMAGES)


def read_shard(path):
    store = pairs(path.parent)
    return store.images(torch.arange(4)) if store.is_whole(0) else None


def make_cell(path):
    path.with_suffix(".json").write_text(json.dumps(sealed({"values": {"fd": 1 / 3}}), indent=1))
    write_png((IMAGES[0] * 255).byte(), path.with_suffix(".png"))


def read_whole_cell(path):
    found = read_cell(path.with_suffix(".json"))
    return found and (found, read_png(path.with_suffix(".png")))


def make_latents(path):
    save_file({"latents": IMAGES}, path, metadata=seal_of({"latents": IMAGES}))


def state_of(model):
    return dict(model.state_dict())


SCHEDULE = LinearSchedule()
SHAPES = SimpleNamespace(image_shape=(1, 8, 8))
KINDS = {
    "checkpoint": ("a.ckpt", lambda p: save(MODEL, p), lambda p: read_checkpoint(p)["state_dict"]),
    "model": ("a.ckpt", lambda p: save(MODEL, p), lambda p: state_of(load(p))),
    "module": (
        "a.ckpt",
        lambda p: save(MODEL, p),
        lambda p: state_of(DDPM.load_from_checkpoint(p)),
    ),
    "fingerprint": (
        "a.ckpt",
        lambda p: save(MODEL, p),
        lambda p: fingerprint_of_file(MODEL, str(p)),
    ),
    "manifest": ("manifest.json", make_pairs, lambda p: pairs(p.parent).recipe),
    "shard": ("00000.safetensors", make_pairs, read_shard),
    "digest of a shard": ("00000.sha256", make_pairs, read_shard),
    "levels": (
        "a.json",
        lambda p: save_levels(p, SCHEDULE, [linear(1000, 3), linear(1000, 7)]),
        lambda p: load_levels(p, SCHEDULE, 3),
    ),
    "numbers of a cell": ("a.json", make_cell, read_whole_cell),
    "images of a cell": ("a.png", make_cell, read_whole_cell),
    "latents": ("a.safetensors", make_latents, lambda p: _read_latents(str(p), SHAPES)),
}
REDONE = {"shard", "digest of a shard", "numbers of a cell", "images of a cell"}


def flipped(data, place):
    """One bit is another: at 40 places over the file, and near both ends."""
    rng = random.Random(place)
    at = {"first": rng.randrange(min(16, len(data))), "last": len(data) - 1 - rng.randrange(16)}
    at = at.get(place, place * (len(data) - 1) // 39 if isinstance(place, int) else 0)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


DAMAGES = {
    **{f"first {n} bytes": lambda d, n=n: d[:n] for n in (0, 1, 8, 60)},
    **{f"{n} of 8 parts": lambda d, n=n: d[: len(d) * n // 8] for n in range(1, 8)},
    **{f"{n} bytes short": lambda d, n=n: d[:-n] for n in (1, 2, 20)},
    **{f"bit {n}": lambda d, n=n: flipped(d, n) for n in ("first", "last", *range(40))},
    "zeros": lambda d: bytes(len(d)),
    "zeros at the end": lambda d: d[: len(d) // 2] + bytes(len(d) - len(d) // 2),
    "text": lambda d: b"not what it was\n",
    "a list": lambda d: b"[]",
    "a number": lambda d: b"1",
    "an empty object": lambda d: b"{}",
    "deep": lambda d: b"[" * 100_000,
    "no UTF-8": lambda d: b"\xff\xfe\x00\xd8",
    "an archive": lambda d: b"PK\x05\x06" + bytes(18),
    "a picture": lambda d: b"\x89PNG\r\n\x1a\n" + bytes(30),
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) if isinstance(a, tuple) else a == b


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """A file, its bytes, how it is read, and what it says."""
    name, make, read = KINDS[request.param]
    path = tmp_path_factory.mktemp("files") / name
    make(path)
    return SimpleNamespace(
        path=path,
        data=path.read_bytes(),
        read=read,
        value=read(path),
        redone=request.param in REDONE,
    )


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_one_line_or_redone_and_never_silent(kind, damage):
    found, message = None, None
    kind.path.write_bytes(damage(kind.data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = kind.read(kind.path)
        except ValueError as error:
            message = str(error)
    kind.path.write_bytes(kind.data)
    if message is not None:
        assert not kind.redone
        assert "\n" not in message
        assert str(kind.path.parent) in message
        assert ": " in message
    else:
        # A bit that means nothing may differ, such as one of padding.
        assert (kind.redone and found is None) or same(kind.value, found)


def test_a_whole_checkpoint_beside_is_named(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(99)}}, tmp_path / "step=1.ckpt")
    data = (tmp_path / "step=1.ckpt").read_bytes()
    (tmp_path / "step=2.ckpt").write_bytes(data[:-99])
    middle = len(data) // 2
    damaged = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    (tmp_path / "last.ckpt").write_bytes(damaged)
    with pytest.raises(DamagedError, match=r"got .*last\.ckpt, .*such as .*step=1\.ckpt, which"):
        read_archive(tmp_path / "last.ckpt")
    (tmp_path / "step=1.ckpt").unlink()
    with pytest.raises(DamagedError, match=r"not match its checksum\): give another file$"):
        read_archive(tmp_path / "last.ckpt")


def test_what_is_kept_serves_one_more_reading_of_the_same_file(tmp_path):
    path, other = Path(save(MODEL, tmp_path / "a.ckpt")), tmp_path / "b.ckpt"
    kept = read_archive(path, keep=True)
    found = read_archive(path)
    assert found is kept
    assert read_archive(path) is not kept
    other.write_bytes(path.read_bytes())
    kept = read_archive(path, keep=True)
    assert read_archive(other) is not kept
    assert read_archive(path) is not kept


@pytest.mark.parametrize("read", [read_archive, check_archive])
def test_a_file_that_was_damaged_since_it_was_kept_is_noticed(tmp_path, read):
    path = Path(save(MODEL, tmp_path / "a.ckpt"))
    data = path.read_bytes()
    read_archive(path, keep=True)
    damaged = tmp_path / "b.ckpt"
    middle = len(data) // 2
    damaged.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    damaged.replace(path)
    with pytest.raises(DamagedError):
        read(path)


@pytest.mark.parametrize("command", ["sample", "test", "fit"])
def test_the_checksums_of_a_checkpoint_are_compared_once(tmp_path, command, monkeypatch):
    config = write_config(tiny_config(tmp_path, max_steps=1), tmp_path / "config.yaml")
    main(["fit", "--config", config])
    checked, testzip = [], zipfile.ZipFile.testzip

    def record(archive):
        checked.append(Path(archive.filename))
        return testzip(archive)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", record)
    last = tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    more = {"sample": ["--num_images", "1"], "fit": ["--trainer.max_steps", "2"]}
    main([command, "--ckpt_path", str(last), *more.get(command, [])])
    assert checked == [last]


def test_the_command_line_says_it_in_one_line(tmp_path):
    data = Path(save(MODEL, tmp_path / "a.ckpt")).read_bytes()
    (tmp_path / "a.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(SystemExit) as exit_info:
        main(["sample", "--ckpt_path", str(tmp_path / "a.ckpt")])
    message = str(exit_info.value.code)
    assert message.startswith("error: --ckpt_path must be a checkpoint, got ")
    assert "damaged" in message
    assert "\n" not in message


class Evil:
    def __reduce__(self):
        return (open, ("/nowhere/ran", "w"))


@pytest.mark.parametrize("make", [InceptionFeatures, DINOv2Features, DigitsFeatures])
def test_a_wrong_file_of_weights_is_a_short_error_that_names_it(tmp_path, make):
    content = {
        "picture.png": b"\x89PNG\r\n\x1a\n and so on",
        "text.pth": b"no weights",
        "empty.pth": b"",
        "picture.safetensors": b"\x89PNG\r\n\x1a\n and so on",
    }
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    other = {"of.another": torch.zeros(3), "program": torch.zeros(2)}
    torch.save(other, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": other}, tmp_path / "nested.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({0: torch.zeros(3)}, tmp_path / "numbers.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is an old form
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    whole = (tmp_path / "other.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    save_file(other, tmp_path / "other.safetensors")
    names = [*sorted(each.name for each in tmp_path.iterdir()), "nowhere.pth"]
    reasons = {}
    for name in names:
        with pytest.raises(ValueError, match=re.escape(name)) as error_info:
            make(str(tmp_path / name))
        message = str(error_info.value)
        assert str(tmp_path / name) in message
        assert len(message) < 600 + 2 * len(str(tmp_path))
        assert "weights_only" not in message
        assert "\n" not in message
        reasons[name] = message
    assert len(names) == 14
    assert "it has no weight" in reasons["other.pth"]
    assert "io.open" in reasons["evil.pth"]
    assert "its 'state_dict' is a dict in place of a tensor" in reasons["nested.pth"]
    assert "it holds a Tensor in place of tensors by name" in reasons["tensor.pth"]
    assert "a program of TorchScript" in reasons["program.pt"]


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def saved(**settings):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(100)}, buffer, **settings)
    return buffer.getvalue()


OLD = saved(_use_new_zipfile_serialization=False)
ALIEN = {
    "empty": b"",
    "word": b"hello",
    "text": b"this is text, several words\n" * 5,
    "table": b"a,b\n1,2\n",
    "page": b"<html><body>not found</body></html>",
    "zeros": bytes(100),
    "picture": b"\x89PNG\r\n\x1a\n and so on",
    "zip": zipped(a=b"x"),
    "zip of a folder": zipped(x__a=b"x", x__b=b"y"),
    "empty zip": zipped(),
    "half a zip": zipped(a=b"x" * 100)[:60],
    "half weights": saved()[:500],
    "half old weights": OLD[: len(OLD) // 2],
    "begun old weights": OLD[:40],
    "half a pickle": pickle.dumps([1, 2, "abc"])[:8],
}
READERS = {
    "x.ckpt": read_archive,
    "x.pt": read_weights,
    "x.safetensors": read_tensors,
    "x.json": read_sealed,
    "x.pth": lambda path: read_source(str(path)),
    "x.txt": lambda path: read_source(str(path)),
    "x.pkl": lambda path: read_source(str(path)),
    "x.npz": contents_of,
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_another_kind_is_told_in_words(tmp_path, name):
    """Not in those of a library, as `KeyError: 101`."""
    for kind, content in ALIEN.items():
        (tmp_path / kind).mkdir()
        path = tmp_path / kind / name
        path.write_bytes(content)
        if name == "x.npz" and kind in ("zip", "zip of a folder", "empty zip"):
            assert contents_of(path) == {}
            continue
        with pytest.raises(ValueError, match=re.escape(name)) as error_info:
            READERS[name](path)
        message = str(error_info.value).replace(str(path), "")
        assert not re.search(r"\w*Error\b|enforce|BadZip|\.cc|header|codec|such as", message), kind
        told = r"\((it|torch\.save|a part of it|'.*' does) .+\)|under 'ema', got none"
        assert re.search(told, message), message


def test_random_bytes_are_told_in_words(tmp_path):
    generator, file = random.Random(0), tmp_path / "x.pt"
    for _ in range(300):
        file.write_bytes(generator.randbytes(generator.randint(1, 30)))
        with pytest.raises(ValueError, match=r"\((it|torch.save|a part) [^:]+\)$"):
            read_weights(file)


def test_files_of_before_have_no_digest_and_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"values": {"fd": 1}}')
    assert read_sealed(tmp_path / "a.json") == {"values": {"fd": 1}}
    save_file({"latents": IMAGES}, tmp_path / "a.safetensors")
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["latents"], IMAGES)


def test_a_sealed_file_that_was_changed_is_refused_until_the_digest_is_removed(tmp_path):
    content = sealed({"steps": (1, 2), "levels": {3: [0.1]}})
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert read_sealed(path) == {"steps": [1, 2], "levels": {"3": [0.1]}}
    path.write_text(json.dumps({**content, "steps": [1, 3]}))
    with pytest.raises(DamagedError, match="does not match its sha256, which is to be removed"):
        read_sealed(path)


def test_the_fingerprint_of_a_whole_file_is_that_of_its_model(tmp_path):
    path = save(MODEL, tmp_path / "a.ckpt")
    assert fingerprint_of_file(MODEL, str(path)) == fingerprint(MODEL)
