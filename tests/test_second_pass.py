"""Queries whose listed keys hold nearly all of the low-rank part: the complement must be more than rounding."""

from __future__ import annotations

import math

import pytest
import torch
from operator_cases import operator_arguments
from oracle import row_error
from testkit import assert_same_bits, attend, rand
from torch import Tensor

import scatterbrain as sb
from scatterbrain.operators.arguments import QUADRATIC, AttentionArguments

# More keys are listed than a state holds out (kMostHeld in csrc/params.h): those would leave nothing to take back. In
# the longer calls more queries are computed again than the first ones, which are summed key by key (kByKeyKeys).
LENGTHS, LISTED, HEAD_DIM, RANK, SCALE = (400, 1200), 272, 16, 2, 0.25
# L of the listed keys over every other weight: within what float64 can subtract, and beyond it
PEAKS = {"peaked": 500.0, "extreme": 1e8}


def peaked_inputs(peak: float, keys: int) -> list[Tensor]:
    """query, key, value, two maps, and gradients of out and lse."""
    query, key, value, d_out = (rand(1, 2, keys, HEAD_DIM, seed=seed) for seed in range(4))
    query_map, key_map = (0.3 * rand(1, 2, keys, RANK + 1, seed=seed) for seed in (4, 5))
    query_map[..., 0], key_map[:, :, :LISTED, 0] = 4.0, peak
    query_map[:, :, 1::3, -1] = -60.0  # in the same tiles, queries without a low-rank part to speak of
    return [query, key, value, query_map, key_map, d_out, rand(1, 2, keys, seed=6)]


def lists(keys: int, block_q: int, is_causal: bool) -> tuple[Tensor, Tensor]:
    blocks = -(-keys // block_q)
    index = torch.arange(LISTED, dtype=torch.int32).expand(1, 1, blocks, LISTED).contiguous()
    count = torch.full((1, 1, blocks), LISTED, dtype=torch.int32)
    if is_causal:  # a list names no key after its block's last query
        last = torch.arange(1, blocks + 1, dtype=torch.int32) * block_q
        count = torch.minimum(count, last.expand(1, 1, blocks)).contiguous()
        index = torch.where(torch.arange(LISTED) < count[..., None], index, -1).to(torch.int32)
    return index, count


def call(inputs: list[Tensor], block_q: int, is_causal: bool) -> list[Tensor]:
    """Results and gradients of the operator."""
    *inputs, d_out, d_lse = inputs
    leaves = [t.requires_grad_() for t in inputs]
    index, count = lists(inputs[0].size(2), block_q, is_causal)
    given = dict(zip(("query", "key", "value", "query_map", "key_map"), leaves), index=index, count=count)
    settings = dict(low_rank=QUADRATIC, block_q=block_q, is_causal=is_causal, scale=SCALE)
    out, lse = torch.ops.scatterbrain.attention(*operator_arguments(AttentionArguments, **given, **settings))
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, [d_out, d_lse])]


def peaked_call(peak: float, keys: int, block_q: int, is_causal: bool) -> list[Tensor]:
    return call(peaked_inputs(peak, keys), block_q, is_causal)


def dense(peak: float, keys: int, is_causal: bool) -> list[Tensor]:
    """The same from the dense definition in float64."""
    *inputs, d_out, d_lse = (t.double() for t in peaked_inputs(peak, keys))
    query, key, value, query_map, key_map = leaves = [t.requires_grad_() for t in inputs]
    x, y = query_map[..., :-1], key_map[..., :-1]
    low_rank = (query_map[..., -1:] + key_map[..., -1][..., None, :]).exp() * (1 + x @ y.mT / 2).square()
    listed = torch.arange(keys) < LISTED
    weight = torch.where(listed, (SCALE * query @ key.mT).exp(), low_rank)
    if is_causal:
        weight = weight.tril()
    total = weight.sum(-1)
    out, lse = weight @ value / total[..., None], total.log()
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, [d_out, d_lse])]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("block_q", [1, 8, 16, 32])
@pytest.mark.parametrize("keys", LENGTHS)
@pytest.mark.parametrize("peak", PEAKS)
def test_what_is_left_of_a_peaked_low_rank_part_is_exact(peak: str, keys: int, block_q: int, is_causal: bool) -> None:
    results = zip(peaked_call(PEAKS[peak], keys, block_q, is_causal), dense(PEAKS[peak], keys, is_causal))
    for i, (got, want) in enumerate(results):
        # Gradients of maps are differences of products with coordinates as large as the peak: the dense definition in
        # float32 errs by 4e-5.
        assert row_error(got, want) < (2.5e-5 if i >= 5 else 1e-5)


