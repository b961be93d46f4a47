"""Random numbers of a task: a generator is a function of what it is for, never of what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def generator_of(*key: int | str) -> torch.Generator:
    """A generator for ``key``, such as a seed and the number of a batch.

    Keys that differ give independent generators, also those whose parts joined are the same text, as (1, 23) and
    (12, 3) are.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def permutations(rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """The numbers from 0 to below ``length`` in random order, for each row: int64 (rows, length)."""
    return torch.rand(rows, length, generator=generator, dtype=torch.float64).argsort(dim=1)
