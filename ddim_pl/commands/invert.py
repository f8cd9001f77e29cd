"""`main.py invert`: latents of real images, by gradient descent ([DEQ], section 5)."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import save_file
from torch import Tensor

from ddim_pl.checks import check_at_least
from ddim_pl.commands.sources import RealImages, image_source, unclipped
from ddim_pl.damage import DamagedError, read_tensors, seal_of
from ddim_pl.denoiser import Denoiser
from ddim_pl.evaluation.plots import label_rows, plot_lines
from ddim_pl.evaluation.tables import markdown, scatter, write_csv, write_text
from ddim_pl.evaluation.worker import Worker, on_every_worker
from ddim_pl.files import replacing
from ddim_pl.images import read_png, to_uint8
from ddim_pl.inversion import Implicit, Inversion, Method, check_stop_below, encode
from ddim_pl.inversion import invert as find_latents
from ddim_pl.samplers import DDIM
from ddim_pl.timesteps import make_levels
from ddim_pl.training import DiffusionModule

GRID_IMAGES = 16
LARGEST_RATE = 1e3
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
    stop_below: float | None = None,
    seed: int | None = None,
    batch_size: int = 250,
    output: str | None = None,
) -> None:
    """Find the latents from which deterministic DDIM generates given images.

    Writes `latents.safetensors` with the best `latents` of each image, `grid.png` with a row of
    images, one of those from the first latents, one of those from the best; the curves of loss and
    time as `curves.csv`, `curves.png` and for TensorBoard; and a summary `invert.md`. The loss is
    the squared error summed over an image in [-1, 1], as in the paper.

    Args:
        trainer: Gives the devices.
        model: The model.
        datamodule: Gives its validation images, unless `images` are given.
        ckpt_path: Checkpoint, or "last".
        method: How the images are generated with a gradient: `Implicit` (DEQ-DDIM, by default),
            `InverseJacobian`, or `Sequential`, through the whole chain.
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
        stop_below: Stop each batch when the loss of each of its images is below this.
        seed: Seed of the noise; by default that of training.
        batch_size: Images at once, on each worker.
        output: Folder to write to, without latents of an earlier call; by default `invert` in the
            checkpoint's run, where those are replaced.

    Raises:
        ValueError: If an image or the first latents cannot be read, a number does not fit, or the
            folder holds the latents of an earlier call.
    """
    check_at_least(1, num_images=num_images, batch_size=batch_size, num_updates=num_updates)
    check_at_least(0, seed=seed, max_seconds=max_seconds)
    _check(model, lr, stop_below)
    levels = make_levels(timesteps, model.schedule, num_steps, model.last_level)
    given = None if start in ("encoding", "noise") else _read_latents(start, model)
    source = image_source(model, datamodule, images, label, num_images)
    method = method or Implicit()
    first = partial(_first_latents, start, partial(model.latents, seed=seed), given)
    optimise = partial(find_latents, method=method, num_updates=num_updates, lr=lr)
    optimise = partial(optimise, max_seconds=max_seconds, stop_below=stop_below)

    def work(worker: Worker) -> None:
        folder = worker.folder(output, "invert", results=("latents.safetensors", "curves.*"))
        real = source(worker)
        _check_count(start, given, len(real.images))
        found, curve = _invert_all(worker, real, levels, first, optimise, batch_size)
        if worker.is_first:
            text = f"{len(levels) - 1} {timesteps} steps from {start}, {method}, Adam {lr:g}"
            _write(worker, folder, real, found, curve, text)

    on_every_worker(trainer, model, work, ckpt_path=ckpt_path)


def _check(model: DiffusionModule, lr: float, stop_below: float | None) -> None:
    check_stop_below(stop_below)
    if not 0 < lr <= LARGEST_RATE:
        raise ValueError(
            f"lr must be positive and at most {LARGEST_RATE:g}, got {lr}: 5e-3 is usual"
        )
    if not model.noise.is_gaussian:
        raise ValueError(
            f"noise must be Gaussian for invert, got {model.noise}: reconstruct and interpolate "
            "encode images of other models"
        )


def _check_count(start: str, given: Tensor | None, count: int) -> None:
    if given is not None and len(given) < count:
        raise ValueError(
            f"start must hold a latent for each of {count} images, got {start!r} with {len(given)}"
        )


def _first_latents(
    start: str,
    noise: Callable[..., tuple[Tensor, object]],
    given: Tensor | None,
    denoiser: Denoiser,
    x: Tensor,
    levels: Tensor,
    indices: Sequence[int],
) -> Tensor:
    """The latents `(B, ...)` that the updates begin with, of images `x` of these indices."""
    if given is not None:
        return given[list(indices)].to(x)
    if start == "encoding":
        return encode(denoiser, x, levels)
    return noise(indices, levels[0])[0].to(x)


def _invert_all(
    worker: Worker,
    real: RealImages,
    levels: Tensor,
    first: Callable[..., Tensor],
    optimise: Callable[..., Inversion],
    batch_size: int,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Latents and images of all batches on all workers, and the curve of their losses."""
    model = worker.model
    found = {name: torch.zeros_like(real.images) for name in ("latents", "first", "images")}
    curves: list[tuple[int, Inversion]] = []
    mine = worker.share(range(len(real.images)))
    for begin in range(0, len(mine), batch_size):
        batch = list(mine[begin : begin + batch_size])
        denoiser = unclipped(model, None if real.label is None else real.label[batch])
        x = real.images[batch].to(model.device)
        with worker.precision():
            z = first(denoiser, x, levels, batch)
            found["first"][batch] = DDIM()(denoiser, z, levels).float().cpu()
            # Lightning predicts in inference mode, in which there are no gradients.
            with torch.inference_mode(False), torch.enable_grad():
                images, start = x.clone(), z.clone()
                inversion = optimise(
                    denoiser, images, levels.clone(), start, progress=worker.shows_progress
                )
        found["latents"][batch] = inversion.latents.float().cpu()
        found["images"][batch] = inversion.images.float().cpu()
        curves.append((len(batch), inversion))
    curve = _mean_curve(worker, curves, len(real.images))
    return {name: worker.all_reduce(values) for name, values in found.items()}, curve


