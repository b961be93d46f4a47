"""Attention: exp(s) on the support, L off it, one normaliser."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scatterbrain.low_rank import Centroid, Clusters, Favor, Quadratic
from scatterbrain.reference.inputs import Inputs
from scatterbrain.reference.low_rank import log_kernel
from scatterbrain.reference.supports import computed_queries, support_mask
from scatterbrain.supports import Window


def visible(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    query_padding_mask: Tensor | None = None,
    query_offset: int | Tensor = 0,
) -> Tensor:
    """bool (B, 1, N, M): pairs that any attention may use: neither side padded, and j <= i + query_offset if causal."""
    return Inputs.of(
        query,
        key,
        None,
        key_padding_mask,
        is_causal,
        query_padding_mask=query_padding_mask,
        query_offset=query_offset,
    ).visible()


def default_low_rank(statistics: object, is_causal: bool) -> object:
    """The kernel of a call that names none: that of its statistics, of their size, where it has some."""
    if isinstance(statistics, Clusters):
        return Centroid(statistics.representatives.shape[2])
    if statistics is None:
        return Quadratic(9) if is_causal else Centroid(64)
    rows = getattr(statistics, "projection", None)
    if rows is not None:
        return Favor(rows.shape[0])
    projection = getattr(statistics, "query_projection", None)
    return Quadratic(9 if projection is None else projection.shape[-2])


def mask(
    support: object,
    query: Tensor,
    key: Tensor,
    low_rank: object = ...,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    statistics: object = None,
    query_padding_mask: Tensor | None = None,
    query_offset: int | Tensor = 0,
) -> Tensor:
    """bool (B, Hq, N, M): the pairs whose weight is exp(s). Arguments as :func:`scatterbrain.route`: a kernel without
    its statistics does not take part in routing."""
    low_rank = default_low_rank(statistics, is_causal) if low_rank is ... else low_rank
    if statistics is None and getattr(low_rank, "statistics", "input") != "input":
        low_rank = None
    inputs = Inputs.of(
        query, key, low_rank, key_padding_mask, is_causal, scale, statistics, query_padding_mask, query_offset
    )
    return support_mask(support, inputs) & inputs.visible()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    support: object = Window(64),
    low_rank: object = ...,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    statistics: object = None,
    query_padding_mask: Tensor | None = None,
    query_offset: int | Tensor = 0,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same arguments and meaning as :func:`scatterbrain.attention`, dense; computed and returned in ``dtype``,
    differentiable.

    Raises:
        TypeError, ValueError: where the arguments have no meaning. Those that only the operators refuse are taken.
    """
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"expected value (B, Hkv, M, dv) as key {tuple(key.shape)}, got {tuple(value.shape)}")
    low_rank = default_low_rank(statistics, is_causal) if low_rank is ... else low_rank
    inputs = Inputs.of(
        query, key, low_rank, key_padding_mask, is_causal, scale, statistics, query_padding_mask, query_offset
    )
    seen = inputs.visible() & computed_queries(support, inputs)[..., None]
    exact = support_mask(support, inputs) & seen
    rest = seen & ~exact

    inputs = inputs.to(dtype)
    value = value.to(dtype).masked_fill(inputs.key_padding[:, None, :, None], 0)
    key, value = (t.repeat_interleave(inputs.group, 1) for t in (inputs.key, value))
    s = (inputs.query * inputs.scale) @ key.transpose(-1, -2)
    if low_rank is None or not rest.any():  # nothing is left for it
        rest = torch.zeros_like(rest)
        exponent = factor = torch.zeros_like(s)
    else:
        exponent, factor = log_kernel(low_rank, inputs)
    weights, c = _weights(s, exponent, factor, exact, rest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    out = torch.where(empty, 0, weights @ value / torch.where(empty, 1, total))
    if not return_lse:
        return out
    lse = torch.where(empty, -math.inf, torch.log(torch.where(empty, 1, total)) + c).squeeze(-1)
    return out, lse


def _weights(s: Tensor, exponent: Tensor, factor: Tensor, exact: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """w exp(-c): exp(s) on the support, L off it, both relative to the largest exponent c of the row."""
    none = torch.finfo(s.dtype).min
    if s.shape[-1] == 0:
        return s, s.new_zeros(*s.shape[:-1], 1)
    peak = torch.maximum(s.detach().masked_fill(~exact, none), exponent.detach().masked_fill(~rest, none)).amax(
        -1, keepdim=True
    )
    c = torch.where(peak == none, 0, peak)
    sparse = torch.where(exact, torch.exp(torch.where(exact, s - c, 0)), 0)
    dense = torch.where(rest, torch.exp(torch.where(rest, exponent - c, 0)) * factor, 0)
    return sparse + dense, c
