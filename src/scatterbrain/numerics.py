"""Sums whose last bit does not depend on the memory layout."""

from __future__ import annotations

from torch import Tensor


def squared_norm(tokens: Tensor) -> Tensor:
    """(..., 1). Summed along contiguous memory: the order of torch's sum, and with it the last bit, depends on the
    stride."""
    return (tokens if tokens.stride(-1) == 1 else tokens.contiguous()).square().sum(-1, keepdim=True)
