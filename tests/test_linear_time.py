"""Time is that of what a call evaluates. Calls are compared with calls that evaluate as much, by the stage that
evaluates it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from testkit import assert_same_bits, leaves, out_and_gradients, qkv, rand

import scatterbrain as sb


def seconds(stage: str, function: Callable[[], object], calls: int = 5) -> float:
    """Of the fastest call, on one thread."""
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(calls):
        with sb.profile() as profile:
            function()
        times.append(profile.stages[stage].seconds)
    torch.set_num_threads(threads)
    return min(times)


def test_the_backward_pass_of_single_queries_does_not_pass_over_keys_that_none_lists() -> None:
    """Against queries in blocks, whose gradients are scattered otherwise."""
    queries, keys = 32, 2**18
    times = []
    for block_q in (1, 8):
        tokens = leaves(qkv(queries, keys, batch=1, heads=1, head_dim=16))
        out = sb.attention(*tokens, sb.Window(16, block_q), None, is_causal=True, query_offset=keys - queries)
        gradient = rand(*out.shape, seed=3)
        backward = lambda: torch.autograd.grad(out, tokens, gradient, retain_graph=True)
        times.append(seconds("backward of queries", backward))
    assert times[0] < 10 * times[1]


@pytest.mark.parametrize("low_rank", [None, sb.Favor(8)], ids=["none", "favor"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_block_of_a_billion_queries_is_one_of_all_queries(is_causal: bool, low_rank: sb.Favor | None) -> None:
    tokens, times, results = qkv(100, batch=1, head_dim=16), [], []
    for block_q in (2**30, 256):
        call = lambda *given: sb.attention(*given, sb.Window(64, block_q), low_rank, is_causal=is_causal)
        results.append(out_and_gradients(call, tokens))
        times.append(seconds("forward of queries", lambda: call(*tokens)))
    assert_same_bits(*results)
    assert times[0] < 20 * times[1]


def test_ignored_keys_between_few_others_take_no_time() -> None:
    """60 keys, far apart or next to each other, that every query evaluates one by one."""
    queries, keys, times = 64, 2**18, []
    query, key, value = qkv(queries, keys, batch=1, heads=1, head_dim=16)
    for step in (keys // 60, 1):
        mask = torch.ones(1, keys, dtype=torch.bool)
        mask[:, : 60 * step : step] = False
        call = lambda: sb.attention(query, key, value, sb.Window(16), sb.Favor(8), key_padding_mask=mask)
        times.append(seconds("forward of queries", call))
    assert times[0] < 10 * times[1]
