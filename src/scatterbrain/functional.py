"""The public functions: checks, statistics to coordinates, supports to lists, then one operator."""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scatterbrain import autograd, checks, flops, prepared  # noqa: F401  (flops registers the operators' formulas)
from scatterbrain.coordinates import coordinate_dtype, coordinates, quadratic_projection
from scatterbrain.block_lists import BlockLists, content_lists, covers_every_key, lists_of
from scatterbrain.low_rank import (
    LOW_RANK_CODE,
    Coefficients,
    LowRank,
    Moments,
    Projections,
    Quadratic,
    Statistics,
    moments,
    statistics_from_moments,
)
from scatterbrain.padding import PaddingInfo, padding_info
from scatterbrain.padding import valid_range as valid_range
from scatterbrain.supports import LSH, Blocks, Full, Routed, Support, Window

DEFAULT_LOW_RANK = Quadratic(rank=9)


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
    padding = padding_info(query, key, key_padding_mask, None, 0)
    scale = default_scale(query, scale)
    m = checked_moments(query, key, scale, padding)
    return statistics_from_moments(m, rank, scale)


def unchecked_moments(query: Tensor, key: Tensor, scale: float, padding: PaddingInfo) -> Moments:
    """Moments of the valid tokens of one batch."""
    return moments(query, key, scale, padding.key_mask, padding.query_mask)


def checked_moments(query: Tensor, key: Tensor, scale: float, padding: PaddingInfo) -> Moments:
    """Moments of calibration tokens, refused where they are not finite or there are none."""
    m = unchecked_moments(query, key, scale, padding)
    if not bool(
        torch.isfinite(m.query_second).all() & torch.isfinite(m.key_second).all() & torch.isfinite(m.key_mean).all()
    ):
        raise ValueError(
            "calibration: query or key holds NaN or infinity among the valid tokens (or is too large to "
            "square); calibrate on clean inputs, mask bad tokens"
        )
    keys = key.shape[0] * key.shape[2] if padding.key_mask is None else int((~padding.key_mask).sum())
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

    Where the support covers every key, without masks, offset and ``return_lse``, F.scaled_dot_product_attention
    computes the same exact attention, to other rounding: nothing is faster on few tokens.

    Under autocast query, key and value are cast to its dtype; coordinates stay float32. Lists, statistics and
    stabilisers are constants of the backward pass.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came and the cure.
    """
    plan_key = None
    if (
        key_padding_mask is None
        and query_padding_mask is None
        and type(query_offset) is int
        and query_offset == 0
        and return_lse is False
    ):
        plan_key = prepared.key_of(query, key, value, support, low_rank, is_causal, scale, statistics)
        plan = prepared.find(plan_key)
        if plan is not None:
            if plan.planned is None:
                return _exact(query, key, value, is_causal, plan.scale)
            try:
                return plan.planned.attention(query, key, value)
            except autograd.StaleProjection:
                pass  # checked anew, and planned anew
    if _is_autocast(query):
        tokens = cast_for_autocast(query, key, value)
        with torch.autocast(query.device.type, enabled=False):
            return attention(
                *tokens,
                support,
                low_rank,
                key_padding_mask,
                is_causal,
                scale,
                statistics,
                query_padding_mask,
                query_offset,
                return_lse,
            )
    checks.check_tensors(query, key, value)
    checks.check_no_forward_mode(query, key, value)
    checks.check_bool("return_lse", return_lse)
    checks.check_scale(scale)
    checks.check_kind_of_statistics(statistics)
    checks.check_pair(support, low_rank, is_causal)
    batch, q_heads, n, head_dim = query.shape
    _, kv_heads, m, _ = key.shape
    checks.check_offset(query_offset, batch, is_causal)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    if isinstance(support, Full):  # nothing is left for the low-rank kernel
        low_rank = statistics = None
    checks.check_statistics(low_rank, statistics, scale, batch, q_heads, kv_heads, head_dim)
    padding = padding_info(query, key, key_padding_mask, query_padding_mask, query_offset)
    if not return_lse and padding.is_everything() and covers_every_key(support, n, m, is_causal):
        unused = []
        if isinstance(statistics, Projections):
            unused = [t for t in vars(statistics).values() if t.requires_grad]
        if _suits_torch(is_causal, scale) and (not unused or autograd.is_untraced()):
            prepared.keep(plan_key, statistics, scale, coordinate_dtype(query), None)
            out = _exact(query, key, value, is_causal, scale)
            return autograd.with_zero_gradients(out, unused) if unused else out
    if plan_key is not None and not _routes_in_float32(support, query):
        settings = _quadratic_settings(query, key, support, low_rank, None, scale, padding, is_causal)
        plan = prepared.keep(plan_key, statistics, scale, coordinate_dtype(query), settings)
        # As the calls after it: checkpointing wants what a call saves to be the same each time.
        if plan is not None:
            with contextlib.suppress(autograd.StaleProjection):
                return plan.planned.attention(query, key, value)
    out, lse = _run(query, key, value, support, low_rank, statistics, scale, padding, is_causal)
    return (out, lse) if return_lse else out


def _exact(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Tensor:
    """Exact attention without masks: on few tokens nothing is faster than torch's own kernel."""
    if query.shape[1] == key.shape[1]:
        return F.scaled_dot_product_attention(query, key, value, None, 0.0, is_causal, scale=scale)
    return F.scaled_dot_product_attention(query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=True)


