"""Argument checks of the public functions, all before any kernel runs. Every message says what was expected, what came
and what to do."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from scatterbrain.low_rank import Coefficients, Favor, LowRank, Projections, Quadratic, RandomFeatures, Statistics
from scatterbrain.supports import SUPPORTS, Blocks, Empty, LSH, Support

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(query: Tensor, key: Tensor, *value: Tensor) -> None:
    """query (B, Hq, N, d), key (B, Hkv, M, d) and, where there is one, value (B, Hkv, M, dv): rank, dtype, device and
    sizes that fit together."""
    if not _fit(query, key, value[0] if value else key):
        _explain(query, key, *value)


def _fit(query: object, key: object, value: object) -> bool:
    """All of :func:`check_tensors` in one go: what a short sequence has to wait for."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return False
    q_shape, k_shape, v_shape = query.shape, key.shape, value.shape
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        return False
    (batch, q_heads, _, q_width), (k_batch, k_heads, k_tokens, k_width) = q_shape, k_shape
    v_batch, v_heads, v_tokens, v_width = v_shape
    return (
        query.dtype in DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
        and batch == k_batch == v_batch
        and q_width == k_width
        and k_heads == v_heads
        and k_tokens == v_tokens
        and q_width >= 1
        and v_width >= 1
        and q_heads >= 1
        and k_heads >= 1
        and q_heads % k_heads == 0
    )


def _explain(query: object, key: object, *value: object) -> None:
    """Raises for the first thing that does not fit."""
    for name, tensor in zip(("query", "key", "value"), (query, key, *value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, tokens, head_dim), got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}; convert it")
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"query, key and value must have one dtype, got query {query.dtype} and {name} "
                f"{tensor.dtype}; convert one of them"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"query, key and value must be on one device, got query on {query.device} and {name} on "
                f"{tensor.device}; move one of them"
            )
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} must have the batch of query, expected {query.shape[0]}, got {tensor.shape[0]}")
        if tensor.shape[1] < 1 or tensor.shape[3] < 1:
            raise ValueError(
                f"{name} must have at least one head and a head_dim of at least 1, got shape {tuple(tensor.shape)}"
            )
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key must have the head_dim of query, expected {query.shape[3]}, got {key.shape[3]}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"the heads of query must be a multiple of those of key, got {query.shape[1]} and {key.shape[1]}"
        )
    if value and value[0].shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"value must have the heads and tokens of key, expected {tuple(key.shape[1:3])}, got "
            f"{tuple(value[0].shape[1:3])}"
        )


def is_readable(*tensors: Tensor) -> bool:
    """Whether contents can be looked at here without waiting for a device, and without a value that a trace or vmap
    does not have."""
    return not torch.compiler.is_compiling() and all(
        t.device.type == "cpu" and not torch._C._functorch.is_batchedtensor(t) for t in tensors
    )


