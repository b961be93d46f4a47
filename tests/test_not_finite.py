"""A token that is no number, infinite or nearly so changes no bit of what does not see it, also where queries share a
list: a weight of zero times no number is no number."""

from __future__ import annotations

import math

import pytest
import torch
from operator_cases import operator_arguments
from test_second_pass import LISTED, PEAKS, lists, peaked_inputs
from testkit import assert_same_bits, attend, leaves, qkv, rand
from torch import Tensor

import scatterbrain as sb
from scatterbrain.operators.arguments import QUADRATIC, AttentionArguments

N, D, AT = 150, 32, 43
SUPPORTS = {
    "window of 5": sb.Window(40, 5),
    "window of 8": sb.Window(24, 8),
    "window": sb.Window(64),
    "window of 32": sb.Window(48, 32),
    "window with sinks": sb.Window(29, sinks=5),
    "pooled of 8": sb.Routed(24, 8),
    "pooled": sb.Routed(48, window=32, sinks=5),
    "single queries": sb.Window(24, 1),
    "empty": sb.Empty(),
}
LOW_RANKS = {"none": None, "quadratic": sb.Quadratic(4), "favor": sb.Favor(16)}
PAIRS = [(s, r) for s in SUPPORTS for r in LOW_RANKS if (s, r) != ("empty", "none")]
CONTENTS = {"nan": math.nan, "inf": math.inf, "nearly infinite": 0.9}  # the last times the largest number
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_pair = pytest.mark.parametrize(("support", "low_rank"), PAIRS)
every_content = pytest.mark.parametrize("content", CONTENTS)