def _read_latents(start: str, model: DiffusionModule) -> Tensor:
    """Latents of an earlier call."""
    if not Path(start).is_file():
        raise ValueError(
            f"start must be 'encoding', 'noise' or a latents.safetensors file, got {start!r}"
        )
    try:
        z = read_tensors(start)["latents"]
    except (DamagedError, KeyError) as error:
        raise ValueError(
            f"start {start!r} holds no latents ({error}): give the file of an earlier call"
        ) from error
    if tuple(z.shape[1:]) != model.image_shape:
        raise ValueError(
            f"start {start!r} holds latents of shape {tuple(z.shape[1:])}, the model has "
            f"{model.image_shape}: give a file of this model"
        )
    return z


def _mean_curve(
    worker: Worker, curves: Sequence[tuple[int, Inversion]], num_images: int
) -> list[dict[str, float]]:
    """The mean of the curves of all batches on all devices, up to the end of the longest.

    A batch that has ended stays where it is. Losses and evaluations are means over the images; the
    time is that of all batches of a worker, one after the other, on the slowest worker.
    """
    longest = max((len(each.curve) for _, each in curves), default=0)
    points = int(worker.gather(torch.tensor(longest)).max())
    sums = torch.zeros(points, len(COLUMNS), dtype=torch.float64)
    for count, each in curves:
        ended = each.curve[-1:] * (points - len(each.curve))
        rows = torch.tensor([point[1:] for point in each.curve + ended], dtype=torch.float64)
        sums += rows * torch.tensor([1, *[count] * (len(COLUMNS) - 1)])
    every = worker.gather(sums)
    means = every.sum(0) / num_images
    means[:, 0] = every[..., 0].max(0).values
    return [
        {"update": update, **dict(zip(COLUMNS, row, strict=True))}
        for update, row in enumerate(means.tolist())
    ]


def _write(
    worker: Worker,
    folder: Path,
    real: RealImages,
    found: dict[str, Tensor],
    curve: list[dict[str, float]],
    text: str,
) -> None:
    """Write latents, images, curves and a summary."""
    with replacing(folder / "latents.safetensors") as part:
        tensors = {"latents": found["latents"]}
        save_file(tensors, part, metadata=seal_of(tensors))
    shown = {"images": real.images, "first": found["first"], "best": found["images"]}
    pictures = [to_uint8(images[:GRID_IMAGES]) for images in shown.values()]
    label_rows(folder / "grid.png", list(shown), pictures)
    write_csv(folder / "curves.csv", curve)
    lines = {name: [row[name] for row in curve] for name in ("loss", "best loss")}
    axes = {x: [row[x] for row in curve] for x in ("seconds", "evaluations", "update")}
    plot_lines(folder / "curves.png", axes, lines)
    _write_events(folder, curve)
    last = curve[-1]
    text = (
        f"{len(real.images)} images inverted: {text}, precision {worker.trainer.precision}.\n\n"
        f"{_summary(real, found)}\n"
        f"{int(last['update'])} updates, {last['evaluations']:.0f} evaluations of the network for "
        f"each image, {last['seconds']:.0f} s."
    )
    write_text(folder / "invert.md", text)
    print(f"\n{text}\nLatents, curves and images are in {folder}")


def _write_events(folder: Path, curve: list[dict[str, float]]) -> None:
    """Write the curves and the page of images for TensorBoard, in the place of earlier ones."""
    # Every command imports this module, and TensorBoard takes a tenth of a second.
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as log:
        for row in curve:
            for name in COLUMNS:
                log.add_scalar(f"invert/{name.replace(' ', '_')}", row[name], int(row["update"]))
        log.add_image("invert/images", read_png(folder / "grid.png"))


def _summary(real: RealImages, found: dict[str, Tensor]) -> str:
    """The errors of the first and the best latents, as a table."""
    rows = []
    for name, images in {"first": found["first"], "best": found["images"]}.items():
        errors = (images - real.images).double().square().flatten(1).sum(1)
        rows.append(
            {
                "latents": name,
                "loss": float(errors.mean()),
                "standard error": scatter(errors),
                "least": float(errors.min()),
                "most": float(errors.max()),
            }
        )
    return markdown(rows)
