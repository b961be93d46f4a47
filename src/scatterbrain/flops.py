"""FLOP counts of the operators, for torch.utils.flop_counter."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from scatterbrain import ops  # noqa: F401  (loads the operators)

_QUADRATIC = 1  # low_rank of the operators


def _pairs_and_features(
    query: tuple,
    value: tuple,
    query_map: tuple | None,
    index: tuple | None,
    span: tuple | None,
    low_rank: int,
    block_k: int,
    span_keys: int,
    keys: int,
    packed_rank: int,
) -> tuple[int, int, int]:
    listed = (index[-1] * block_k if index is not None else 0) + (span_keys if span is not None else 0)
    rank = packed_rank or (0 if query_map is None else query_map[-1] - 1)
    features = {0: 0, 1: (rank + 1) * (rank + 2) // 2, 2: rank}[low_rank]
    return min(listed, keys), rank, features


@register_flop_formula([torch.ops.scatterbrain.attention, torch.ops.scatterbrain.attention_with_state])
def attention_flops(
    query,
    key,
    value,
    query_map,
    key_map,
    index,
    count,
    span,
    query_order,
    query_mask,
    key_mask,
    query_range,
    key_range,
    query_offset,
    low_rank,
    block_q,
    block_k,
    span_keys,
    is_causal,
    scale,
    packed_rank=0,
    *,
    out_shape=None,
    **kwargs,
) -> int:
    """Multiply-adds counted twice: S and P V of listed pairs, x.y of the same, states of the keys and F H of the
    queries."""
    batch, heads, tokens, d = query
    dv = value[-1]
    pairs, rank, features = _pairs_and_features(
        query, value, query_map, index, span, low_rank, block_k, span_keys, key[2], packed_rank
    )
    return (
        2
        * batch
        * (heads * tokens * (pairs * (d + dv + rank) + features * (dv + 1)) + key[1] * key[2] * features * (dv + 1))
    )


@register_flop_formula(torch.ops.scatterbrain.attention_backward)
def attention_backward_flops(
    d_out,
    d_lse,
    out,
    lse,
    query,
    key,
    value,
    query_map,
    key_map,
    index,
    count,
    span,
    query_order,
    query_mask,
    key_mask,
    query_range,
    key_range,
    query_offset,
    low_rank,
    block_q,
    block_k,
    span_keys,
    is_causal,
    scale,
    packed_rank=0,
    state=None,
    scores=None,
    query_weight=None,
    key_weight=None,
    *,
    out_shape=None,
    **kwargs,
) -> int:
    """S and dP again, dq, dk and dv of listed pairs, x.y and both its gradients; states again, their gradient and both
    uses of it."""
    batch, heads, tokens, d = query
    dv = value[-1]
    pairs, rank, features = _pairs_and_features(
        query, value, query_map, index, span, low_rank, block_k, span_keys, key[2], packed_rank
    )
    queries = heads * tokens * (pairs * (3 * d + 2 * dv + 3 * rank) + 2 * features * (dv + 1))
    through_maps = sum(
        project_flops(tokens_of, weight, None)
        for tokens_of, weight in ((query, query_weight), (key, key_weight))
        if weight
    )
    return 2 * batch * (queries + key[1] * key[2] * 3 * features * (dv + 1)) + through_maps


@register_flop_formula(torch.ops.scatterbrain.project)
def project_flops(tokens, weight, bias, *, out_shape=None, **kwargs) -> int:
    """2 N d outputs per head."""
    return 2 * tokens[0] * tokens[1] * tokens[2] * tokens[3] * weight[2]


@register_flop_formula(torch.ops.scatterbrain.project_packed)
def project_packed_flops(tokens, weight, bias, *, out_shape=None, **kwargs) -> int:
    """As :func:`project_flops`."""
    return project_flops(tokens, weight, bias)


@register_flop_formula(
    [torch.ops.scatterbrain.quadratic_attention, torch.ops.scatterbrain.quadratic_attention_with_state]
)
def quadratic_attention_flops(
    query,
    key,
    value,
    query_weight,
    query_bias,
    key_weight,
    key_bias,
    index,
    count,
    span,
    *rest,
    out_shape=None,
    **kwargs,
) -> int:
    """Both projections, then as :func:`attention_flops`; routing counts nothing."""
    rows, (keys, _, block_q, block_k, span_keys) = rest[:6], rest[6:11]
    rank = query_weight[2] - 1
    if keys:  # the capacity of lists that routing makes
        index = (keys if block_k == 1 else keys // block_k + 1,)
    settings = (_QUADRATIC, block_q, block_k, span_keys, False, 1.0, rank)
    of_maps = project_flops(query, query_weight, None) + project_flops(key, key_weight, None)
    return of_maps + attention_flops(query, key, value, None, None, index, count, span, *rows, *settings)


@register_flop_formula(torch.ops.scatterbrain.project_backward)
def project_backward_flops(grad, tokens, weight, *, out_shape=None, **kwargs) -> int:
    """Twice the forward projection: by the tokens and by the weight."""
    return 2 * project_flops(tokens, weight, None)
