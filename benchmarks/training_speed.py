"""What does the framework cost? A bare PyTorch loop against Lightning's fit of the same work.

    .venv/bin/python benchmarks/training_speed.py [--device cuda --preset cifar10 --precision bf16]

Both train the same network on the same data with an average of the weights. The ratio is taken
pair by pair, because the speed of a shared machine drifts. `--compile` and `--channels-last` apply
to both.
"""

import argparse
import statistics
import tempfile
import time
import warnings

import lightning as L
import torch
from sampling_speed import PRESETS
from torch.nn import functional as F

from ddim_pl.data.base import BatchOrder, ImageDataModule, IndexedImages, TensorImages
from ddim_pl.networks.unet import UNet
from ddim_pl.rng import derive_seed, step_generators
from ddim_pl.training import DDPM
from ddim_pl.training.ema import ExponentialAverage


class RandomImages(ImageDataModule):
    """Images of noise, in the shape of a preset."""

    def __init__(self, shape: tuple[int, int, int], batch_size: int, steps: int) -> None:
        super().__init__(batch_size, flip=False, steps_per_epoch=steps)
        generator = torch.Generator().manual_seed(0)
        size = (max(2048, 2 * batch_size), *shape)
        images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        self.images = TensorImages(images, torch.zeros(len(images), dtype=torch.int64), 1)

    def load(self, train: bool) -> TensorImages:
        """Return the same images for training and validation."""
        return self.images


class Clock(L.Callback):
    """Times the batches of a fit after the first few."""

    def __init__(self, skip: int) -> None:
        self.skip = skip

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        """Start the clock once the warm-up is over."""
        if trainer.global_step == self.skip:
            self.start = _now(trainer.strategy.root_device)

    def on_train_end(self, trainer: L.Trainer, *_: object) -> None:
        """Stop it."""
        self.seconds = _now(trainer.strategy.root_device) - self.start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Time pairs of the two loops and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", choices=PRESETS, default="digits")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    device, skip = torch.device(options.device), 5
    warnings.filterwarnings("ignore")

    def module() -> DDPM:
        torch.manual_seed(0)
        network = UNet(**PRESETS[options.preset])
        if options.channels_last:
            network = network.to(memory_format=torch.channels_last)
        return DDPM(network, compile=options.compile)

    shape = module().image_shape

    def bare() -> float:
        ddpm = module().to(device)
        network, average = ddpm.network, ExponentialAverage(ddpm.network, 0.9999).to(device)
        if options.compile:
            network.compile()
        data = RandomImages(shape, options.batch, options.steps)
        draws, images = BatchOrder(len(data.images), options.batch), IndexedImages(data.images)
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-4)
        schedule = ddpm.schedule
        for step in range(options.steps + skip):
            if step == skip:
                start = _now(device)
            x = images[draws.batch(step)].images.to(device).float() / 127.5 - 1
            host, on_device = step_generators(derive_seed(0, step), device)
            t = torch.randint(1, 1001, (len(x),), generator=host).double()
            alpha, sigma = (c.float().to(device).reshape(-1, 1, 1, 1) for c in schedule(t))
            eps = torch.randn(x.shape, generator=on_device, device=device)
            mixed = options.precision == "bf16"
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                output = network(alpha * x + sigma * eps, (t - 1).float().to(device))
            loss = F.mse_loss(output.float(), eps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(network)
        return _now(device) - start

    def lightning(folder: str) -> float:
        clock = Clock(skip)
        trainer = L.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_steps=options.steps + skip,
            precision="bf16-mixed" if options.precision == "bf16" else "32-true",
            gradient_clip_val=1.0,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=folder,
        )
        trainer.fit(module(), RandomImages(shape, options.batch, options.steps + skip))
        return clock.seconds

    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(options.pairs + 1):
            plain, framed = bare(), lightning(folder)
            if pair:  # the first is a warm-up
                ratios.append(framed / plain)
    print(
        f"{options.preset} batch {options.batch} on {device.type}, {options.precision}"
        f"{', compiled' * options.compile}{', channels last' * options.channels_last}: "
        f"Lightning / bare loop = {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}), last bare loop "
        f"{options.steps / plain:.1f} updates/s"
    )


if __name__ == "__main__":
    main()
