"""`main.py import`: a teacher of another program as a checkpoint."""

from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ddim_pl.checks import check_at_least
from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.files import check_writable, write_tensors
from ddim_pl.teachers.reading import read_source
from ddim_pl.training import DDPM
from ddim_pl.training.ddpm import averaged_checkpoint
from ddim_pl.training.hyperparameters import CONFIG_KEY, import_path

IMAGES = "data/images"
"""Folder of real images that a checkpoint names, for commands that need some."""


def import_teacher(
    source: str,
    *,
    output: str,
    scheduler: str | None = None,
    image_size: int | None = None,
) -> None:
    """Turn a teacher of diffusers, of DDIM's code or of EDM's into a checkpoint for every command.

    Nothing in the source is run. The checkpoint holds the weights alone: a fit cannot go on from
    it, but distils it as its `teacher`. Commands that need real images take `--data`, or a folder
    of images `data/images`.

    Args:
        source: A folder of diffusers (UNet2DModel with a DDPM or DDIM scheduler), its name on the
            Hugging Face Hub, a file of weights of the code of DDIM or DDPM for PyTorch, or a
            pickle of EDM (`network-snapshot-*.pkl`).
        output: File to write; there must be none of this name.
        scheduler: A `scheduler_config.json` of diffusers or its folder, in place of the source's.
        image_size: Height and width of the images, where the source does not say it.

    Raises:
        ValueError: If the source cannot be read or expressed here, some of its weights are not
            finite, or the output exists.
    """
    path = Path(output)
    if path.exists():
        raise ValueError(f"output must be a new file, got {output!r}, which exists: give another")
    check_at_least(1, image_size=image_size)
    teacher = read_source(source, scheduler, image_size)
    _check_finite(source, teacher.network)
    model = DDPM(teacher.network, **teacher.settings)
    model.origin = (_origin_of(source),)
    checkpoint = averaged_checkpoint(model)
    hyper = checkpoint["hyper_parameters"]
    arguments = {name: value for name, value in hyper.items() if not name.startswith("_")}
    config: dict[str, Any] = {
        "model": {"class_path": hyper["_class_path"], "init_args": arguments},
        **_images(model),
    }
    checkpoint[CONFIG_KEY] = yaml.safe_dump(config)
    check_writable("output", path.absolute().parent)
    write_tensors(checkpoint, path)
    count = sum(weights.numel() for weights in model.network.parameters())
    notes = [
        *teacher.notes,
        f"schedule: {model.schedule}, prediction: {model.prediction}, clip: {model.clip}",
        f"sampler: {model.sampler}, {len(model.levels) - 1} steps",
        f"{output}: {count:,} parameters, {path.stat().st_size / 1e6:.1f} MB",
    ]
    print("\n".join(notes))


def _origin_of(source: str) -> dict[str, Any]:
    """A source's name on the Hub, or that of its file or folder alone."""
    path = Path(source)
    if path.exists():
        return {"by": "import", "source": path.resolve().name}
    return {"by": "import", "source": source, "on_hub": True}


def _check_finite(source: str, network: nn.Module) -> None:
    for name, weights in network.state_dict().items():
        wrong = int((~weights.isfinite()).sum())
        if wrong:
            raise ValueError(
                f"source must hold finite weights, got {source!r} with {wrong} of "
                f"{weights.numel()} that are not, in {name} (as it is called here): its training "
                "diverged, or the file is damaged; give an earlier or a whole one"
            )


def _images(model: DDPM) -> dict[str, Any]:
    """The data of the config: a folder of images of the model's shape, read when it is needed."""
    channels, height, width = model.image_shape
    if height != width or channels not in (1, 3):
        return {}
    arguments = {"root": IMAGES, "image_size": height, "channels": channels}
    return {"data": {"class_path": import_path(ImageFolderDataModule), "init_args": arguments}}
