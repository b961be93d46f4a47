"""Arguments of the operators: samples of every kernel, every form of list and every dtype."""

from __future__ import annotations

import torch
from testkit import KV, B, H, N, blocks, leaves, padding, qkv, rand

import scatterbrain as sb


def some_lists(block_k: int) -> sb.Blocks:
    return blocks([[0, 2], [0, 1, 2], [1, 3, 4]], 16, block_k)


MASK = padding(N, (0, 9))

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# Parts of opcheck without gradients: the other two are about autograd.
WITHOUT_GRADIENT = ("test_schema", "test_faketensor")


def attention_arguments(kernel: str, lists: str, dtype: torch.dtype, is_causal: bool) -> tuple:
    """Arguments of the attention operator. The causal samples have masks with their ranges, and an offset."""
    maps = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = leaves(qkv(dtype=dtype))
    coordinates = [None, None]
    if kernel != "none":
        coordinates = [rand(B, h, N, 4, seed=seed, dtype=maps).abs().requires_grad_() for seed, h in ((4, H), (5, KV))]
    index = count = span = order = offset = None
    block_q, block_k, span_keys = 16, 1, 0
    if lists in ("index", "order"):
        lists_of_keys = some_lists(4)
        index, count, block_k = lists_of_keys.index, lists_of_keys.count, lists_of_keys.block_k
    if lists == "order":
        order = (
            torch.randperm(N, generator=torch.Generator().manual_seed(1)).expand(B, H, N).to(torch.int32).contiguous()
        )
    if lists == "span":
        span, span_keys = torch.tensor([[[0, 12], [4, 16], [20, 32]]], dtype=torch.int32), 12
    masks = ranges = (None, None)
    if is_causal:
        masks = (MASK, MASK.clone())
        ranges = (torch.tensor([[0, N], [0, N - 9]], dtype=torch.int32),) * 2
        ranges, offset = (ranges[0], ranges[1].clone()), torch.tensor([0, 3], dtype=torch.int32)
    code = {"none": 0, "quadratic": 1, "features": 2}[kernel]
    return (
        *tensors,
        *coordinates,
        index,
        count,
        span,
        order,
        *masks,
        *ranges,
        offset,
        code,
        block_q,
        block_k,
        span_keys,
        is_causal,
        0.3,
    )


SAMPLES = [
    (kernel, lists, dtype, is_causal)
    for kernel in ("quadratic", "features", "none")
    for lists in ("span", "index", "order", "empty")
    for is_causal in (False, True)
    for dtype in (DTYPES if lists == "index" and kernel == "quadratic" else [torch.float32])
    if not (lists == "order" and is_causal) and not (lists == "empty" and kernel == "none")
]