def check_mask(name: str, mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> None:
    """bool (batch, tokens), True = ignore."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name} must be a bool tensor, True = ignore, got {kind}; a mask of kept tokens is inverted "
            "with `mask == 0`"
        )
    if tuple(mask.shape) != (batch, tokens):
        raise ValueError(f"{name} must be (batch, tokens) = ({batch}, {tokens}), got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{name} must be on the device of query, {device}, got {mask.device}")


def check_no_forward_mode(*tensors: Tensor) -> None:
    """Forward-mode derivatives (torch.func.jvp, forward_ad) would be dropped without a word."""
    if torch.autograd.forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            "scatterbrain has no forward-mode derivatives (torch.func.jvp, forward_ad.make_dual); use reverse mode, or "
            "sb.reference.attention, which is plain torch"
        )


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_kind_of_statistics(statistics: object) -> None:
    if statistics is not None and not isinstance(statistics, (Statistics, Projections, RandomFeatures)):
        raise TypeError(
            f"statistics must be Statistics, Projections, RandomFeatures or None, got {type(statistics).__name__}"
        )


def check_scale(scale: float | None) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None for 1/sqrt(head_dim), got {type(scale).__name__}")
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale must be finite, got {scale}")


def check_offset(query_offset: int | Tensor, batch: int, is_causal: bool) -> None:
    """An int, or an integer tensor of shape (batch,)."""
    if type(query_offset) is int and query_offset == 0:
        return
    if isinstance(query_offset, Tensor):
        if query_offset.dtype not in (torch.int32, torch.int64) or tuple(query_offset.shape) != (batch,):
            raise ValueError(
                f"query_offset must be an int or an integer tensor of shape ({batch},), got "
                f"{query_offset.dtype} of shape {tuple(query_offset.shape)}"
            )
        if not is_causal:
            raise ValueError("query_offset shifts the causal edge and needs is_causal=True, got is_causal=False")
        if is_readable(query_offset) and bool((query_offset.long().abs() >= 2**31).any()):
            raise ValueError(f"query_offset must fit into 32 bits, got {query_offset.tolist()}")
        return
    if isinstance(query_offset, bool) or not isinstance(query_offset, (int, torch.SymInt)):
        raise TypeError(f"query_offset must be an int or a tensor, got {type(query_offset).__name__}")
    if isinstance(query_offset, int) and query_offset != 0 and not is_causal:
        raise ValueError(
            "query_offset shifts the causal edge and needs is_causal=True, got "
            f"query_offset={query_offset} with is_causal=False"
        )
    if isinstance(query_offset, int) and abs(query_offset) >= 2**31:
        raise ValueError(f"query_offset must fit into 32 bits, got {query_offset}")


def check_pair(support: Support, low_rank: LowRank, is_causal: bool) -> None:
    """Support and low-rank kernel, and what causality rules out."""
    if not isinstance(is_causal, bool):
        raise TypeError(
            f"is_causal must be a bool, got {type(is_causal).__name__}; a mask goes into "
            "key_padding_mask, or into support=Blocks"
        )
    if not isinstance(support, SUPPORTS):
        raise TypeError(
            f"support must be one of {', '.join(s.__name__ for s in SUPPORTS)}, got {type(support).__name__}"
        )
    if low_rank is not None and not isinstance(low_rank, (Quadratic, Favor)):
        raise TypeError(f"low_rank must be Quadratic, Favor or None, got {type(low_rank).__name__}")
    if isinstance(support, Empty) and low_rank is None:
        raise ValueError(
            "support=Empty() with low_rank=None leaves no attention at all; give a low-rank kernel or a support"
        )
    if is_causal and isinstance(support, LSH):
        raise ValueError(
            "support=LSH is bidirectional only: clusters come from a sort of the whole sequence, so "
            "later tokens would choose what earlier ones read; use Routed or Window"
        )
    if is_causal and isinstance(support, Blocks) and support.query_order is not None:
        raise ValueError(
            "Blocks with a query_order are bidirectional only; use is_causal=False or lists in the order of the queries"
        )
    if is_causal and isinstance(low_rank, Quadratic) and low_rank.statistics == "input":
        raise ValueError(
            "statistics='input' would leak the future in causal attention; pass statistics= from "
            "sb.fit_statistics with Quadratic(statistics='stored'), or use a calibrated module"
        )


def check_statistics(
    low_rank: LowRank,
    statistics: Coefficients | None,
    scale: float,
    batch: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    """That the low-rank kernel has what it needs, fitted for this scale, rank and head_dim."""
    if low_rank is None:
        if statistics is not None:
            raise ValueError(f"statistics={type(statistics).__name__} needs a low-rank kernel, got low_rank=None")
        return
    if isinstance(low_rank, Favor):
        if statistics is None:
            return
        if not isinstance(statistics, RandomFeatures):
            raise TypeError(f"low_rank=Favor takes statistics=RandomFeatures or None, got {type(statistics).__name__}")
        rows = low_rank.features // 2 if low_rank.hyperbolic else low_rank.features
        if tuple(statistics.projection.shape) != (rows, head_dim):
            raise ValueError(
                f"the projection of Favor must be (rows, head_dim) = ({rows}, {head_dim}), got "
                f"{tuple(statistics.projection.shape)}"
            )
        return
    if _fits(statistics, low_rank, scale, kv_heads, head_dim):
        return
    if low_rank.rank > head_dim:
        raise ValueError(f"Quadratic: rank must be at most head_dim={head_dim}, got {low_rank.rank}")
    if low_rank.statistics == "input":
        if statistics is not None:
            raise ValueError(
                "statistics= was given with Quadratic(statistics='input'), which fits its own; use statistics='stored'"
            )
        return
    if statistics is None:
        raise ValueError(
            "Quadratic(statistics='learned') needs its projections: pass statistics=sb.Projections(...), or use "
            "sb.ScatterbrainAttention, which owns them"
            if low_rank.statistics == "learned"
            else f"Quadratic(statistics={low_rank.statistics!r}) is not calibrated: pass statistics= from "
            f"sb.fit_statistics(query, key, rank={low_rank.rank}), use a calibrated "
            "sb.ScatterbrainAttention (sb.calibrate), or, bidirectional only, Quadratic(statistics='input')"
        )
    if not isinstance(statistics, (Statistics, Projections)):
        raise TypeError(
            "low_rank=Quadratic takes statistics=Statistics (sb.fit_statistics) or Projections, got "
            f"{type(statistics).__name__}"
        )
    if statistics.rank != low_rank.rank:
        raise ValueError(
            f"statistics have rank {statistics.rank}, low_rank asks for {low_rank.rank}; fit them with "
            f"rank={low_rank.rank}"
        )
    if statistics.query_projection.shape[-1] != head_dim:
        raise ValueError(f"statistics are for head_dim {statistics.query_projection.shape[-1]}, query has {head_dim}")
    r, d = low_rank.rank, head_dim
    if isinstance(statistics, Projections):
        if statistics.query_projection.shape[0] != q_heads or statistics.key_projection.shape[0] != kv_heads:
            raise ValueError(
                f"projections must be per head, expected {q_heads} query and {kv_heads} key heads, got "
                f"{statistics.query_projection.shape[0]} and {statistics.key_projection.shape[0]}"
            )
        _check_shapes(statistics, (q_heads, r, d), (q_heads, d), (q_heads,), (kv_heads, r, d), (kv_heads, d))
        return
    if abs(statistics.scale - scale) > 1e-6 * max(abs(scale), 1e-6):
        raise ValueError(
            f"statistics were fitted for scale={statistics.scale:.6g}, attention runs with "
            f"scale={scale:.6g}; fit them with the same scale"
        )
    leading = tuple(statistics.query_projection.shape[:-2])
    if leading not in ((kv_heads,), (batch, kv_heads), (1, kv_heads)):
        raise ValueError(
            f"statistics must be per key/value head, expected leading shape ({kv_heads},) or ({batch}, "
            f"{kv_heads}), got {leading}"
        )
    _check_shapes(statistics, (*leading, r, d), (*leading, d), (*leading, r, d), (*leading, d))


def _fits(statistics: object, low_rank: Quadratic, scale: float, kv_heads: int, head_dim: int) -> bool:
    """Whether these are statistics of this very kernel, per key/value head: the common case, without delay."""
    if type(statistics) is not Statistics or statistics.scale != scale or low_rank.statistics == "input":
        return False
    of_map, of_mean = (kv_heads, low_rank.rank, head_dim), (kv_heads, head_dim)
    return (
        low_rank.rank <= head_dim
        and statistics.query_projection.shape == of_map
        and statistics.key_projection.shape == of_map
        and statistics.query_mean.shape == of_mean
        and statistics.key_mean.shape == of_mean
    )


def _check_shapes(owner: Statistics | Projections, *shapes: tuple[int, ...]) -> None:
    """That the tensors of ``owner``, in the order of its fields, have these shapes."""
    for field, shape in zip(fields(owner), shapes):
        if tuple(getattr(owner, field.name).shape) != shape:
            raise ValueError(
                f"{type(owner).__name__}: {field.name} must be of shape {shape}, got "
                f"{tuple(getattr(owner, field.name).shape)}"
            )


def check_blocks(
    blocks: Blocks,
    batch: int,
    q_heads: int,
    kv_heads: int,
    q_tokens: int,
    key_range: Tensor | None,
    query_range: Tensor | None,
    k_tokens: int,
    offset: Tensor | None,
    is_causal: bool,
) -> None:
    """Shapes of caller-given lists and, on the CPU, that no entry lies past the keys or after everything its block may
    see."""
    if blocks.index.shape[0] != batch or blocks.index.shape[1] not in (q_heads, kv_heads):
        raise ValueError(
            f"Blocks: index must lead with (batch, heads) = ({batch}, {q_heads}) or ({batch}, "
            f"{kv_heads}), got {tuple(blocks.index.shape[:2])}"
        )
    expected = -(-q_tokens // blocks.block_q)
    if blocks.index.shape[2] != expected:
        raise ValueError(
            f"Blocks: {q_tokens} queries in blocks of {blocks.block_q} make {expected} lists, got index "
            f"with {blocks.index.shape[2]}"
        )
    order = blocks.query_order
    if order is not None and (order.shape[0] != batch or q_heads % order.shape[1] or order.shape[2] != q_tokens):
        raise ValueError(
            f"Blocks: query_order must be (batch, heads, queries) = ({batch}, {q_heads}, {q_tokens}), "
            f"got {tuple(order.shape)}"
        )
    if not is_readable(blocks.index, blocks.count, *(t for t in (key_range, query_range, offset) if t is not None)):
        return
    used = torch.arange(blocks.index.shape[3], dtype=torch.int32) < blocks.count[..., None]
    entry = torch.where(used, blocks.index, -1).long()
    first, end = (
        (0, k_tokens)
        if key_range is None
        else (key_range[:, 0, None, None, None].long(), key_range[:, 1, None, None, None].long())
    )
    start = first + entry * blocks.block_k
    if bool((used & (start >= end)).any()):
        raise ValueError(
            f"Blocks: index names key block {int(entry.max())}, past the {k_tokens} keys in blocks of "
            f"{blocks.block_k}; drop entries out of range"
        )
    if not is_causal or blocks.index.shape[2] == 0:
        return
    slot = (torch.arange(blocks.index.shape[2]) + 1) * blocks.block_q
    last = (
        slot
        if query_range is None
        else torch.minimum(query_range[:, 0, None].long() + slot, query_range[:, 1, None].long())
    ).clamp(max=q_tokens) - 1
    edge = last if offset is None else last + offset[:, None].long()
    if bool((used & (start > edge.reshape(-1, 1, blocks.index.shape[2], 1))).any()):
        raise ValueError(
            "Blocks: a list names keys after its block's last query, which breaks causality; leave them "
            "out or use is_causal=False"
        )
