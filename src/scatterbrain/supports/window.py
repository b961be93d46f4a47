"""The keys nearest to the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scatterbrain.call import Call
from scatterbrain.fields import check_int, repr_of
from scatterbrain.operators.device_constants import kept
from scatterbrain.operators.tracing import is_known, is_untraced
from scatterbrain.padding import EVERYTHING, PaddingInfo
from scatterbrain.supports.base import BlockLists, Support
from scatterbrain.supports.routed import lists_of_single_queries


@dataclass(frozen=True)
class Window(Support):
    """The keys nearest to the query's block.

    Bidirectional: a block whose centre is c sees ``[c - keys/2, c + keys/2)``, shifted to stay inside the sequence;
    with M keys for N queries c is scaled by M/N. Causal: query i of the block that starts at b sees keys ``max(0, b +
    block_q - keys) .. i`` (with keys < block_q the first queries of a block see none). With ``sinks`` the window is as
    many keys shorter, and the first ones of the sequence are seen too, by every query that may see them; a
    bidirectional window is shifted to stay behind them.

    Args:
        keys: keys per query in all, at least 1.
        block_q: queries that share a window; 16 is one register tile of the kernels.
        sinks: first keys of each row's valid range that every query sees, part of ``keys``. Language models attend to
            the first tokens whatever the query is (attention sinks: Xiao et al., ICLR 2024); the default 0 suits
            sequences without such tokens.

    Raises:
        TypeError, ValueError: a field is no int, or sinks > keys.
    """

    kind: ClassVar[str] = "window"
    can_be_prepared: ClassVar[bool] = True
    gains_from_order: ClassVar[bool] = True

    keys: int
    block_q: int = 16
    sinks: int = 0

    def __post_init__(self) -> None:
        check_int("Window", "keys", self.keys, 1)
        check_int("Window", "block_q", self.block_q, 1)
        check_int("Window", "sinks", self.sinks, 0)
        if self.sinks > self.keys:
            raise ValueError(
                f"Window: sinks are part of keys, expected at most keys={self.keys}, got sinks={self.sinks}"
            )

    def __repr__(self) -> str:
        return repr_of(self, if_set=("sinks",))

    def covers_every_key(self, queries: int, keys: int, is_causal: bool) -> bool:
        blocks = (queries + self.block_q - 1) // self.block_q
        within = blocks * self.block_q <= self.keys if is_causal else keys <= self.keys
        return is_known(within) or (self.sinks > 0 and is_known(keys <= self.sinks))

    def lists(self, call: Call, query_map: Tensor | None, key_map: Tensor | None) -> BlockLists:
        n, m, device = call.query.shape[2], call.key.shape[2], call.query.device
        if is_untraced() and call.padding.is_everything():
            span = kept(_span_of_everything, device, self, n, m, call.is_causal)
        else:
            span = window_span(self, n, m, call.padding, call.is_causal, device)
        return BlockLists(span=span, block_q=self.block_q, span_keys=self.keys - self.sinks, span_sinks=self.sinks)

    def for_cross_attention(self) -> tuple[Support, str]:
        own = lists_of_single_queries(self.keys)
        return own, f"{own}: a window lies where the number of target tokens puts it"


def window_span(support: Window, n: int, m: int, padding: PaddingInfo, is_causal: bool, device: torch.device) -> Tensor:
    """int32 (1 or B, blocks, 2), absolute [lo, hi) of each query block's window, without the sinks, before the causal
    edge cuts it."""
    keys = support.keys - support.sinks
    slot = torch.arange(-(-n // support.block_q), device=device)[None] * support.block_q
    q_first, q_length, k_first, k_length = 0, max(n, 1), 0, m
    if padding.query_range is not None:
        q_first, q_length = (
            padding.query_range[:, :1].long(),
            (padding.query_range[:, 1:] - padding.query_range[:, :1]).long().clamp(min=1),
        )
    if padding.key_range is not None:
        k_first = padding.key_range[:, :1].long()
        k_length = (padding.key_range[:, 1:] - padding.key_range[:, :1]).long()

    def at_most(limit: int | Tensor, position: Tensor) -> Tensor:
        return torch.minimum(position, limit) if isinstance(limit, Tensor) else position.clamp(max=limit)

    if is_causal:
        first = q_first + slot + (0 if padding.query_offset is None else padding.query_offset[:, None].long()) - k_first
        lo = (first + support.block_q - keys).clamp(min=0)
        hi = first + support.block_q
    else:
        lo = (2 * slot + support.block_q) * k_length // (2 * q_length) - keys // 2
        lo = at_most(k_length, at_most(k_length - keys, lo).clamp(min=support.sinks))
        hi = lo + keys
    hi = at_most(k_length, hi)
    return torch.stack([lo + k_first, torch.maximum(hi, lo) + k_first], -1).to(torch.int32)


def _span_of_everything(support: Window, n: int, m: int, is_causal: bool, device: torch.device) -> Tensor:
    """:func:`window_span` without padding, which depends on numbers alone."""
    return window_span(support, n, m, EVERYTHING, is_causal, device)
