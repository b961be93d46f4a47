"""Checks of the fields of supports and low-rank kernels."""

from __future__ import annotations


def check_int(owner: str, name: str, value: object, low: int) -> None:
    """An int of at least ``low``.

    Raises:
        TypeError, ValueError: naming the owner and the field.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < low:
        raise ValueError(f"{owner}: {name} must be at least {low}, got {value}")
