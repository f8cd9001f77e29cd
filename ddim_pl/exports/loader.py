"""Draw images with the network of a folder as this; needs PyTorch and safetensors only.

In Python: `images = sample(load(FOLDER), torch.randn(16, C, H, W))`, of about [-1, 1]; `label=`
takes the classes, int64 (16,), of a network that has some.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Step(nn.Module):
    """Step number `k` of the sampler, an int64 scalar, from a state `z` (B, C, H, W)."""

    def __init__(
        self,
        network: nn.Module,
        steps: list[dict[str, Any]],
        clip: Callable[[Tensor], Tensor] | None,
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
        time = weights["time"].expand(z.shape[0])
        output = self.network(weights["input_scale"] * z, time, *given)
        x = weights["z_weight"] * z
        of_parts = weights["output_weights"].unbind()
        for weight, part in zip(of_parts, output.chunk(len(of_parts), dim=1), strict=True):
            x = x + weight * part
        if self.clip is not None:
            x = self.clip(x)
        eps = (z - weights["alpha"] * x) / weights["sigma"]
        z = weights["x_weight"] * x + weights["eps_weight"] * eps
        return z if noise is None else z + weights["noise_weight"] * noise


def load(folder: str | Path) -> Step:
    """The network of a folder with its sampler."""
    folder = Path(folder).resolve()
    config = json.loads((folder / "config.json").read_text())
    package = _package(folder / "code")
    network = _made(package, config["network"]).eval().requires_grad_(False)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    clip = config["clip"] and _made(package, config["clip"])
    return Step(network, config["steps"], clip)


@torch.no_grad()
def sample(step: Step, z: Tensor, label: Tensor | None = None) -> Tensor:
    """Images from standard normal noise `z` (B, C, H, W)."""
    for k in range(step.num_steps):
        z = step(z, torch.tensor(k, device=z.device), torch.randn_like(z), label)
    return z


def _package(folder: Path) -> ModuleType:
    """A folder of modules as a package of a name of its own, so that two do not meet."""
    name = f"code_{abs(hash(folder))}"
    if name not in sys.modules:
        spec: Any = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
    return sys.modules[name]


def _made(package: ModuleType, content: dict[str, Any]) -> Any:
    module = importlib.import_module(f"{package.__name__}.{content['module']}")
    return getattr(module, content["class"])(**content["init_args"])
