"""Classes that are given as numbers from 0."""

from collections.abc import Iterable

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from ddim_pl.data.folders import MOST_SHOWN

MOST_CLASSES = 1_000_000
"""More are no classes but numbers of something else, as of images."""


def count_classes(labels: Iterable[int], source: str, *, report: bool = True) -> int:
    """Return the number of classes, the largest label and one; 0 without labels.

    Args:
        labels: Whole numbers from 0, in any order.
        source: What gives them, for the messages.
        report: Warn of labels between that no image has.

    Raises:
        ValueError: If there are more than `MOST_CLASSES`.
    """
    found = set(labels)
    count = max(found, default=-1) + 1
    if count > MOST_CLASSES:
        raise ValueError(
            f"{source} must give classes below {MOST_CLASSES}, got {count - 1}: number "
            "the classes from 0, or leave them out"
        )
    if report and len(found) < count:
        is_empty = np.ones(count, dtype=bool)
        is_empty[[*found]] = False
        empty = is_empty.nonzero()[0].tolist()
        shown = [*map(str, empty[:MOST_SHOWN]), *(["..."] if len(empty) > MOST_SHOWN else [])]
        rank_zero_warn(
            f"{source} gives no image the labels {', '.join(shown)}, though labels are counted "
            f"from 0 to {count - 1}: subtract 1 from all if they were counted from 1"
        )
    return count