def _suits_torch(is_causal: bool, scale: float) -> bool:
    """Whether torch's own kernel does what was asked: it multiplies masked scores by the scale, which makes NaN of -inf
    where the scale is not positive, and under vmap it is a loop."""
    return (scale > 0 or not is_causal) and (
        torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()
    )


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    support: Support,
    low_rank: LowRank,
    statistics: Coefficients | None,
    scale: float,
    padding: PaddingInfo,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the operator, from arguments that were checked."""
    plain = autograd.is_untraced()
    if plain and isinstance(low_rank, Quadratic):
        projection = quadratic_projection(query, key, low_rank, statistics, scale, padding)
        settings = _quadratic_settings(query, key, support, low_rank, projection, scale, padding, is_causal)
        return autograd.quadratic_attention(query, key, value, projection, settings)
    query_map, key_map = coordinates(query, key, low_rank, statistics, scale, padding, is_causal)
    lists = lists_of(support, query, key, query_map, key_map, low_rank, scale, padding, is_causal)
    operator = autograd.attention if plain else torch.ops.scatterbrain.attention
    return operator(
        query,
        key,
        value,
        query_map,
        key_map,
        *lists[:4],
        *_of_padding(padding),
        LOW_RANK_CODE[type(low_rank)],
        *lists[4:],
        is_causal,
        scale,
    )


def _routes_in_float32(support: Support, query: Tensor) -> bool:
    """Whether routing works on copies in another type, so that float64 copies of the same inputs are routed alike."""
    return isinstance(support, Routed) and query.dtype == torch.float64


def _quadratic_settings(
    query: Tensor,
    key: Tensor,
    support: Support,
    low_rank: Quadratic,
    projection: autograd.Projection | None,
    scale: float,
    padding: PaddingInfo,
    is_causal: bool,
) -> tuple:
    """``settings`` of :func:`autograd.quadratic_attention`, which routes by itself where it can. ``projection`` is needed
    where it cannot."""
    if isinstance(support, Routed) and not _routes_in_float32(support, query):
        lists = BlockLists(None, None, None, None, support.block_q, support.block_k, 0)
        keys, window = support.keys, support.window
    else:
        maps = autograd.project_both(query, key, projection) if isinstance(support, Routed) else (None, None)
        lists = lists_of(support, query, key, *maps, low_rank, scale, padding, is_causal)
        keys = window = 0
    return (*lists[:4], *_of_padding(padding), keys, window, *lists[4:], is_causal, scale)


def _of_padding(padding: PaddingInfo) -> tuple[Tensor | None, ...]:
    """The operators' arguments about padding."""
    return padding.query_mask, padding.key_mask, padding.query_range, padding.key_range, padding.offset


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
    if _is_autocast(query):
        tokens = cast_for_autocast(query, key)
        with torch.autocast(query.device.type, enabled=False):
            return route(
                *tokens,
                support,
                low_rank,
                key_padding_mask,
                is_causal,
                scale,
                statistics,
                query_padding_mask,
                query_offset,
            )
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
    padding = padding_info(query, key, key_padding_mask, query_padding_mask, query_offset)
    scale = default_scale(query, scale)
    with torch.no_grad():
        query_map, key_map = coordinates(query, key, low_rank, statistics, scale, padding, is_causal)
        return content_lists(support, query, key, query_map, key_map, low_rank, scale, padding, is_causal)


# -------------------- scale and autocast


def default_scale(query: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(query.shape[3]) if scale is None else float(scale)


def _is_autocast(query: object) -> bool:
    if not isinstance(query, Tensor):
        return False
    if not torch._C._is_any_autocast_enabled():
        return False  # the device's name costs more than all of this
    device = query.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The autocast region's dtype for float tensors, as torch's own attention does; float64 stays."""
    if not _is_autocast(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
