"""Plots and pages of images; every file appears whole or not at all."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ddim_pl.evaluation.tables import Row
from ddim_pl.files import replacing


def plot_distances(path: Path, rows: Sequence[Row], key: str, series: Sequence[str]) -> None:
    """Plot a distance against steps and against network evaluations, a line per way of sampling.

    Args:
        path: PNG to write.
        rows: Hold "steps", "network evaluations" and `key`.
        key: Name of the distance.
        series: Name of the line that each row belongs to.
    """
    # The figure is drawn without pyplot, which would choose a backend for the whole process.
    from matplotlib.figure import Figure

    lines: dict[str, list[Row]] = {}
    for name, row in zip(series, rows, strict=True):
        lines.setdefault(name, []).append(row)
    names = ["steps", "network evaluations"]
    if all(row[names[0]] == row[names[1]] for row in rows):
        names.pop()
    figure = Figure(figsize=(6 + 3 * len(names), 5), layout="constrained")
    for axes, x in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for name, points in lines.items():
            ordered = sorted(points, key=lambda row: row[x])
            axes.plot(
                [row[x] for row in ordered],
                [max(row[key], 1e-6) for row in ordered],
                marker="o",
                markersize=4,
                label=name,
            )
        axes.set(xlabel=x, ylabel=key)
        logarithmic_x(axes, {row[x] for row in rows})
        logarithmic_y(axes)
        axes.grid(visible=True, which="both", alpha=0.25)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    _save_figure(figure, path)


def plot_lines(
    path: Path, axes_of: Mapping[str, Sequence[float]], lines: Mapping[str, Sequence[float]]
) -> None:
    """Plot lines against each of several axes, the values logarithmic.

    Args:
        path: PNG to write.
        axes_of: What the lines are plotted against, a picture each, by name.
        lines: Positive values by name, as many as an axis has.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(axes_of), 3.5), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(1, len(axes_of)), axes_of.items(), strict=True):
        for label, values in lines.items():
            axes.plot(x, values, label=label)
        axes.set(xlabel=name, yscale="log")
        axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    _save_figure(figure, path)


def _save_figure(figure: Any, path: Path) -> None:
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)


def label_rows(path: Path, names: Sequence[str], images: Sequence[Tensor], side: int = 48) -> None:
    """Draw a page of rows, each a name and images of the same latents.

    Args:
        path: PNG to write.
        names: One for each row.
        images: One uint8 batch `(B, C, H, W)` for each row.
        side: Width of an image on the page in pixels, at least; small ones are enlarged by a whole
            factor.
    """
    factor = max(1, math.ceil(side / images[0].shape[-1]))
    height, width = (n * factor + 2 for n in images[0].shape[-2:])
    font = ImageFont.load_default(size=min(13, max(9, height // 3)))
    left = int(max(font.getlength(name) for name in names)) + 12
    page = Image.new("RGB", (left + width * len(images[0]), height * len(names)), "white")
    draw = ImageDraw.Draw(page)
    for row, (name, batch) in enumerate(zip(names, images, strict=True)):
        draw.text((6, row * height + height // 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(batch):
            large = ImageOps.scale(to_pil_image(image), factor, Image.Resampling.NEAREST)
            page.paste(large, (left + column * width, row * height))
    with replacing(path) as part:
        page.save(part, format="png")


def logarithmic_x(axes: Any, values: Iterable[float]) -> None:
    """Make an axis logarithmic, with ticks at those of the values that leave room for a label."""
    ticks = _apart(sorted(values))
    axes.set_xscale("log")
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def logarithmic_y(axes: Any) -> None:
    """Make an axis logarithmic, with labels between powers of ten where there is room."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    labelled = (2, 5) if high > 10 * low else range(2, 10)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(partial(_of_digits, labelled))
    axes.tick_params(axis="y", which="minor", labelsize=7)


def _of_digits(labelled: Sequence[int], value: float, position: int | None = None) -> str:
    """Label of a logarithmic axis' minor tick, if its first digit is one of those `labelled`."""
    first = round(value / 10 ** math.floor(math.log10(value)))
    return f"{value:g}" if first in labelled else ""


def _apart(values: Sequence[float]) -> list[float]:
    """Those that are far enough from their neighbours for a logarithmic axis."""
    kept: list[float] = []
    for value in values:
        if not kept or value > 1.15 * kept[-1]:
            kept.append(value)
    return kept
