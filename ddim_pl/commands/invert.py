"""`main.py invert`: latents of real images, by gradient descent (Pokle et al. 2022, section 5)."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ddim_pl.commands.devices import Device, at_least, check_images, on_every_device
from ddim_pl.commands.report import label_rows, markdown, plot_lines, write_csv, write_text
from ddim_pl.commands.sources import RealImages, read_images, unclipped, validation_images
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.files import replacing
from ddim_pl.images import read_png, to_uint8
from ddim_pl.inversion import Implicit, Inversion, Method
from ddim_pl.inversion import invert as find_latents
from ddim_pl.latents import encode
from ddim_pl.noise import latents
from ddim_pl.samplers import DDIM
from ddim_pl.timesteps import make_levels
from ddim_pl.training import DiffusionModule

GRID_IMAGES = 16
COLUMNS = ("seconds", "evaluations", "loss", "best loss")


def invert(
    trainer: L.Trainer,
    model: DiffusionModule,
    datamodule: L.LightningDataModule | None = None,
    ckpt_path: str | None = None,
    *,
    method: Method | None = None,
    start: str = "encoding",
    images: Sequence[str] | None = None,
    label: int | None = None,
    num_images: int = 32,
    timesteps: str = "linear",
    num_steps: int = 100,
    num_updates: int = 1000,
    lr: float = 5e-3,
    max_seconds: float | None = None,
    seed: int | None = None,
    batch_size: int = 250,
    output: str | None = None,
) -> None:
    """Find the latents from which deterministic DDIM draws given images.

    Writes `latents.safetensors` with the best `latents` of each image, `grid.png` with a row of
    images, of what the first latents draw, and of what the best ones draw; the curves of loss and
    time as `curves.csv`, `curves.png` and for TensorBoard; and a summary `invert.md`. The loss is
    the squared error summed over an image in [-1, 1], as in the paper.

    Args:
        trainer: Gives the devices.
        model: The model.
        datamodule: Gives its validation images, unless `images` are given.
        ckpt_path: Checkpoint, or "last".
        method: How the images are drawn with a gradient: `Implicit` (DEQ-DDIM, by default) or
            `Sequential`, through the whole chain.
        start: First latents: "encoding" by DDIM, "noise" of the seed, or the `latents.safetensors`
            of an earlier call.
        images: Image files.
        label: Class of `images`, if the model has classes.
        num_images: How many validation images; not used with `images`.
        timesteps: Strategy of the levels.
        num_steps: Steps of the chain.
        num_updates: Updates of the latents.
        lr: Rate of Adam.
        max_seconds: Stop each batch after this time, if that comes first.
        seed: Seed of the noise; by default that of training.
        batch_size: Images at once, on each device.
        output: Folder to write to; by default `invert` in the checkpoint's run.

    Raises:
        ValueError: If an image or the first latents cannot be read, or a number does not fit.
    """
    at_least(1, num_images=num_images, batch_size=batch_size, num_updates=num_updates)
    at_least(0, seed=seed or 0)
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}: 5e-3 is usual")
    if not model.noise.is_gaussian:
        raise ValueError(
            f"invert knows Gaussian noise only, and the model has {model.noise}: reconstruct and "
            "interpolate encode its images"
        )
    levels = make_levels(timesteps, model.schedule, num_steps)
    given = None if start in ("encoding", "noise") else _read_latents(start, model)
    files = read_images(model, images, label) if images else None
    if not images:
        check_images(datamodule)
    method = method or Implicit()

    def first_latents(denoiser: NetworkDenoiser, x: Tensor, indices: Sequence[int]) -> Tensor:
        """The latents to begin with, of the images `x` of these indices."""
        if given is not None:
            return given[list(indices)].to(x)
        if start == "encoding":
            return encode(denoiser, x, levels)
        return latents(model.seed if seed is None else seed, indices, model.image_shape)[0].to(x)

    def work(device: Device) -> None:
        folder = device.folder(output, "invert")
        real = files or validation_images(
            device, datamodule, lambda labels: torch.arange(min(num_images, len(labels)))
        )
        if given is not None and len(given) < len(real.images):
            raise ValueError(
                f"start {start!r} holds {len(given)} latents for {len(real.images)} images"
            )
        found = {name: torch.zeros_like(real.images) for name in ("latents", "first", "images")}
        curves: list[tuple[int, Inversion]] = []
        mine = device.share(range(len(real.images)))
        for begin in range(0, len(mine), batch_size):
            batch = list(mine[begin : begin + batch_size])
            denoiser = unclipped(model, None if real.label is None else real.label[batch])
            x = real.images[batch].to(model.device)
            with device.trainer.precision_plugin.forward_context():
                z = first_latents(denoiser, x, batch)
                found["first"][batch] = DDIM()(denoiser, z, levels).float().cpu()
                # Lightning predicts in inference mode, in which there are no gradients.
                with torch.inference_mode(False), torch.enable_grad():
                    inversion = find_latents(
                        denoiser,
                        x.clone(),
                        levels.clone(),
                        z.clone(),
                        method=method,
                        num_updates=num_updates,
                        lr=lr,
                        max_seconds=max_seconds,
                        progress=device.shows_progress,
                    )
            found["latents"][batch] = inversion.latents.float().cpu()
            found["images"][batch] = inversion.images.float().cpu()
            curves.append((len(batch), inversion))
        curve = _mean_curve(device, curves)
        found = {name: device.sum(values) for name, values in found.items()}
        if device.is_first:
            text = f"{len(levels) - 1} {timesteps} steps from {start}, {method}, Adam {lr:g}"
            _write(folder, real, found, curve, text)

    on_every_device(trainer, model, work, ckpt_path=ckpt_path)


def _read_latents(start: str, model: DiffusionModule) -> Tensor:
    """Latents of an earlier call."""
    if not Path(start).is_file():
        raise ValueError(
            f"start must be 'encoding', 'noise' or a latents.safetensors file, got {start!r}"
        )
    try:
        z = load_file(start)["latents"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"start {start!r} holds no latents ({error}): give the file of an earlier call"
        ) from error
    if tuple(z.shape[1:]) != model.image_shape:
        raise ValueError(
            f"start {start!r} holds latents of shape {tuple(z.shape[1:])}, the model has "
            f"{model.image_shape}: give a file of this model"
        )
    return z


def _mean_curve(device: Device, curves: Sequence[tuple[int, Inversion]]) -> list[dict[str, float]]:
    """The curves of all batches on all devices as one, as far as all of them go.

    Losses and evaluations are means over the images; the time is that of all batches of a device,
    one after the other, on the slowest device.
    """
    far = 2**31 - 1  # a device without images does not hold the others back
    lengths = [far, *(len(each.curve) for _, each in curves)]
    points = int(device.gather(torch.tensor(min(lengths))).min())
    sums = torch.zeros(points, len(COLUMNS), dtype=torch.float64)
    for count, each in curves:
        rows = torch.tensor([point[1:] for point in each.curve[:points]], dtype=torch.float64)
        sums += rows * torch.tensor([1, *[count] * (len(COLUMNS) - 1)])
    every = device.gather(sums)
    images = float(device.gather(torch.tensor(float(sum(count for count, _ in curves)))).sum())
    means = every.sum(0) / images
    means[:, 0] = every[..., 0].max(0).values
    return [
        {"update": update, **dict(zip(COLUMNS, row, strict=True))}
        for update, row in enumerate(means.tolist())
    ]


def _write(
    folder: Path,
    real: RealImages,
    found: dict[str, Tensor],
    curve: list[dict[str, float]],
    text: str,
) -> None:
    """Write all that there is to see and to go on with."""
    with replacing(folder / "latents.safetensors") as part:
        save_file({"latents": found["latents"]}, part)
    shown = {"images": real.images, "drawn first": found["first"], "drawn": found["images"]}
    pictures = [to_uint8(images[:GRID_IMAGES]) for images in shown.values()]
    label_rows(folder / "grid.png", list(shown), pictures)
    write_csv(folder / "curves.csv", curve)
    lines = {name: [row[name] for row in curve] for name in ("loss", "best loss")}
    plot_lines(
        folder / "curves.png",
        {x: [row[x] for row in curve] for x in ("seconds", "evaluations", "update")},
        lines,
    )
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as log:
        for row in curve:
            for name in COLUMNS:
                log.add_scalar(f"invert/{name.replace(' ', '_')}", row[name], int(row["update"]))
        log.add_image("invert/images", read_png(folder / "grid.png"))
    rows = []
    for name, drawn in list(shown.items())[1:]:
        errors = (drawn - real.images).double().square().flatten(1).sum(1)
        rows.append(
            {
                "latents": "first" if name == "drawn first" else "best",
                "loss": float(errors.mean()),
                "standard error": float(errors.std() / len(errors) ** 0.5)
                if len(errors) > 1
                else 0.0,
                "least": float(errors.min()),
                "most": float(errors.max()),
            }
        )
    last = curve[-1]
    text = (
        f"{len(real.images)} images inverted: {text}.\n\n{markdown(rows)}\n"
        f"{int(last['update'])} updates, {last['evaluations']:.0f} evaluations of the network for "
        f"each image, {last['seconds']:.0f} s."
    )
    write_text(folder / "invert.md", text)
    print(f"\n{text}\nLatents, curves and images are in {folder}")
