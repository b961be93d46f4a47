"""No key: linear attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from scatterbrain.call import Call
from scatterbrain.supports.base import BlockLists, Support

if TYPE_CHECKING:
    from scatterbrain.low_rank import LowRankKernel


@dataclass(frozen=True)
class Empty(Support):
    """No key: attention is the low-rank kernel alone (linear attention)."""

    kind: ClassVar[str] = "empty"

    def check(self, low_rank: LowRankKernel | None, is_causal: bool) -> None:
        if low_rank is None:
            raise ValueError(
                "support=Empty() with low_rank=None leaves no attention at all; give a low-rank kernel or a support"
            )

    def lists(self, call: Call, query_map: Tensor | None, key_map: Tensor | None) -> BlockLists:
        return BlockLists()
