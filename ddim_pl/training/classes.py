"""What labels mean: the names of the classes in a checkpoint, for a run that goes on."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from ddim_pl.data.base import ImageDataModule

if TYPE_CHECKING:
    from ddim_pl.training.base import DiffusionModule

CLASSES_KEY = "ddim_pl_classes"
"""Where a checkpoint holds the names, by label."""

MOST_NAMES, LONGEST = 10_000, 100
"""Names that a checkpoint holds at most, and their letters."""


def record_classes(module: "DiffusionModule", checkpoint: dict[str, Any]) -> None:
    """Put the names of the classes into a checkpoint, where network and data have some."""
    names = _names(module)
    if names:
        checkpoint[CLASSES_KEY] = names


def compare_classes(module: "DiffusionModule", checkpoint: dict[str, Any]) -> None:
    """Warn if a label of the data is another class than when the checkpoint was written.

    A checkpoint, or data, without names are not compared; nor are labels that one of both lacks.

    Args:
        module: Goes on from the checkpoint, with the data of its trainer.
        checkpoint: May hold anything.
    """
    before, names = checkpoint.get(CLASSES_KEY), _names(module)
    if not isinstance(before, list):
        return
    pairs = zip(before, names, strict=False)
    other = [(label, *pair) for label, pair in enumerate(pairs) if pair[0] != pair[1]]
    if other:
        label, old, new = other[0]
        rank_zero_warn(
            f"{len(other)} labels mean other classes than in the checkpoint, {label} first, which "
            f"was {str(old)[:LONGEST]!r} and is {new!r}: the network takes one for the other; "
            "give the labels or folders of before, or begin a new run"
        )


def _names(module: "DiffusionModule") -> list[str]:
    """The names of the classes that the network takes and its trainer's data has, by label."""
    if module.num_classes is None or module._trainer is None:
        return []
    data = getattr(module.trainer, "datamodule", None)
    names = data.class_names if isinstance(data, ImageDataModule) else ()
    return [str(name)[:LONGEST] for name in names[:MOST_NAMES]]
