"""Supports: the pairs whose weight is exp(s). Positions count from a row's first token that is not padding."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from scatterbrain.reference.inputs import Inputs
from scatterbrain.reference.lsh import clusters
from scatterbrain.reference.routing import routed_lists
from scatterbrain.supports import LSH, Blocks, Empty, Full, Routed, Window


@functools.singledispatch
def support_mask(support: object, inputs: Inputs) -> Tensor:
    """bool (B, Hq, N, M): the pairs of a support. Those that nobody may see (padding, causal edge) do not count."""
    name = type(support).__name__
    raise TypeError(
        f"sb.reference knows no support {name}; define it with @sb.reference.support_mask.register on a function "
        f"(support: {name}, inputs: sb.reference.Inputs) that returns a bool tensor (B, Hq, N, M)"
    )


@functools.singledispatch
def computed_queries(support: object, inputs: Inputs) -> Tensor:
    """bool (B, Hq, N): queries that are computed at all; rows of the others are zero. By default all are."""
    return torch.ones(inputs.query.shape[:3], dtype=torch.bool, device=inputs.query.device)


@support_mask.register
def _(support: Full, inputs: Inputs) -> Tensor:
    return inputs.pairs(True)


@support_mask.register
def _(support: Empty, inputs: Inputs) -> Tensor:
    return inputs.pairs(False)


@support_mask.register
def _(support: Window, inputs: Inputs) -> Tensor:
    """Bidirectional: the ``keys`` keys around the block's centre, which is scaled by M / N, shifted to lie inside the
    sequence. Causal: the ``keys`` keys that end with the block's last query. ``sinks`` of the keys are the row's first
    ones, for every query; the others are a window of so many fewer keys, bidirectional behind the sinks."""
    chosen, sinks, block_q = inputs.pairs(False), support.sinks, support.block_q
    keys = support.keys - sinks
    for b, offset in enumerate(inputs.query_offset):
        (q_first, q_end), (k_first, k_end) = inputs.query_range(b), inputs.key_range(b)
        n, m = q_end - q_first, k_end - k_first
        for begin in range(0, n, block_q):
            if inputs.is_causal:
                end = q_first + begin + block_q + offset - k_first  # position after the block's last query
                low = max(end - keys, 0)
            else:
                centre = (2 * begin + block_q) * m // (2 * n)
                low = max(min(centre - keys // 2, m - keys), sinks)
                end = low + keys
            rows = slice(q_first + begin, min(q_first + begin + block_q, q_end))
            chosen[b, :, rows, k_first + low : k_first + max(min(end, m), low)] = True
            chosen[b, :, rows, k_first : k_first + min(sinks, m)] = True
    return chosen


@support_mask.register
def _(support: Routed, inputs: Inputs) -> Tensor:
    return _listed(inputs, *routed_lists(support, inputs), support.block_q, support.block_k)


@support_mask.register
def _(support: LSH, inputs: Inputs) -> Tensor:
    """A pair is exact if some round puts both into one cluster."""
    of_query, of_key = clusters(support, inputs)
    return (of_query[..., :, None] == of_key[..., None, :]).any(2)


@support_mask.register
def _(support: Blocks, inputs: Inputs) -> Tensor:
    batch, heads, n, _ = inputs.query.shape
    (rows, list_heads, blocks), lists = tuple(support.index.shape[:3]), -(-n // support.block_q)
    if rows not in (batch, 1) or list_heads not in (heads, inputs.key.shape[1], 1) or blocks != lists:
        raise ValueError(
            f"Blocks: index must lead with (batch, heads, lists) = {(batch, heads, lists)}, or as many heads as key, "
            f"or 1 for every row or head, got {(rows, list_heads, blocks)}"
        )
    index, count, order = support.index, support.count, support.query_order
    index, count = index.expand(batch, -1, -1, -1), count.expand(batch, -1, -1)
    order = None if order is None else order.expand(batch, -1, -1)
    return _listed(inputs, index, count, support.block_q, support.block_k, order, are_for_all_rows=rows == 1)


@computed_queries.register
def _(support: Blocks, inputs: Inputs) -> Tensor:
    """With an order, the queries that it names."""
    batch, heads, n, _ = inputs.query.shape
    order = support.query_order
    if order is None:
        return torch.ones(batch, heads, n, dtype=torch.bool, device=inputs.query.device)
    named = (order[..., None, :] == torch.arange(n, device=order.device)[:, None]).any(-1).expand(batch, -1, -1)
    return named.repeat_interleave(heads // order.shape[1], 1)


def _listed(
    inputs: Inputs,
    index: Tensor,
    count: Tensor,
    block_q: int,
    block_k: int,
    order: Tensor | None = None,
    are_for_all_rows: bool = False,
) -> Tensor:
    """Pairs of lists as :class:`scatterbrain.Blocks` describes them. Lists for all rows end with each row's keys."""
    chosen = inputs.pairs(False)
    batch, heads = chosen.shape[:2]
    for b in range(batch):
        k_first, k_end = inputs.key_range(b)
        for h in range(heads):
            slots = list(range(*inputs.query_range(b)))
            if order is not None:
                slots = order[b, h * order.shape[1] // heads].tolist()
            of_list = h * index.shape[1] // heads
            for t in range(-(-len(slots) // block_q)):
                queries = [i for i in slots[t * block_q : (t + 1) * block_q] if i >= 0]
                for entry in index[b, of_list, t, : int(count[b, of_list, t])].tolist():
                    low = k_first + entry * block_k
                    if low >= k_end and are_for_all_rows and entry * block_k < inputs.key.shape[2]:
                        break
                    if low >= k_end:
                        raise ValueError(
                            f"Blocks: index names key block {entry}, past the row's {k_end - k_first} keys"
                        )
                    chosen[b, h, queries, low : min(low + block_k, k_end)] = True
    return chosen
