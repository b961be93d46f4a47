"""The public functions: checks, statistics to coordinates, supports to lists, then one operator."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scatterbrain import checks, lsh, ops  # noqa: F401  (ops registers the operators)
from scatterbrain.low_rank import (
    Coefficients,
    Favor,
    LowRank,
    Moments,
    Projections,
    Quadratic,
    Statistics,
    favor_log_features,
    favor_sizes,
    moments,
    quadratic_weights,
    random_projection,
    statistics_from_moments,
)
from scatterbrain.support import LSH, Blocks, Empty, Full, Routed, Support, Window

ANY_LENGTH = 2**31 - 1  # bound of spans over all keys: a constant, which does not tie a compiled graph to one length
LOW_RANK_CODE = {type(None): 0, Quadratic: 1, Favor: 2}


DEFAULT_LOW_RANK = Quadratic(rank=9)


class Rows(NamedTuple):
    """What of each batch row counts: masks, their [first, last + 1) ranges and the causal offset; None where everything
    does."""

    query_mask: Tensor | None
    key_mask: Tensor | None
    query_range: Tensor | None
    key_range: Tensor | None
    offset: Tensor | None


class Lists(NamedTuple):
    """A support as the operator takes it."""

    index: Tensor | None
    count: Tensor | None
    span: Tensor | None
    order: Tensor | None
    block_q: int
    block_k: int
    span_keys: int


def valid_range(mask: Tensor) -> Tensor:
    """int32 (B, 2), [first, last + 1) of the tokens that bool ``mask`` (B, tokens) does not ignore; (0, 0) if it
    ignores all."""
    tokens = mask.shape[1]
    if tokens == 0:
        return torch.zeros(mask.shape[0], 2, dtype=torch.int32, device=mask.device)
    position = torch.arange(tokens, device=mask.device)
    end = torch.where(mask, 0, position + 1).amax(1)
    first = torch.minimum(torch.where(mask, tokens, position).amin(1), end)
    return torch.stack([first, end], 1).to(torch.int32)


def rows_of(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    query_offset: int | Tensor,
) -> Rows:
    """Masks with their ranges; the query mask defaults to the key mask where there are as many queries as keys."""
    batch, n, m = query.shape[0], query.shape[2], key.shape[2]
    checks.check_mask("key_padding_mask", key_padding_mask, batch, m, query.device)
    checks.check_mask("query_padding_mask", query_padding_mask, batch, n, query.device)
    if query_padding_mask is None and key_padding_mask is not None and n == m:
        query_padding_mask = key_padding_mask
    key_range = None if key_padding_mask is None else valid_range(key_padding_mask)
    query_range = (
        None
        if query_padding_mask is None
        else key_range
        if query_padding_mask is key_padding_mask
        else valid_range(query_padding_mask)
    )
    offset = None
    if isinstance(query_offset, Tensor):
        offset = query_offset.to(device=query.device, dtype=torch.int32)
    elif not (isinstance(query_offset, int) and query_offset == 0):
        offset = torch.full((batch,), query_offset, dtype=torch.int32, device=query.device)
    return Rows(query_padding_mask, key_padding_mask, query_range, key_range, offset)


def fit_statistics(
    query: Tensor, key: Tensor, rank: int = 9, key_padding_mask: Tensor | None = None, scale: float | None = None
) -> Statistics:
    """Means and projections of the quadratic kernel from some queries and keys, pooled over the batch, per key/value
    head.

    Args:
        query: (B, Hq, N, d). key: (B, Hkv, M, d). Any floating dtype; computed in float64.
        rank: dimension of the coordinates, at most head_dim; 9 is the measured sweet spot.
        key_padding_mask: bool (B, M), True = ignore; also for the queries if N == M.
        scale: as :func:`attention`; default 1/sqrt(d).

    Returns:
        :class:`Statistics` in float32, for ``statistics=`` of :func:`attention`.

    Raises:
        ValueError: rank > head_dim, no valid token, or NaN or infinity among the valid tokens.
    """
    checks.check_tensors(query, key)
    checks.check_scale(scale)
    if query.shape[0] == 0:
        raise ValueError("fit_statistics: expected at least one batch row, got a batch of 0")
    checks.check_statistics(Quadratic(rank, "input"), None, 1.0, 0, 0, 0, query.shape[3])
    rows = rows_of(query, key, key_padding_mask, None, 0)
    scale = _default_scale(query, scale)
    m = checked_moments(query, key, scale, rows)
    return statistics_from_moments(m, rank, scale)


def unchecked_moments(query: Tensor, key: Tensor, scale: float, rows: Rows) -> Moments:
    """Moments of the valid tokens of one batch."""
    return moments(query, key, scale, rows.key_mask, rows.query_mask)


def checked_moments(query: Tensor, key: Tensor, scale: float, rows: Rows) -> Moments:
    """Moments of calibration tokens, refused where they are not finite or there are none."""
    m = unchecked_moments(query, key, scale, rows)
    if not bool(
        torch.isfinite(m.query_second).all() & torch.isfinite(m.key_second).all() & torch.isfinite(m.key_mean).all()
    ):
        raise ValueError(
            "calibration: query or key holds NaN or infinity among the valid tokens (or is too large to "
            "square); calibrate on clean inputs, mask bad tokens"
        )
    keys = key.shape[0] * key.shape[2] if rows.key_mask is None else int((~rows.key_mask).sum())
    if keys == 0 or not bool((m.tokens > 0).all()):
        raise ValueError(
            "calibration: expected at least one valid token, got none; check key_padding_mask (True = ignore)"
        )
    return m


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse + low-rank attention under one normaliser (Scatterbrain, Chen et al., NeurIPS 2021, section 4).

    ``out_i = sum_j w_ij v_j / sum_j w_ij`` with ``w_ij = exp(scale q_i.k_j)`` for the keys j in the support of i and
    ``w_ij = L_ij`` for all others that i may see.

    Args:
        query: (B, Hq, N, d); key: (B, Hkv, M, d); value: (B, Hkv, M, dv). float32, bfloat16, float16 or float64; any
            strides; Hq a multiple of Hkv.
        support: which keys are exact; default the 64 nearest.
        low_rank: the kernel of the rest; None drops the rest (sparse attention).
        key_padding_mask: bool (B, M), True = ignore. Padded tokens may hold anything, NaN included.
        is_causal: query i sees keys <= i + query_offset (top-left, as F.scaled_dot_product_attention).
        scale: factor of q.k; default 1/sqrt(d).
        statistics: what the low-rank kernel needs: :func:`fit_statistics` for Quadratic(statistics="stored").
        query_padding_mask: bool (B, N), True: the output row is zero; defaults to key_padding_mask if N == M.
        query_offset: int or (B,) integer tensor, position of the first query among the keys; causal only. Evaluating a
            sequence in chunks this way gives the rows of one pass where chunks start at multiples of the support's
            block_q; pooled causal routing alone looks at 15 queries before the chunk and then routes differently.
        return_lse: also return the log of each row's total weight, float32 (float64 for float64 inputs), (B, Hq, N).

    Returns:
        (B, Hq, N, dv) in value's dtype. A row without any weight is zero, and so are its gradients.

    Under autocast query, key and value are cast to its dtype; coordinates stay float32. Lists, statistics and
    stabilisers are constants of the backward pass.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came and the cure.
    """
    query, key, value = _autocast(query, key, value)
    checks.check_tensors(query, key, value)
    checks.check_no_forward_mode(query, key, value)
    checks.check_bool("return_lse", return_lse)
    checks.check_scale(scale)
    checks.check_kind_of_statistics(statistics)
    checks.check_pair(support, low_rank, is_causal)
    checks.check_offset(query_offset, query.shape[0], is_causal)
    rows = rows_of(query, key, key_padding_mask, query_padding_mask, query_offset)
    scale = _default_scale(query, scale)
    with _without_autocast(query.device):
        if isinstance(support, Full):
            # Nothing is left for the low-rank kernel. Without masks and offsets torch's own kernel is the fastest exact
            # attention there is.
            low_rank = statistics = None
            plain = all(field is None for field in rows) and not return_lse and query.shape[2] > 0 and key.shape[2] > 0
            if plain:
                return F.scaled_dot_product_attention(
                    query, key, value, is_causal=is_causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
                )
        query_map, key_map = coordinates(query, key, low_rank, statistics, scale, rows, is_causal)
        lists = lists_of(support, query, key, query_map, key_map, low_rank, scale, rows, is_causal)
        out, lse = torch.ops.scatterbrain.attention(
            query,
            key,
            value,
            query_map,
            key_map,
            lists.index,
            lists.count,
            lists.span,
            lists.order,
            rows.query_mask,
            rows.key_mask,
            rows.query_range,
            rows.key_range,
            rows.offset,
            LOW_RANK_CODE[type(low_rank)],
            lists.block_q,
            lists.block_k,
            lists.span_keys,
            is_causal,
            scale,
        )
    return (out, lse) if return_lse else out


