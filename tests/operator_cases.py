"""Arguments of the operators: samples of every kernel, every form of list and every dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from testkit import KV, B, D, H, N, blocks, leaves, padding, qkv, rand
from torch import Tensor

import scatterbrain as sb
from scatterbrain.operators.arguments import QUADRATIC, AttentionArguments


def some_lists(block_k: int) -> sb.Blocks:
    return blocks([[0, 2], [0, 1, 2], [1, 3, 4]], 16, block_k)


MASK = padding(N, (0, 9))

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# Parts of opcheck without gradients: the other two are about autograd.
WITHOUT_GRADIENT = ("test_schema", "test_faketensor")


# What a call is without settings of its own; a tensor is None.
PLAIN = dict(
    low_rank=0,
    keys=0,
    window=0,
    sinks=0,
    pools=1,
    block_q=16,
    block_k=1,
    span_keys=0,
    span_sinks=0,
    is_causal=False,
    scale=0.2,
    packed_rank=0,
)


def operator_arguments(kind: type[NamedTuple], given: NamedTuple | None = None, **fields: object) -> Any:
    """Arguments of an operator (a tuple of scatterbrain.operators.arguments) by name: ``fields``, else those that
    ``given``, the arguments of another operator, has too, else a plain call's."""
    common = PLAIN if given is None else PLAIN | given._asdict()
    return kind(**{name: common.get(name) for name in kind._fields} | fields)


def detached(arguments: NamedTuple) -> Any:
    return type(arguments)(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))


def attention_arguments(kernel: str, lists: str, dtype: torch.dtype, is_causal: bool) -> AttentionArguments:
    """Arguments of the attention operator. The causal samples have masks with their ranges, and an offset."""
    fields: dict[str, object] = dict(zip(("query", "key", "value"), leaves(qkv(dtype=dtype))))
    maps = torch.float64 if dtype == torch.float64 else torch.float32
    if kernel == "centroid":
        fields["cluster_index"] = (torch.arange(N, dtype=torch.int32) % 5).expand(B, KV, N).contiguous()
        for seed, (name, shape) in enumerate(dict(representatives=(5, D), log_mass=(N,), query_mean=(D,)).items()):
            fields[name] = rand(B, KV, *shape, seed=seed + 4, dtype=maps)
    elif kernel != "none":
        for name, seed, heads in (("query_map", 4, H), ("key_map", 5, KV)):
            fields[name] = rand(B, heads, N, 4, seed=seed, dtype=maps).abs().requires_grad_()
    if lists in ("index", "order"):
        given = some_lists(4)
        fields |= dict(index=given.index, count=given.count, block_k=given.block_k)
    if lists == "order":
        order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
        fields["query_order"] = order.expand(B, H, N).to(torch.int32).contiguous()
    if lists in ("span", "sinks"):
        fields |= dict(span=torch.tensor([[[0, 12], [4, 16], [20, 32]]], dtype=torch.int32), span_keys=12)
        fields["span_sinks"] = 5 if lists == "sinks" else 0
    if is_causal:
        padding_range = torch.tensor([[0, N], [0, N - 9]], dtype=torch.int32)
        fields |= dict(query_mask=MASK, key_mask=MASK.clone())
        fields |= dict(query_range=padding_range, key_range=padding_range.clone())
        fields["query_offset"] = torch.tensor([0, 3], dtype=torch.int32)
    code = {"none": 0, "quadratic": QUADRATIC, "features": 2, "centroid": 3}[kernel]
    return operator_arguments(AttentionArguments, **fields, low_rank=code, is_causal=is_causal, scale=0.3)


SAMPLES = [
    (kernel, lists, dtype, is_causal)
    for kernel in ("quadratic", "features", "centroid", "none")
    for lists in ("span", "sinks", "index", "order", "empty")
    for is_causal in (False, True)
    for dtype in (DTYPES if lists == "index" and kernel in ("quadratic", "centroid") else [torch.float32])
    if not (is_causal and (lists == "order" or kernel == "centroid")) and not (lists == "empty" and kernel == "none")
]
