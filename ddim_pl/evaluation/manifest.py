"""How images in a folder were made, for whoever finds them: a `manifest.json` beside them."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch

import ddim_pl
from ddim_pl.damage import sealed
from ddim_pl.evaluation.cost import network_evaluations
from ddim_pl.evaluation.tables import write_text
from ddim_pl.training import DiffusionModule
from ddim_pl.training.fingerprint import digest_of, fingerprint

OF_NETWORK = ("schedule", "noise", "prediction", "time_input", "sigma_data")
"""What reads a network's weights."""

GUIDANCE = "guidance"
"""Entry of results of images that are guided; others have none."""

WEIGHTS = "weights"
"""Entry of results that say of which weights they are."""

LONG = ("levels", "clip", *OF_NETWORK, WEIGHTS)
"""Entries of `sampling_of` that are to be compared, not to be read in a table."""


def sampling_of(model: DiffusionModule) -> dict[str, Any]:
    """What a model's images depend on besides seed, labels and precision, for results of a test.

    Args:
        model: Draws the images, with its own sampler and levels; its weights are loaded.
    """
    steps, levels, guidance = model.timesteps, model.levels, model.sampling_guidance
    state = {f"average.{name}": each for name, each in model.average.state_dict().items()}
    chosen = {"ema_decay": str(model.average.decay)} if model.average_index else {}
    return {
        **chosen,
        "sampler": str(model.sampler),
        "timesteps": steps if isinstance(steps, str) else levels.tolist(),
        **({} if guidance is None else {GUIDANCE: str(guidance)}),
        "network evaluations": network_evaluations(
            model.sampler, levels, model.schedule, guidance
        ),
        "levels": levels.tolist(),
        "clip": str(model.sampling_clip),
        **{name: str(getattr(model, name)) for name in OF_NETWORK},
        WEIGHTS: digest_of(state),
    }


def write_manifest(
    file: Path,
    trainer: L.Trainer,
    model: DiffusionModule,
    ckpt_path: str | None,
    *,
    seed: int | None = None,
    label: int | None = None,
    first: int = 0,
    num_images: int | None,
) -> None:
    """Write all that images depend on, with a digest as in other JSON files.

    The checkpoint's fingerprint is that of finished cells and of pairs: of its averaged weights
    and of what reads them, see `ddim_pl.training.fingerprint`.

    Args:
        file: Where to.
        trainer: Its precision and kind of device are recorded.
        model: Draws the images, with its own sampler and levels; its weights are loaded.
        ckpt_path: The checkpoint, if there is one.
        seed: Of the images; by default the model's.
        label: Class of all images; by default all in turn.
        first: Index of the first image.
        num_images: How many; None if a loader does not know its length.
    """
    levels, guidance = model.levels, model.sampling_guidance
    content: dict[str, Any] = {
        "ddim_pl": ddim_pl.__version__,
        "torch": torch.__version__,
        "device": trainer.strategy.root_device.type,
        "checkpoint": None if ckpt_path is None else str(ckpt_path),
        "fingerprint": fingerprint(model),
        "updates": model.checkpoint_step or None,
        "weights": kind_of_weights(model),
        "sampler": str(model.sampler),
        "clip": model.clip if isinstance(model.clip, bool) else str(model.clip),
        "timesteps": model.timesteps if isinstance(model.timesteps, str) else "list",
        "steps": len(levels) - 1,
        "levels": levels.tolist(),
        GUIDANCE: None if guidance is None else str(guidance),
        "network evaluations": network_evaluations(
            model.sampler, levels, model.schedule, guidance
        ),
        "seed": model.seed if seed is None else seed,
        "noise_source": model.noise_source,
        "first": first,
        "num_images": num_images,
        "label": label,
        "num_classes": model.num_classes,
        "shape": list(model.image_shape),
        "precision": str(trainer.precision),
        "sampling_precision": model.sampling_precision,
    }
    write_text(file, json.dumps(sealed(content), indent=1))


def kind_of_weights(model: DiffusionModule) -> str:
    """Which weights draw: an imported model's are those that the other program has chosen."""
    if model.origin and model.origin[-1]["by"] == "import":
        return "as imported"
    return f"averaged, ema_decay {model.average.decay}"
