"""An update: Lightning's fit against a bare loop, our U-Net against others, precisions, settings.

A stage of `speed.py` and `gpu.py`. Every contender trains with Adam, clipped gradients and an
average of the weights on the same random images. Lightning has the callbacks and the logger of
configs/default.yaml.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from measuring import ROOT, Bench, Contender, Row
from sampling_speed import CUDA_GRAPHS, in_that
from subjects import (
    autocast,
    build,
    diffusers_network,
    has,
    lucidrains_diffusion,
    make_model,
    network_arguments,
    other_memory_format,
    precisions,
    settings,
    shipped,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddim_pl.data.base import BatchOrder, ImageDataModule, IndexedImages, TensorImages
from ddim_pl.training import DDPM

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def training(bench: Bench) -> None:
    """Updates a second."""
    # Name, batch, updates in a turn, and updates of each fit that are not timed.
    every, usual = precisions(bench.device), ("float32", "bf16")
    cases = [("digits", 48, 15, 2, usual), ("cifar10", 8, 2, 1, usual)]
    if bench.device == "cuda":
        cases = [("cifar10", 128, 20, 5, every), ("digits", 48, 100, 5, usual)]
    if bench.tiny:
        cases = [("digits", 4, 2, 1, every), ("cifar10", 4, 2, 1, every)]
    for name, batch, steps, skip, kinds in cases:
        for precision in kinds:
            bench.case(
                f"{name}, batch {batch}, {precision}",
                partial(_training, bench, name, batch, steps, skip, precision),
            )


def _training(
    bench: Bench, name: str, batch: int, steps: int, skip: int, precision: str
) -> list[Row]:
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        fit = partial(fit_for, bench, Path(folder), batch, steps, skip, precision)
        contenders = dict(_loops(bench, name, batch, steps, precision))
        for label, model in _models(bench, name, precision):
            contenders[f"Lightning, {label}"] = partial(fit, model)
        rows = bench.in_turn(
            {key: in_that(precision, call) for key, call in contenders.items()},
            work=steps,
            unit="updates",
        )
    return [row | {"ms an update": 1e3 * row["seconds"] / steps} for row in rows]


def _models(bench: Bench, name: str, precision: str) -> Iterator[tuple[str, DDPM]]:
    """Ours as it is, with each setting, and with what no setting turns."""
    make = partial(make_model, name, tiny=bench.tiny)
    usual = shipped(bench)
    yield "ours", make(**usual)
    # A fit draws nothing, and compiles by itself on a GPU and nowhere else.
    same = [("sampling_precision", "bf16"), ("compile", bench.device == "cuda")]
    for key, value in settings(bench, precision, without=same):
        yield f"ours {key}={value}", make(**usual | {key: value})
    if bench.device == "cuda" or bench.tiny:
        optimizer = make().optimizer
        # An optimiser that was told how to update stays as it is.
        yield (
            "ours foreach=True of Adam",
            make(**usual, optimizer=partial(optimizer, foreach=True)),
        )
    if bench.compile and precision == "bf16":
        model = make(compile=False)
        model.network.compile(mode="reduce-overhead")
        yield f"ours {CUDA_GRAPHS}", model


# ---- bare loops -------------------------------------------------------------------------------


def _loops(
    bench: Bench, name: str, batch: int, steps: int, precision: str
) -> Iterator[tuple[str, Contender]]:
    """Ours and others' in a bare loop; the first is what the others are compared with."""
    model = make_model(name, tiny=bench.tiny)
    arguments = network_arguments(name, tiny=bench.tiny)

    def loop(network: nn.Module, loss: Loss) -> Contender:
        return BareLoop(bench, model, network, loss, batch=batch, precision=precision).make(steps)

    yield "bare loop, ours", loop(model.network, ours_loss(model))
    word, layout = other_memory_format(model.network)
    other = make_model(name, tiny=bench.tiny)
    other.network.to(memory_format=layout)
    yield f"bare loop, ours {word}", loop(other.network, ours_loss(other))
    if has(bench, "diffusers"):
        yield "bare loop, diffusers", loop(diffusers_network(arguments), diffusers_loss(model))
    if has(bench, "denoising-diffusion-pytorch"):
        theirs = lucidrains_diffusion(arguments, 50)
        count = sum(p.numel() for p in theirs.model.parameters()) / 1e6
        yield (
            f"bare loop, denoising-diffusion-pytorch, {count:.1f} M parameters",
            loop(theirs, lambda network, x, label: network(x / 2 + 0.5)),
        )


