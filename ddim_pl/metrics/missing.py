"""Weights of a feature extractor that cannot be downloaded or read, and what helps who asks."""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingWeightsError(ValueError):
    """The weights of an extractor cannot be downloaded or read.

    Args:
        what: What is wrong and what helps everywhere; `otherwise` adds what else does.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}, or give its path as weights_path")
        self.what = what


@contextmanager
def otherwise(remedy: str) -> Iterator[None]:
    """Tell who asks for an extractor what else can be done without its weights.

    Args:
        remedy: What it is, after "or".

    Raises:
        ValueError: In place of a `MissingWeightsError`.
    """
    try:
        yield
    except MissingWeightsError as error:
        raise ValueError(f"{error.what}, or {remedy}") from error
