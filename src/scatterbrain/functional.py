"""The public functions: check, then execute."""

from __future__ import annotations

import math
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from scatterbrain import checks, execution, prepared
from scatterbrain.call import Call
from scatterbrain.low_rank import (
    Centroid,
    Clusters,
    Coefficients,
    Favor,
    LowRank,
    Quadratic,
    Statistics,
    check_coefficients,
    check_kind_of_coefficients,
    check_low_rank,
)
from scatterbrain.low_rank.centroid import find_clusters
from scatterbrain.low_rank.moments import checked_moments
from scatterbrain.low_rank.quadratic_coefficients import statistics_from_moments
from scatterbrain.operators.devices import check_device
from scatterbrain.operators.tracing import is_untraced, refuse_jit_trace
from scatterbrain.operators.unused import with_zero_gradients
from scatterbrain.padding import padding_info
from scatterbrain.supports import Blocks, Empty, Support, Window
from scatterbrain.supports.base import BlockLists

DEFAULT_LOW_RANK = Centroid(64)  # of bidirectional calls
CAUSAL_LOW_RANK = Quadratic(rank=9)  # of causal ones


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
    checks.check_not_nested(query, key)
    checks.check_tensors(query, key)
    checks.check_scale(scale)
    if query.shape[0] == 0:
        raise ValueError("fit_statistics: expected at least one batch row, got a batch of 0")
    Quadratic(rank).check_head_dim(query.shape[3])
    padding = padding_info(query, key, key_padding_mask, None, 0)
    scale = default_scale(query, scale)
    return statistics_from_moments(checked_moments(query, key, scale, padding), rank, scale)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    support: Support = Window(64),
    low_rank: LowRank | EllipsisType = ...,
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
        low_rank: the kernel of the rest; None drops the rest (sparse attention). Default: the one that takes
            ``statistics``; without them Centroid(64), which needs none, in causal calls Quadratic(9), which does.
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
    computes the same exact attention, to other rounding: nothing is faster on few tokens. Heads of fewer than 8
    dimensions are computed in float64 instead, since torch's kernel rounds their short rows too coarsely.

    Under autocast query, key and value are cast to its dtype; coordinates stay float32. Lists, statistics and
    stabilisers are constants of the backward pass.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came and the cure.
    """
    if low_rank is ...:
        low_rank = default_low_rank(statistics, is_causal)
    kept_as = None
    if (
        key_padding_mask is None
        and query_padding_mask is None
        and type(query_offset) is int
        and query_offset == 0
        and return_lse is False
    ):
        kept_as = prepared.key_of(query, key, value, support, low_rank, is_causal, scale, statistics)
        found = prepared.find(kept_as)
        if found is not None:
            out = execution.run_prepared(found, query, key, value, is_causal)
            if out is not None:
                return out
    checks.check_not_nested(query, key, value)
    if not getattr(support, "is_full", False):
        refuse_jit_trace()
    if _is_autocast(query):
        tokens = cast_for_autocast(query, key, value)
        with torch.autocast(query.device.type, enabled=False):
            settings = support, low_rank, key_padding_mask, is_causal, scale, statistics, query_padding_mask
            return attention(*tokens, *settings, query_offset, return_lse)
    checks.check_tensors(query, key, value)
    checks.check_no_forward_mode(query, key, value)
    checks.check_bool("return_lse", return_lse)
    checks.check_scale(scale)
    check_kind_of_coefficients(statistics)
    checks.check_pair(support, low_rank, is_causal)
    support.check_heads(query.shape[1])
    checks.check_offset(query_offset, query.shape[0], is_causal, query.device)
    unused: tuple[Tensor, ...] = ()
    if support.is_full:  # nothing is left for the low-rank kernel
        unused = () if statistics is None else statistics.parameters()
        low_rank = statistics = kept_as = None
    padding = padding_info(query, key, key_padding_mask, query_padding_mask, query_offset)
    call = Call(query, key, value, support, low_rank, statistics, default_scale(query, scale), padding, is_causal)
    check_coefficients(low_rank, statistics, call)
    out, lse = execution.run(call, return_lse, kept_as)
    if unused:
        out, lse = (None if t is None else with_zero_gradients(t, unused) for t in (out, lse))
    return (out, lse) if return_lse else out


def route(
    query: Tensor,
    key: Tensor,
    support: Support,
    low_rank: LowRank | EllipsisType = ...,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    statistics: Coefficients | None = None,
    query_padding_mask: Tensor | None = None,
    query_offset: int | Tensor = 0,
) -> Blocks:
    """The lists that :func:`attention` would use, for use as its ``support=``. No gradient flows through the choice;
    memory is linear in the tokens.

    Arguments as :func:`attention`. A kernel that lacks its ``statistics`` leaves the choice to the scores without a
    low-rank part.

    Returns:
        :class:`Blocks` with lists for every query head.
    """
    if low_rank is ...:
        low_rank = default_low_rank(statistics, is_causal)
    checks.check_not_nested(query, key)
    refuse_jit_trace()
    if _is_autocast(query):
        tokens = cast_for_autocast(query, key)
        with torch.autocast(query.device.type, enabled=False):
            settings = support, low_rank, key_padding_mask, is_causal, scale, statistics, query_padding_mask
            return route(*tokens, *settings, query_offset)
    checks.check_tensors(query, key)
    checks.check_scale(scale)
    if not getattr(type(support), "depends_on_content", False):
        raise TypeError(
            f"route: support must be Routed or LSH, whose lists depend on the content, got {type(support).__name__}"
        )
    check_low_rank(low_rank)
    check_kind_of_coefficients(statistics)
    if low_rank is not None and not low_rank.can_run(statistics):
        low_rank = None
    checks.check_pair(support, low_rank, is_causal)
    support.check_heads(query.shape[1])
    checks.check_offset(query_offset, query.shape[0], is_causal, query.device)
    check_device(query)
    padding = padding_info(query, key, key_padding_mask, query_padding_mask, query_offset)
    call = Call(query, key, None, support, low_rank, statistics, default_scale(query, scale), padding, is_causal)
    check_coefficients(low_rank, statistics, call)
    with torch.no_grad():
        call, _, maps = execution.kernel_inputs(call)
        lists = support.lists(call, *maps)
        return Blocks.from_lists(BlockLists(*map(_ordinary, lists)))


def cluster(
    query: Tensor,
    key: Tensor,
    clusters: int = 64,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    query_padding_mask: Tensor | None = None,
) -> Clusters:
    """The clusters that :func:`attention` with ``low_rank=Centroid(clusters)`` would make of the keys, for use as its
    ``statistics=``. Linear in the tokens; no gradient flows through the choice, and gradients reach the keys from where
    the clusters are used.

    Keys are compared in at most 16 dimensions, near the principal ones of up to 256 keys that are spread evenly over
    the sequence. Centres are taken from the same keys and moved once to the mean of those nearest to them (one step of
    Lloyd's algorithm); every key then joins the nearest centre. Equal inputs give equal clusters.

    Args:
        query: (B, Hq, N, d); key: (B, Hkv, M, d). float32, bfloat16, float16 or float64; any strides. The queries count
            by their mean alone.
        clusters: from 1 to 256.
        key_padding_mask, query_padding_mask, scale: as :func:`attention`.

    Returns:
        :class:`Clusters`, in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: naming the argument; NaN or infinity among the valid tokens.
    """
    checks.check_not_nested(query, key)
    refuse_jit_trace()
    if _is_autocast(query):
        tokens = cast_for_autocast(query, key)
        with torch.autocast(query.device.type, enabled=False):
            return cluster(*tokens, clusters, key_padding_mask, scale, query_padding_mask)
    checks.check_tensors(query, key)
    checks.check_scale(scale)
    check_device(query)
    low_rank = Centroid(clusters)
    padding = padding_info(query, key, key_padding_mask, query_padding_mask, 0)
    call = Call(query, key, None, Empty(), low_rank, None, default_scale(query, scale), padding, is_causal=False)
    found = find_clusters(call, clusters)
    return Clusters(*map(_ordinary, vars(found).values()))


def _ordinary(made: Any) -> Any:
    """A tensor made in inference mode as one that calls outside of it can keep for their gradients; all else as it
    is."""
    if not is_untraced() or not isinstance(made, Tensor) or not made.is_inference():
        return made
    with torch.inference_mode(False):
        return made.clone()


# -------------------- defaults and autocast


def default_low_rank(statistics: Coefficients | None, is_causal: bool) -> LowRank:
    """The kernel of a call that names none: of the size of its statistics, where it has some."""
    if statistics is None:
        return CAUSAL_LOW_RANK if is_causal is True else DEFAULT_LOW_RANK
    for low_rank in (DEFAULT_LOW_RANK, CAUSAL_LOW_RANK, Favor()):
        if isinstance(statistics, low_rank.takes):
            return low_rank.fitting(statistics)
    return CAUSAL_LOW_RANK


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
