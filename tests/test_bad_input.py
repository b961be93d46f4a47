"""Mistakes of a caller raise before any kernel runs, naming the argument, what came and the cure; operators that are
called directly raise and never crash."""

from __future__ import annotations

import math
import random
import re
from collections import namedtuple
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import testkit
import torch
from operator_cases import operator_arguments
from testkit import rand
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.operators.arguments import (
    AttentionArguments,
    ForwardResults,
    KeptResults,
    QuadraticArguments,
    RouteArguments,
)

B, H, KV, N, D = 2, 4, 2, 40, 8
NONE = sb.Window(8)


statistics = partial(testkit.fitted, 4, kv_heads=KV)
projections = partial(testkit.projections, 4, heads=H, kv_heads=KV)
int32_zeros = partial(torch.zeros, dtype=torch.int32)
# One list for each of two query blocks.
blocks = partial(testkit.blocks, block_q=20, heads=H, capacity=4)


def qkv(**changed: object) -> tuple:
    tensors = dict(zip(("query", "key", "value"), testkit.qkv(N, heads=H, kv_heads=KV))) | changed
    return tuple(tensors.values())


def attend(*args: object, **kwargs: object) -> Tensor:
    given = dict(support=NONE, low_rank=None) | kwargs
    return sb.attention(*(args or qkv()), **given)


