"""Our nn.MultiheadAttention beside torch's with the same weights, and inputs for both."""

from __future__ import annotations

from typing import Any

import testkit
import torch
from testkit import with_biases
from torch import Tensor, nn

import scatterbrain as sb

E, H, N, L, S = 48, 4, 2, 21, 21
EVERY_KEY = sb.Window(64)  # all keys are in the window: the approximated path computes exact attention
INPUT = sb.Quadratic(9, "input")
QUADRATIC = dict(zip(("support", "low_rank"), sb.presets.quadratic()))


def padding(kind: type = bool, batch: int | None = N) -> Tensor:
    """The last row, or the only one, has 6 padded keys at its end."""
    mask = testkit.padding(S, [0] * ((batch or 1) - 1) + [6])
    return testkit.as_kind(mask if batch else mask[0], kind)


def inputs(batched: bool = True, batch_first: bool = False, same: bool = True, own_value: bool = False,
           kdim: int = E, vdim: int = E, length: int = L) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One tensor three times if ``same``, else key and value of their own; ``own_value``: the value is a third
    tensor."""

    def tokens(count: int, width: int) -> Tensor:
        shape = ((N, count) if batch_first else (count, N)) if batched else (count,)
        return torch.randn(*shape, width, requires_grad=True)

    query = tokens(length, E)
    key = query if same else tokens(S, kdim)
    return query, key, tokens(S, vdim) if own_value or kdim != vdim else key


def pair(support: Any, low_rank: Any = None, **arguments: Any) -> tuple[nn.MultiheadAttention, sb.MultiheadAttention]:
    """nn.MultiheadAttention with random biases, and sb.MultiheadAttention with its checkpoint."""
    theirs = with_biases(nn.MultiheadAttention(E, H, **arguments))
    ours = sb.MultiheadAttention(E, H, **arguments, support=support, low_rank=low_rank)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours
