"""What a device says about itself: the sizes of what it saves for the backward pass, widths and capacities, and the
table of its launchers."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch
from operator_cases import operator_arguments
from torch import Tensor

from scatterbrain.operators.arguments import QUADRATIC, AttentionArguments, RouteArguments

OPERATORS = torch.ops.scatterbrain
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


def draw(seed: int) -> dict:
    """A call without padding: every list holds as many key blocks as it has room for."""
    chance = random.Random(seed)
    block_q, block_k = chance.choice(((1, 1), (1, 8), (8, 1), (12, 1), (16, 1), (16, 8), (32, 1), (40, 4)))
    heads = chance.choice((1, 2, 4))
    return dict(
        batch=chance.choice((1, 2)),
        heads=heads,
        kv_heads=chance.choice([h for h in (1, 2, 4) if heads % h == 0]),
        queries=chance.choice((0, 1, 17, 64, 100, 600)),
        keys=chance.choice((0, 1, 40, 128, 129, 513)),
        head_dim=chance.choice((8, 16, 40)),
        value_dim=chance.choice((8, 16, 40)),
        dtype=chance.choice(DTYPES),
        low_rank=chance.choice((0, 1, 2)),
        rank=chance.choice((1, 3, 9)),
        is_packed=chance.random() < 0.3,
        listed=chance.choice((0, 24, 64, 100)),
        span_keys=chance.choice((0, 16, 64)),
        has_span=chance.random() < 0.5,
        sinks=seed % 3,
        block_q=block_q,
        block_k=block_k,
        is_causal=chance.random() < 0.25,
    )


def results(call: dict) -> tuple[Tensor, Tensor]:
    """State and scores of the operator."""
    batch, n, m, dtype = call["batch"], call["queries"], call["keys"], call["dtype"]
    fields = dict(query=torch.randn(batch, call["heads"], n, call["head_dim"]).to(dtype))
    for name, width in (("key", "head_dim"), ("value", "value_dim")):
        fields[name] = torch.randn(batch, call["kv_heads"], m, call[width]).to(dtype)
    if call["low_rank"]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        fields["packed_rank"] = call["rank"] if call["is_packed"] and call["low_rank"] == QUADRATIC else 0
        width = OPERATORS.packed_width(call["rank"]) if fields["packed_rank"] else call["rank"] + 1
        for token in ("query", "key"):
            fields[f"{token}_map"] = torch.rand(*fields[token].shape[:3], width, dtype=wide)
    blocks = -(-n // call["block_q"])
    if call["listed"]:
        capacity = call["listed"] // call["block_k"]
        fields["index"] = torch.zeros(batch, call["heads"], blocks, capacity, dtype=torch.int32)
        fields["count"] = torch.full((batch, call["heads"], blocks), min(1, m), dtype=torch.int32)
    if call["has_span"]:
        fields |= dict(span=torch.zeros(1, blocks, 2, dtype=torch.int32), span_sinks=call["sinks"])
    fields |= {name: call[name] for name in ("low_rank", "block_q", "block_k", "span_keys", "is_causal")}
    _, _, state, scores = OPERATORS.attention_with_state(*operator_arguments(AttentionArguments, **fields))
    return state, scores


def test_sizes_are_those_of_what_the_operator_returns() -> None:
    saved = {"state": 0, "scores": 0}
    for seed in range(400):
        call = draw(seed)
        state, scores = results(call)
        listed = call["listed"] // call["block_k"] * call["block_k"] + call["has_span"] * (
            call["span_keys"] + call["sinks"]
        )
        names = ("batch", "heads", "queries", "head_dim", "kv_heads", "keys", "value_dim", "low_rank")
        shape = [call[name] for name in names]
        rank = call["rank"] if call["low_rank"] else 0
        sizes = OPERATORS.saved_sizes("cpu", call["dtype"], *shape, rank, listed, call["block_q"], call["is_causal"])
        expected = list(state.shape), list(scores.shape), str(state.dtype).removeprefix("torch.")
        assert sizes == expected and scores.dtype == state.dtype, call
        saved["state"] += state.numel() > 0
        saved["scores"] += scores.numel() > 0
    assert all(30 < n < 370 for n in saved.values()), saved


@pytest.mark.parametrize("block_q", [2**20, 2**31 - 1])
def test_a_block_far_larger_than_the_row_takes_no_more_room(block_q: int) -> None:
    shape = 1, 1, 100, 16, 1, 100, 16, 0, 0, 64
    large, fitting = (OPERATORS.saved_sizes("cpu", torch.float32, *shape, b, False) for b in (block_q // 32 * 32, 128))
    assert large == fitting and large[1] == [1, 1, 128, 64]


def test_widths_and_capacities_are_those_of_the_operators() -> None:
    for rank in (1, 9, 13, 14, 15, 30):
        weight = torch.randn(1, 2, rank + 1, 32)
        rows = OPERATORS.project_packed(torch.randn(1, 2, 5, 32), weight, torch.zeros(1, 2, rank + 1))
        assert rows.shape[3] == OPERATORS.packed_width(rank)
    tokens = torch.randn(1, 2, 40, 16)
    for keys, block_q, block_k, window in ((64, 16, 1, 0), (40, 8, 1, 0), (64, 1, 8, 16), (32, 1, 8, 0)):
        form = dict(keys=keys, block_q=block_q, block_k=block_k, window=window)
        index, _ = OPERATORS.route(*operator_arguments(RouteArguments, query=tokens, key=tokens, **form))
        assert index.shape[3] == min(OPERATORS.list_capacity(keys, block_k), 40 // block_k)
    narrow = OPERATORS.narrow_head()
    for head_dim, dtype in ((narrow - 1, "float64"), (narrow, "float32")):
        shape = 1, 1, 20, head_dim, 1, 20, 16, 0, 0, 0, 1, False
        assert OPERATORS.saved_sizes("cpu", torch.float32, *shape)[2] == dtype


def test_a_device_without_kernels_is_named() -> None:
    shape = 1, 1, 20, 16, 1, 20, 16, 0, 0, 0, 1, False
    message = r"expected tensors on a device that .* \(CPU(, CUDA)?\), got MPS; move the tensors"
    with pytest.raises(RuntimeError, match=message):
        OPERATORS.saved_sizes("mps", torch.float32, *shape)
    with pytest.raises(RuntimeError, match="expected sizes of at least 0 and block_q of at least 1"):
        OPERATORS.saved_sizes("cpu", torch.float32, *shape[:10], 0, False)


def test_launchers_are_called_through_the_table_of_the_device() -> None:
    """A test of another device's kernels puts its own launchers into the table."""
    project, project_packed = 4, 5  # of struct Launchers (csrc/launchers.h)
    table = (ctypes.c_void_p * 6).from_address(OPERATORS.launchers_address("cpu"))
    tokens, weight = torch.randn(1, 2, 5, 32), torch.randn(1, 2, 10, 32)
    before = table[project_packed]
    table[project_packed] = table[project]
    try:
        rows = OPERATORS.project_packed(tokens, weight, torch.zeros(1, 2, 10))
    finally:
        table[project_packed] = before
    assert torch.equal(rows, OPERATORS.project(tokens, weight, None))
    assert OPERATORS.project_packed(tokens, weight, torch.zeros(1, 2, 10)).shape[3] == OPERATORS.packed_width(9)