STORED = sb.Quadratic(4)
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
    # support and low-rank kernel
    "support is a number": (lambda: attend(support=64), TypeError, "support must be one of Full.*got int"),
    "support is a class": (lambda: attend(support=sb.Full), TypeError, "support must be one of"),
    "low_rank is a number": (
        lambda: attend(low_rank=9),
        TypeError,
        "low_rank must be Quadratic, Favor or None, got int",
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
    "uncalibrated": (lambda: attend(low_rank=STORED), ValueError, "not calibrated.*fit_statistics"),
    "uncalibrated ema": (lambda: attend(low_rank=sb.Quadratic(4, "ema")), ValueError, "not calibrated.*fit_statistics"),
    "statistics without a kernel": (
        lambda: attend(statistics=statistics()),
        ValueError,
        "statistics=Statistics needs a low-rank kernel",
    ),
    "statistics that fit themselves": (
        lambda: attend(low_rank=sb.Quadratic(4, "input"), statistics=statistics()),
        ValueError,
        "statistics=.*'input'.*'stored'",
    ),
    "statistics of another kind": (
        lambda: attend(low_rank=STORED, statistics=sb.RandomFeatures(rand(4, D))),
        TypeError,
        "Quadratic takes statistics=Statistics.*got RandomFeatures",
    ),
    "statistics for Favor": (
        lambda: attend(low_rank=sb.Favor(8), statistics=statistics()),
        TypeError,
        "Favor takes statistics=RandomFeatures.*got Statistics",
    ),
    "statistics are a dict": (
        lambda: attend(low_rank=STORED, statistics={}),
        TypeError,
        "statistics must be Statistics.*got dict",
    ),
    "another rank": (
        lambda: attend(low_rank=STORED, statistics=testkit.fitted(3, kv_heads=KV)),
        ValueError,
        "statistics have rank 3.*fit them with rank=4",
    ),
    "another scale": (
        lambda: attend(low_rank=STORED, statistics=statistics(), scale=1.0),
        ValueError,
        "fitted for scale=0.353553.*scale=1",
    ),
    "another head_dim": (
        lambda: attend(low_rank=STORED, statistics=statistics(head_dim=16, scale=D**-0.5)),
        ValueError,
        "statistics are for head_dim 16, query has 8",
    ),
    "other heads": (
        lambda: attend(low_rank=STORED, statistics=statistics(kv_heads=1)),
        ValueError,
        r"per key/value head.*\(2,\).*got \(1,\)",
    ),
    "projections of other heads": (
        lambda: attend(low_rank=STORED, statistics=projections(heads=2)),
        ValueError,
        "per head, expected 4 query and 2 key heads, got 2 and 2",
    ),
    "projections of another width": (
        lambda: attend(
            low_rank=STORED,
            statistics=sb.Projections(rand(H, 4, D), rand(H, D + 1), rand(H), rand(KV, 4, D), rand(KV, D)),
        ),
        ValueError,
        r"Projections: query_bias must be.*\(4, 8\), got \(4, 9\)",
    ),
    "projections of two ranks": (
        lambda: attend(
            low_rank=STORED, statistics=sb.Projections(rand(H, 4, D), rand(H, D), rand(H), rand(KV, 3, D), rand(KV, D))
        ),
        ValueError,
        r"Projections: key_projection must be",
    ),
    "rank above head_dim": (
        lambda: attend(low_rank=sb.Quadratic(9, "input")),
        ValueError,
        "rank must be at most head_dim=8, got 9",
    ),
    "another random projection": (
        lambda: attend(low_rank=sb.Favor(8), statistics=sb.RandomFeatures(rand(9, D))),
        ValueError,
        r"projection of Favor.*\(8, 8\), got \(9, 8\)",
    ),
    # lists
    "lists of another batch": (
        lambda: attend(*(t[:1] for t in qkv()), support=blocks([[0], [1]])),
        ValueError,
        r"index must lead with \(batch, heads\) = \(1, 4\)",
    ),
    "lists for other queries": (
        lambda: attend(support=blocks([[0], [1], [2]])),
        ValueError,
        "40 queries in blocks of 20 make 2 lists, got index with 3",
    ),
    "key past the end": (
        lambda: attend(support=blocks([[0], [40]])),
        ValueError,
        "index names key block 40, past the 40 keys",
    ),
    "block past the end": (
        lambda: attend(support=blocks([[0], [5]], block_k=8)),
        ValueError,
        "index names key block 5, past the 40 keys in blocks of 8",
    ),
    "key past the valid ones": (
        lambda: attend(support=blocks([[0], [39]]), key_padding_mask=(torch.arange(N) < 1).expand(B, N)),
        ValueError,
        "index names key block 39, past",
    ),
    "key after its block": (
        lambda: attend(support=blocks([[20], [30]]), is_causal=True),
        ValueError,
        "keys after its block's last query, which breaks causality",
    ),
    "key after its block and offset": (
        lambda: attend(support=blocks([[19], [30]]), is_causal=True, query_offset=-1),
        ValueError,
        "breaks causality",
    ),
    "causal order": (
        lambda: attend(
            support=blocks([[0], [1]], order=torch.arange(N, dtype=torch.int32).expand(B, H, N)), is_causal=True
        ),
        ValueError,
        "query_order are bidirectional only",
    ),
    "order of other queries": (
        lambda: attend(support=blocks([[0], [1]], order=torch.arange(3, dtype=torch.int32).expand(B, H, 3))),
        ValueError,
        r"query_order must be.*\(2, 4, 40\), got \(2, 4, 3\)",
    ),
    "order names a query twice": (
        lambda: attend(support=blocks([[0], [1]], order=torch.zeros(B, H, N, dtype=torch.int32))),
        ValueError,
        "query_order names query 0 twice",
    ),
    "order past the end": (
        lambda: attend(support=blocks([[0], [1]], order=torch.arange(1, N + 1, dtype=torch.int32).expand(B, H, N))),
        ValueError,
        "query_order names query 40",
    ),
    "two keys in one slot": (
        lambda: blocks([[3, 3], [1]]),
        ValueError,
        "strictly ascending.*sort it and drop duplicates",
    ),
    "unsorted": (lambda: blocks([[3, 2], [1]]), ValueError, "strictly ascending"),
    "negative entry": (lambda: blocks([[-2], [1]]), ValueError, "negative entry.*unused slots"),
    "count past the capacity": (
        lambda: blocks([[0], [1]], count=5),
        ValueError,
        "count must lie between 0 and the capacity 4",
    ),
    "negative count": (
        lambda: blocks([[0], [1]], count=-1),
        ValueError,
        "count must lie between 0 and the capacity 4.*got -1",
    ),
    "int64 index": (
        lambda: sb.Blocks(torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, dtype=torch.int32), 8, 1),
        TypeError,
        "index must be an int32 tensor, got torch.int64",
    ),
    "3-D index": (
        lambda: sb.Blocks(torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32), 8, 1),
        ValueError,
        "index must have 4 dimensions",
    ),
    "count of another shape": (
        lambda: sb.Blocks(torch.zeros(1, 1, 2, 1, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32), 8, 1),
        ValueError,
        r"count must have shape \(1, 1, 2\)",
    ),
    "block_q 0": (lambda: blocks([[0], [1]], block_q=0), ValueError, "block_q must be at least 1, got 0"),
    "block_q past 32 bits": (
        lambda: blocks([[0], [1]], block_q=2**40),
        ValueError,
        "block_q must be at most 2147483647",
    ),
    "block_k past 32 bits": (
        lambda: blocks([[0], [1]], block_k=2**40),
        ValueError,
        "block_k must be at most 2147483647",
    ),
    "count elsewhere": (
        lambda: sb.Blocks(int32_zeros(1, 1, 1, 1), int32_zeros(1, 1, 1, device="meta"), 16, 1),
        ValueError,
        "Blocks: index, count and query_order must be on one device, got index on cpu and count on meta; move",
    ),
    "order elsewhere": (
        lambda: sb.Blocks(int32_zeros(1, 1, 1, 1), int32_zeros(1, 1, 1), 16, 1, int32_zeros(1, 1, 9, device="meta")),
        ValueError,
        "one device.*query_order on meta",
    ),
    "lists elsewhere": (
        lambda: attend(
            support=sb.Blocks(int32_zeros(B, H, 2, 4, device="meta"), int32_zeros(B, H, 2, device="meta"), 20, 1)
        ),
        ValueError,
        "Blocks: lists must be on the device of query, cpu, got meta; move index, count and query_order there",
    ),
    "tokens elsewhere than the lists": (
        lambda: attend(*(t.to("meta") for t in qkv()), support=blocks([[0], [1]])),
        ValueError,
        "lists must be on the device of query, meta, got cpu",
    ),
    "float block_k": (lambda: blocks([[0], [1]], block_k=1.0), TypeError, "block_k must be an int, got 1.0"),
    # supports and kernels, on construction
    "no window": (lambda: sb.Window(0), ValueError, "Window: keys must be at least 1, got 0"),
    "window of a float": (lambda: sb.Window(6.4), TypeError, "Window: keys must be an int, got 6.4 of type float"),
    "window of a bool": (lambda: sb.Window(True), TypeError, "Window: keys must be an int, got True of type bool"),
    "window block": (lambda: sb.Window(8, block_q=0), ValueError, "Window: block_q must be at least 1"),
    "budget below the block": (lambda: sb.Routed(8), ValueError, "Routed: keys.*at least block_q=16, got 8"),
    "no such form": (
        lambda: sb.Routed(64, block_q=4),
        ValueError,
        "Routed: expected block_q in.*got block_q=4, block_k=1",
    ),
    "window below the pooled block": (
        lambda: sb.Routed(64, window=15),
        ValueError,
        "Routed: the window of the pooled form.*expected 0.*at least block_q=16, got window=15",
    ),
    "window and sinks above keys": (
        lambda: sb.Routed(67, window=64, sinks=4),
        ValueError,
        "Routed: keys.*at least 68 for window=64 and sinks=4, got 67",
    ),
    "sinks of whole blocks above keys": (
        lambda: sb.Routed(64, 1, 8, 56, sinks=9),
        ValueError,
        "Routed: keys.*at least 72 for window=56 and sinks=9, got 64",
    ),
    "more sinks than keys": (lambda: sb.Window(8, sinks=9), ValueError, "Window: sinks.*at most keys=8, got sinks=9"),
    "negative sinks": (lambda: sb.Window(8, sinks=-1), ValueError, "Window: sinks must be at least 0, got -1"),
    "sinks of a bool": (lambda: sb.Routed(64, sinks=True), TypeError, "Routed: sinks must be an int, got True"),
    "window not of blocks": (lambda: sb.Routed(64, 1, 8, 12), ValueError, "Routed:.*multiples of 8.*window=12"),
    "window above keys": (lambda: sb.Routed(16, 1, 8, 24), ValueError, "window <= keys, got keys=16, window=24"),
    "no keys": (lambda: sb.Routed(-64), ValueError, "Routed: keys must be at least 1, got -64"),
    # sizes that the kernels cannot count to
    "causal window past 32 bits": (
        lambda: attend(support=sb.Window(2**31), is_causal=True),
        ValueError,
        "Window: keys must be at most 2147483647, got 2147483648",
    ),
    "window past 64 bits": (lambda: sb.Window(2**70), ValueError, "Window: keys must be at most"),
    "window blocks past 32 bits": (
        lambda: attend(support=sb.Window(16, 2**31)),
        ValueError,
        "Window: block_q must be at most 2147483647, got 2147483648",
    ),
    "routed keys past 32 bits": (
        lambda: attend(support=sb.Routed(2**31), key_padding_mask=testkit.padding(N, [1, 2])),
        ValueError,
        "Routed: keys must be at most 2147483647",
    ),
    "routed window past 32 bits": (
        lambda: sb.Routed(2**31, 1, 8, 2**31),
        ValueError,
        "Routed: keys must be at most 2147483647",
    ),
    "LSH keys past 32 bits": (lambda: sb.LSH(2**31, 1), ValueError, "LSH: keys must be at most 2147483647"),
    "LSH seed past 64 bits": (lambda: sb.LSH(64, seed=2**64), ValueError, "LSH: seed must be at most"),
    "features past 32 bits": (lambda: sb.Favor(2**31), ValueError, "Favor: features must be at most 2147483647"),
    "Favor seed past its draws": (lambda: sb.Favor(seed=2**50), ValueError, "Favor: seed must be at most"),
    "redraw past 32 bits": (lambda: sb.Favor(redraw=2**31), ValueError, "Favor: redraw must be at most"),
    "rank past 32 bits": (lambda: sb.Quadratic(2**31), ValueError, "Quadratic: rank must be at most 2147483647"),
    "module heads past 32 bits": (
        lambda: sb.ScatterbrainAttention(2**40, 8),
        ValueError,
        "ScatterbrainAttention: num_heads must be at most 2147483647",
    ),
    "scale past a float": (lambda: attend(scale=10**400), ValueError, "scale must be finite, got 1000"),
    "LSH rounds": (lambda: sb.LSH(64, rounds=3), ValueError, "LSH: keys.*divide by rounds=3, got 64"),
    "LSH no rounds": (lambda: sb.LSH(64, rounds=0), ValueError, "LSH: rounds must be at least 1"),
    "LSH hash": (lambda: sb.LSH(64, hash="angular"), ValueError, "LSH: expected hash='e2lsh', got 'angular'"),
    "rank 0": (lambda: sb.Quadratic(0), ValueError, "Quadratic: rank must be at least 1"),
    "statistics misspelt": (
        lambda: sb.Quadratic(9, "store"),
        ValueError,
        "Quadratic: expected statistics 'stored'.*got 'store'",
    ),
    "no features": (lambda: sb.Favor(0), ValueError, "Favor: features must be at least 1"),
    "odd hyperbolic": (lambda: sb.Favor(7, hyperbolic=True), ValueError, "Favor: hyperbolic.*even number.*7"),
    "centred": (lambda: sb.Favor(centred=True), TypeError, "unexpected keyword argument 'centred'"),
    "redraw 0": (lambda: sb.Favor(redraw=0), ValueError, "Favor: redraw must be at least 1"),
    # statistics
    "statistics of a NaN scale": (
        lambda: replace(statistics(), scale=math.nan),
        ValueError,
        "Statistics: scale must be finite, got nan",
    ),
    "statistics of no scale": (
        lambda: replace(statistics(), scale=None),
        TypeError,
        "Statistics: scale must be a number, got NoneType",
    ),
    "statistics without a mean": (
        lambda: replace(statistics(), key_mean=None),
        TypeError,
        "Statistics: key_mean must be a tensor, got NoneType",
    ),
    "integer statistics": (
        lambda: statistics().to(torch.int32),
        TypeError,
        "Statistics: query_projection must be a floating-point tensor, got torch.int32",
    ),
    "statistics on two devices": (
        lambda: replace(statistics(), key_mean=torch.zeros(KV, D, device="meta")),
        ValueError,
        "Statistics: tensors must be on one device, got query_projection on cpu and key_mean on meta; move",
    ),
    "statistics of one head without its dimension": (
        lambda: sb.Statistics(rand(4, D), rand(D), rand(4, D), rand(D), 1.0),
        ValueError,
        r"Statistics: query_projection must be \(Hkv, rank, head_dim\).*got shape \(4, 8\)",
    ),
    "statistics of two widths": (
        lambda: replace(statistics(), query_mean=rand(KV, D + 1)),
        ValueError,
        r"Statistics: query_mean must be of shape \(2, 8\), got \(2, 9\)",
    ),
    "statistics with NaN": (
        lambda: replace(statistics(), query_mean=torch.full((KV, D), math.nan)),
        ValueError,
        "Statistics: query_mean must be finite, got NaN or infinity; fit it again",
    ),
    "statistics that a narrower dtype does not hold": (
        lambda: replace(statistics(), key_projection=torch.full((KV, 4, D), 1e5)).to(torch.float16),
        ValueError,
        "Statistics: key_projection must be finite",
    ),
    "statistics without values": (
        lambda: attend(low_rank=STORED, statistics=statistics().to("meta")),
        ValueError,
        "statistics=Statistics: query_projection is on the meta device and holds no values",
    ),
    "projections of integers": (
        lambda: replace(projections(), key_bias=torch.zeros(KV, D, dtype=torch.int64)),
        TypeError,
        "Projections: key_bias must be a floating-point tensor, got torch.int64",
    ),
    "flat projections": (
        lambda: replace(projections(), key_projection=rand(4, D)),
        ValueError,
        r"Projections: key_projection must be \(Hkv, rank, head_dim\), got shape \(4, 8\)",
    ),
    "projections without values": (
        lambda: attend(low_rank=sb.Quadratic(4, "learned"), statistics=projections().to("meta")),
        ValueError,
        "statistics=Projections: query_projection is on the meta device",
    ),
    "random features of nothing": (
        lambda: sb.RandomFeatures(None),
        TypeError,
        "RandomFeatures: projection must be a tensor, got NoneType",
    ),
    "random features of a vector": (
        lambda: sb.RandomFeatures(rand(D)),
        ValueError,
        r"RandomFeatures: projection must be \(rows, head_dim\), got shape \(8,\)",
    ),
    "random features without values": (
        lambda: attend(low_rank=sb.Favor(8), statistics=sb.RandomFeatures(rand(8, D)).to("meta")),
        ValueError,
        "statistics=RandomFeatures: projection is on the meta device",
    ),
    "fit on the meta device": (
        lambda: sb.fit_statistics(*(t.to("meta") for t in qkv()[:2]), 4),
        ValueError,
        "calibration: expected queries and keys that hold values, got tensors on the meta device",
    ),
    "fit above head_dim": (
        lambda: sb.fit_statistics(*qkv()[:2], rank=9),
        ValueError,
        "rank must be at most head_dim=8, got 9",
    ),
    "fit rank 0": (lambda: sb.fit_statistics(*qkv()[:2], rank=0), ValueError, "rank must be at least 1"),
    "fit on NaN": (
        lambda: sb.fit_statistics(rand(B, H, N, D).fill_(math.nan), qkv()[1], 4),
        ValueError,
        "calibration: query or key holds NaN",
    ),
    "fit on infinite keys": (
        lambda: sb.fit_statistics(qkv()[0], rand(B, KV, N, D).fill_(math.inf), 4),
        ValueError,
        "calibration: query or key holds NaN or infinity",
    ),
    "fit on nothing": (
        lambda: sb.fit_statistics(*qkv()[:2], 4, torch.ones(B, N, dtype=torch.bool)),
        ValueError,
        "at least one valid token.*key_padding_mask",
    ),
    "fit on no tokens": (
        lambda: sb.fit_statistics(rand(B, H, 0, D), rand(B, KV, 0, D), 4),
        ValueError,
        "at least one valid token",
    ),
    "fit on queries without keys": (
        lambda: sb.fit_statistics(rand(B, H, N, D), rand(B, KV, 0, D), 4),
        ValueError,
        "at least one valid token",
    ),
    "fit mask": (
        lambda: sb.fit_statistics(*qkv()[:2], 4, torch.ones(B, N)),
        TypeError,
        "key_padding_mask must be a bool tensor",
    ),
    "fit scale": (lambda: sb.fit_statistics(*qkv()[:2], 4, scale=math.nan), ValueError, "scale must be finite"),
    # route
    "route a window": (
        lambda: sb.route(*qkv()[:2], sb.Window(8)),
        TypeError,
        "route: support must be Routed or LSH.*got Window",
    ),
    "route causal LSH": (
        lambda: sb.route(*qkv()[:2], sb.LSH(8), is_causal=True),
        ValueError,
        "LSH is bidirectional only",
    ),
    "route mask": (
        lambda: sb.route(*qkv()[:2], sb.Routed(16), key_padding_mask=torch.zeros(B, 3, dtype=torch.bool)),
        ValueError,
        "key_padding_mask must be",
    ),
    "route offset": (
        lambda: sb.route(*qkv()[:2], sb.Routed(16), query_offset=1),
        ValueError,
        "query_offset.*is_causal=True",
    ),
    "route other statistics": (
        lambda: sb.route(*qkv()[:2], sb.Routed(16), statistics=statistics(kv_heads=1)),
        ValueError,
        "per key/value head",
    ),
    # modules
    "module without heads": (
        lambda: sb.ScatterbrainAttention(0, 8),
        ValueError,
        "num_heads must be a positive int, got 0",
    ),
    "module of a float": (
        lambda: sb.ScatterbrainAttention(4, 8.0),
        (TypeError, ValueError),
        "head_dim must be a positive int, got 8.0",
    ),
    "module heads": (
        lambda: sb.ScatterbrainAttention(4, 16, 3),
        ValueError,
        "num_heads must be a multiple of num_kv_heads, got 4 and 3",
    ),
    "module rank": (lambda: sb.ScatterbrainAttention(4, 8), ValueError, "rank must be at most head_dim=8, got 9"),
    "module support": (
        lambda: sb.ScatterbrainAttention(4, 16, support="window"),
        TypeError,
        "support must be one of.*got str",
    ),
    "module nothing left": (
        lambda: sb.ScatterbrainAttention(4, 16, support=sb.Empty(), low_rank=None),
        ValueError,
        "Empty",
    ),
    "module uncalibrated": (
        lambda: sb.ScatterbrainAttention(H, D, KV, NONE, STORED)(*qkv()),
        ValueError,
        "not calibrated.*sb.calibrate",
    ),
    "module other heads": (
        lambda: sb.ScatterbrainAttention(2, D, 2, NONE, None)(*qkv()),
        ValueError,
        "expected query with 2 heads.*got 4",
    ),
    "module redraw": (
        lambda: sb.ScatterbrainAttention(H, D, KV, NONE, None).redraw(torch.Generator()),
        ValueError,
        "redraw: only Favor",
    ),
    "calibrate nothing": (
        lambda: sb.calibrate(nn.Linear(2, 2)).__enter__(),
        ValueError,
        "calibrate: expected at least one ScatterbrainAttention.*found none",
    ),
    "calibrate a function": (
        lambda: sb.calibrate(len).__enter__(),
        TypeError,
        "expected an nn.Module, got builtin_function_or_method",
    ),
    "update a list": (lambda: sb.update_statistics([]), TypeError, "expected an nn.Module, got list"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_arguments_are_named(name: str) -> None:
    call, error, words = CALLS[name]
    with pytest.raises(error) as raised:
        call()
    assert re.search(words, str(raised.value), re.DOTALL), str(raised.value)


def test_calibration_on_bad_batches_raises_and_leaves_the_module_as_it_was() -> None:
    core = sb.ScatterbrainAttention(H, D, KV, NONE, STORED)
    with pytest.raises(ValueError, match="calibration: query or key holds NaN"), sb.calibrate(core):
        core(*qkv(query=rand(B, H, N, D).fill_(math.nan)))
    assert not core.is_calibrated
    with pytest.raises(ValueError, match="no ScatterbrainAttention was run"), sb.calibrate(core):
        pass
    with pytest.raises(ValueError, match="one scale, got scale=2 after 1"), sb.calibrate(core):
        core(*qkv(), scale=1.0)
        core(*qkv(), scale=2.0)
    assert not core.is_calibrated
    with pytest.raises(ValueError, match="not calibrated"):
        core(*qkv())
    with sb.calibrate(core):
        core(*qkv())
    with pytest.raises(ValueError, match="fitted for scale=0.353553, attention runs with scale=1"):
        core(*qkv(), scale=1.0)
    other = sb.ScatterbrainAttention(H, D, KV, NONE, sb.Quadratic(3))
    with pytest.raises(
        RuntimeError, match=r"statistics of rank 4, this module rank 3; create it with Quadratic\(rank=4\)"
    ):
        other.load_state_dict(core.state_dict())


def test_budgets_larger_than_the_sequence_are_no_error_and_attend_to_all_of_it() -> None:
    """Nothing is clamped: 64 nearest keys of 40 are all of them."""
    tensors = qkv()
    for support in (sb.Window(64), sb.Routed(64), sb.Routed(64, 1, 8, 16), sb.LSH(128)):
        torch.testing.assert_close(
            attend(*tensors, support=support), attend(*tensors, support=sb.Full()), rtol=1e-5, atol=1e-6
        )


# ---------------------------------------------------------------------------------------- operators


def well_formed(
    low_rank: int = 1,
    block_q: int = 8,
    form: str = "index",
    is_causal: bool = False,
    dtype: torch.dtype = torch.float32,
) -> AttentionArguments:
    lists = -(-N // block_q)
    maps = torch.float64 if dtype == torch.float64 else torch.float32
    fields: dict[str, object] = {}
    if low_rank:
        fields |= dict(query_map=rand(B, H, N, 4, dtype=maps), key_map=rand(B, KV, N, 4, dtype=maps))
    if form == "index":
        index = torch.arange(4, dtype=torch.int32).expand(B, H, lists, 4)
        fields |= dict(index=index, count=torch.full((B, H, lists), 4, dtype=torch.int32))
    if form == "span":
        fields |= dict(span=torch.tensor([0, 8], dtype=torch.int32).expand(1, lists, 2), span_keys=8)
    return operator_arguments(
        AttentionArguments,
        query=rand(B, H, N, D, dtype=dtype),
        key=rand(B, KV, N, D, dtype=dtype),
        value=rand(B, KV, N, D, dtype=dtype),
        low_rank=low_rank,
        block_q=block_q,
        is_causal=is_causal,
        scale=0.3,
        **fields,
    )


def int32(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def entries(first: int, at: int = 3) -> Tensor:
    index = torch.arange(4, dtype=torch.int32).repeat(B, H, 5, 1)
    index[1, 2, 4, at] = first
    return index


FORWARD = {
    "an entry past the keys": dict(index=entries(40)),
    "an entry of 2^31 - 1": dict(index=entries(2**31 - 1)),
    "a negative entry": dict(index=entries(-5, at=0)),
    "an entry twice": dict(index=entries(2)),
    "a count past the capacity": dict(count=torch.full((B, H, 5), 5, dtype=torch.int32)),
    "a count of 2^31 - 1": dict(count=torch.full((B, H, 5), 2**31 - 1, dtype=torch.int32)),
    "a negative count": dict(count=torch.full((B, H, 5), -1, dtype=torch.int32)),
    "a count of another shape": dict(count=torch.ones(B, H, 4, dtype=torch.int32)),
    "index without count": dict(count=None),
    "count without index": dict(index=None),
    "int64 index": dict(index=entries(3).long()),
    "an index of other blocks": dict(index=entries(3)[:, :, :4]),
    "an index of no head": dict(index=entries(3)[:, :0], count=torch.ones(B, 0, 5, dtype=torch.int32)),
    "an index of three heads": dict(index=entries(3)[:, :3], count=torch.ones(B, 3, 5, dtype=torch.int32)),
    "a list that breaks causality": dict(index=entries(39), is_causal=True, query_offset=int32(-20, -20)),
    "a query range past the queries": dict(query_range=int32([0, N], [0, N + 1])),
    "a key range past the keys": dict(key_range=int32([0, N], [0, N + 9])),
    "a key range before the keys": dict(key_range=int32([-1, N], [0, N])),
    "a key range that ends before it starts": dict(key_range=int32([30, 10], [0, N])),
    "a query range that ends before it starts": dict(query_range=int32([30, 10], [0, N])),
    "a range of another batch": dict(key_range=int32([0, N])),
    "a range of three numbers": dict(key_range=torch.zeros(B, 3, dtype=torch.int32)),
    "an offset of another batch": dict(query_offset=int32(0), is_causal=True),
    "an int64 offset": dict(query_offset=torch.zeros(B, dtype=torch.int64), is_causal=True),
    "a mask of other tokens": dict(key_mask=torch.zeros(B, N - 1, dtype=torch.bool)),
    "a mask of another batch": dict(query_mask=torch.zeros(1, N, dtype=torch.bool)),
    "a byte mask": dict(key_mask=torch.zeros(B, N, dtype=torch.uint8)),
    "an order past the queries": dict(query_order=torch.full((B, H, N), N, dtype=torch.int32)),
    "an order of no head": dict(query_order=torch.zeros(B, 0, N, dtype=torch.int32)),
    "an order of three heads": dict(query_order=torch.zeros(B, 3, N, dtype=torch.int32)),
    "an order of fewer queries": dict(query_order=torch.zeros(B, H, N - 1, dtype=torch.int32)),
    "a causal order": dict(query_order=torch.arange(N, dtype=torch.int32).expand(B, H, N), is_causal=True),
    "no maps": dict(query_map=None, key_map=None),
    "one map": dict(key_map=None),
    "maps without a kernel": dict(low_rank=0),
    "maps of two ranks": dict(key_map=rand(B, KV, N, 5)),
    "maps without coordinates": dict(query_map=rand(B, H, N, 1), key_map=rand(B, KV, N, 1)),
    "float64 maps": dict(query_map=rand(B, H, N, 4).double()),
    "a map of other tokens": dict(key_map=rand(B, KV, N - 1, 4)),
    "a map of other heads": dict(query_map=rand(B, KV, N, 4)),
    "no such kernel": dict(low_rank=3),
    "block_q 0": dict(block_q=0),
    "block_q of 2^62": dict(block_q=2**62),
    "block_k 0": dict(block_k=0),
    "block_k of 2^62": dict(block_k=2**62),
    "keys of other heads than value": dict(key=rand(B, H, N, D)),
    "values of other tokens": dict(value=rand(B, KV, N - 1, D)),
    "keys of another width": dict(key=rand(B, KV, N, D - 1)),
    "keys of another dtype": dict(key=rand(B, KV, N, D).half()),
    "integers": dict(query=torch.ones(B, H, N, D, dtype=torch.int32)),
    "heads that do not divide": dict(query=rand(B, 3, N, D)),
    "no query head": dict(query=rand(B, 0, N, D), query_map=rand(B, 0, N, 4)),
    "no width": dict(query=rand(B, H, N, 0), key=rand(B, KV, N, 0)),
    "no value width": dict(value=rand(B, KV, N, 0)),
    "three dimensions": dict(query=rand(H, N, D)),
}
SPANS = {
    "a span longer than said": dict(span=int32([0, 9]).expand(1, 5, 2)),
    "a span whose length wraps": dict(span=int32([-(2**31), 2**31 - 1]).expand(1, 5, 2)),
    "a negative length": dict(span=int32([9, 0]).expand(1, 5, 2), span_keys=-5),
    "a length of 2^62": dict(span_keys=2**62),
    "negative sinks": dict(span_sinks=-1),
    "sinks without a span": dict(span=None, span_sinks=1),
    "spans of other blocks": dict(span=int32([0, 8]).expand(1, 4, 2)),
    "spans of another batch": dict(span=int32([0, 8]).expand(3, 5, 2)),
    "spans of three numbers": dict(span=int32([0, 8, 8]).expand(1, 5, 3)),
}
RESULTS = {
    "out of fewer tokens": dict(out=(B, H, N - 1, D)),
    "out of another width": dict(out=(B, H, N, D - 1)),
    "d_out of another width": dict(d_out=(B, H, N, D + 1)),
    "d_out of other heads": dict(d_out=(B, KV, N, D)),
    "a flat d_out": dict(d_out=(B * H, N, D)),
    "lse of fewer tokens": dict(lse=(B, H, N - 1)),
    "a 4-D lse": dict(lse=(B, H, N, 1)),
    "d_lse of fewer tokens": dict(d_lse=(B, H, N - 1)),
    "a half-precision lse": dict(lse=torch.zeros(B, H, N, dtype=torch.float16)),
    "a double d_lse": dict(d_lse=torch.zeros(B, H, N, dtype=torch.float64)),
    "an integer d_out": dict(d_out=torch.zeros(B, H, N, D, dtype=torch.int32)),
}


def backward(given: AttentionArguments, **results: object) -> tuple[Tensor, ...]:
    shapes = dict(d_out=(B, H, N, D), d_lse=(B, H, N), out=(B, H, N, D), lse=(B, H, N)) | results
    tensors = {name: shape if isinstance(shape, Tensor) else torch.zeros(shape) for name, shape in shapes.items()}
    return torch.ops.scatterbrain.attention_backward(*ForwardResults(**tensors), *given)


@pytest.mark.parametrize(
    "form, change",
    [("index", c) for c in FORWARD.values()] + [("span", c) for c in SPANS.values()],
    ids=[*FORWARD, *SPANS],
)
def test_the_attention_operators_refuse(form: str, change: dict[str, object]) -> None:
    given = well_formed(form=form)
    torch.ops.scatterbrain.attention(*given)  # the change alone is refused below
    with pytest.raises(RuntimeError, match="^attention: "):
        torch.ops.scatterbrain.attention(*given._replace(**change))
    with pytest.raises(RuntimeError, match="^attention: "):
        backward(given._replace(**change))


@pytest.mark.parametrize("change", RESULTS.values(), ids=RESULTS)
def test_the_backward_operator_refuses_results_of_another_shape(change: dict[str, object]) -> None:
    backward(well_formed())
    with pytest.raises(RuntimeError, match="^attention_backward: "):
        backward(well_formed(), **change)


PROJECTIONS = {
    "weight of another width": (rand(1, KV, 3, D + 1), None),
    "weight of three heads": (rand(1, 3, 3, D), None),
    "weight of no head": (rand(1, 0, 3, D), None),
    "weight of another batch": (rand(3, KV, 3, D), None),
    "half weight": (rand(1, KV, 3, D).half(), None),
    "3-D weight": (rand(KV, 3, D), None),
    "no output": (rand(1, KV, 0, D), None),
    "bias of fewer outputs": (rand(1, KV, 3, D), rand(1, KV, 2)),
    "bias of fewer heads": (rand(1, KV, 3, D), rand(1, 1, 3)),
    "flat bias": (rand(1, KV, 3, D), rand(6)),
    "double bias": (rand(1, KV, 3, D), rand(1, KV, 3).double()),
}


@pytest.mark.parametrize("weight, bias", PROJECTIONS.values(), ids=PROJECTIONS)
def test_the_projection_refuses(weight: Tensor, bias: Tensor | None) -> None:
    with pytest.raises(RuntimeError, match="^project: "):
        torch.ops.scatterbrain.project(rand(B, H, N, D), weight, bias)


@pytest.mark.parametrize(
    "grad",
    [rand(B, H, N, 2), rand(B, H, N - 1, 3), rand(B, H, 3), rand(B, H, N, 3).double(), rand(B, KV, N, 3)],
    ids=lambda t: str(tuple(t.shape)),
)
def test_the_projection_refuses_gradients_of_another_shape(grad: Tensor) -> None:
    with pytest.raises(RuntimeError, match="^project_backward: "):
        torch.ops.scatterbrain.project_backward(grad, rand(B, H, N, D), rand(1, KV, 3, D))


def routing(block_q: int = 16, **changed: object) -> tuple[Tensor, Tensor]:
    given = operator_arguments(
        RouteArguments,
        query=rand(B, H, N, D),
        key=rand(B, KV, N, D),
        query_map=rand(B, H, N, 4),
        key_map=rand(B, KV, N, 4),
        low_rank=1,
        keys=24,
        block_q=block_q,
        block_k=1 if block_q > 1 else 8,
        scale=0.3,
    )
    return torch.ops.scatterbrain.route(*given._replace(**changed))


ROUTES = {name: FORWARD[name] for name in FORWARD if "range" in name or "offset" in name or "mask" in name} | {
    "no such form": dict(block_q=4),
    "a budget below the block": dict(keys=8),
    "a budget of 2^62": dict(keys=2**62),
    "a window above the budget": dict(block_q=1, block_k=8, window=32),
    "a negative window": dict(block_q=1, block_k=8, window=-8),
    "a window below the block": dict(window=8),
    "sinks above the budget": dict(sinks=9),
    "negative sinks": dict(sinks=-1),
    "blocks of sinks above the budget": dict(block_q=1, block_k=8, window=16, sinks=9),
    "keys of another width": dict(key=rand(B, KV, N, D - 1)),
    "heads that do not divide": dict(query=rand(B, 3, N, D)),
    "no head": dict(query=rand(B, 0, N, D)),
    "integers": dict(query=torch.ones(B, H, N, D, dtype=torch.int32)),
    "no maps": dict(query_map=None),
    "a map of other tokens": dict(key_map=rand(B, KV, N - 1, 4)),
    "maps without coordinates": dict(query_map=rand(B, H, N, 1), key_map=rand(B, KV, N, 1)),
    "double maps": dict(query_map=rand(B, H, N, 4).double()),
    "no such kernel": dict(low_rank=-1),
}


@pytest.mark.parametrize("change", ROUTES.values(), ids=ROUTES)
def test_the_routing_operator_refuses(change: dict[str, object]) -> None:
    routing(block_q=change.get("block_q", 16) if change.get("block_q") in (1, 8, 16, 32) else 16)
    with pytest.raises(RuntimeError, match="^route: "):
        routing(**change)


def operator_calls() -> dict[str, tuple[str, NamedTuple]]:
    """Operators with well-formed arguments that fill every tensor but the ones that exclude each other."""
    optional = dict(
        query_mask=torch.zeros(B, N, dtype=torch.bool),
        key_mask=torch.zeros(B, N, dtype=torch.bool),
        query_range=int32([0, N], [0, N]),
        key_range=int32([0, N], [0, N]),
        query_offset=int32(0, 0),
    )
    attention, tokens = well_formed()._replace(**optional), (rand(B, H, N, D), rand(B, KV, N, D))
    spans = well_formed(form="span")._replace(query_order=None)
    ordered = well_formed()._replace(query_order=torch.arange(N, dtype=torch.int32).repeat(B, H, 1))
    weights = dict(
        query_weight=rand(1, KV, 4, D), query_bias=rand(1, KV, 4), key_weight=rand(1, KV, 4, D), key_bias=rand(1, KV, 4)
    )
    shared = {name: value for name, value in attention._asdict().items() if name in QuadraticArguments._fields}
    quadratic = operator_arguments(QuadraticArguments, **shared, **weights)
    routed = operator_arguments(
        RouteArguments,
        **dict(zip(("query", "key"), tokens)),
        **optional,
        query_map=rand(B, H, N, 4),
        key_map=rand(B, KV, N, 4),
        low_rank=1,
        keys=24,
        block_q=16,
        block_k=1,
        scale=0.3,
    )
    results = ForwardResults(rand(B, H, N, D), rand(B, H, N), rand(B, H, N, D), rand(B, H, N))
    backward = namedtuple("Backward", [*ForwardResults._fields, *AttentionArguments._fields, *KeptResults._fields])
    project = namedtuple("Project", ["tokens", "weight", "bias"])
    of_map = namedtuple("ProjectBackward", ["grad", "tokens", "weight"])
    return {
        "attention": ("attention", attention),
        "attention of a window": ("attention", spans),
        "attention in another order": ("attention", ordered),
        "attention_with_state": ("attention_with_state", attention),
        "attention_backward": (
            "attention_backward",
            backward(*results, *attention, *KeptResults(rand(0), rand(0), rand(1, KV, 4, D), rand(1, KV, 4, D))),
        ),
        "quadratic_attention": ("quadratic_attention", quadratic),
        "quadratic_attention_with_state": ("quadratic_attention_with_state", quadratic),
        "route": ("route", routed),
        "project": ("project", project(tokens[0], weights["query_weight"], weights["query_bias"])),
        "project_packed": ("project_packed", project(tokens[0], weights["query_weight"], weights["query_bias"])),
        "project_backward": ("project_backward", of_map(rand(B, H, N, 4), tokens[0], weights["query_weight"])),
    }


OPERATOR_CALLS = operator_calls()


@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_the_operators_refuse_a_tensor_on_another_device(name: str) -> None:
    """One tensor on the meta device would make torch return results that nothing has been written to."""
    operator, arguments = OPERATOR_CALLS[name]
    getattr(torch.ops.scatterbrain, operator)(*arguments)
    tensors = [field for field, value in arguments._asdict().items() if isinstance(value, Tensor)]
    assert len(tensors) >= 3
    for field in tensors:
        changed = arguments._replace(**{field: getattr(arguments, field).to("meta")})
        with pytest.raises(
            RuntimeError, match=r"[a-z_]+: tensors must be on one device, got \w+ on (cpu|meta) and \w+ on"
        ):
            getattr(torch.ops.scatterbrain, operator)(*changed)


@pytest.mark.parametrize("seed", range(60))
def test_drawn_nonsense_raises_or_gives_results_of_the_right_shape(seed: int) -> None:
    """Several arguments at once are replaced by tensors of drawn shapes, dtypes and contents."""
    r = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    given = well_formed(
        r.choice([0, 1, 2]),
        r.choice([1, 5, 8, 32]),
        r.choice(["index", "span", ""]),
        r.random() < 0.5,
        r.choice([torch.float32, torch.bfloat16, torch.float64]),
    )

    def tensor(like: object) -> object:
        shape = (
            list(like.shape)
            if isinstance(like, Tensor)
            else [r.choice([1, B]), r.choice([1, KV, H]), N, 4][: r.choice([1, 2, 3, 4])]
        )
        if r.random() < 0.5:
            shape[r.randrange(len(shape))] += r.choice([-1, 1])
        if isinstance(like, Tensor) and like.is_floating_point():
            return torch.randn([max(0, n) for n in shape], generator=generator).to(
                r.choice([like.dtype, like.dtype, torch.float16])
            )
        return torch.randint(-3, r.choice([5, 60]), [max(0, n) for n in shape], generator=generator, dtype=torch.int32)

    for name in r.sample(given._fields, r.choice([1, 2, 3])):
        value = getattr(given, name)
        can_be_left_out = name in ("index", "count", "span", "query_map", "key_map")
        if isinstance(value, bool):
            changed = not value
        elif isinstance(value, int):
            changed = r.choice([-1, 0, 1, 2, 8, 2**31, 2**40])
        elif isinstance(value, float):
            changed = value
        elif r.random() < 0.8:
            changed = tensor(value)
        else:
            changed = None if can_be_left_out else value
        given = given._replace(**{name: changed})
    try:
        out, lse = torch.ops.scatterbrain.attention(*given)
    except RuntimeError as error:
        assert str(error).startswith("attention: ")
        return
    assert out.shape == (*given.query.shape[:3], given.value.shape[3]) and lse.shape == out.shape[:3]
    gradients = torch.ops.scatterbrain.attention_backward(*ForwardResults(out, lse, out, lse), *given)
    assert [g.shape for g in gradients[:3]] == [t.shape for t in (given.query, given.key, given.value)]
