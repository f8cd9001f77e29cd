"""Which images a folder holds, and what their labels are. What is left out is said."""

import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor

from ddim_pl.data.image_list import (
    KEPT_FROM,
    SETTLED,
    ImageList,
    kept_list,
    place_of,
    times_of,
)

JPEG = (".jfif", ".jpe", ".jpeg", ".jpg")
EXTENSIONS = frozenset((*JPEG, ".bmp", ".gif", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
SPLITS = frozenset(("test", "train", "training", "val", "valid", "validation"))
MOST_SHOWN = 12
"""Classes, or endings, that a message lists at most."""


def find_images(root: Path, *, name: str = "root", report: bool = True) -> ImageList:
    """Return the image files below `root`, sorted; hidden files and folders are left out.

    A long list is kept in the user's cache, where the next process finds it unless a folder has
    changed, see `ImageList`.

    Args:
        root: The folder.
        name: The argument that gave it, for the errors.
        report: Say how many there are, and how many files of which ending are skipped.

    Raises:
        ValueError: If `root` is not a folder or holds no image, a folder cannot be read, or links
            lead to a folder twice, whose images would count twice.
    """
    if not root.is_dir():
        raise ValueError(f"{name} must be a folder of images, got {str(root)!r}")
    place = place_of(root)
    found = kept_list(root, place)
    if found is None:
        begin = time.time_ns()
        found = _listed(root)
        # A folder that changes while it is read, or has just changed, may look the same later.
        latest = max(map(max, found.folders.values()))
        if len(found) >= KEPT_FROM and latest < begin - SETTLED:
            found.keep(place)
    if not found:
        raise ValueError(
            f"{name} must hold images, got {str(root)!r} without any: put files ending in "
            f"{', '.join(sorted(EXTENSIONS))} there, or give another folder"
        )
    if report:
        _report(root, len(found), Counter(found.skipped))
    return found


def class_names(root: Path, paths: ImageList, *, report: bool = True) -> list[str]:
    """Return the first-level subfolders, sorted, or [] if all images lie in `root` itself.

    Args:
        root: The folder.
        paths: Its images.
        report: Say how many images each class has.

    Raises:
        ValueError: If some images lie in subfolders and some do not, a subfolder holds none, or
            the subfolders are no classes but splits: what labels mean would depend on it.
    """
    counts = paths.counts
    if not counts:
        return []
    beside = len(paths) - sum(counts.values())
    if beside:
        raise ValueError(
            f"{root} must hold its images in subfolders, which are classes, or none there, got "
            f"{beside} beside them, {_first_beside(paths)} first: move all into subfolders, into "
            "a single one for a single class"
        )
    folders = {each.name for each in root.iterdir() if each.is_dir()}
    empty = sorted(name for name in folders - set(counts) if not name.startswith("."))
    if empty:
        raise ValueError(
            f"{root / empty[0]} must hold images, as the subfolders of {root} are classes and "
            "their order gives the labels, got none: remove the folder or fill it"
        )
    if len(counts) > 1 and {name.lower() for name in counts} <= SPLITS:
        raise ValueError(
            f"root must hold one split, its subfolders classes, got {str(root)!r} with "
            f"{', '.join(counts)}: give the folder of one split, and another as val_root"
        )
    if report:
        report_classes(root, counts)
    return list(counts)


def report_classes(source: Path, counts: Mapping[str, int]) -> None:
    """Say which classes there are, in their order, and how many images each has."""
    rank_zero_info(f"{source}: {len(counts)} classes, numbered in this order: {_some(counts)}")


def labels_of(root: Path, paths: ImageList, names: list[str]) -> Tensor:
    """Return the int64 index in `names` of each path's first-level subfolder, or zeros.

    Raises:
        ValueError: If there are names and an image lies in no subfolder of such a name.
    """
    if not names:
        return torch.zeros(len(paths), dtype=torch.int64)
    unknown = next((name for name in paths.counts if name not in names), None)
    stray: str | None = None
    if unknown is not None:
        stray = next(each for each in paths.names() if each.startswith(f"{unknown}/"))
    elif sum(paths.counts.values()) < len(paths):
        stray = _first_beside(paths)
    if stray is not None:
        raise ValueError(
            f"{root / stray} must lie in a subfolder named like a training class: move it to one "
            f"of {', '.join(names[:5])}{', ...' if len(names) > 5 else ''} in {root}"
        )
    labels = torch.tensor([names.index(name) for name in paths.counts])
    return labels.repeat_interleave(torch.tensor(list(paths.counts.values())))


def _listed(root: Path) -> ImageList:
    """List the images, and what is skipped."""
    found: list[str] = []
    skipped: Counter[str] = Counter()
    seen: dict[str, str] = {}
    times: dict[str, list[int]] = {}
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_refuse):
        _check_once(folder, seen, root)
        times[os.path.abspath(folder)] = times_of(folder)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        below = "" if Path(folder) == root else f"{Path(folder).relative_to(root).as_posix()}/"
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and ending in EXTENSIONS:
                found.append(below + name)
            else:
                skipped["hidden" if name.startswith(".") else ending or "no ending"] += 1
    return ImageList.of(root, found, times, skipped)


def _first_beside(paths: ImageList) -> str:
    return next(name for name in paths.names() if "/" not in name)


def _refuse(error: OSError) -> None:
    raise ValueError(
        f"{error.filename} cannot be read ({error.strerror}): change its permissions, or remove it"
    ) from error


def _check_once(folder: str, seen: dict[str, str], root: Path) -> None:
    """Check that a folder is read for the first time, and is not above `root`."""
    real = os.path.realpath(folder)
    above = Path(folder) != root and root.resolve().is_relative_to(real)
    if above or real in seen:
        raise ValueError(
            f"{folder} must not lead to a folder that is read anyway, {seen.get(real, real)}, as "
            "its images would count twice: remove the link"
        )
    seen[real] = folder


def _report(root: Path, count: int, skipped: Counter[str]) -> None:
    """Say how many images there are, and what was skipped."""
    rest = f", {skipped.total()} other files skipped: {_some(skipped)}" if skipped else ""
    rank_zero_info(f"{root}: {count} images{rest}")
    Image.init()
    readable = {ending: skipped[ending] for ending in skipped if ending in Image.EXTENSION}
    if readable:
        rank_zero_warn(
            f"{root} holds files that may be images but are skipped for their ending: "
            f"{_some(readable)}; convert them to PNG, or remove them"
        )


def _some(counts: Mapping[str, int]) -> str:
    shown = [f"{name} ({count})" for name, count in counts.items()][:MOST_SHOWN]
    return ", ".join([*shown, *(["..."] if len(counts) > MOST_SHOWN else [])])
