"""Argument checks of the public functions, all before any kernel runs. Every message says what was expected, what came
and what to do."""

from __future__ import annotations

import reprlib
import sys

import torch
from torch import Tensor

from scatterbrain.fields import not_a_bool
from scatterbrain.low_rank import LowRank, LowRankKernel, check_low_rank
from scatterbrain.operators.tracing import NO_FORWARD_MODE, is_readable
from scatterbrain.supports import Support, check_support

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_not_nested(*tensors: Tensor) -> None:
    if any(isinstance(t, Tensor) and t.is_nested for t in tensors):
        raise ValueError(
            "expected padded tensors, got a nested tensor; pad it (torch.nested.to_padded_tensor) and pass "
            "key_padding_mask, True = ignore"
        )


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


def check_no_forward_mode(*tensors: Tensor) -> None:
    """Forward-mode derivatives (torch.func.jvp, forward_ad) would be dropped without a word."""
    if torch.autograd.forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(NO_FORWARD_MODE)


def check_bool(name: str, value: object) -> None:
    error = not_a_bool(name, value)
    if error is not None:
        raise error


def check_scale(scale: float | None) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None for 1/sqrt(head_dim), got {type(scale).__name__}")
    if not abs(scale) <= sys.float_info.max:
        raise ValueError(f"scale must be finite, got {reprlib.repr(scale)}")


def check_offset(query_offset: int | Tensor, batch: int, is_causal: bool, device: torch.device) -> None:
    """An int, or an integer tensor of shape (batch,), which may be on another device than the tokens, ``device``, as
    long as it has values."""
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
        if query_offset.is_meta and device.type != "meta":
            raise ValueError(f"query_offset must be on the device of query, {device}, got {query_offset.device}")
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


def check_causal_support(support: Support) -> None:
    """A support for causal calls alone."""
    check_support(support, "causal_support")
    if support.is_bidirectional_only:
        raise ValueError(
            f"causal_support must be a support that causal attention can use, got {support}, which is bidirectional "
            "only; use Routed or Window"
        )


def check_causal_low_rank(low_rank: LowRankKernel) -> None:
    """A kernel for causal calls alone."""
    try:
        low_rank.check(is_causal=True)
    except ValueError as error:
        raise ValueError(
            f"causal_low_rank must be a kernel that causal attention can use, such as Quadratic(), got {low_rank}: "
            f"{error}"
        ) from error


def lists_keys(support: Support, is_causal: bool) -> bool:
    """Whether a support leaves anything without a low-rank part."""
    try:
        check_pair(support, None, is_causal)
    except ValueError:
        return False
    return True


def check_pair(support: Support, low_rank: LowRank, is_causal: bool) -> None:
    """Support and low-rank kernel, and what causality rules out."""
    error = not_a_bool("is_causal", is_causal, cure="a mask goes into key_padding_mask, or into support=Blocks")
    if error is not None:
        raise error
    check_support(support)
    check_low_rank(low_rank)
    support.check(low_rank, is_causal)
    if low_rank is not None:
        low_rank.check(is_causal)