def route(
    query: Tensor,
    key: Tensor,
    support: Routed | LSH,
    low_rank: LowRank = DEFAULT_LOW_RANK,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    statistics: Coefficients | None = None,
    query_padding_mask: Tensor | None = None,
    query_offset: int | Tensor = 0,
) -> Blocks:
    """The lists that :func:`attention` would use, for use as its ``support=``. No gradient flows through the choice;
    memory is linear in the tokens.

    Arguments as :func:`attention`; a ``low_rank`` that is not given has the rank of ``statistics``. Without
    ``statistics`` (and with nothing else to take coordinates from) the scores are those without a low-rank part.

    Returns:
        :class:`Blocks` with lists for every query head.
    """
    query, key = _autocast(query, key)
    checks.check_tensors(query, key)
    checks.check_scale(scale)
    if not isinstance(support, (Routed, LSH)):
        raise TypeError(
            f"route: support must be Routed or LSH, whose lists depend on the content, got {type(support).__name__}"
        )
    if isinstance(low_rank, Quadratic) and low_rank.statistics != "input" and statistics is None:
        low_rank = None
    if low_rank is DEFAULT_LOW_RANK and isinstance(statistics, (Statistics, Projections)):
        low_rank = Quadratic(statistics.rank)
    checks.check_pair(support, low_rank, is_causal)
    checks.check_offset(query_offset, query.shape[0], is_causal)
    rows = rows_of(query, key, key_padding_mask, query_padding_mask, query_offset)
    scale = _default_scale(query, scale)
    with _without_autocast(query.device), torch.no_grad():
        query_map, key_map = coordinates(query, key, low_rank, statistics, scale, rows, is_causal)
        return _content_lists(support, query, key, query_map, key_map, low_rank, scale, rows, is_causal)


