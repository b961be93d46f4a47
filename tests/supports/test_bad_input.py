"""Supports that cannot be and lists that do not fit a call are refused, naming the field, what came and the cure."""

from __future__ import annotations

from functools import partial

import pytest
import testkit
import torch
from bad_calls import B, H, N, assert_refused, attend, numpy, qkv, statistics
from torch import Tensor

import scatterbrain as sb
from scatterbrain.call import Call
from scatterbrain.padding import EVERYTHING

int32_zeros = partial(torch.zeros, dtype=torch.int32)
# One list for each of two query blocks.
blocks = partial(testkit.blocks, block_q=20, heads=H, capacity=4)

# id: (call, error, words that the message holds, in this order)
CALLS = {
    # supports, on construction
    "no window": (lambda: sb.Window(0), ValueError, "Window: keys must be at least 1, got 0"),
    "window of a float": (lambda: sb.Window(6.4), TypeError, "Window: keys must be an int, got 6.4 of type float"),
    "window of a bool": (lambda: sb.Window(True), TypeError, "Window: keys must be an int, got True of type bool"),
    "window block": (lambda: sb.Window(8, block_q=0), ValueError, "Window: block_q must be at least 1"),
    "budgets of too few heads": (
        lambda: attend(support=sb.Routed((16,) * (H + 1))),
        ValueError,
        f"Routed: expected keys for each of the {H} query heads, got {H + 1}",
    ),
    "budgets of no head": (
        lambda: sb.Routed(()),
        ValueError,
        "Routed: keys must be an int, or one for every query head",
    ),
    "budget of numpy": (
        lambda: sb.Routed(numpy().int64(64)),
        TypeError,
        "Routed: keys must be an int, got .*64.* of type int64",
    ),
    "budgets of numpy": (
        lambda: sb.Routed(numpy().array([64, 32])),
        TypeError,
        "Routed: keys must be an int, got array",
    ),
    "budgets of a tensor": (
        lambda: sb.Routed(torch.tensor([64])),
        TypeError,
        "Routed: keys must be an int, got tensor",
    ),
    "one budget below the block": (lambda: sb.Routed((32, 8)), ValueError, "Routed: keys.*at least block_q=16, got 8"),
    "one budget of no blocks": (
        lambda: sb.Routed((16, 20), 1, 8),
        ValueError,
        "Routed: expected keys and window in multiples of 8.*keys=\\(16, 20\\)",
    ),
    "one budget of a float": (lambda: sb.Routed((16, 32.0)), TypeError, "Routed: keys must be an int, got 32.0"),
    "budgets of a module with other heads": (
        lambda: sb.ScatterbrainAttention(4, 8, support=sb.Routed((16, 32)), low_rank=None),
        ValueError,
        "each of the 4 query heads, got 2",
    ),
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
    "LSH rounds": (lambda: sb.LSH(64, rounds=3), ValueError, "LSH: keys.*divide by rounds=3, got 64"),
    "LSH no rounds": (lambda: sb.LSH(64, rounds=0), ValueError, "LSH: rounds must be at least 1"),
    "LSH hash": (lambda: sb.LSH(64, hash="sim"), ValueError, "LSH: expected hash='e2lsh' or 'angular', got 'sim'"),
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
    "LSH seed past 32 bits": (lambda: sb.LSH(64, seed=2**32), ValueError, "LSH: seed must be at most"),
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
    "key past a row's valid ones": (
        lambda: attend(support=blocks([[0], [38]]), key_padding_mask=testkit.padding(N, (0, 0), (0, 7))),
        ValueError,
        "index names key block 38, past the 33 valid keys of row 1 in blocks of 1; drop .*, or give lists for all rows",
    ),
    "key past the end, for all rows": (
        lambda: attend(support=blocks([[0], [40]], batch=1), key_padding_mask=testkit.padding(N, (0, 0), (0, 7))),
        ValueError,
        "index names key block 40, past the 40 keys in blocks of 1",
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
    # routing
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
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_supports_are_named(name: str) -> None:
    assert_refused(*CALLS[name])


def test_budgets_larger_than_the_sequence_are_no_error_and_attend_to_all_of_it() -> None:
    """Nothing is clamped: 64 nearest keys of 40 are all of them."""
    tensors = qkv()
    for support in (sb.Window(64), sb.Routed(64), sb.Routed(64, 1, 8, 16), sb.LSH(128)):
        torch.testing.assert_close(
            attend(*tensors, support=support), attend(*tensors, support=sb.Full()), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "index, order, words",
    [([1, 1], None, "no key twice"), ([3, 1], None, "ascending"), ([0, 2], [0, 0], "names query 0 twice")],
)
def test_lists_on_a_device_are_looked_at_again_when_they_are_used(
    monkeypatch: pytest.MonkeyPatch, index: list[int], order: list[int] | None, words: str
) -> None:
    """Where the environment asks for it: they may have been made, or changed, while nobody looked."""

    class OnDevice(Tensor):
        """A tensor that says it is not on the CPU."""

        is_cpu = False

    lists = torch.tensor(index, dtype=torch.int32).expand(1, 1, 1, 2).as_subclass(OnDevice)
    of_queries = None if order is None else torch.tensor(order, dtype=torch.int32).expand(1, 1, 2).as_subclass(OnDevice)
    support = sb.Blocks(lists, torch.full((1, 1, 1), 2, dtype=torch.int32), 16, 1, of_queries)
    query, key = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 9, 8)
    call = Call(query, key, None, support, None, None, 1.0, EVERYTHING, False)
    support.check_fit(call)
    monkeypatch.setenv("SCATTERBRAIN_CHECK", "1")
    with pytest.raises(ValueError, match=words):
        support.check_fit(call)
