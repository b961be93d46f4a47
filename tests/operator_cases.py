"""Arguments of the operators, for tests of them: tensors, lists, projections, and samples of every kind."""

from __future__ import annotations

import torch
from torch import Tensor

import scatterbrain as sb

B, H, KV, N, D = 2, 2, 1, 37, 8


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(n: int = N, dtype: torch.dtype = torch.float32, batch: int = B) -> list[Tensor]:
    return [rand(batch, h, n, D, seed=seed, dtype=dtype) for seed, h in enumerate((H, KV, KV))]


def projections(dtype: torch.dtype = torch.float32, rank: int = 3) -> sb.Projections:
    shapes = ((H, rank, D), (H, D), (H,), (KV, rank, D), (KV, D))
    return sb.Projections(*(rand(*shape, seed=10 + i, dtype=dtype) / 3 for i, shape in enumerate(shapes)))


def some_lists(tokens: int = N, is_causal: bool = False) -> sb.Blocks:
    index = torch.tensor([[0, 2, -1], [0, 1, 2], [1, 3, 4]], dtype=torch.int32).expand(B, H, 3, 3).contiguous()
    count = torch.tensor([2, 3, 3], dtype=torch.int32).expand(B, H, 3).contiguous()
    return sb.Blocks(index.clamp(max=1) if is_causal and tokens < 20 else index, count, 16, 4 if is_causal else 8)


MASK = torch.arange(N).expand(B, N) >= torch.tensor([[N], [N - 9]])

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# What opcheck looks at where there is no gradient: the other two parts are about autograd.
WITHOUT_GRADIENT = ("test_schema", "test_faketensor")


def attention_arguments(kernel: str, lists: str, dtype: torch.dtype, is_causal: bool) -> tuple:
    """Arguments of the operator. The causal samples have masks with their ranges, and an offset."""
    maps = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [t.requires_grad_() for t in qkv(dtype=dtype)]
    coordinates = [None, None]
    if kernel != "none":
        coordinates = [rand(B, h, N, 4, seed=seed, dtype=maps).abs().requires_grad_() for seed, h in ((4, H), (5, KV))]
    index = count = span = order = offset = None
    block_q, block_k, span_keys = 16, 1, 0
    if lists in ("index", "order"):
        blocks = some_lists(is_causal=True)
        index, count, block_k = blocks.index, blocks.count, blocks.block_k
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
