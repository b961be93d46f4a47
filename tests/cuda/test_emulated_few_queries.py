"""Calls of few queries and many keys before them, as a step of generation makes: one state on tensor cores, none
without them. In the emulator: errors, what they allocate, what they may not depend on; and a planted fault."""

from __future__ import annotations

import pytest
import torch
from cuda_memory import at_once
from emulated import Emulator
from planted import Kernels
from testkit import assert_same_bits, rand
from tiles import excess as excess_of_kernel
from tiles import kernel_starts, statistics_of
from torch import Tensor

import scatterbrain as sb

M = 700
KERNELS = {torch.bfloat16: "attention_tile", torch.float16: "attention_tile", torch.float32: "attention_tile_float"}


def tokens_of(dtype: torch.dtype, queries: int, keys: int = M, head_dim: int = 64, batch: int = 2) -> list[Tensor]:
    query, key = rand(batch, 4, queries, head_dim, seed=1), rand(batch, 2, keys, head_dim, seed=2)
    return [query.to(dtype), key.to(dtype), rand(batch, 2, keys, head_dim, seed=3).to(dtype)]


def excess(emulator: Emulator, kernel: str, tokens: list[Tensor], *arguments: object, **more: object) -> str:
    """The CPU sums unlisted keys of few queries one by one, with weights that are not rounded on any of its sets."""
    return excess_of_kernel(emulator, kernel, tokens, *arguments, rounds=tokens[0].dtype != torch.bfloat16, **more)


def behind(tokens: list[Tensor]) -> Tensor:
    """Offsets by which the last query of a row sees its last key, and 90 keys less in the next row."""
    return tokens[1].shape[2] - tokens[0].shape[2] - torch.tensor([0, 90], dtype=torch.int32)


SUPPORTS = {"window": sb.Window(64), "routed": sb.Routed(32, block_q=1, block_k=8, window=16), "empty": sb.Empty()}


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("queries", [1, 7, 16])
@pytest.mark.parametrize("dtype", KERNELS, ids=str)
def test_errors_are_those_of_the_cpu_kernel(emulator: Emulator, dtype: torch.dtype, queries: int, support: str) -> None:
    tokens = tokens_of(dtype, queries)
    more = dict(is_causal=True, query_offset=behind(tokens))
    assert not excess(emulator, KERNELS[dtype], tokens, SUPPORTS[support], sb.Quadratic(4), **more)


@pytest.mark.parametrize("keys", [1, 64, 130, 200])
def test_short_rows_and_padding(emulator: Emulator, keys: int) -> None:
    """Early tiles read no state; a masked row's keys are counted from its first one."""
    tokens = tokens_of(torch.bfloat16, min(keys, 9), keys)
    mask = torch.zeros(2, keys, dtype=torch.bool)
    mask[1, : keys // 3] = True
    more = dict(is_causal=True, query_offset=keys - tokens[0].shape[2], key_padding_mask=mask)
    assert not excess(emulator, "attention_tile", tokens, sb.Window(8, 8), sb.Quadratic(4), **more)


@pytest.mark.parametrize("dtype", [*KERNELS, torch.float64], ids=str)
def test_later_keys_change_no_bit(emulator: Emulator, dtype: torch.dtype) -> None:
    tokens = tokens_of(dtype, 5)
    more = dict(is_causal=True, query_offset=400, statistics=statistics_of(sb.Quadratic(4), tokens))
    others = [tokens[0], *(t.clone() for t in tokens[1:])]
    others[1][:, :, 405:], others[2][:, :, 405:] = 7.0, torch.nan
    with emulator.installed():
        runs = [sb.attention(*t, sb.Window(64), sb.Quadratic(4), return_lse=True, **more) for t in (tokens, others)]
    assert_same_bits(*runs, ("out", "lse"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 20])  # on tensor cores, and without
def test_memory_is_a_small_part_of_the_keys(emulator: Emulator, dtype: torch.dtype, head_dim: int) -> None:
    """A state before every 64 keys would be 18 times the keys and values, in float64 36 times."""
    tokens = tokens_of(dtype, 1, 8192, head_dim, batch=1)
    low_rank = sb.Quadratic(9)
    given = dict(is_causal=True, query_offset=8191, statistics=statistics_of(low_rank, [t[:, :, :99] for t in tokens]))
    with emulator.installed():
        sb.attention(*tokens, sb.Window(64), low_rank, **given)  # constants are made once
        used = at_once(lambda: sb.attention(*tokens, sb.Window(64), low_rank, **given))
    assert used <= sum(t.nbytes for t in tokens[1:]), used


def test_flagged_queries_need_no_state(emulator: Emulator) -> None:
    """Their complement drowns in rounding; each sums every key by itself in float64."""
    query, key, value = tokens_of(torch.bfloat16, 3)
    key[:, :, :5] *= 30  # in all lists
    support = sb.Blocks(torch.zeros(2, 4, 1, 1, dtype=torch.int32), torch.ones(2, 4, 1, dtype=torch.int32), 16, 16)
    statistics = statistics_of(sb.Quadratic(4), [query, key[:, :, 5:]])
    more = dict(is_causal=True, query_offset=M - 3, statistics=statistics)
    with kernel_starts(emulator, "attention_forward"):
        out = sb.attention(query, key, value, support, sb.Quadratic(4), **more)
    exact = sb.reference.attention(query, key, value, support, sb.Quadratic(4), dtype=torch.float64, **more)
    cpu = sb.attention(query, key, value, support, sb.Quadratic(4), **more)
    assert float((out - exact).abs().max()) <= 2 * float((cpu - exact).abs().max())


# -------------------- a planted fault


def first_complaint(emulator: Emulator) -> str:
    tokens = tokens_of(torch.bfloat16, 7)
    more = dict(is_causal=True, query_offset=behind(tokens))
    return excess(emulator, "attention_tile", tokens, sb.Window(64), sb.Quadratic(4), **more)


def test_the_kernels_without_a_fault_raise_no_complaint(emulator: Emulator) -> None:
    assert first_complaint(emulator) == ""


def test_later_keys_in_the_state_are_noticed(kernels: Kernels) -> None:
    old, new = "if (!p.has_one_state) return range.k_end;", "if (p.state_slots > 0) return range.k_end;"
    kernels.assert_caught("kv_state.cuh", old, new, "rms|row|lse", first_complaint)
