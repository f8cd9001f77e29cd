"""Is our sampling loop as fast as that of diffusers? The same network, latents and levels.

    .venv/bin/python benchmarks/sampling_speed.py [--device cuda] [--preset cifar10]

The two loops run in turn, and the ratio of each pair is taken: on a shared machine the speed of
one run means nothing, that of a pair little less. Prints the median ratio and the largest
difference of the images.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.networks.unet import UNet
from ddim_pl.samplers import DDIM
from ddim_pl.schedules import LinearSchedule
from ddim_pl.timesteps import trailing

PRESETS = {
    "digits": {"image_size": 8, "in_channels": 1, "channels": 24, "multipliers": [1, 2]}
    | {"num_blocks": 1, "attention": [4], "groups": 8, "dropout": 0.0},
    "cifar10": {},
}


def seconds(function: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Time one call, and return what it made."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.no_grad()
def main() -> None:
    """Compare the loops and print a line per batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", choices=PRESETS, default="digits")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    network = UNet(**PRESETS[options.preset]).eval().to(device)
    for parameter in network.parameters():  # the output convolution starts at zero
        torch.nn.init.normal_(parameter, std=0.05)
    denoiser = NetworkDenoiser(network, LinearSchedule(), clip=True)
    levels = trailing(1000, options.steps)
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=True, steps_offset=0)

    def diffusers_loop(z: Tensor) -> Tensor:
        scheduler.set_timesteps(options.steps)
        for t in scheduler.timesteps:
            output = network(z, t.to(device).float().expand(len(z)))
            z = scheduler.step(output, t, z, use_clipped_model_output=True).prev_sample
        return z

    for batch in options.batches:
        z = torch.randn(batch, network.in_channels, *[network.image_size] * 2, device=device)
        ratios, difference = [], 0.0
        for pair in range(options.pairs + 1):
            ours, a = seconds(lambda z=z: DDIM()(denoiser, z, levels), device)
            theirs, b = seconds(lambda z=z: diffusers_loop(z), device)
            difference = max(difference, (a - b).abs().max().item())
            if pair:  # the first is a warm-up
                ratios.append(theirs / ours)
        print(
            f"{options.preset} batch {batch:4d}, {options.steps} steps on {device.type}: "
            f"diffusers / ours = {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}), images differ by {difference:.1e}"
        )


if __name__ == "__main__":
    main()
