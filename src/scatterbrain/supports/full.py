"""Every key: exact attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scatterbrain.call import Call
from scatterbrain.supports.base import BlockLists, Support

ANY_LENGTH = 2**31 - 1  # bound of spans over all keys: a constant, so a compiled graph is not tied to one length


@dataclass(frozen=True)
class Full(Support):
    """Every key: exact attention. The low-rank kernel has nothing left to do and is ignored."""

    kind: ClassVar[str] = "full"
    is_full: ClassVar[bool] = True

    def covers_every_key(self, queries: int, keys: int, is_causal: bool) -> bool:
        return True

    def lists(self, call: Call, query_map: Tensor | None, key_map: Tensor | None) -> BlockLists:
        n, m = call.query.shape[2], call.key.shape[2]
        span = torch.arange(2, dtype=torch.int32, device=call.query.device) * m
        return BlockLists(span=span.expand(1, -(-n // 16), 2).contiguous(), span_keys=ANY_LENGTH)
