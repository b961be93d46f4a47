"""The definition: dense attention with one normaliser, in float64, gradients by autograd. Slow, obvious, and the oracle
of every test."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scatterbrain import checks, functional
from scatterbrain.low_rank import Coefficients, Favor, LowRank, Quadratic, Statistics
from scatterbrain.low_rank.favor import favor_sizes, seeded_projection
from scatterbrain.low_rank.moments import moments
from scatterbrain.low_rank.quadratic_coefficients import statistics_from_moments
from scatterbrain.supports import LSH, Blocks, Empty, Full, Routed, Support, Window


def visible(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    query_padding_mask: Tensor | None = None,
    query_offset: int | Tensor = 0,
) -> Tensor:
    """bool (B, 1, N, M): pairs that any attention may use: neither side padded, and j <= i + query_offset if causal."""
    padding = functional.padding_info(query, key, key_padding_mask, query_padding_mask, query_offset)
    batch, n, m = query.shape[0], query.shape[2], key.shape[2]
    seen = torch.ones(batch, 1, n, m, dtype=torch.bool, device=query.device)
    if padding.key_mask is not None:
        seen &= ~padding.key_mask[:, None, None, :]
    if padding.query_mask is not None:
        seen &= ~padding.query_mask[:, None, :, None]
    if is_causal:
        offset = (
            torch.zeros(batch, dtype=torch.long, device=query.device)
            if padding.query_offset is None
            else padding.query_offset.long()
        )
        edge = torch.arange(n, device=query.device)[None, :] + offset[:, None]
        seen &= (torch.arange(m, device=query.device)[None, None, :] <= edge[:, :, None])[:, None]
    return seen


def mask(
    support: Support,
    query: Tensor,
    key: Tensor,
    low_rank: LowRank = Quadratic(rank=9),
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    statistics: Coefficients | None = None,
    query_padding_mask: Tensor | None = None,
    query_offset: int | Tensor = 0,
) -> Tensor:
    """bool (B, Hq, N, M): the pairs whose weight is exp(s). Arguments as :func:`scatterbrain.attention`; supports that
    look at the content are routed here exactly as there."""
    checks.check_tensors(query, key)
    checks.check_scale(scale)
    checks.check_pair(support, low_rank or Quadratic(1), is_causal)  # an empty mask needs no low-rank kernel
    checks.check_offset(query_offset, query.shape[0], is_causal)
    seen = visible(query, key, key_padding_mask, is_causal, query_padding_mask, query_offset)
    batch, heads, n, _ = query.shape
    m = key.shape[2]
    seen = seen.expand(batch, heads, n, m)
    if isinstance(support, Full):
        return seen.clone()
    if isinstance(support, Empty):
        return torch.zeros_like(seen)
    if isinstance(support, (Routed, LSH)):
        support = functional.route(
            query,
            key,
            support,
            low_rank,
            key_padding_mask,
            is_causal,
            scale,
            statistics,
            query_padding_mask,
            query_offset,
        )
    padding = functional.padding_info(query, key, key_padding_mask, query_padding_mask, query_offset)
    if isinstance(support, Blocks):
        pass
    chosen = torch.zeros_like(seen)
    for b in range(batch):
        q_first, q_end = (0, n) if padding.query_range is None else padding.query_range[b].tolist()
        k_first, k_end = (0, m) if padding.key_range is None else padding.key_range[b].tolist()
        offset = 0 if padding.query_offset is None else int(padding.query_offset[b])
        if isinstance(support, Window):
            for start in range(q_first, q_end, support.block_q):
                lo, hi = _window(
                    support, start - q_first, q_end - q_first, k_end - k_first, start + offset - k_first, is_causal
                )
                chosen[b, :, start : min(start + support.block_q, q_end), k_first + lo : k_first + hi] = True
        else:
            _fill_blocks(chosen[b], support, b, q_first, q_end, k_first, k_end)
    return chosen & seen


def _window(support: Window, block_start: int, n: int, m: int, position: int, is_causal: bool) -> tuple[int, int]:
    """[lo, hi) among m keys for the block that starts at ``block_start`` of n queries; ``position``: of its first query
    among the keys."""
    if is_causal:
        return min(max(0, position + support.block_q - support.keys), m), max(0, min(position + support.block_q, m))
    centre = (2 * block_start + support.block_q) * m // (2 * n)
    lo = max(0, min(centre - support.keys // 2, m - support.keys))
    return lo, min(lo + support.keys, m)


def _fill_blocks(chosen: Tensor, blocks: Blocks, b: int, q_first: int, q_end: int, k_first: int, k_end: int) -> None:
    heads, n, _ = chosen.shape
    for h in range(heads):
        list_head = h * blocks.index.shape[1] // heads
        order = (
            list(range(q_first, q_end))
            if blocks.query_order is None
            else blocks.query_order[b, h * blocks.query_order.shape[1] // heads].tolist()
        )
        for start in range(0, len(order), blocks.block_q):
            t = start // blocks.block_q
            queries = [i for i in order[start : start + blocks.block_q] if i >= 0]
            for entry in blocks.index[b, list_head, t, : int(blocks.count[b, list_head, t])].tolist():
                lo = k_first + entry * blocks.block_k
                chosen[h, queries, lo : min(lo + blocks.block_k, k_end)] = True


def _ordered(order: Tensor, heads: int) -> Tensor:
    """bool (B, Hq, N, 1): queries that some slot of ``query_order`` names; the others are not computed."""
    batch, list_heads, n = order.shape
    named = torch.zeros(batch, list_heads, n + 1, dtype=torch.bool, device=order.device)
    named.scatter_(2, torch.where(order < 0, n, order).long(), True)
    return named[..., :n].repeat_interleave(heads // list_heads, 1)[..., None]


def log_kernel(
    query: Tensor,
    key: Tensor,
    low_rank: LowRank,
    statistics: Coefficients | None,
    scale: float,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(log scale, factor), both (B, Hq, N, M), of L = exp(log scale) factor, in the dtype of query. Padded tokens must
    already be zero."""
    batch, heads, _, d = query.shape
    group = heads // key.shape[1]
    repeat = lambda t: t.repeat_interleave(group, -3)  # noqa: E731  (over heads of a (..., H, tokens, width) tensor)
    if isinstance(low_rank, Favor):
        projection = seeded_projection(low_rank, d) if statistics is None else statistics.projection
        projection = projection.detach().to(query)
        logs = []
        for tokens, size in zip((query, repeat(key)), favor_sizes(scale)):
            x = tokens * size
            exponent = x @ projection.T
            exponent = torch.cat([exponent, -exponent], -1) if low_rank.hyperbolic else exponent
            logs.append(exponent - x.square().sum(-1, keepdim=True) / 2 - math.log(low_rank.features) / 2)
        q_peak, k_peak = (t.detach().amax(-1, keepdim=True) for t in logs)
        factor = torch.exp(logs[0] - q_peak) @ torch.exp(logs[1] - k_peak).transpose(-1, -2)
        return q_peak + k_peak.transpose(-1, -2), factor
    if statistics is None:
        statistics = statistics_from_moments(
            moments(query, key, scale, key_mask, query_mask, per_row=True), low_rank.rank, scale
        )
    scaled = query * scale
    if isinstance(statistics, Statistics):
        pq, a, pk, b = (
            getattr(statistics, n).detach().to(query)
            for n in ("query_projection", "query_mean", "key_projection", "key_mean")
        )
        kv_centred = key - b[..., None, :]
        y = kv_centred @ pk.transpose(-1, -2)
        kappa = kv_centred @ a[..., :, None]
        pq, a, b = (t.repeat_interleave(group, -3) if t is pq else t.repeat_interleave(group, -2) for t in (pq, a, b))
        x = (scaled - a[..., None, :]) @ pq.transpose(-1, -2)
        rho = scaled @ b[..., :, None]
    else:
        pq, b, c, pk, a = (
            getattr(statistics, n).to(query)
            for n in ("query_projection", "query_bias", "query_log_scale", "key_projection", "key_bias")
        )
        x, rho = scaled @ pq.transpose(-1, -2), scaled @ b[..., :, None] + c[..., None, None]
        y, kappa = key @ pk.transpose(-1, -2), key @ a[..., :, None]
    t = x @ repeat(y).transpose(-1, -2)
    return rho + repeat(kappa).transpose(-1, -2), (1 + t / 2).square()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    support: Support = Window(64),
    low_rank: LowRank = Quadratic(rank=9),
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    statistics: Coefficients | None = None,
    query_padding_mask: Tensor | None = None,
    query_offset: int | Tensor = 0,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same arguments and meaning as :func:`scatterbrain.attention`, dense; computed and returned in ``dtype``,
    differentiable."""
    checks.check_tensors(query, key, value)
    checks.check_scale(scale)
    checks.check_pair(support, low_rank, is_causal)
    checks.check_offset(query_offset, query.shape[0], is_causal)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    padding = functional.padding_info(query, key, key_padding_mask, query_padding_mask, query_offset)
    seen = visible(query, key, key_padding_mask, is_causal, query_padding_mask, query_offset)
    if isinstance(support, Full):
        low_rank = statistics = None
    if isinstance(support, Blocks) and support.query_order is not None:
        seen = seen & _ordered(support.query_order, query.shape[1])
    exact = mask(
        support, query, key, low_rank, key_padding_mask, is_causal, scale, statistics, query_padding_mask, query_offset
    )

    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if padding.query_mask is not None:
        query = query.masked_fill(padding.query_mask[:, None, :, None], 0)
    if padding.key_mask is not None:
        key, value = (t.masked_fill(padding.key_mask[:, None, :, None], 0) for t in (key, value))
    group = query.shape[1] // key.shape[1]
    s = (query * scale) @ key.repeat_interleave(group, 1).transpose(-1, -2)
    rest = seen & ~exact
    if low_rank is None:
        rest = torch.zeros_like(exact)
        exponent, factor = torch.zeros_like(s), torch.zeros_like(s)
    else:
        exponent, factor = log_kernel(query, key, low_rank, statistics, scale, padding.key_mask, padding.query_mask)
    weights, c = _weights(s, exponent, factor, exact, rest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    out = torch.where(empty, 0, weights @ value.repeat_interleave(group, 1) / torch.where(empty, 1, total))
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
