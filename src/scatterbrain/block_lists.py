"""From a support to lists of keys, the form in which the operator takes every support."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from scatterbrain import autograd, checks, lsh
from scatterbrain.low_rank import LOW_RANK_CODE, LowRank
from scatterbrain.padding import EVERYTHING, PaddingInfo
from scatterbrain.supports import LSH, Blocks, Empty, Full, Routed, Support, Window

ANY_LENGTH = 2**31 - 1  # bound of spans over all keys: a constant, which does not tie a compiled graph to one length


class BlockLists(NamedTuple):
    """A support as the operator takes it."""

    index: Tensor | None
    count: Tensor | None
    span: Tensor | None
    order: Tensor | None
    block_q: int
    block_k: int
    span_keys: int


def window_span(support: Window, n: int, m: int, padding: PaddingInfo, is_causal: bool, device: torch.device) -> Tensor:
    """int32 (1 or B, blocks, 2), absolute [lo, hi) of each query block's window, before the causal edge cuts it."""
    slot = torch.arange(-(-n // support.block_q), device=device)[None] * support.block_q
    q_first, q_length, k_first, k_length = 0, max(n, 1), 0, m
    if padding.query_range is not None:
        q_first, q_length = (
            padding.query_range[:, :1].long(),
            (padding.query_range[:, 1:] - padding.query_range[:, :1]).long().clamp(min=1),
        )
    if padding.key_range is not None:
        k_first, k_length = (
            padding.key_range[:, :1].long(),
            (padding.key_range[:, 1:] - padding.key_range[:, :1]).long(),
        )

    def at_most(limit: int | Tensor, position: Tensor) -> Tensor:
        return torch.minimum(position, limit) if isinstance(limit, Tensor) else position.clamp(max=limit)

    if is_causal:
        first = q_first + slot + (0 if padding.offset is None else padding.offset[:, None].long()) - k_first
        lo = (first + support.block_q - support.keys).clamp(min=0)
        hi = first + support.block_q
    else:
        lo = (2 * slot + support.block_q) * k_length // (2 * q_length) - support.keys // 2
        lo = at_most(k_length - support.keys, lo).clamp(min=0)
        hi = lo + support.keys
    hi = at_most(k_length, hi)
    return torch.stack([lo + k_first, torch.maximum(hi, lo) + k_first], -1).to(torch.int32)


@functools.lru_cache(maxsize=32)
def _kept_span(support: Window, n: int, m: int, is_causal: bool, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # usable by a later call that trains
        return window_span(support, n, m, EVERYTHING, is_causal, device)


def _span(support: Window, n: int, m: int, padding: PaddingInfo, is_causal: bool, device: torch.device) -> Tensor:
    """:func:`window_span`, kept where it depends on nothing but numbers: a dozen small operations."""
    if autograd.is_untraced() and padding.is_everything() and device.type == "cpu":
        return _kept_span(support, n, m, is_causal, device)
    return window_span(support, n, m, padding, is_causal, device)


def covers_every_key(support: Support, n: int, m: int, is_causal: bool) -> bool:
    """Whether every query's support holds all keys that it may see, for n queries and m keys without padding or
    offset, and there are any of both. Lists that a caller gives are not looked into. Lengths of a graph for any length
    count as unknown: never a condition on them."""
    is_number = type(n) is type(m) is int and not torch.compiler.is_compiling()
    known = bool if is_number else _always
    if not (known(n > 0) and known(m > 0)):
        return False
    if isinstance(support, Window):
        block_q = support.block_q
        return known((n + block_q - 1) // block_q * block_q <= support.keys if is_causal else m <= support.keys)
    if isinstance(support, Full):
        return True
    if isinstance(support, LSH):
        return known(m <= support.keys // support.rounds)
    if not isinstance(support, Routed):
        return False
    if support.block_k == 1:
        return known(m <= support.keys) or (is_causal and known(n <= support.keys))
    listed = (support.keys - support.window) // support.block_k
    if is_causal:  # the last query has the most blocks before its window
        return known((n - support.window) // support.block_k <= listed)
    # The first query's window, cut by the start of the sequence, is the smallest.
    nearby = -(-(support.window // 2) // support.block_k)
    return known(m <= (listed + nearby) * support.block_k)


def _always(condition: bool | torch.SymBool) -> bool:
    """Whether the condition holds for every length that a traced graph serves."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def lists_of(
    support: Support,
    query: Tensor,
    key: Tensor,
    query_map: Tensor | None,
    key_map: Tensor | None,
    low_rank: LowRank,
    scale: float,
    padding: PaddingInfo,
    is_causal: bool,
) -> BlockLists:
    """Any support as lists."""
    n, m = query.shape[2], key.shape[2]
    if isinstance(support, Empty):
        return BlockLists(None, None, None, None, 16, 1, 0)
    if isinstance(support, Full):
        span = (torch.arange(2, dtype=torch.int32, device=query.device) * m).expand(1, -(-n // 16), 2).contiguous()
        return BlockLists(None, None, span, None, 16, 1, ANY_LENGTH)
    if isinstance(support, Window):
        return BlockLists(
            None,
            None,
            _span(support, n, m, padding, is_causal, query.device),
            None,
            support.block_q,
            1,
            support.keys,
        )
    if isinstance(support, (Routed, LSH)):
        support = content_lists(support, query, key, query_map, key_map, low_rank, scale, padding, is_causal)
    else:
        checks.check_blocks(
            support,
            query.shape[0],
            query.shape[1],
            key.shape[1],
            n,
            padding.key_range,
            padding.query_range,
            m,
            padding.offset,
            is_causal,
        )
    return BlockLists(support.index, support.count, None, support.query_order, support.block_q, support.block_k, 0)


def content_lists(
    support: Routed | LSH,
    query: Tensor,
    key: Tensor,
    query_map: Tensor | None,
    key_map: Tensor | None,
    low_rank: LowRank,
    scale: float,
    padding: PaddingInfo,
    is_causal: bool,
) -> Blocks:
    if isinstance(support, LSH):
        return lsh.lsh_lists(
            query, key, support, padding.query_mask, padding.key_mask, padding.query_range, padding.key_range
        )
    # Always in float32, so that float64 copies of the same inputs are routed alike. The operator itself brings half types
    # to it; below autograd there is nothing to detach from.
    if autograd.is_untraced():
        operator = autograd.route
        as_float = lambda t: t.float() if t is not None and t.dtype == torch.float64 else t  # noqa: E731
    else:
        operator = torch.ops.scatterbrain.route
        as_float = lambda t: None if t is None else t.detach().float()  # noqa: E731
    index, count = operator(
        as_float(query),
        as_float(key),
        as_float(query_map),
        as_float(key_map),
        padding.query_mask,
        padding.key_mask,
        padding.query_range,
        padding.key_range,
        padding.offset,
        LOW_RANK_CODE[type(low_rank)],
        support.keys,
        support.block_q,
        support.block_k,
        support.window,
        is_causal,
        scale,
    )
    return Blocks._from_kernel(index, count, support.block_q, support.block_k)
