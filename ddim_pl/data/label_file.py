"""Text files of labels: a line for each image, its name and its class."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddim_pl.data.folders import MOST_SHOWN
from ddim_pl.data.image_list import ImageList
from ddim_pl.data.numbered import count_classes


class _Line(NamedTuple):
    """A line of the file."""

    number: int
    name: str
    label: str


def read_labels(
    file: Path, paths: ImageList, classes: list[str] | None = None
) -> tuple[Tensor, list[str]]:
    """Read the labels of images from a text file, UTF-8, in any order.

    A line is the name of an image, relative to the folder, and its class, separated by a comma, a
    tab or else blanks, as in `a/1.png 3` or `a/1.png,cat`. Classes that are numbers are the labels
    themselves, from 0; names are numbered in alphabetical order. Empty lines are left out.

    Args:
        file: The text file.
        paths: The images of the folder.
        classes: Those of the training images, which no others may join; None for those found.

    Returns:
        Labels, int64 (N,), in the order of `paths`, and the classes by label.

    Raises:
        ValueError: If the file cannot be read; a line is not of this form, names no image or one
            named before, or has an unknown class; or an image has no line.
    """
    lines = list(_lines(file))
    _check_kind(file, lines)
    if classes is None:
        classes = _classes(file, lines)
    numbers = {name: number for number, name in enumerate(classes)}
    places = {name: index for index, name in enumerate(paths.names())}
    labels = torch.full((len(paths),), -1, dtype=torch.int64)
    for line in lines:
        place, label = places.get(line.name), numbers.get(line.label)
        if place is None:
            raise ValueError(
                f"{file}, line {line.number}, must begin with the name of an image in "
                f"{paths.root}, got {line.name!r}: correct it, as {paths.name(0)} is written, or "
                "remove the line"
            )
        if labels[place] >= 0:
            raise ValueError(
                f"{file}, line {line.number}, must name an image once, got {line.name!r} again: "
                "remove one of the lines"
            )
        if label is None:
            raise ValueError(
                f"{file}, line {line.number}, must end in a class of the training images "
                f"({_some(classes)}), got {line.label!r}: correct it"
            )
        labels[place] = label
    absent = (labels < 0).nonzero().flatten().tolist()
    if absent:
        raise ValueError(
            f"{file} must have a line for each of the {len(paths)} images in {paths.root}, got "
            f"none for {len(absent)}, {paths.name(absent[0])} first: add it, or remove the images"
        )
    return labels, classes


def _lines(file: Path) -> Iterator[_Line]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"labels must be a text file in UTF-8, a line for each image, got {str(file)!r} "
            f"({error}): give such a file"
        ) from error
    for number, line in enumerate(text.split("\n"), 1):  # names may hold what else ends lines
        if not line.strip():
            continue
        separator = next((each for each in "\t," if each in line), None)
        parts = [part.strip() for part in line.strip().rsplit(separator, 1)]
        if len(parts) < 2 or not all(parts):
            raise ValueError(
                f"{file}, line {number}, must be the name of an image and its class, separated by "
                f"a comma, a tab or blanks, got {line!r}: complete it"
            )
        # More digits are too many for a class, and for `int`.
        label = str(int(parts[1])) if re.fullmatch(r"\d{1,18}", parts[1]) else parts[1]
        yield _Line(number, parts[0].removeprefix("./"), label)


def _check_kind(file: Path, lines: list[_Line]) -> None:
    """Check that classes are all numbers from 0, or all names."""
    for line in lines:
        if re.fullmatch(r"-\d+|[-+]?\d+\.\d*|\d{19,}", line.label):
            raise ValueError(
                f"{file}, line {line.number}, must end in a whole number from 0 or a name, got "
                f"{line.label[:40]!r}: correct it"
            )
        if line.label.isdecimal() != lines[0].label.isdecimal():
            raise ValueError(
                f"{file} must give classes as numbers alone or as names alone, got "
                f"{lines[0].label!r} in line {lines[0].number} and {line.label!r} in line "
                f"{line.number}: correct them, or remove a heading"
            )


def _classes(file: Path, lines: list[_Line]) -> list[str]:
    found = {line.label for line in lines}
    if not lines or not lines[0].label.isdecimal():
        return sorted(found)
    return [str(number) for number in range(count_classes(map(int, found), str(file)))]


def _some(names: list[str]) -> str:
    return ", ".join([*names[:MOST_SHOWN], *(["..."] if len(names) > MOST_SHOWN else [])])
