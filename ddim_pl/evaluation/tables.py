"""Tables of results, as CSV and Markdown; every file appears whole or not at all."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim_pl.files import replacing

Row = Mapping[str, Any]


def write_text(path: Path, text: str) -> None:
    """Write a text file, with a line break at its end."""
    with replacing(path) as part:
        part.write_text(text.rstrip("\n") + "\n")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV under the names of all their columns; numbers in full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; numbers with four significant digits.

    >>> print(markdown([{"steps": 10, "fd": 0.123456}]))
    | steps | fd |
    |---|---|
    | 10 | 0.1235 |
    <BLANKLINE>
    """
    names = _columns(rows)
    lines = [names, ["---"] * len(names)]
    lines += [[_cell(row.get(name, "")) for name in names] for row in rows]
    head, rule, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, rule.replace(" ", ""), *body]) + "\n"


def scatter(values: Tensor) -> float:
    """Standard error of the mean of values `(N,)`; 0 for a single one."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).split("\n")).replace("|", "\\|")
