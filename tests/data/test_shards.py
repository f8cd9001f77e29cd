"""Shards as the script in docs/data.md writes them."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.inference import check_loads_in_inference_mode
from data.test_base import Recorder, make_trainer, saved_at_with, with_ranks
from ddim_pl.data.shards import ShardDataModule

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
SIZE, COUNT, PER_SHARD = 8, 42, 5
CLASSES = ["bat", "cat", "cow"]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in classes, `images`, and the same in nine shards, `shards`."""
    pytest.importorskip("litdata")
    root = tmp_path_factory.mktemp("written")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        folder = root / "images" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (script,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
        if "litdata" in block
    )
    assert 'chunk_bytes="64MB", num_workers=4' in script
    small = f"chunk_size={PER_SHARD}, num_workers=1"
    script = script.replace('chunk_bytes="64MB", num_workers=4', small)
    (root / "write_shards.py").write_text(script)
    command = [sys.executable, "write_shards.py", "images", "shards"]
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=500)
    return root


@pytest.fixture
def shards(written: Path, tmp_path: Path) -> Path:
    """A copy."""
    return shutil.copytree(written / "shards", tmp_path / "shards")


def module(root: Path, **arguments: Any) -> ShardDataModule:
    given: dict[str, Any] = {"num_classes": 3, "shuffle_shards": 2, "batch_size": 4, "flip": True}
    return ShardDataModule(str(root), SIZE, **given | arguments)


