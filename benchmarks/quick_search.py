"""Which small network learns CIFAR-10 best for the same work?

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/quick_search.py ROOT [--images 40000]

ROOT is a folder of the training images with a subfolder for each class. A candidate is
configs/cifar10/quick.yaml with some settings changed from the first guess, `BASE`. First all
candidates make updates in turn, which gives the CPU time of an image in units of that guess's.
Then each trains on as many images as cost what `--images` cost it; last come the loss of its
average on 1,280 images and the cifar_fd of 1,000 images by 16 steps of DPM-Solver++. What is
measured goes to `runs/quick-search/search.json` and `search.md`; called again, the script goes on.
Without
`search.json`, but with the weights beside it, it measures again what is trained.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from measuring import ROOT as PROJECT
from measuring import machine, quieten, table
from subjects import build
from torch.optim import Adam

import callbacks
from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.files import replacing
from ddim_pl.metrics.cifar import CIFARFeatures
from ddim_pl.training import DDPM

OUT = Path("runs/quick-search")
BASE = "64 channels, multipliers [1, 2, 4]"
FIRST = {"channels": 64, "multipliers": [1, 2, 4], "groups": 16}
ROUNDS = 7
Changes = dict[str, Any]
# Changes of the network, and of rate, batch and schedule.
CANDIDATES: dict[str, tuple[Changes, Changes]] = {
    BASE: ({}, {}),
    "rate 4e-4": ({}, {"lr": 4e-4}),
    "rate 2e-3": ({}, {"lr": 2e-3}),
    "batch 32": ({}, {"batch_size": 32}),
    "batch 128": ({}, {"batch_size": 128}),
    "multipliers [1, 2, 2]": ({"multipliers": [1, 2, 2]}, {}),
    "two blocks, multipliers [1, 2, 2]": ({"multipliers": [1, 2, 2], "num_blocks": 2}, {}),
    "96 channels, multipliers [1, 2, 2]": (
        {"channels": 96, "multipliers": [1, 2, 2], "groups": 32},
        {},
    ),
    "80 channels, multipliers [1, 2, 2], as in quick.yaml": (
        {"channels": 80, "multipliers": [1, 2, 2]},
        {},
    ),
    "pixels, not patches; 32 channels, multipliers [1, 2, 4, 4]": (
        {"patch_size": 1, "channels": 32, "multipliers": [1, 2, 4, 4]},
        {},
    ),
}


class Candidate:
    """A model with changed settings, and how to train it.

    Args:
        name: One of `CANDIDATES`.
    """

    def __init__(self, name: str) -> None:
        config = yaml.safe_load((PROJECT / "configs/cifar10/quick.yaml").read_text())
        of_network, of_training = CANDIDATES[name]
        given = copy.deepcopy(config["model"])
        arguments = given["init_args"]
        arguments["network"]["init_args"] |= FIRST | of_network
        rate = of_training.get("lr", arguments.pop("optimizer")["init_args"]["lr"])
        arguments.pop("optimizer", None)
        L.seed_everything(0)
        self.model: DDPM = build(given)
        self.model.optimizer = partial(Adam, lr=rate)
        self.batch_size = of_training.get("batch_size", config["data"]["init_args"]["batch_size"])
        self.trainer = config["trainer"]

    def fit(self, data: ImageFolderDataModule, updates: int) -> float:
        """Train, and return the CPU seconds."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = L.Trainer(
                accelerator="cpu",
                devices=1,
                precision=self.trainer["precision"],
                gradient_clip_val=self.trainer["gradient_clip_val"],
                max_steps=updates,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
                num_sanity_val_steps=0,
                default_root_dir=folder,
            )
            begin = time.process_time()
            trainer.fit(self.model, data)
            return time.process_time() - begin

    def measured(self, data: ImageFolderDataModule) -> dict[str, float]:
        """Loss and distance of the average."""
        fd = callbacks.FrechetDistance(CIFARFeatures, num_samples=1000, batch_size=250)
        with tempfile.TemporaryDirectory() as folder:
            test = L.Trainer(
                accelerator="cpu",
                devices=1,
                callbacks=[fd],
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_test_batches=1280 // self.batch_size,
                default_root_dir=folder,
            )
            return dict(test.test(self.model, data, verbose=False)[0])


def costs(root: str) -> dict[str, float]:
    """CPU time of an image in units of the base's, from updates in turn."""
    candidates = {name: Candidate(name) for name in CANDIDATES}
    images = {size: data_of(root, size) for size in {c.batch_size for c in candidates.values()}}
    ratios: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for index in range(ROUNDS + 1):
        found = {}
        for name, candidate in candidates.items():
            updates = 256 // candidate.batch_size
            found[name] = candidate.fit(images[candidate.batch_size], updates)
        if index:  # the first round warms up
            for name, seconds in found.items():
                ratios[name].append(seconds / found[BASE])
    return {name: statistics.median(each) for name, each in ratios.items()}


def data_of(root: str, batch_size: int) -> ImageFolderDataModule:
    """All training images, mirrored at random."""
    return ImageFolderDataModule(root, 32, batch_size=batch_size, flip=True)


def trained(name: str, root: str, images: int, cost: float) -> dict[str, Any]:
    """Train a candidate on its share of images, unless its weights are there, and measure it."""
    candidate = Candidate(name)
    data = data_of(root, candidate.batch_size)
    updates = round(images / cost / candidate.batch_size)
    file = OUT / f"{list(CANDIDATES).index(name)}-{updates}-updates.ckpt"
    average = candidate.model.average.module
    if file.exists():
        average.load_state_dict(torch.load(file, weights_only=True))
    else:
        candidate.fit(data, updates)
        with replacing(file) as part:
            torch.save(average.state_dict(), part)
    found = candidate.measured(data)
    parameters = sum(p.numel() for p in candidate.model.network.parameters())
    return {
        "candidate": name,
        "parameters, M": round(parameters / 1e6, 1),
        "cost of an image": round(cost, 2),
        "images": updates * candidate.batch_size,
        "loss": round(found["test/loss"], 4),
        "cifar_fd of 1,000": round(found["test/cifar_fd"], 2),
        "budget": images,
    }


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root")
    parser.add_argument("--images", type=int, default=40_000)
    options = parser.parse_args()
    quieten()
    OUT.mkdir(parents=True, exist_ok=True)
    rows = kept("search.json", list)
    cost = kept("costs.json", dict) or keep("costs.json", costs(options.root))
    for name in CANDIDATES:
        if not any((row["candidate"], row["budget"]) == (name, options.images) for row in rows):
            rows.append(trained(name, options.root, options.images, cost[name]))
            keep("search.json", rows)
            print(rows[-1], flush=True)
    versions = machine("cpu", torch.get_num_threads())
    text = ", ".join(f"{name} {value}" for name, value in versions.items())
    (OUT / "search.md").write_text(f"{text}\n\n{table(rows)}\n")
    print(table(rows))


def kept(name: str, kind: type) -> Any:
    """What a file of an earlier call holds, or an empty one of its kind."""
    file = OUT / name
    return json.loads(file.read_text()) if file.exists() else kind()


def keep(name: str, content: Any) -> Any:
    """Write it and return it."""
    with replacing(OUT / name) as part:
        part.write_text(json.dumps(content, indent=1))
    return content


if __name__ == "__main__":
    main()