def ours_loss(model: DDPM) -> Loss:
    """The loss of our U-Net as a bare loop writes it: noise at random levels, squared error."""

    def call(network: nn.Module, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return network(z, t, label) if model.num_classes else network(z, t)

    return _simple_loss(model, call)


def diffusers_loss(model: DDPM) -> Loss:
    """The same of diffusers' U-Net."""

    def call(network: nn.Module, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return network(z, t, class_labels=label if model.num_classes else None).sample

    return _simple_loss(model, call)


def _simple_loss(model: DDPM, call: Callable[..., Tensor]) -> Loss:
    schedule = model.schedule
    scales = schedule(torch.arange(1, schedule.num_levels + 1, dtype=torch.float64))
    table = torch.stack([scales.alpha, scales.sigma]).float()

    def loss(network: nn.Module, x: Tensor, label: Tensor) -> Tensor:
        nonlocal table
        table = table.to(x.device)
        t = torch.randint(schedule.num_levels, (len(x),), device=x.device)
        alpha, sigma = table[:, t, None, None, None]
        eps = torch.randn_like(x)
        output = call(network, alpha * x + sigma * eps, t.float(), label)
        return F.mse_loss(output.float(), eps)

    return loss


class BareLoop:
    """A training loop without a framework.

    Args:
        bench: Its device.
        model: Whose optimiser is taken, and whose shape of images.
        network: What is trained.
        loss: A function of network, images and labels.
        batch: Images of an update.
        precision: See `subjects.precisions`.
    """

    def __init__(
        self,
        bench: Bench,
        model: DDPM,
        network: nn.Module,
        loss: Loss,
        *,
        batch: int,
        precision: str,
    ) -> None:
        self.network, self.loss, self.precision = network.train().to(bench.device), loss, precision
        self.device = bench.device
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
        self.optimizer = model.optimizer(network.parameters())
        data = RandomImages(model, batch, 1)
        self.order = BatchOrder(len(data.images), batch)
        self.images = IndexedImages(data.images)
        self.step = 0

    def make(self, steps: int) -> Contender:
        """A function that makes so many updates."""
        return lambda: [self.update() for _ in range(steps)] and None

    def update(self) -> None:
        """Make one update."""
        images, label = self.images[self.order.batch(self.step)]
        x = images.to(self.device).float() / 127.5 - 1
        with autocast(self.device, self.precision):
            loss = self.loss(self.network, x, label.to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        self.step += 1


# ---- Lightning --------------------------------------------------------------------------------


class RandomImages(ImageDataModule):
    """Images of noise, in the shape of a model's."""

    def __init__(self, model: DDPM, batch_size: int, steps: int) -> None:
        super().__init__(batch_size, flip=False, steps_per_epoch=steps)
        generator = torch.Generator().manual_seed(0)
        size = (max(2048, 2 * batch_size), *model.image_shape)
        images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        classes = model.num_classes or 1
        self.images = TensorImages(images, torch.arange(len(images)) % classes, classes)

    def load(self, train: bool) -> TensorImages:
        """Return the same images for training and validation."""
        return self.images


class Stopwatch(L.Callback):
    """Times the updates of a fit after the first few."""

    def __init__(self, bench: Bench, skip: int) -> None:
        self.bench, self.skip = bench, skip

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start once the warm-up is over."""
        if trainer.global_step == self.skip:
            self.start = self.bench.now()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop after the last update, before the checkpoint of the end."""
        self.seconds = self.bench.now() - self.start if hasattr(self, "start") else 0.0


def fit_for(
    bench: Bench, folder: Path, batch: int, steps: int, skip: int, precision: str, model: DDPM
) -> float:
    """Seconds of so many updates in Lightning's fit, with the callbacks that every run has."""
    given = yaml.safe_load((ROOT / "configs/default.yaml").read_text())["trainer"]
    stopwatch = Stopwatch(bench, skip)
    trainer = L.Trainer(
        accelerator="gpu" if bench.device == "cuda" else "cpu",
        devices=1,
        max_steps=steps + skip,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        gradient_clip_val=1.0,
        callbacks=[stopwatch, *(build(each) for each in given["callbacks"])],
        logger=TensorBoardLogger(folder, name="speed"),
        log_every_n_steps=given["log_every_n_steps"],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(model, RandomImages(model, batch, steps + skip))
    return stopwatch.seconds