# -------------------- steps


def _default_scale(query: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(query.shape[3]) if scale is None else float(scale)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The autocast region's dtype for float tensors, as torch's own attention does; float64 stays."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _without_autocast(device: torch.device) -> AbstractContextManager:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def coordinates(
    query: Tensor,
    key: Tensor,
    low_rank: LowRank,
    statistics: Coefficients | None,
    scale: float,
    rows: Rows,
    is_causal: bool,
):
    """query_map (B, Hq, N, r + 1) and key_map (B, Hkv, M, r + 1) of the low-rank kernel, float32 (float64 for float64
    inputs); None without one."""
    batch, q_heads, _, d = query.shape
    checks.check_statistics(low_rank, statistics, scale, batch, q_heads, key.shape[1], d)
    if low_rank is None:
        return None, None
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if isinstance(low_rank, Favor):
        return _favor_coordinates(query, key, low_rank, statistics, scale, rows, dtype)
    if low_rank.statistics == "input" and statistics is None:
        m = moments(query, key, scale, rows.key_mask, rows.query_mask, per_row=True)
        statistics = statistics_from_moments(m, low_rank.rank, scale)
    # The products of means and projections are formed in float64: they are tiny, and they are what cancels against the
    # tokens.
    weights = [w.to(dtype) for w in quadratic_weights(statistics.to(query.device, torch.float64), scale)]
    if isinstance(statistics, Statistics):  # constants of the backward pass, whatever they were made from
        weights = [w.detach() for w in weights]
    query_weight, query_offset, key_weight, key_offset = (w if _per_row(statistics) else w[None] for w in weights)
    return torch.ops.scatterbrain.project(query, query_weight, query_offset), torch.ops.scatterbrain.project(
        key, key_weight, key_offset
    )


def _per_row(statistics: Coefficients) -> bool:
    return isinstance(statistics, Statistics) and statistics.query_projection.dim() == 4


def _favor_coordinates(
    query: Tensor,
    key: Tensor,
    low_rank: Favor,
    statistics: Coefficients | None,
    scale: float,
    rows: Rows,
    dtype: torch.dtype,
):
    if statistics is None:
        projection = random_projection(
            low_rank.features, query.shape[3], low_rank.orthogonal, low_rank.hyperbolic, low_rank.seed
        )
    else:
        projection = statistics.projection
    projection = projection.detach().to(device=query.device, dtype=dtype)[None, None]
    maps = []
    for tokens, mask, size in zip((query, key), (rows.query_mask, rows.key_mask), favor_sizes(scale)):
        # A node of its own without a mask too: gradients of the features are then always added up before they join that
        # of the scores, to the same bits.
        tokens = tokens.view_as(tokens) if mask is None else tokens.masked_fill(mask[:, None, :, None], 0)
        projected = torch.ops.scatterbrain.project(tokens, projection * size, None)
        maps.append(torch.cat(favor_log_features(projected, tokens, size, low_rank.hyperbolic), -1))
    return maps[0], maps[1]


