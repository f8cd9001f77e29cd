"""Checks of arguments, in one dialect: "name must be ..., got ...: remedy"."""

from typing import Any, get_args


def check_at_least(least: float, **values: float | None) -> None:
    """Check that numbers are large enough; None passes.

    >>> check_at_least(1, batch_size=0)
    Traceback (most recent call last):
    ValueError: batch_size must be at least 1, got 0

    Raises:
        ValueError: If one is smaller than `least`.
    """
    for name, value in values.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_one_of(choices: Any, **values: Any) -> None:
    """Check that values are among those of a `Literal` type.

    Raises:
        ValueError: If one is not.
    """
    for name, value in values.items():
        if value not in get_args(choices):
            raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")
