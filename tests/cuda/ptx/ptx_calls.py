"""Calls of the registered operators that together start every CUDA kernel. A new kernel needs a call here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from testkit import rand

import scatterbrain as sb

OPERATORS = torch.ops.scatterbrain
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CALLS: dict[str, Callable[[torch.dtype], object]] = {}
N, D = 70, 24


def call(name: str) -> Callable[[Callable[[torch.dtype], object]], Callable[[torch.dtype], object]]:
    def register(function: Callable[[torch.dtype], object]) -> Callable[[torch.dtype], object]:
        CALLS[name] = function
        return function

    return register


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(
    dtype: torch.dtype,
    support: object,
    low_rank: object,
    head_dim: int = D,
    queries: int = N,
    keys: int = N,
    **more: object,
) -> object:
    query = rand(1, 2, queries, head_dim, seed=1, dtype=dtype)
    key, value = rand(1, 1, keys, head_dim, seed=2, dtype=dtype), rand(1, 1, keys, 19, seed=3, dtype=dtype)
    if isinstance(low_rank, sb.Quadratic):
        more["statistics"] = sb.fit_statistics(query.float(), key.float(), low_rank.rank)
    return sb.attention(query, key, value, support, low_rank, return_lse=True, **more)


@call("projections")
def _projections(dtype: torch.dtype) -> None:
    x, weight = rand(2, 4, 300, 11, dtype=dtype), rand(1, 2, 5, 11, seed=1, dtype=accumulation(dtype))
    bias, grad = rand(1, 2, 5, seed=2, dtype=accumulation(dtype)), rand(2, 4, 300, 5, seed=3, dtype=accumulation(dtype))
    OPERATORS.project(x, weight, bias)
    OPERATORS.project_packed(x, weight, bias)
    OPERATORS.project_backward(grad, x, weight)


@call("windows")
def _windows(dtype: torch.dtype) -> None:
    attend(dtype, sb.Window(20, 8), None, is_causal=True)
    attend(dtype, sb.Window(29, 16, sinks=5), sb.Quadratic(3), is_causal=True)
    attend(dtype, sb.Window(24), sb.Quadratic(3), keys=530)


@call("lists")
def _lists(dtype: torch.dtype) -> None:
    padding = torch.zeros(1, N, dtype=torch.bool)
    padding[:, 60:] = True
    attend(dtype, sb.Routed(24, 16), sb.Favor(8), key_padding_mask=padding)
    attend(dtype, sb.Routed(32, block_q=1, block_k=8, window=16), sb.Favor(8), is_causal=True)
    attend(dtype, sb.Empty(), sb.Quadratic(3), is_causal=True)


@call("narrow heads")
def _narrow_heads(dtype: torch.dtype) -> None:
    attend(dtype, sb.Window(16), sb.Quadratic(3), head_dim=8)
    attend(dtype, sb.Window(16), sb.Centroid(4), head_dim=8)


@call("clusters")
def _clusters(dtype: torch.dtype) -> None:
    attend(dtype, sb.Window(16), sb.Centroid(5))


@call("cancelling queries")
def _cancelling(dtype: torch.dtype) -> None:
    """L overrates the listed keys by far, so that their queries are computed again."""
    query, key, value = (rand(1, 2, N, 16, seed=seed, dtype=dtype) for seed in range(3))
    query_map, key_map = (30 * torch.ones(1, 2, N, 3, dtype=accumulation(dtype)) for _ in range(2))
    query_map[..., -1] = key_map[..., -1] = 0
    key_map[:, :, 20:] = 0
    index = torch.arange(20, dtype=torch.int32).expand(1, 2, 1, 20).contiguous()
    count = torch.full((1, 2, 1), 20, dtype=torch.int32)
    for is_causal in (False, True):
        OPERATORS.attention(
            query,
            key,
            value,
            query_map,
            key_map,
            *[None] * 4,
            index,
            count,
            *[None] * 7,
            1,
            N + 30,
            1,
            0,
            0,
            is_causal,
            0.2,
        )
