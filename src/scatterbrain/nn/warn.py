"""Warnings from modules that torch.compile may trace."""

from __future__ import annotations

import warnings

import torch


@torch.compiler.assume_constant_result
def warn(message: str, stacklevel: int) -> None:
    """``warnings.warn``; under torch.compile the warning is given once, when the call is traced."""
    warnings.warn(message, stacklevel=stacklevel)


def warn_once(message: str, said: set[str], stacklevel: int) -> None:
    """:func:`warn`, unless ``said`` has the message already."""
    if torch.compiler.is_compiling():  # once a trace; a graph would be made anew when the set changes
        warn(message, stacklevel)
    elif message not in said:
        said.add(message)
        warn(message, stacklevel + 1)
