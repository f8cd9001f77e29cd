"""Distances of two folders by this package and by torch-fidelity, pytorch-fid and clean-fid.

All take the same images and the same weights: those of a file, or random ones in the format of the
published file. Tools that are not installed are left out. Prints a Markdown table.

    python benchmarks/fid_agreement.py --num_images 200
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3

from ddim_pl.commands.measure import measure
from ddim_pl.images import write_png
from ddim_pl.metrics.inception import InceptionFeatures, Resize

FIDELITY = "torch_fidelity.feature_extractor_inceptionv3"


def random_weights(path: Path) -> None:
    """Write random weights, whose activations neither vanish nor explode, in the real format."""
    generator = torch.Generator().manual_seed(0)
    with (
        mock.patch(f"{FIDELITY}.load_state_dict_from_url", return_value={}),
        mock.patch(f"{FIDELITY}.FeatureExtractorInceptionV3.load_state_dict"),
    ):
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(std=0.3, generator=generator)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    torch.save(network.state_dict(), path)


def write_images(folder: Path, count: int, side: int, seed: int) -> None:
    """Write PNGs of smooth noise; those of seed 1 are brighter and have edges."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        coarse = torch.rand(1, 3, 5, 5, generator=generator)
        image = nn.functional.interpolate(coarse, (side, side), mode="bicubic")[0]
        edges = (image.mean(0) > 0.5).float() - 0.5
        pixels = (image + edges if seed else image / 4).clamp(0, 1)
        write_png((pixels * 255).to(torch.uint8), folder / f"{index:05d}.png")


def ours(a: Path, b: Path, weights: Path, resize: Resize) -> float:
    """The distance of `main.py measure`."""

    def features(weights_path: str) -> InceptionFeatures:
        return InceptionFeatures(weights_path, resize=resize)

    with contextlib.redirect_stdout(io.StringIO()) as out:
        measure(str(a), str(b), features=features, weights=str(weights), device="cpu")
    found: float = next(iter(json.loads(out.getvalue()).values()))
    return found


def by_torch_fidelity(a: Path, b: Path, weights: Path) -> float:
    """torch-fidelity's FID."""
    import torch_fidelity

    found = torch_fidelity.calculate_metrics(
        input1=str(a),
        input2=str(b),
        fid=True,
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,  # no processes for loading
        feature_extractor_weights_path=str(weights),
    )
    return float(found["frechet_inception_distance"])


@contextlib.contextmanager
def weights_of(module: str, weights: Path) -> Iterator[None]:
    """Give another tool these weights in place of its download."""
    state = torch.load(weights, weights_only=True)
    with mock.patch(f"{module}.load_state_dict_from_url", return_value=state):
        yield


def by_pytorch_fid(a: Path, b: Path, weights: Path) -> float:
    """pytorch-fid's FID."""
    from pytorch_fid.fid_score import calculate_fid_given_paths

    with weights_of("pytorch_fid.inception", weights), quiet():
        paths = [str(a), str(b)]
        return float(calculate_fid_given_paths(paths, 50, "cpu", 2048, num_workers=0))


class _Script(nn.Module):
    """Takes the place of clean-fid's TorchScript file: images of 299x299 in [-1, 1]."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.network = NoTrainInceptionV3("x", ["2048"], str(weights))

    def forward(self, x: Tensor) -> Tensor:
        *layers, _ = self.network.children()
        for layer in layers:
            x = layer(x)
        return x.flatten(1)


def by_clean_fid(a: Path, b: Path, weights: Path) -> float:
    """clean-fid's FID, mode "clean": its resize, its order of steps and its distance."""
    from cleanfid import fid

    layers = _Script(weights)

    def features(x: Tensor) -> Tensor:
        return layers((x - 128) / 128)

    with quiet():
        sides = [
            fid.get_folder_features(
                *(str(folder), features),
                num_workers=0,
                device=torch.device("cpu"),
                mode="clean",
                verbose=False,
            )
            for folder in (a, b)
        ]
        moments = [(np.mean(x, axis=0), np.cov(x, rowvar=False)) for x in sides]
        return float(fid.frechet_distance(*moments[0], *moments[1]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what other tools print."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


TOOLS: dict[str, tuple[Resize, Callable[[Path, Path, Path], float]]] = {
    "torch-fidelity": ("tensorflow", by_torch_fidelity),
    "pytorch-fid": ("pytorch", by_pytorch_fid),
    "clean-fid": ("clean", by_clean_fid),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num_images", type=int, default=200, help="in each of two folders")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--weights", type=Path, help="the published file; by default random ones")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as place:
        weights = options.weights or Path(place, "weights.pth")
        if options.weights is None:
            random_weights(weights)
        folders = [Path(place, name) for name in ("a", "b")]
        for seed, folder in enumerate(folders):
            write_images(folder, options.num_images, options.side, seed)
        print(
            "| tool | resize | its distance | ours | relative difference |\n|---|---|---|---|---|"
        )
        for name, (resize, tool) in TOOLS.items():
            try:
                theirs = tool(*folders, weights)
            except ImportError:
                print(f"| {name} | {resize} | not installed | | |")
                continue
            mine = ours(*folders, weights, resize)
            print(
                f"| {name} | {resize} | {theirs:.8g} | {mine:.8g} | {abs(mine / theirs - 1):.1e} |"
            )


if __name__ == "__main__":
    main()
