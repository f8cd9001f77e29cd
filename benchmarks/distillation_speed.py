"""What does an update of progressive distillation cost, and does making pairs cost anything?

    .venv/bin/python benchmarks/distillation_speed.py [--device cuda --preset cifar10]

The first ratio is an update of the student (two evaluations of the teacher, and the student's own
forward and backward pass) over a plain training update of the same network, by alternating single
updates of both; 5/3 is the count of passes. The second is the bare sampler's throughput over that
of making pairs, which draws the same images and writes them, in alternating rounds.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from sampling_speed import PRESETS

from ddim_pl.data.teacher_pairs import PairStore
from ddim_pl.networks.unet import UNet
from ddim_pl.rng import step_generators
from ddim_pl.samplers import DDIM
from ddim_pl.timesteps import linear
from ddim_pl.training import DDPM, DiffusionModule, ProgressiveDistillation
from ddim_pl.training.pairs import make_pairs, recipe_of


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Updates:
    """Single updates of a module, timed."""

    def __init__(self, module: DiffusionModule, x: torch.Tensor) -> None:
        self.module = module.to(x.device).train()
        self.x = x
        self.optimizer = torch.optim.Adam(module.network.parameters(), lr=1e-5)

    def __call__(self, step: int) -> float:
        """Make one update; return its seconds."""
        begin = _now(self.x.device)
        denoiser = self.module._denoiser(self.module.network)
        generators = step_generators(step, self.x.device)
        loss = self.module.loss(denoiser, (self.x,), generators).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.network.parameters(), 1.0)
        self.optimizer.step()
        self.module.average.update_parameters(self.module.network)
        return _now(self.x.device) - begin


def main() -> None:
    """Print both ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", choices=PRESETS, default="digits")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device(options.device)
    torch.manual_seed(0)
    plain = DDPM(UNet(**PRESETS[options.preset]), prediction="v", loss_weight="snr_plus_one")
    student = ProgressiveDistillation(
        UNet(**PRESETS[options.preset]), plain.schedule, rounds=[(8, 1_000_000)]
    )
    x = torch.rand(options.batch, *plain.image_shape, device=device) * 2 - 1
    updates = [Updates(plain, x), Updates(student, x)]
    ratios = []
    for step in range(options.updates + 5):
        seconds = [update(step) for update in updates]
        if step >= 5:
            ratios.append(seconds[1] / seconds[0])
    low, _, high = statistics.quantiles(ratios)
    print(
        f"{options.preset} batch {options.batch} on {device.type}: progressive / plain update = "
        f"{statistics.median(ratios):.3f} (quartiles {low:.3f} to {high:.3f}, {len(ratios)} pairs)"
    )

    levels, count = linear(1000, 20), 4 * options.batch
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds + 1):
            begin = _now(device)
            for start in range(0, count, options.batch):
                plain.sample(range(start, start + options.batch), levels=levels)
            bare = _now(device) - begin
            recipe = {**recipe_of(plain, DDIM(), levels, precision="32-true"), "seed": 0}
            store = PairStore(
                Path(folder, str(turn)), recipe, num_pairs=count, shard_size=options.batch
            )
            store.begin()
            begin = _now(device)
            make_pairs(store, plain, DDIM(), levels, batch_size=options.batch)
            if turn:  # the first is a warm-up
                ratios.append(bare / (_now(device) - begin))
    print(
        f"throughput of making pairs / bare sampler = {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} rounds)"
    )


if __name__ == "__main__":
    main()
