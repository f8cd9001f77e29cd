"""What does an update of progressive distillation cost, and does making pairs cost anything?

A stage of `speed.py` and `gpu.py`. An update of the student (two evaluations of the teacher, and
the student's own forward and backward pass) against a plain update of the same network: 5/3 is
the count of passes; and with `teacher_precision: bf16` against without ("over its peer"). Making
pairs, which draws images and writes them, against drawing alone.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from measuring import Bench, Row
from sampling_speed import in_that
from subjects import autocast, make_model, make_network, precisions

from ddim_pl.data.teacher_pairs import PairStore
from ddim_pl.rng import step_generators
from ddim_pl.samplers import DDIM
from ddim_pl.timesteps import linear
from ddim_pl.training import DDPM, DiffusionModule, ProgressiveDistillation
from ddim_pl.training.pairs import make_pairs, recipe_of
from ddim_pl.training.reduced import NetworkPrecision


def distillation(bench: Bench) -> None:
    """Ratios of updates and of pairs."""
    on_gpu = bench.device == "cuda"
    name, batch = ("cifar10", 128) if on_gpu else ("digits", 128)
    batch = 4 if bench.tiny else batch
    cases = [(name, batch, precision) for precision in precisions(bench.device)]
    cases += [] if on_gpu else [("cifar10", 4 if bench.tiny else 8, "float32")]
    for case in cases:
        text = "update, {}, batch {}, {}".format(*case)
        bench.case(text, partial(_updates, bench, *case))
    bench.case(f"pairs, {name}, batch {batch}", partial(_pairs, bench, name, batch))


class Updates:
    """Updates of a module in a bare loop.

    Args:
        bench: Its device.
        module: What is trained.
        batch: Images of an update, and their precision.
        precision: See `subjects.precisions`.
    """

    def __init__(self, bench: Bench, module: DiffusionModule, batch: int, precision: str) -> None:
        self.module = module.to(bench.device).train()
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(batch, *module.image_shape, generator=generator) * 2 - 1
        self.x, self.device, self.precision = x.to(bench.device), bench.device, precision
        classes = module.num_classes
        self.label = (
            None if classes is None else torch.arange(batch, device=bench.device) % classes
        )
        self.optimizer = torch.optim.Adam(module.network.parameters(), lr=1e-5)
        self.step = 0

    def __call__(self, count: int) -> None:
        """Make so many updates."""
        for _ in range(count):
            denoiser = self.module._denoiser(self.module.network).condition(self.label)
            generators = step_generators(self.step, self.x.device)
            with autocast(self.device, self.precision):
                batch = (self.x,) if self.label is None else (self.x, self.label)
                loss = self.module.loss(denoiser, batch, generators).mean()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.network.parameters(), 1.0)
            self.optimizer.step()
            self.module.average.update_parameters(self.module.network)
            self.step += 1


def _plain(bench: Bench, name: str) -> DDPM:
    """A model that can be distilled: it predicts v."""
    return make_model(name, tiny=bench.tiny, prediction="v", loss_weight="snr_plus_one")


def _updates(bench: Bench, name: str, batch: int, precision: str) -> list[Row]:
    plain = _plain(bench, name)
    student, reduced = (
        ProgressiveDistillation(
            make_network(name, tiny=bench.tiny),
            plain.schedule,
            rounds=[(8, 1_000_000)],
            teacher_precision=teacher_precision,
        )
        for teacher_precision in get_args(NetworkPrecision)
    )
    modules = {"plain": plain, "progressive": student, "teacher_precision='bf16'": reduced}
    count = 1 if bench.tiny or batch == 8 else 5
    contenders = {
        label: in_that(precision, partial(Updates(bench, module, batch, precision), count))
        for label, module in modules.items()
    }
    peers = {"teacher_precision='bf16'": "progressive"}
    return bench.in_turn(contenders, work=count, unit="updates", peers=peers)


def _pairs(bench: Bench, name: str, batch: int) -> list[Row]:
    plain = _plain(bench, name).eval().to(bench.device)
    levels, count = linear(1000, 2 if bench.tiny else 20), 2 * batch

    def bare() -> None:
        for start in range(0, count, batch):
            plain.sample(range(start, start + batch), sampler=DDIM(), levels=levels)

    def pairs() -> None:
        recipe = {**recipe_of(plain, DDIM(), levels, precision="32-true"), "seed": 0}
        with tempfile.TemporaryDirectory() as folder:
            store = PairStore(Path(folder), recipe, num_pairs=count, shard_size=batch)
            store.begin()
            make_pairs(store, plain, DDIM(), levels, batch_size=batch)

    return bench.in_turn({"drawing": bare, "making pairs": pairs}, work=count, unit="images")