def draw(dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    return [*qkv(N, batch=1, heads=4, kv_heads=2, head_dim=D, dtype=dtype), rand(1, 4, N, D, seed=9, dtype=dtype)]


def run(given: list[Tensor], support: object, low_rank: str, **more: object) -> list[Tensor]:
    """out, lse, dq, dk and dv of a causal call."""
    fit = rand(1, 4, 99, D, seed=5), rand(1, 2, 99, D, seed=6)
    if low_rank == "quadratic":
        more["statistics"] = sb.fit_statistics(*fit, 4)
    return attend(given[:3], support, LOW_RANKS[low_rank], d_out=given[3], is_causal=True, **more)


def spoilt(given: list[Tensor], which: int | None, tokens: slice, content: str) -> list[Tensor]:
    """With other numbers of the same signs at `tokens` of one tensor, or of all."""
    changed = [t.clone() for t in given]
    for i, t in enumerate(changed):
        if which in (None, i):
            largest = torch.finfo(t.dtype).max if content == "nearly infinite" else 1.0
            t[:, :, tokens] = CONTENTS[content] * largest * t[:, :, tokens].sign()
    return changed


@every_dtype
@every_content
@every_pair
def test_the_past_does_not_see_it(support: str, low_rank: str, content: str, dtype: torch.dtype) -> None:
    """Results of queries before it, and their gradients."""
    given = draw(dtype)
    want = run(given, SUPPORTS[support], low_rank)
    for which in (0, 1, 2, 3, None):
        for tokens in (slice(AT, AT + 1), slice(AT, None)):
            got = run(spoilt(given, which, tokens, content), SUPPORTS[support], low_rank)
            assert_same_bits([t[:, :, :AT] for t in got[:3]], [t[:, :, :AT] for t in want[:3]])


@every_dtype
@every_content
@every_pair
def test_the_past_does_not_see_it_beside_queries_that_are_padding(
    support: str, low_rank: str, content: str, dtype: torch.dtype
) -> None:
    given, padding = draw(dtype), torch.zeros(1, N, dtype=torch.bool)
    padding[:, ::8] = True  # the first query of every tile
    want, got = (
        run(t, SUPPORTS[support], low_rank, query_padding_mask=padding)
        for t in (given, spoilt(given, None, slice(AT, None), content))
    )
    assert_same_bits([t[:, :, :AT] for t in got[:3]], [t[:, :, :AT] for t in want[:3]])


@every_dtype
@every_content
@every_pair
def test_keys_behind_a_query_do_not_see_it(support: str, low_rank: str, content: str, dtype: torch.dtype) -> None:
    """Nor do they see its gradient: theirs are of the queries from their own on. Other queries see nothing of it."""
    given = draw(dtype)
    chosen = SUPPORTS[support]
    if isinstance(chosen, sb.Routed):  # what a query is may choose the lists of later ones
        more = {"statistics": sb.fit_statistics(*given[:2], 4)} if low_rank == "quadratic" else {}
        chosen = sb.route(*given[:2], chosen, low_rank=LOW_RANKS[low_rank], is_causal=True, **more)
    want = run(given, chosen, low_rank)
    others = torch.arange(N) != AT
    for which in (0, 3):
        got = run(spoilt(given, which, slice(AT, AT + 1), content), chosen, low_rank)
        assert_same_bits([t[:, :, others] for t in got[:3]], [t[:, :, others] for t in want[:3]])
        assert_same_bits([t[:, :, AT + 1 :] for t in got[3:]], [t[:, :, AT + 1 :] for t in want[3:]])


@every_dtype
@every_content
@pytest.mark.parametrize("support", ["window of 8", "window", "window of 32", "window with sinks", "single queries"])
def test_keys_that_no_query_sees_change_nothing(support: str, content: str, dtype: torch.dtype) -> None:
    """Where the queries that would list them are padding, every gradient of every other token has its bits."""
    given, padding, others = draw(dtype), torch.zeros(1, N, dtype=torch.bool), torch.ones(N, dtype=torch.bool)
    padding[:, AT : AT + 64 + 48] = True
    others[AT : AT + 20] = False
    want, got = (
        run(t, SUPPORTS[support], "none", query_padding_mask=padding)
        for t in (given, spoilt(given, None, slice(AT, AT + 20), content))
    )
    assert_same_bits([t[:, :, others] for t in got], [t[:, :, others] for t in want])
    assert all(t[:, :, others].isfinite().all() for t in want[2:])


@every_content
@pytest.mark.parametrize("block_q", [8, 16, 32])
@pytest.mark.parametrize("peak", PEAKS)
def test_queries_that_are_computed_again_do_not_see_it(peak: str, block_q: int, content: str) -> None:
    """In float64 and key by key."""
    keys, edge = 400, LISTED + 45
    index, count = lists(keys, block_q, True)
    settings = dict(low_rank=QUADRATIC, block_q=block_q, is_causal=True, scale=0.25)
    inputs = peaked_inputs(PEAKS[peak], keys)
    later = spoilt(inputs[:3], 2, slice(edge, None), content)
    results = []
    for given in (inputs, [*later, *inputs[3:]]):
        *tokens, d_out, d_lse = given
        tokens = leaves(tokens)
        named = dict(zip(("query", "key", "value", "query_map", "key_map"), tokens), index=index, count=count)
        out, lse = torch.ops.scatterbrain.attention(*operator_arguments(AttentionArguments, **named, **settings))
        dq, dx = torch.autograd.grad([out, lse], [tokens[0], tokens[3]], [d_out, d_lse])
        results.append([t[:, :, :edge] for t in (out.detach(), lse.detach(), dq, dx)])
    assert_same_bits(*results)


@every_content
@pytest.mark.parametrize("low_rank", LOW_RANKS)
@pytest.mark.parametrize("support", ["window of 8", "window", "pooled"])
def test_any_number_of_threads_gives_the_same_bits(support: str, low_rank: str, content: str) -> None:
    """More threads than heads keep what a tile adds to its keys, and add it key range by key range."""
    given, results = draw(torch.float32), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for which in range(4):
            found = run(spoilt(given, which, slice(AT, AT + 1), content), SUPPORTS[support], low_rank)
            results.append([t.nan_to_num(7.0, 8.0, 9.0) for t in found])
    for one, three in zip(results[:4], results[4:]):
        assert_same_bits(one, three)
