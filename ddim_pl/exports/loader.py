"""Draw images with the network of this folder; needs PyTorch and safetensors only.

In Python: `images = sample(load(), torch.randn(16, C, H, W))`, of about [-1, 1]; `label=` takes
the classes, int64 (16,), of a network that has some.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ddim_pl.networks.unet import UNet


class Step(nn.Module):
    """Step number `k` of the sampler, an int64 scalar, from a state `z` (B, C, H, W)."""

    def __init__(
        self, network: nn.Module, steps: list[dict[str, Any]], clip: list[float] | None
    ) -> None:
        super().__init__()
        self.network, self.clip, self.num_steps = network, clip, len(steps)
        for name in steps[0]:
            self.register_buffer(name, torch.tensor([step[name] for step in steps]))

    def forward(
        self, z: Tensor, k: Tensor, noise: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        """The next state; a stochastic sampler takes standard normal noise (B, C, H, W)."""
        tables = self.named_buffers(recurse=False)
        weights = {name: table.index_select(0, k.reshape(1))[0] for name, table in tables}
        given = () if label is None else (label,)
        output = self.network(z, weights["time"].expand(z.shape[0]), *given)
        x = weights["z_weight"] * z
        of_parts = weights["output_weights"].unbind()
        for weight, part in zip(of_parts, output.chunk(len(of_parts), dim=1), strict=True):
            x = x + weight * part
        if self.clip is not None:
            x = x.clamp(*self.clip)
        eps = (z - weights["alpha"] * x) / weights["sigma"]
        z = weights["x_weight"] * x + weights["eps_weight"] * eps
        return z if noise is None else z + weights["noise_weight"] * noise


def load(folder: str | Path = Path(__file__).parent) -> Step:
    """The network of a folder with its sampler."""
    config = json.loads((Path(folder) / "config.json").read_text())
    network = UNet(**config["network"]).eval()
    network.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return Step(network, config["steps"], config["clip"])


@torch.no_grad()
def sample(step: Step, z: Tensor, label: Tensor | None = None) -> Tensor:
    """Images from standard normal noise `z` (B, C, H, W)."""
    for k in range(step.num_steps):
        z = step(z, torch.tensor(k), torch.randn_like(z), label)
    return z
