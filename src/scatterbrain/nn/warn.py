"""Warnings from modules that torch.compile may trace."""

from __future__ import annotations

import warnings

import torch


@torch.compiler.assume_constant_result
def warn(message: str, stacklevel: int) -> None:
    """``warnings.warn``; under torch.compile the warning is given once, when the call is traced."""
    warnings.warn(message, stacklevel=stacklevel)
