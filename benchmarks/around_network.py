"""What lies around the network: pictures, features, metrics and folders of images.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/around_network.py png

The two ways run in turn, and the ratio of each pair of CPU seconds is taken: on a shared machine
the wall clock means little. Memory is the most that a process of its own held.
"""

import argparse
import io
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import _compute_fid
from torchvision.transforms.functional import to_pil_image

from ddim_pl.data import image_folder
from ddim_pl.data.folders import class_names, find_images, labels_of
from ddim_pl.data.image_folder import ImageFiles, ImageFolderDataModule
from ddim_pl.data.squares import Squaring
from ddim_pl.metrics.frechet import covariance_root, frechet_distance
from ddim_pl.metrics.inception import InceptionFeatures
from ddim_pl.metrics.quality import SampleQuality

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from inceptions import random_inception

PAIRS = 5


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU time of one call, over all threads."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    function()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(name: str, slow: Callable[[], Any], fast: Callable[[], Any]) -> None:
    """Print the ratio of the CPU seconds of two ways, after a warm-up of each."""
    slow(), fast()
    pairs = [(cpu_seconds(slow), cpu_seconds(fast)) for _ in range(PAIRS)]
    ratios = sorted(a / b for a, b in pairs)
    print(
        f"{name}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), "
        f"{min(a for a, _ in pairs):.3f} s and {min(b for _, b in pairs):.3f} s of CPU"
    )


