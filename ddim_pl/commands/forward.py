"""`main.py forward`: how images become noise, on DDIM's paths ([DDIM], section 4.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from ddim_pl.checks import check_at_least
from ddim_pl.commands.sources import image_source
from ddim_pl.evaluation.plots import label_rows
from ddim_pl.evaluation.tables import markdown, write_csv, write_text
from ddim_pl.evaluation.worker import Worker, on_every_worker
from ddim_pl.images import to_uint8
from ddim_pl.inversion import forward_trajectory
from ddim_pl.prediction import eps_from_x
from ddim_pl.timesteps import make_levels
from ddim_pl.training import DiffusionModule


def forward(
    trainer: L.Trainer,
    model: DiffusionModule,
    datamodule: L.LightningDataModule | None = None,
    ckpt_path: str | None = None,
    *,
    images: Sequence[str] | None = None,
    num_images: int = 64,
    num_shown: int = 2,
    etas: Sequence[float] = (0.0, 0.5, 1.0),
    timesteps: str = "linear",
    num_steps: int = 100,
    num_points: int = 11,
    seed: int | None = None,
    output: str | None = None,
) -> None:
    """Draw the noisy states of images along DDIM's forward processes, one for each eta.

    A forward step depends on the image ([DDIM], eq. 8), except at eta = 1, which is DDPM's Markov
    chain. At every level the state has the same law for every eta. Writes `grid.png`, a row for
    each image and eta; and `forward.csv` and `forward.md` with the mean and deviation of the noise
    at these levels, 0 and 1 by construction, and its correlation with the noise at the cleanest
    level: 1 at eta = 0.

    Args:
        trainer: Gives the devices.
        model: The model, of which only schedule, seed and image size are used.
        datamodule: Gives its validation images, unless `images` are given.
        ckpt_path: Checkpoint, or "last".
        images: Image files.
        num_images: How many validation images; not used with `images`.
        num_shown: Images in the grid at most.
        etas: Noise of the steps, each in [0, 1].
        timesteps: Strategy of the levels.
        num_steps: Steps of a path.
        num_points: States that are shown, the image included, spread over the path.
        seed: Seed of the noise; by default that of training.
        output: Folder to write to; by default `forward` in the checkpoint's run.

    Raises:
        ValueError: If the noise is not Gaussian, an image cannot be read, or a number does not
            fit.
    """
    check_at_least(1, num_images=num_images, num_shown=num_shown, num_steps=num_steps)
    check_at_least(2, num_points=num_points)
    check_at_least(0, seed=seed)
    _check(model, etas)
    levels = make_levels(timesteps, model.schedule, num_steps)
    levels = levels.flip(0)[1:]  # without the image itself
    points = torch.linspace(len(levels) - 1, 0, min(num_points - 1, len(levels))).round()
    source = image_source(model, datamodule, images, None, num_images, needs_label=False)

    def work(worker: Worker) -> None:
        results = ("grid.png", "forward.*")
        folder = worker.folder(output, "forward", results=results)
        real = source(worker)
        if not worker.is_first:
            return
        x, chosen = real.images.double(), model.seed if seed is None else seed
        found = {
            eta: _follow(model, x, levels, eta, chosen, points.tolist(), num_shown) for eta in etas
        }
        text = f"Noise of {len(x)} images on DDIM's forward paths of {len(levels)} steps."
        _write(folder, found, text)

    on_every_worker(trainer, model, work, ckpt_path=ckpt_path)


def _check(model: DiffusionModule, etas: Sequence[float]) -> None:
    if not model.noise.is_gaussian:
        raise ValueError(
            f"noise must be Gaussian for forward, got {model.noise}: give another checkpoint"
        )
    if not etas or not all(0 <= eta <= 1 for eta in etas):
        raise ValueError(f"etas must be one or more numbers in [0, 1], got {list(etas)}")


class Paths(NamedTuple):
    """What is kept of the paths of one eta.

    Attributes:
        pictures: Of the first images, `(images, points, C, H, W)` uint8, the image itself first.
        rows: The noise at each of the other points.
    """

    pictures: Tensor
    rows: list[dict[str, Any]]


def _follow(
    model: DiffusionModule,
    x: Tensor,
    levels: Tensor,
    eta: float,
    seed: int,
    points: Sequence[int],
    num_shown: int,
) -> Paths:
    """Follow images `(B, ...)` along rising levels, and keep the states at some of them."""
    generators = model.image_noise(range(len(x)), seed=seed)
    states = forward_trajectory(model.schedule, x, levels, eta=eta, generator=generators)
    pictures, rows, first = [to_uint8(x[:num_shown])], [], None
    for place, state in enumerate(states):
        eps = eps_from_x(model.schedule(state.t), state.z, x)
        first = eps if first is None else first
        if place in points:
            pictures.append(to_uint8(state.z[:num_shown]))
            rows.append(_row(eta, float(state.t), eps, first))
    return Paths(torch.stack(pictures, 1), rows)


def _write(folder: Path, found: dict[float, Paths], text: str) -> None:
    """Write the table and the page of rows."""
    shown = {
        f"image {image + 1}, eta {eta:g}": paths.pictures[image]
        for image in range(len(next(iter(found.values())).pictures))
        for eta, paths in found.items()
    }
    label_rows(folder / "grid.png", list(shown), list(shown.values()))
    rows = [row for paths in found.values() for row in paths.rows]
    write_csv(folder / "forward.csv", rows)
    text = f"{text}\n\n{markdown(rows)}"
    write_text(folder / "forward.md", text)
    print(f"\n{text}\nThe images are in {folder / 'grid.png'}")


def _row(eta: float, level: float, eps: Tensor, first: Tensor) -> dict[str, Any]:
    pair = torch.stack([eps.flatten(), first.flatten()])
    return {
        "eta": eta,
        "level": level,
        "mean": float(eps.mean()),
        "deviation": float(eps.std()),
        "correlation": float(torch.corrcoef(pair)[0, 1]),
    }