def window_span(support: Window, n: int, m: int, rows: Rows, is_causal: bool, device: torch.device) -> Tensor:
    """int32 (1 or B, blocks, 2), absolute [lo, hi) of each query block's window, before the causal edge cuts it."""
    slot = torch.arange(-(-n // support.block_q), device=device)[None] * support.block_q
    q_first, q_length, k_first, k_length = 0, max(n, 1), 0, m
    if rows.query_range is not None:
        q_first, q_length = (
            rows.query_range[:, :1].long(),
            (rows.query_range[:, 1:] - rows.query_range[:, :1]).long().clamp(min=1),
        )
    if rows.key_range is not None:
        k_first, k_length = rows.key_range[:, :1].long(), (rows.key_range[:, 1:] - rows.key_range[:, :1]).long()

    def at_most(limit: int | Tensor, position: Tensor) -> Tensor:
        return torch.minimum(position, limit) if isinstance(limit, Tensor) else position.clamp(max=limit)

    if is_causal:
        first = q_first + slot + (0 if rows.offset is None else rows.offset[:, None].long()) - k_first
        lo = (first + support.block_q - support.keys).clamp(min=0)
        hi = first + support.block_q
    else:
        lo = (2 * slot + support.block_q) * k_length // (2 * q_length) - support.keys // 2
        lo = at_most(k_length - support.keys, lo).clamp(min=0)
        hi = lo + support.keys
    hi = at_most(k_length, hi)
    return torch.stack([lo + k_first, torch.maximum(hi, lo) + k_first], -1).to(torch.int32)


def lists_of(
    support: Support,
    query: Tensor,
    key: Tensor,
    query_map: Tensor | None,
    key_map: Tensor | None,
    low_rank: LowRank,
    scale: float,
    rows: Rows,
    is_causal: bool,
) -> Lists:
    """Any support as lists."""
    n, m = query.shape[2], key.shape[2]
    if isinstance(support, Empty):
        return Lists(None, None, None, None, 16, 1, 0)
    if isinstance(support, Full):
        span = (torch.arange(2, dtype=torch.int32, device=query.device) * m).expand(1, -(-n // 16), 2).contiguous()
        return Lists(None, None, span, None, 16, 1, ANY_LENGTH)
    if isinstance(support, Window):
        return Lists(
            None,
            None,
            window_span(support, n, m, rows, is_causal, query.device),
            None,
            support.block_q,
            1,
            support.keys,
        )
    if isinstance(support, (Routed, LSH)):
        support = _content_lists(support, query, key, query_map, key_map, low_rank, scale, rows, is_causal)
    else:
        checks.check_blocks(
            support,
            query.shape[0],
            query.shape[1],
            key.shape[1],
            n,
            rows.key_range,
            rows.query_range,
            m,
            rows.offset,
            is_causal,
        )
    return Lists(support.index, support.count, None, support.query_order, support.block_q, support.block_k, 0)


def _content_lists(
    support: Routed | LSH,
    query: Tensor,
    key: Tensor,
    query_map: Tensor | None,
    key_map: Tensor | None,
    low_rank: LowRank,
    scale: float,
    rows: Rows,
    is_causal: bool,
) -> Blocks:
    if isinstance(support, LSH):
        return lsh.lsh_lists(query, key, support, rows.query_mask, rows.key_mask, rows.query_range, rows.key_range)
    # Always in float32, so that float64 copies of the same inputs are routed alike.
    as_float = lambda t: None if t is None else t.detach().float()  # noqa: E731
    index, count = torch.ops.scatterbrain.route(
        as_float(query),
        as_float(key),
        as_float(query_map),
        as_float(key_map),
        rows.query_mask,
        rows.key_mask,
        rows.query_range,
        rows.key_range,
        rows.offset,
        LOW_RANK_CODE[type(low_rank)],
        support.keys,
        support.block_q,
        support.block_k,
        support.window,
        is_causal,
        scale,
    )
    return Blocks._from_kernel(index, count, support.block_q, support.block_k)
