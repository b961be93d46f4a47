"""FLOP counts of the operators, for torch.utils.flop_counter. Multiply-adds are counted twice."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from scatterbrain.operators import library  # noqa: F401  (loads the operators)
from scatterbrain.operators.arguments import (
    AttentionArguments,
    QuadraticArguments,
    after_projection,
    backward_arguments,
)
from scatterbrain.operators.fakes import list_capacity

_OPS = torch.ops.scatterbrain


class _Counts(NamedTuple):
    """Multiply-adds of the low-rank part of attention, besides those of the values.

    Args:
        listed: keys of a query at most.
        rank: of a listed pair's low-rank weight.
        features: rows of a state, each of which a query meets.
        exponents: of a query with all clusters.
        rows_per_key: rows of the state that a key adds to.
    """

    listed: int
    rank: int
    features: int
    exponents: int
    rows_per_key: int


def _counts(a: AttentionArguments) -> _Counts:
    """Tensors are given as their shapes."""
    listed = 0 if a.span is None else a.span_keys + a.span_sinks
    listed += a.index[-1] * a.block_k if a.index is not None else 0
    _, _, keys, d = a.key
    listed = min(listed, keys)
    if a.representatives is not None:  # a key belongs to one cluster, and its weight is looked up
        clusters = a.representatives[2]
        return _Counts(listed, 0, clusters, clusters * d, 1)
    rank = a.packed_rank or (0 if a.query_map is None else a.query_map[-1] - 1)
    features = {0: 0, 1: (rank + 1) * (rank + 2) // 2, 2: rank}[a.low_rank]
    return _Counts(listed, rank, features, 0, features)


@register_flop_formula([_OPS.attention, _OPS.attention_with_state])
def attention_flops(*arguments, out_shape=None, **kwargs) -> int:
    """S and P V of listed pairs, x.y of the same, states of the keys and F H of the queries."""
    a = AttentionArguments(*arguments)
    batch, heads, tokens, d = a.query
    _, kv_heads, keys, dv = a.value
    n = _counts(a)
    queries = heads * tokens * (n.listed * (d + dv + n.rank) + n.features * (dv + 1) + n.exponents)
    return 2 * batch * (queries + kv_heads * keys * n.rows_per_key * (dv + 1))


@register_flop_formula(_OPS.attention_backward)
def attention_backward_flops(*arguments, state=None, scores=None, query_weight=None, key_weight=None,
                             out_shape=None, **kwargs) -> int:  # fmt: skip
    """S and dP again, dq, dk and dv of listed pairs, x.y and both its gradients; states again, their gradient and both
    uses of it; exponents of clusters again, and their gradients by queries and representatives."""
    _, a, kept = backward_arguments(arguments)
    batch, heads, tokens, d = a.query
    _, kv_heads, keys, dv = a.value
    n = _counts(a)
    listed = n.listed * (3 * d + 2 * dv + 3 * n.rank)
    queries = heads * tokens * (listed + 2 * n.features * (dv + 1) + 3 * n.exponents)
    weights = ((a.query, kept.query_weight or query_weight), (a.key, kept.key_weight or key_weight))
    through_maps = sum(project_flops(of, weight, None) for of, weight in weights if weight)
    return 2 * batch * (queries + kv_heads * keys * 3 * n.rows_per_key * (dv + 1)) + through_maps


@register_flop_formula([_OPS.project, _OPS.project_packed])
def project_flops(tokens, weight, bias, *, out_shape=None, **kwargs) -> int:
    """2 N d outputs per head."""
    batch, heads, n, d = tokens
    _, _, outputs, _ = weight
    return 2 * batch * heads * n * d * outputs


@register_flop_formula([_OPS.quadratic_attention, _OPS.quadratic_attention_with_state])
def quadratic_attention_flops(*arguments, out_shape=None, **kwargs) -> int:
    """Both projections, then as :func:`attention_flops`; routing counts nothing."""
    a = QuadraticArguments(*arguments)
    index = (list_capacity(a, a.key[2]),) if a.keys else a.index
    _, _, outputs, _ = a.query_weight
    projected = after_projection(a, None, None, index, None)._replace(packed_rank=outputs - 1)
    of_maps = project_flops(a.query, a.query_weight, None) + project_flops(a.key, a.key_weight, None)
    return of_maps + attention_flops(*projected)


@register_flop_formula(_OPS.project_backward)
def project_backward_flops(grad, tokens, weight, *, out_shape=None, **kwargs) -> int:
    """Twice the forward projection: by the tokens and by the weight."""
    return 2 * project_flops(tokens, weight, None)