def png() -> None:
    """Compression of smooth pictures with a little noise."""
    generator = torch.Generator().manual_seed(0)
    for side, count in ((32, 500), (256, 30)):
        coarse = 60 * torch.randn(count, 3, 8, 8, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic")
        noise = 2 * torch.randn(count, 3, side, side, generator=generator)
        images = [*map(to_pil_image, (128 + smooth + noise).clamp(0, 255).to(torch.uint8))]
        sizes = {}

        def write(level: int, images: list[Any] = images, sizes: dict[int, int] = sizes) -> None:
            sizes[level] = 0
            for image in images:
                file = io.BytesIO()
                image.save(file, format="png", compress_level=level)
                sizes[level] += len(file.getvalue())

        name = f"{count} pictures of {side}x{side}, level 6 / level 1"
        compare(name, lambda write=write: write(6), lambda write=write: write(1))
        print(f"  bytes: {sizes[6]} and {sizes[1]}, {sizes[1] / sizes[6]:.2f} of them")


@torch.no_grad()
def inception() -> None:
    """Features of Inception-v3, with random weights in the format of the real ones."""
    with TemporaryDirectory() as folder:
        theirs = random_inception("2048")
        torch.save(theirs.state_dict(), f"{folder}/weights.pth")
        ours = InceptionFeatures(f"{folder}/weights.pth")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    compare("8 images, torch-fidelity / ours", lambda: theirs(images), lambda: ours(images))
    a, b = theirs(images), ours(images)
    print(f"  largest difference / largest feature: {float((a - b).abs().max() / a.max()):.1e}")


def frechet() -> None:
    """The algebra of the Fréchet distance of 2048 features."""
    generator = torch.Generator().manual_seed(0)
    width = 2048
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    mean = torch.zeros(width, dtype=torch.float64)
    for count in (6000, 1000):
        x, y = torch.randn(2, count, width, generator=generator, dtype=torch.float64) @ mix
        a, b = x.T.cov(), 1.2 * y.T.cov()
        root = covariance_root(a)

        def theirs(a: Tensor = a, b: Tensor = b) -> Tensor:
            return _compute_fid(mean, a, mean, b)

        def first(a: Tensor = a, b: Tensor = b) -> Tensor:
            return frechet_distance(mean, covariance_root(a), mean, b)

        def again(root: Tensor = root, b: Tensor = b) -> Tensor:
            return frechet_distance(mean, root, mean, b)

        compare(f"{count} images, torchmetrics / ours, the first time", theirs, first)
        compare(f"{count} images, torchmetrics / ours, later", theirs, again)
        print(f"  {float(theirs()):.10g} and {float(first()):.10g}")


class Given(nn.Module):
    """Features that are made up, of as many numbers as Inception's."""

    name, num_features = "given", 2048

    def forward(self, images: Tensor) -> Tensor:
        """Random features of images `(B, C, H, W)`."""
        return torch.rand(len(images), self.num_features)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Random features and logits."""
        return self(images), torch.rand(len(images), 1008)


def peak(metric: str, count: int) -> None:
    """Print the memory of one metric, in this process."""
    quality = SampleQuality(Given(), [metric])
    images = torch.zeros(500, 3, 2, 2, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for real in (True, False):
        for _ in range(count // len(images)):
            quality.update(images, real=real)
    stored = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    quality.compute()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{metric}: {(stored - before) / 1e3:.0f} MB, then {(after - before) / 1e3:.0f} MB")


def memory() -> None:
    """The most that metrics hold, with 20,000 images on each side."""
    for metric in ("fd", "kid", "inception_score"):
        process = multiprocessing.get_context("spawn").Process(target=peak, args=(metric, 20_000))
        process.start()
        process.join()


def read_list(root: str, what: str, way: str) -> None:
    """Print time and memory of one way to the paths of a folder, in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    found: list[Any] = []

    def make() -> None:
        if way == "paths":  # as before there were lists
            names = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
            found.append(sorted(names))
            counts = Counter(path.relative_to(root).parts[0] for path in found[0])
            found.append(torch.tensor([int(p.relative_to(root).parts[0]) for p in found[0]]))
            assert len(counts)
        else:
            found.append(find_images(Path(root), report=False))
            found.append(labels_of(Path(root), found[0], class_names(Path(root), found[0])))
        if way == "check":
            image_folder.MEMORY_LIMIT = 0
            squaring = Squaring()
            ImageFiles(found[0], image_size=8, channels=3, squaring=squaring).prepare()

    taken = cpu_seconds(make)
    wall = time.perf_counter() - begin
    held = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    print(f"{what}: {taken:.2f} s of CPU, {wall:.2f} s, {held:.0f} MB more")


def folder() -> None:
    """Start with a folder of 100,000 tiny images in 100 subfolders."""
    with TemporaryDirectory() as root, TemporaryDirectory() as cache:
        os.environ["DDIM_PL_CACHE"] = cache
        file = io.BytesIO()
        to_pil_image(torch.zeros(3, 8, 8, dtype=torch.uint8)).save(file, format="png")
        for index in range(100_000):
            path = Path(root, f"{index % 100:02d}", f"{index:08d}-some-longer-name.png")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(file.getvalue())
        time.sleep(3)  # until the folders' times tell every change
        ways = {"list of paths": "paths", "made and kept": "", "read again": ""}
        ways |= {"read, headers checked": "check", "read, headers checked before": "check"}
        for what, way in ways.items():
            process = multiprocessing.get_context("spawn").Process(
                target=read_list, args=(root, what, way)
            )
            process.start()
            process.join()


def write_photographs(root: Path, count: int) -> None:
    """Write JPEGs of 341x256, smooth with a little noise; every hundredth is the same."""
    generator = torch.Generator().manual_seed(0)
    coarse = 60 * torch.randn(100, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(256, 341), mode="bicubic")
    noise = 5 * torch.randn(smooth.shape, generator=generator)
    for index, pixels in enumerate((128 + smooth + noise).clamp(0, 255).to(torch.uint8)):
        file = io.BytesIO()
        to_pil_image(pixels).save(file, format="jpeg", quality=90)
        for number in range(index, count, 100):
            Path(root, f"{number:06d}.jpg").write_bytes(file.getvalue())


def decoded() -> None:
    """An epoch of 4,000 photographs in batches of 64, decoded each time and once for all."""
    count = 4000
    with TemporaryDirectory() as root, TemporaryDirectory() as cache:
        write_photographs(Path(root), count)
        image_folder.MEMORY_LIMIT = 0  # as if they were too many for memory
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).split(64)
        for side in (64, 256):
            plain = ImageFolderDataModule(root, side)
            mapped = ImageFolderDataModule(root, side, cache=cache)
            plain.setup()
            begin = time.perf_counter()
            taken = cpu_seconds(mapped.prepare_data)
            wall = time.perf_counter() - begin
            (file,) = Path(cache).glob("*.npy")
            size = file.stat().st_size / 1e6
            print(f"{side}x{side}: made in {taken:.1f} s of CPU, {wall:.1f} s; {size:.0f} MB")
            again = cpu_seconds(ImageFolderDataModule(root, side, cache=cache).prepare_data)
            print(f"  found by the next start in {again:.3f} s of CPU")
            mapped.setup()

            def epoch(data: ImageFolderDataModule) -> None:
                for indices in order:
                    data.train_set.images(indices)

            name = f"{side}x{side}, an epoch, decoded / mapped"
            compare(name, lambda a=plain: epoch(a), lambda b=mapped: epoch(b))


def main() -> None:
    """Answer one question."""
    asked = (png, inception, frechet, memory, folder, decoded)
    questions = {each.__name__: each for each in asked}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", choices=questions)
    torch.set_num_threads(1)
    questions[parser.parse_args().question]()


if __name__ == "__main__":
    main()
