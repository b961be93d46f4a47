"""Sketches of tokens: the signs of 64 random projections (SimHash, Charikar 2002), made by a randomised Hadamard
transform (Ailon & Chazelle 2006) three times over, as the hashes of Andoni et al. (2015) are."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 64
ROUNDS = 3
SMALL = 4  # a query's bit counts where its projection is more than the largest one divided by this
_WORD = (1 << 64) - 1


def sketches(token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of float32 tokens (n, d): signs (n, 64), whether a projection is negative; (n, 64), which of them count in a
    query, those of projections that are not small; and (n,), whether all are finite.

    A projection takes additions alone, in an order that is part of the definition: no bit depends on the machine.
    """
    width = BITS
    while width < token.shape[1]:
        width *= 2
    value = torch.zeros(len(token), width)
    value[:, : token.shape[1]] = token
    for step in range(ROUNDS):
        value = _hadamard(value * torch.tensor([_sign(step, column) for column in range(width)]))
    value = value[:, :BITS]
    size, is_finite = value.abs(), value.isfinite().all(1)
    return value < 0, (size * SMALL > size.amax(1, keepdim=True)) & is_finite[:, None], is_finite


def agreement(query: Tensor, counts: Tensor, key: Tensor) -> Tensor:
    """(n, m): in how many bits the signs (n, 64) and (m, 64) agree, or the query's do not count."""
    return ((query[:, None] == key[None]) | ~counts[:, None]).sum(-1)


def _hadamard(value: Tensor) -> Tensor:
    """Times a Walsh-Hadamard matrix, sums of neighbours first."""
    half = 1
    while half < value.shape[1]:
        pairs = value.unflatten(1, (-1, 2, half))
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        value = torch.stack([first + second, first - second], 2).flatten(1)
        half *= 2
    return value


def _sign(step: int, column: int) -> float:
    """1 or -1: the highest bit of a SplitMix64 number (Steele et al. 2014)."""
    z = ((step << 32) + column + 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return -1.0 if (z ^ (z >> 31)) >> 63 else 1.0