def ready(root: Path, **arguments: Any) -> ShardDataModule:
    data = module(root, **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def change(root: Path, **config: Any) -> None:
    content = json.loads((root / "index.json").read_text())
    content["config"].update(config)
    (root / "index.json").write_text(json.dumps(content))


def batches(data: ShardDataModule, count: int) -> list[Any]:
    source: Any = data.train_dataloader()
    return [source.dataset[source.sampler.batch(number)] for number in range(count)]


def test_images_and_labels_are_those_of_the_files(written: Path) -> None:
    before = sorted(path.name for path in (written / "shards").iterdir())
    data = ready(written / "shards")
    assert (data.shape, data.num_classes, len(data.train_set)) == ((3, SIZE, SIZE), 3, COUNT)
    assert len(before) == 1 + -(-COUNT // PER_SHARD)
    expected = {}
    for path in (written / "images").rglob("*.png"):
        pixels = np.array(Image.open(path)).transpose(2, 0, 1)
        expected[pixels.tobytes()] = CLASSES.index(path.parent.name)
    # Not in order, and one twice.
    indices = torch.cat([torch.randperm(COUNT), torch.tensor([3])])
    images, labels = data.train_set.images(indices), data.train_set.labels(indices)
    assert [expected[image.numpy().tobytes()] for image in images] == labels.tolist()
    assert len(images.unique(dim=0)) == COUNT
    # Labels that are asked for before the images, and of others than the latest.
    torch.testing.assert_close(data.train_set.labels(indices[:7]), labels[:7])
    torch.testing.assert_close(data.train_set.images(indices[5:9]), images[5:9])
    assert data.val_set is data.train_set
    assert sorted(path.name for path in (written / "shards").iterdir()) == before


def test_without_num_classes_all_are_of_one_class(written: Path) -> None:
    data = ready(written / "shards", num_classes=None, val_root=str(written / "shards"))
    assert data.num_classes == 1
    assert not data.train_set.labels(torch.arange(COUNT)).any()
    assert len(data.val_set) == COUNT


@pytest.mark.parametrize("num_workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(written: Path, num_workers: int) -> None:
    alone = ready(written / "shards")
    helped = ready(written / "shards", num_workers=num_workers)
    seen = list(helped.train_dataloader())
    for one, two in zip(alone.train_dataloader(), seen, strict=True):
        torch.testing.assert_close(one, two)
    for one, two in zip(batches(alone, 10), seen, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("world_size", [2, 4])
def test_devices_share_the_batch_of_one(written: Path, world_size: int) -> None:
    whole = batches(ready(written / "shards", batch_size=8), 12)
    parts = [
        batches(
            with_ranks(module(written / "shards", batch_size=8 // world_size), rank, world_size),
            12,
        )
        for rank in range(world_size)
    ]
    for number, batch in enumerate(whole):
        for field in (0, 1):
            shares = torch.stack([part[number][field] for part in parts], 1).flatten(0, 1)
            torch.testing.assert_close(shares, batch[field])


def share_of_a_device(rank: int, root: str, rendezvous: str, found: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    data = with_ranks(module(Path(root), batch_size=2), rank, 2)
    # One device reads more than the other, as the first does for a picture.
    torch.save(batches(data, 3 + 2 * rank), Path(found, f"{rank}.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_batch_of_one(written: Path, tmp_path: Path) -> None:
    arguments = (str(written / "shards"), str(tmp_path / "rendezvous"), str(tmp_path))
    torch.multiprocessing.start_processes(share_of_a_device, arguments, 2, start_method="fork")
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for number, batch in enumerate(batches(ready(written / "shards"), 3)):
        for field in (0, 1):
            shares = torch.stack([part[number][field] for part in parts], 1).flatten(0, 1)
            torch.testing.assert_close(shares, batch[field])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("step", [7, 10, 13])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(
    tmp_path: Path, written: Path, step: int, num_workers: int
) -> None:
    whole = Recorder()
    make_trainer(tmp_path, max_steps=18).fit(whole, datamodule=module(written / "shards"))
    path = saved_at_with(tmp_path, step, module(written / "shards", num_workers=num_workers))
    resumed = Recorder()
    data = module(written / "shards", num_workers=2 - num_workers)
    make_trainer(tmp_path, max_steps=18).fit(resumed, datamodule=data, ckpt_path=path)
    assert len(set(whole.seen)) == 18
    assert resumed.seen == whole.seen[step:]


@pytest.mark.parametrize("shuffle_shards", [1, 2, 4, 100])
def test_a_pass_has_each_image_once_and_mixes_some_shards_at_a_time(
    written: Path, shuffle_shards: int
) -> None:
    images: Any = ready(written / "shards", shuffle_shards=shuffle_shards).train_set
    passes = [images.shuffled(torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert not torch.equal(*passes)
    for order in passes:
        assert sorted(order.tolist()) == list(range(COUNT))
        found = (order // PER_SHARD).tolist()
        while found:
            group = set(found[: PER_SHARD * min(shuffle_shards, 9) - 4])
            length = next((n for n, shard in enumerate(found) if shard not in group), len(found))
            assert sorted(found[:length]) == sorted(
                shard for shard in group for _ in range(2 if shard == 8 else PER_SHARD)
            )
            assert len(group) <= shuffle_shards
            found = found[length:]


def test_shards_are_read_in_a_process_that_is_not_forked(written: Path) -> None:
    images = ready(written / "shards").train_set
    copy = pickle.loads(pickle.dumps(images))
    some = torch.tensor([40, 3])
    torch.testing.assert_close(copy.images(some), images.images(some))
    assert copy.digest() == images.digest()
    assert copy.digest() != ready(written / "shards", crop_first=True).train_set.digest()


def test_a_missing_or_short_shard_is_named(shards: Path) -> None:
    shard = next(shards.glob("*.bin"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    message = rf"{shard.name} must have {len(content)} bytes, got {len(content) - 1}: copy"
    with pytest.raises(ValueError, match=message):
        ready(shards)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} must have .* got no file: copy the sh"):
        ready(shards)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"config": {}, "chunks": []}'])
def test_a_folder_without_an_index_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"root must be a folder of shards with litdata's index"):
        ready(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data_format": ["jpeg", "int"]}, r"'image' of the type bytes, got jpeg: write the byt"),
        ({"data_format": ["bytes", "pickle"]}, r"'label' of the type int, got pickle: .*leave nu"),
        ({"compression": "zstd"}, r"must be without compression, got 'zstd'"),
        ({"format": "mds"}, r"must be without format, got 'mds'"),
        ({"data_spec": '[1, {"type": "collections.namedtuple"}]'}, r"are no dicts of plain val"),
        ({"item_loader": "TokensLoader"}, r"must be of litdata's PyTreeLoader, got 'TokensLoad"),
    ],
)
def test_other_samples_are_refused(shards: Path, config: Any, message: str) -> None:
    change(shards, **config)
    with pytest.raises(ValueError, match=message) as caught:
        ready(shards)
    assert "index.json" in str(caught.value)


def test_nothing_is_unpickled(shards: Path) -> None:
    change(shards, data_format=["bytes", "pickle"])
    with pytest.raises(ValueError, match=r"got 'label' of the type pickle, which could run code"):
        ready(shards, num_classes=None)


class Touch:
    """What runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_name_that_stands_twice_hides_no_pickle(shards: Path, tmp_path: Path) -> None:
    """One that would be read before the value of the same name takes its place."""
    shard, mark = shards / "chunk-0-0.bin", tmp_path / "mark"
    pickled, image = pickle.dumps(Touch(mark)), (b"image", (1).to_bytes(8, "little"))
    values = (pickled, *image)
    sizes = b"".join(len(value).to_bytes(4, "little") for value in values)
    item = sizes + b"".join(values)
    offsets = b"".join((12 + at).to_bytes(4, "little") for at in (0, len(item)))
    shard.write_bytes((1).to_bytes(4, "little") + offsets + item)
    content = json.loads((shards / "index.json").read_text())
    content["chunks"] = [
        {"chunk_bytes": shard.stat().st_size, "chunk_size": 1, "filename": shard.name, "dim": None}
    ]
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    tree = {"type": "builtins.dict", "context": '["image", "image", "label"]'}
    tree |= {"children_spec": [leaf] * 3}
    content["config"]["data_spec"] = json.dumps([1, tree])
    content["config"]["data_format"] = ["pickle", "bytes", "int"]
    (shards / "index.json").write_text(json.dumps(content))

    import litdata

    litdata.StreamingDataset(str(shards))[0]
    assert mark.exists()  # it is dangerous
    mark.unlink()
    with pytest.raises(ValueError, match=r"root must be a folder of shards .*a name twice"):
        ready(shards, num_classes=None)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (
            {"filename": "../chunk-0-0.bin"},
            r"must name files beside it, got '\.\./chunk-0-0\.bin'",
        ),
        ({"chunk_size": 2**70}, "root must be a folder of shards"),
        ({"chunk_size": -1000}, "root must be a folder of shards .*negative"),
    ],
)
def test_what_an_index_may_not_say(shards: Path, chunk: Any, message: str) -> None:
    content = json.loads((shards / "index.json").read_text())
    content["chunks"][0] |= chunk
    (shards / "index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        ready(shards)


@pytest.mark.parametrize("name", ["a.parquet", "{%Y}", "local:a"])
def test_any_name_of_a_folder_is_a_folder(shards: Path, name: str) -> None:
    shards.rename(shards.with_name(name))
    assert len(ready(shards.with_name(name)).train_set) == COUNT


def test_a_label_beyond_the_classes_is_named_with_its_place(written: Path) -> None:
    data = ready(written / "shards")
    first = int(data.train_set.labels(torch.arange(COUNT)).argmax())
    place = rf"chunk-0-{first // PER_SHARD}\.bin, image {first % PER_SHARD}"
    with pytest.raises(ValueError, match=f"{place} must have a label below num_classes 2, got 2"):
        ready(written / "shards", num_classes=2).train_set.images(torch.arange(COUNT))


def test_a_broken_image_is_named_with_its_place(shards: Path) -> None:
    data = ready(shards)
    shard = shards / "chunk-0-3.bin"
    content = bytearray(shard.read_bytes())
    start = [found.start() for found in re.finditer(rb"\x89PNG", bytes(content))][2]
    content[start : start + 8] = bytes(8)
    shard.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"chunk-0-3\.bin, image 2 cannot be read"):
        data.train_set.images(torch.arange(COUNT))


def test_without_litdata_the_error_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "litdata", None)
    (tmp_path / "chunk-0-0.bin").write_bytes(b"1234")
    leaf = {"type": None}
    tree = {"type": "builtins.dict", "context": '["image"]', "children_spec": [leaf]}
    config = {"data_format": ["bytes"], "data_spec": json.dumps([1, tree])}
    chunk = {"filename": "chunk-0-0.bin", "chunk_bytes": 4, "chunk_size": 1}
    content = json.dumps({"config": config, "chunks": [chunk]})
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"pip install 'ddim_pl\[litdata\]'"):
        ready(tmp_path, num_classes=None)


@pytest.mark.parametrize("name", ["num_classes", "shuffle_shards", "image_size"])
def test_numbers_out_of_range_are_refused(name: str) -> None:
    arguments: dict[str, Any] = {"image_size": 8, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ShardDataModule("anywhere", **arguments)


def test_a_command_loads_images_in_its_inference_mode(written: Path) -> None:
    check_loads_in_inference_mode(lambda: module(written / "shards"))
