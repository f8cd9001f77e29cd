"""`main.py reconstruct`: how well images come back from their latents (Song et al. 2021, 5.4)."""

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor

from ddim_pl.commands.devices import Device, at_least, check_images, on_every_device
from ddim_pl.commands.report import label_rows, markdown, write_csv, write_text
from ddim_pl.commands.sources import (
    RealImages,
    check_deterministic,
    read_images,
    unclipped,
    validation_images,
)
from ddim_pl.images import to_uint8
from ddim_pl.latents import encode
from ddim_pl.timesteps import has_own_length, make_levels
from ddim_pl.training import DiffusionModule

STEPS = (10, 20, 50, 100, 200, 500, 1000)
GRID_IMAGES = 16


def reconstruct(
    trainer: L.Trainer,
    model: DiffusionModule,
    datamodule: L.LightningDataModule | None = None,
    ckpt_path: str | None = None,
    *,
    images: Sequence[str] | None = None,
    label: int | None = None,
    num_images: int = 64,
    num_steps: Sequence[int] | None = None,
    timesteps: str = "trailing",
    batch_size: int = 250,
    output: str | None = None,
) -> None:
    """Encode images and draw them again, with more and more steps: table 2 of the DDIM paper.

    Writes `reconstruct.csv` and `reconstruct.md` with the mean squared error per dimension, images
    scaled to [0, 1] as in the paper, and `grid.png`: a row of images, then one for each number of
    steps.

    Args:
        trainer: Gives the devices.
        model: The model; its sampler must be deterministic.
        datamodule: Gives its validation images, unless `images` are given.
        ckpt_path: Checkpoint, or "last".
        images: Image files.
        label: Class of `images`, if the model has classes.
        num_images: How many validation images; not used with `images`.
        num_steps: Numbers of steps; by default 10, 20, 50, 100, 200, 500, 1000, as far as there
            are levels.
        timesteps: Strategy of the levels.
        batch_size: Images in a batch, on each device.
        output: Folder to write to; by default `reconstruct` in the checkpoint's run.

    Raises:
        ValueError: If the sampler is stochastic, an image cannot be read, or a number does not
            fit.
    """
    at_least(1, num_images=num_images, batch_size=batch_size)
    check_deterministic(model.sampler)
    steps = num_steps or [n for n in STEPS if n <= model.schedule.num_levels]
    all_levels = [make_levels(timesteps, model.schedule, n) for n in steps]
    if has_own_length(timesteps):
        all_levels = all_levels[:1]
    files = read_images(model, images, label) if images else None
    if not images:
        check_images(datamodule)

    def work(device: Device) -> None:
        folder = device.folder(output, "reconstruct")
        real = files or validation_images(
            device, datamodule, lambda labels: torch.arange(min(num_images, len(labels)))
        )
        shown, rows = [real.images], []
        for i, levels in enumerate(all_levels):
            text = f"{len(levels) - 1} steps ({i + 1} of {len(all_levels)})"
            drawn = _there_and_back(device, real, levels, batch_size, text)
            error = ((drawn - real.images).double() / 2).square().flatten(1).mean(1)
            rows.append(
                {
                    "steps": len(levels) - 1,
                    "network evaluations": 2 * model.sampler.num_evaluations(levels),
                    "error": float(error.mean()),
                    "standard error": float(error.std() / len(error) ** 0.5)
                    if len(error) > 1
                    else 0.0,
                }
            )
            shown.append(drawn)
        if not device.is_first:
            return
        names = ["images", *(f"{row['steps']} steps" for row in rows)]
        few = [to_uint8(images[:GRID_IMAGES]) for images in shown]
        label_rows(folder / "grid.png", names, few)
        write_csv(folder / "reconstruct.csv", rows)
        table = markdown(rows)
        text = (
            f"Mean squared error per dimension, [0, 1], of {len(real.images)} images; "
            f"{model.sampler}, {timesteps} levels.\n\n{table}"
        )
        write_text(folder / "reconstruct.md", text)
        print(f"\n{text}\nThe images are in {folder / 'grid.png'}")

    on_every_device(trainer, model, work, ckpt_path=ckpt_path)


def _there_and_back(
    device: Device, real: RealImages, levels: Tensor, batch_size: int, text: str
) -> Tensor:
    """Reconstructions of all images on all devices, `(B, C, H, W)` on the CPU."""
    model, drawn = device.model, torch.zeros_like(real.images)
    mine = device.share(range(len(real.images)))
    starts = range(0, len(mine), batch_size)
    for start in device.progress(starts, len(starts), text):
        batch = list(mine[start : start + batch_size])
        denoiser = unclipped(model, None if real.label is None else real.label[batch])
        with device.trainer.precision_plugin.forward_context():
            z = encode(
                denoiser, real.images[batch].to(model.device), levels, sampler=model.sampler
            )
            drawn[batch] = model.sampler(denoiser, z, levels).float().cpu()
    return device.sum(drawn)
