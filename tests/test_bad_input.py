"""Mistakes in the arguments of a call raise before any kernel runs, naming the argument, what came and the cure."""

from __future__ import annotations

import math

import pytest
import torch
from bad_calls import KV, B, D, H, N, assert_refused, attend, numpy, qkv
from testkit import rand

import scatterbrain as sb

# id: (call, error, words that the message holds, in this order)
CALLS = {
    # tensors
    "query is a list": (lambda: attend([1.0], *qkv()[1:]), TypeError, "query must be a tensor, got list"),
    "value is None": (lambda: attend(*qkv(value=None)), TypeError, "value must be a tensor"),
    "query without batch": (
        lambda: attend(*qkv(query=rand(H, N, D))),
        ValueError,
        r"query .*batch.* got shape \(4, 40, 8\)",
    ),
    "key without heads": (lambda: attend(*qkv(key=rand(B, N, D))), ValueError, r"key .*got shape"),
    "integer query": (
        lambda: attend(*qkv(query=torch.zeros(B, H, N, D, dtype=torch.int64))),
        TypeError,
        "query must be float32.*got torch.int64.*convert",
    ),
    "complex key": (
        lambda: attend(*qkv(key=rand(B, KV, N, D).to(torch.complex64))),
        TypeError,
        "key must be float32.*complex64",
    ),
    "float8 value": (
        lambda: attend(*qkv(value=rand(B, KV, N, D).to(torch.float8_e5m2))),
        TypeError,
        "value must be float32.*float8_e5m2",
    ),
    "two dtypes": (
        lambda: attend(*qkv(value=rand(B, KV, N, D, dtype=torch.bfloat16))),
        TypeError,
        "one dtype.*value torch.bfloat16; convert",
    ),
    "two devices": (
        lambda: attend(*qkv(key=torch.empty(B, KV, N, D, device="meta"))),
        ValueError,
        "one device.*cpu.*key on meta; move",
    ),
    "two batches": (
        lambda: attend(*qkv(key=rand(3, KV, N, D))),
        ValueError,
        "key must have the batch of query, expected 2, got 3",
    ),
    "no head": (lambda: attend(*qkv(key=rand(B, 0, N, D))), ValueError, "key must have at least one head"),
    "head_dim 0": (
        lambda: attend(*qkv(query=rand(B, H, N, 0), key=rand(B, KV, N, 0))),
        ValueError,
        "query .*head_dim of at least 1",
    ),
    "value_dim 0": (lambda: attend(*qkv(value=rand(B, KV, N, 0))), ValueError, "value .*head_dim of at least 1"),
    "two head_dims": (
        lambda: attend(*qkv(key=rand(B, KV, N, 9))),
        ValueError,
        "key must have the head_dim of query, expected 8, got 9",
    ),
    "heads not divisible": (
        lambda: attend(*qkv(query=rand(B, 3, N, D))),
        ValueError,
        "heads of query must be a multiple.*3 and 2",
    ),
    "value of other heads": (
        lambda: attend(*qkv(value=rand(B, 1, N, D))),
        ValueError,
        r"value must have the heads and tokens of key, expected \(2, 40\), got \(1, 40\)",
    ),
    "value of other tokens": (
        lambda: attend(*qkv(value=rand(B, KV, N + 1, D))),
        ValueError,
        "value must have the heads and tokens of key",
    ),
    # masks, scale, offset, flags
    "float mask": (
        lambda: attend(key_padding_mask=torch.zeros(B, N)),
        TypeError,
        "key_padding_mask must be a bool tensor.*got torch.float32",
    ),
    "list mask": (
        lambda: attend(key_padding_mask=[[False] * N] * B),
        TypeError,
        "key_padding_mask must be a bool tensor.*got list",
    ),
    "4-D mask": (
        lambda: attend(key_padding_mask=torch.zeros(B, 1, 1, N, dtype=torch.bool)),
        ValueError,
        r"key_padding_mask must be.*\(2, 40\), got",
    ),
    "mask of queries": (
        lambda: attend(query_padding_mask=torch.zeros(B, N + 1, dtype=torch.bool)),
        ValueError,
        "query_padding_mask must be",
    ),
    "mask elsewhere": (
        lambda: attend(key_padding_mask=torch.zeros(B, N, dtype=torch.bool, device="meta")),
        ValueError,
        "key_padding_mask must be on the device",
    ),
    "is_causal of numpy": (
        lambda: attend(is_causal=numpy().bool_(False)),
        TypeError,
        r"is_causal must be a bool, got numpy\.bool.*; convert it with bool\(\)",
    ),
    "return_lse of numpy": (
        lambda: attend(return_lse=numpy().bool_(True)),
        TypeError,
        r"return_lse must be a bool, got numpy\.bool.*; convert it with bool\(\)",
    ),
    "scale is a string": (lambda: attend(scale="1"), TypeError, "scale must be a number.*got str"),
    "scale is NaN": (lambda: attend(scale=math.nan), ValueError, "scale must be finite, got nan"),
    "scale is infinite": (lambda: attend(scale=math.inf), ValueError, "scale must be finite, got inf"),
    "offset without causality": (lambda: attend(query_offset=3), ValueError, "query_offset.*needs is_causal=True.*3"),
    "offset tensor without causality": (
        lambda: attend(query_offset=torch.tensor([1, 2])),
        ValueError,
        "query_offset.*needs is_causal=True",
    ),
    "offset elsewhere": (
        lambda: attend(query_offset=torch.zeros(B, dtype=torch.int64, device="meta"), is_causal=True),
        ValueError,
        "query_offset must be on the device of query, cpu, got meta",
    ),
    "float offset": (lambda: attend(query_offset=1.5, is_causal=True), TypeError, "query_offset must be an int.*float"),
    "offset of another batch": (
        lambda: attend(query_offset=torch.tensor([1, 2, 3]), is_causal=True),
        ValueError,
        r"query_offset.*shape \(2,\), got.*\(3,\)",
    ),
    "float offset tensor": (
        lambda: attend(query_offset=torch.tensor([1.0, 2.0]), is_causal=True),
        (TypeError, ValueError),
        "query_offset.*integer tensor.*float32",
    ),
    "huge offset": (
        lambda: attend(query_offset=2**31, is_causal=True),
        ValueError,
        "query_offset must fit into 32 bits",
    ),
    "huge offset tensor": (
        lambda: attend(query_offset=torch.tensor([0, 2**31]), is_causal=True),
        ValueError,
        "query_offset must fit into 32 bits",
    ),
    "is_causal is a tensor": (
        lambda: attend(is_causal=torch.ones(N, N)),
        TypeError,
        "is_causal must be a bool, got Tensor",
    ),
    "scale past a float": (lambda: attend(scale=10**400), ValueError, "scale must be finite, got 1000"),
    # support and low-rank kernel
    "support is a number": (lambda: attend(support=64), TypeError, "support must be one of Full.*got int"),
    "support is a class": (lambda: attend(support=sb.Full), TypeError, "support must be one of"),
    "low_rank is a number": (
        lambda: attend(low_rank=9),
        TypeError,
        "low_rank must be Quadratic, Favor, Centroid, Features or None, got int",
    ),
    "nothing left": (lambda: attend(support=sb.Empty()), ValueError, r"Empty\(\) with low_rank=None"),
    "causal LSH": (
        lambda: attend(support=sb.LSH(8), is_causal=True),
        ValueError,
        "LSH is bidirectional only.*later tokens.*use Routed",
    ),
    "causal input statistics": (
        lambda: attend(low_rank=sb.Quadratic(4, "input"), is_causal=True),
        ValueError,
        "would leak the future.*fit_statistics",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_arguments_are_named(name: str) -> None:
    assert_refused(*CALLS[name])