def test_the_state_alone_would_lose_it() -> None:
    """Subtracting the listed keys from the key/value state leaves only rounding here: in float32, then in float64."""
    for peak, dtype in zip(PEAKS.values(), (torch.float32, torch.float64)):
        assert torch.finfo(dtype).eps * LISTED * (1 + 4.0 * peak / 2) ** 2 > 1e-2 * (min(LENGTHS) - LISTED)


@pytest.mark.parametrize("block_q", [1, 16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_both_forms_of_the_second_pass_run(block_q: int, is_causal: bool) -> None:
    with sb.profile() as profile:
        peaked_call(PEAKS["extreme"], max(LENGTHS), block_q, is_causal)
    assert profile.stages["queries again in double"].calls == 4  # two heads, forward and backward
    assert "queries again by key" in profile.stages


def test_a_few_queries_are_not_computed_in_double() -> None:
    """The first ones of a causal call list most of what they see."""
    tokens, dim = 512, 64
    query, key, value = (rand(1, 1, tokens, dim, seed=seed) + 1.0 for seed in range(3))
    fitted = sb.fit_statistics(rand(1, 1, 400, dim, seed=3) + 1.0, rand(1, 1, 400, dim, seed=4), 9)
    with sb.profile() as profile:
        attend([query, key, value], sb.Routed(64), sb.Quadratic(9), fitted, is_causal=True)
    assert "queries again by key" in profile.stages
    assert "queries again in double" not in profile.stages


@pytest.mark.parametrize("block_q", [1, 16])
def test_no_later_query_decides_how_one_is_computed_again(block_q: int) -> None:
    """Queries in the second half of the sequence need no second pass in one of the two calls."""
    keys = max(LENGTHS)
    late = peaked_inputs(PEAKS["peaked"], keys)
    late[3][:, :, keys // 2 :, -1] = -60.0
    results = call(late, block_q, True)[:2], peaked_call(PEAKS["peaked"], keys, block_q, True)[:2]
    for one, other in zip(*results):
        assert torch.equal(one[:, :, : keys // 2], other[:, :, : keys // 2])
        assert not torch.equal(one[:, :, keys // 2 :], other[:, :, keys // 2 :])


def test_a_row_of_more_keys_than_float32_can_count_is_summed_to_its_end() -> None:
    """Its last key weighs as much as all that are not listed; one query is summed key by key."""
    keys, queries, last = 2**24 + 2, 32, 16.6
    tokens = torch.zeros(1, 1, 1, HEAD_DIM)  # every key is the same in memory
    key_map = torch.tensor([1.0, 0.0]).repeat(1, 1, keys, 1)
    key_map[:, :, :LISTED, 0], key_map[:, :, -1, 1] = 1e6, last
    query_map = torch.tensor([1.0, -60.0]).repeat(1, 1, queries, 1)
    query_map[:, :, 0, 1] = 0.0
    index, count = lists(queries, 16, False)
    given = dict(query=tokens.expand(1, 1, queries, -1), key=tokens.expand(1, 1, keys, -1))
    given |= dict(value=given["key"], query_map=query_map, key_map=key_map, index=index, count=count)
    with sb.profile() as profile:
        _, lse = torch.ops.scatterbrain.attention(
            *operator_arguments(AttentionArguments, **given, low_rank=2, block_q=16, is_causal=False, scale=1.0)
        )
    assert "queries again by key" in profile.stages
    assert float(lse[0, 0, 0]) == pytest.approx(math.log(keys - 1 + math.exp(last)), abs=1e-4)


@pytest.mark.parametrize("block_q", [1, 16])
@pytest.mark.parametrize("keys", LENGTHS)
@pytest.mark.parametrize("peak", PEAKS)
def test_the_result_is_the_same_for_any_number_of_threads(peak: str, keys: int, block_q: int) -> None:
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        results.append(peaked_call(PEAKS[peak], keys, block_q, True))
    assert_same_bits(*results)
