"""The record beside a module's statistics, in a buffer of its own: whether they are in place, for which scale, and sums
that tell the statistics that were fitted from those that were loaded in part, for another module, or never.

A loader may fill buffers one by one, skip some, or leave uninitialised memory in them, without a word to the module. So
the record is what counts, and it is believed only as far as its sums agree with the statistics. All of it is linear in
the statistics: an average of checkpoints has the average of their records. The sums are compared up to the rounding of
the coarsest type that holds the values, and the scale is kept in parts of a few bits each, so that a checkpoint that
was cast to a half type, and perhaps back, is as good as the half type is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_PARTS = 4  # of the scale
_FREQUENCIES = (1.0, 2.3, 3.7)  # of the weights of the sums: several, so that no two sets agree by chance
_ROW = 256  # entries that are summed at once
_TOLERANCE = 1e-3  # of a sum, relative to the root mean square; what averaging may round


class Record(NamedTuple):
    """What a record says.

    Args:
        scale: factor of q.k that the statistics hold for; None where they are not in place.
        problem: why the statistics cannot be used; "" where they can, or where there are none.
    """

    scale: float | None
    problem: str

    @property
    def is_good(self) -> bool:
        """Whether there are statistics that can be used."""
        return self.scale is not None and not self.problem


NOTHING = Record(None, "")


def size_of_record(count: int) -> int:
    """Numbers in the record of so many tensors."""
    return 1 + _PARTS + count * len(_FREQUENCIES)


@torch.no_grad()
def written_record(scale: float | None, statistics: Sequence[Tensor]) -> Tensor:
    """float64: 1 if the statistics are in place, else 0; the scale, else 0; the sums. For statistics that hold numbers,
    on their device."""
    device = statistics[0].device
    head = [0.0] * (1 + _PARTS) if scale is None else [1.0, *_parts(scale)]
    sums = [sums for t in statistics for sums in _sums(t)[0]]
    return torch.tensor(head + sums, dtype=torch.float64, device=device)


@torch.no_grad()
def read_record(record: Tensor, names: Sequence[str], statistics: Sequence[Tensor]) -> Record:
    """What ``record`` says of these statistics, which have these names."""
    flag, *numbers = record.tolist()
    parts, sums = numbers[:_PARTS], numbers[_PARTS:]
    tolerance_of_record = 4 * _rounding(record)
    scale = sum(parts) if abs(flag - 1) < 0.01 else None
    wrong = []
    for i, (name, tensor) in enumerate(zip(names, statistics, strict=True)):
        found, size = _sums(tensor)
        tolerance = max(_TOLERANCE, 4 * _rounding(tensor), tolerance_of_record) * size
        kept = sums[i * len(found) : (i + 1) * len(found)]
        if not all(abs(a - b) <= tolerance for a, b in zip(found, kept)):  # false for NaN too
            wrong.append(name)
    problem = ""
    if wrong:
        some = "" if len(wrong) == len(names) else f" ({', '.join(wrong)})"
        problem = f"the statistics{some} are not what the record beside them (calibration) was made of"
    elif scale is None and not abs(flag) < 0.01:
        problem = f"the record beside the statistics (calibration) starts with {flag:.3g}, expected 0 or 1"
    return Record(scale, problem)


def _rounding(tensor: Tensor) -> float:
    """Relative spacing of the coarsest type that holds every entry."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    held = (dtype for dtype in dtypes if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor))
    return torch.finfo(next(held, tensor.dtype)).eps


def _parts(scale: float) -> list[float]:
    """Numbers of eight bits each, and the rest, that add up to ``scale``."""
    parts = []
    for _ in range(_PARTS - 1):
        parts.append(float(torch.tensor(scale, dtype=torch.float64, device="cpu").bfloat16()))
        scale -= parts[-1]
    return [*parts, scale]


def _sums(tensor: Tensor) -> tuple[list[float], float]:
    """Weighted sums of the entries, and their root mean square, both relative to the root of their number. The sums
    have the same bits for any number of threads and any place in memory."""
    entries = tensor.detach().to(device="cpu", dtype=torch.float64).flatten()
    root = max(entries.numel(), 1) ** 0.5
    if entries.numel() % _ROW:
        entries = F.pad(entries, (0, -entries.numel() % _ROW))
    entries = entries.view(-1, _ROW)
    rows = (_weights(entries.numel()) * entries).sum(-1).tolist()
    # fsum rounds once; where it overflows or meets NaN the sum is not finite, and agrees with nothing
    return [_exact_sum(row) / root for row in rows], float(torch.linalg.vector_norm(entries)) / root


def _exact_sum(numbers: list[float]) -> float:
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):
        return math.nan


@functools.lru_cache(maxsize=16)
def _weights(count: int) -> Tensor:
    with torch.inference_mode(False):
        frequencies = torch.tensor(_FREQUENCIES, dtype=torch.float64, device="cpu")
        weights = torch.cos(frequencies[:, None] * torch.arange(count, dtype=torch.float64, device="cpu"))
        return weights.unflatten(-1, (-1, _ROW))
