"""How a claim is judged: checks with their bounds, tables, and panels of a figure.

A claim is evaluated from what the stages of `claim_stages.py` found for each seed, and gives
tables, panels of a figure and checks. A check compares the mean over the seeds with a bound. The
claim holds if all its checks do, in part if some do, and otherwise not; bounds stand below, each
with its reason, and no seed is left out.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from studies import Study

Row = Mapping[str, Any]
Seeds = Sequence[Mapping[str, Any]]
"""What each stage found, by its name without the seed, for each seed."""

COMPARABLE = 1.5
"""DDIM with 20 steps over DDPM with 1000 that the DDIM paper calls comparable: 6.84 over 4.73."""
SLACK = 1.05
"""Ratio of two distances that counts as equal; sets of images of one model differ by as much."""
SAME_FEATURES = 0.5
"""Distance of images of one latent over that of two images of a class."""
AS_GOOD = 1.1
"""Ratio that counts as as good, where two models are compared, or other images."""
NEAR_TEACHER = 2.25
"""Distance of Luhman's student over its teacher's that is "relatively good": 9.36 over 4.16."""
KEPT = 1.25
"""Distance of the student of four steps over its teacher's that counts as kept: 3.00 over 2.51."""
READABLE = 2.0
"""Distance over Gaussian noise's at which the report's Gamma step still draws images."""
CLEAR = 2.0
"""Difference in units of its scatter."""
SAME_IMAGES = 1e-4
"""Largest relative error of an image of a chain solved to 3e-6."""
FEWER = 0.5
"""Sweeps over steps."""
OF_THE_CALLS = 0.8
"""Ratio of times over that of network evaluations."""


@dataclass(frozen=True)
class Check:
    """A number of each seed, and the bound of their mean."""

    text: str
    values: Sequence[float]
    bound: float
    below: bool = True

    @property
    def holds(self) -> bool:
        """Whether the mean is on the right side of the bound, or on it."""
        mean = statistics.mean(self.values)
        return mean <= self.bound if self.below else mean >= self.bound


@dataclass(frozen=True)
class Panel:
    """Lines of a figure: for each x the values of all seeds; bars where x is a text."""

    x: str
    y: str
    lines: Mapping[str, Mapping[Any, Sequence[float]]]
    log: str = "xy"


@dataclass(frozen=True)
class Evidence:
    """What the numbers say of a claim: checks, tables under their titles, and panels."""

    checks: Sequence[Check]
    tables: Mapping[str, Sequence[Row]]
    panels: Sequence[Panel]

    @property
    def verdict(self) -> str:
        """The rule of all claims."""
        holding = [check.holds for check in self.checks]
        if all(holding):
            return "holds"
        return "holds in part" if any(holding) else "does not hold"


@dataclass(frozen=True)
class Claim:
    """A claim of the report.

    Args:
        title: A few words.
        place: Where the report says it.
        sentence: What it says.
        needs: Names of the stages, without the seed, or a function that gives them.
        evaluate: The rule.
        pictures: Of the first seed: caption, and file below the folder of a stage.
    """

    title: str
    place: str
    sentence: str
    needs: tuple[str, ...] | Callable[[Study], tuple[str, ...]]
    evaluate: Callable[[Study, Seeds], Evidence]
    pictures: Mapping[str, str] = field(default_factory=dict)

    def stages(self, study: Study) -> tuple[str, ...]:
        """Names of the stages, without the seed."""
        return self.needs(study) if callable(self.needs) else self.needs


def spread(values: Sequence[float]) -> str:
    """Mean and sample deviation.

    >>> spread([1.0, 2.0, 3.0]), spread([0.5])
    ('2 ± 1', '0.5')
    """
    mean = f"{statistics.mean(values):.3g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def at_most(text: str, values: Iterable[float], bound: float) -> Check:
    """A mean that is to be no larger."""
    return Check(text, [*values], bound)


def at_least(text: str, values: Iterable[float], bound: float) -> Check:
    """A mean that is to be no smaller."""
    return Check(text, [*values], bound, below=False)


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of each seed."""
    return [a / b for a, b in zip(above, below, strict=True)]
