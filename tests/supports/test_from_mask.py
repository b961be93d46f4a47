"""Lists from a mask: which pairs they hold, which blocks they are made of, and what is refused."""

from __future__ import annotations

import random

import pytest
import testkit
import torch
from bad_calls import assert_refused
from testkit import assert_all_close, causal_mask, out_and_gradients, qkv, rand

import scatterbrain as sb


def block_mask(n: int, m: int, block_q: int, block_k: int, *leading: int, seed: int = 0) -> torch.Tensor:
    """bool (*leading, n, m) of whole blocks."""
    shape = *leading, -(-n // block_q), -(-m // block_k)
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    return chosen.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)[..., :n, :m]


def draw(seed: int) -> tuple[torch.Tensor, dict, int, int]:
    """A mask, what it is read with, and the sizes that it was made of."""
    r = random.Random(seed)
    n, m = r.choice([1, 24, 37, 64]), r.choice([1, 17, 40, 64])
    block_q, block_k = r.choice([1, 3, 8, 16, 100]), r.choice([1, 4, 8, 100])
    leading = r.choice([(), (1, 1), (2, 1), (1, 2), (2, 4), (2, 2)])
    is_causal = r.random() < 0.5
    offset = r.choice([0, 5, -3]) if is_causal else 0
    mask = block_mask(n, m, block_q, block_k, *leading, seed=seed)
    if is_causal:  # what is behind the edge says nothing
        future = torch.arange(m) > torch.arange(n)[:, None] + offset
        mask = torch.where(future, torch.rand(n, m) < 0.5, mask)
    return mask, dict(is_causal=is_causal, query_offset=offset), block_q, block_k


@pytest.mark.parametrize("seed", range(24))
def test_the_lists_hold_the_pairs_of_the_mask_and_attention_weighs_them_exactly(seed: int) -> None:
    mask, causal, block_q, block_k = draw(seed)
    n, m = mask.shape[-2:]
    tokens = qkv(n, m, heads=4, kv_heads=2)
    found = sb.Blocks.from_mask(mask, **causal)
    given = sb.Blocks.from_mask(mask, block_q, block_k, **causal)
    assert found.block_q >= min(block_q, n) and found.block_k >= min(block_k, m)  # the largest that fit
    visible = sb.reference.visible(*tokens[:2], **causal)
    heads = mask if mask.dim() == 2 else mask.repeat_interleave(4 // mask.shape[1], 1)
    want = heads.expand(2, 4, n, m) & visible
    for lists in (found, given):
        assert torch.equal(sb.reference.mask(lists, *tokens[:2], None, **causal), want)
    low_rank = sb.Favor(8)
    mine, defined = (
        out_and_gradients(
            lambda *t, function=function: function(*t, found, low_rank, **causal),
            [t.to(dtype) for t in tokens],
            d_out=rand(2, 4, n, 8, seed=9, dtype=dtype),
        )
        for function, dtype in ((sb.attention, torch.float32), (sb.reference.attention, torch.float64))
    )
    assert_all_close([t.double() for t in mine], defined)


def test_lists_name_no_more_blocks_than_the_mask_has() -> None:
    """A causal list ends with the block of its last query's edge, though blocks behind it are True in the mask."""
    mask = torch.ones(64, 64, dtype=torch.bool)
    lists = sb.Blocks.from_mask(mask, 16, 16, is_causal=True)
    assert lists.count.tolist() == [[[1, 2, 3, 4]]] and lists.index[0, 0, 1].tolist() == [0, 1, -1, -1]
    whole = sb.Blocks.from_mask(mask)
    assert (whole.block_q, whole.block_k, whole.count.item()) == (64, 64, 1)
    assert sb.Blocks.from_mask(~mask).index.shape == (1, 1, 1, 0)


def test_the_edge_of_a_causal_window_takes_no_blocks_apart() -> None:
    """A window of whole blocks, cut at each query: the triangle on the diagonal is the causal edge's."""
    block = torch.arange(64) // 8
    window = (block[:, None] - block).abs() <= 1
    cut = window & ~causal_mask(64)
    lists = sb.Blocks.from_mask(cut, is_causal=True)
    assert (lists.block_q, lists.block_k) == (8, 8)
    assert sb.Blocks.from_mask(cut).block_q == 1
    query, key, value = qkv(64)
    got = sb.attention(query, key, value, lists, None, is_causal=True)
    scores = (query @ key.transpose(-1, -2) * 8**-0.5).masked_fill(~cut, -torch.inf)
    torch.testing.assert_close(got, torch.softmax(scores, -1) @ value)


def test_one_list_serves_every_row_and_head_in_a_module_too() -> None:
    lists = sb.Blocks.from_mask(block_mask(40, 40, 8, 8))
    assert lists.index.shape[:2] == (1, 1)
    module = sb.ScatterbrainAttention(4, 8, 2, lists, sb.Favor(8))
    query, key, value = qkv(40, batch=3, heads=4, kv_heads=2)
    each = sb.Blocks(lists.index.repeat(3, 2, 1, 1), lists.count.repeat(3, 2, 1), lists.block_q, lists.block_k)
    assert torch.equal(module(query, key, value), sb.attention(query, key, value, each, sb.Favor(8)))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_one_list_serves_padded_rows_up_to_their_last_keys(is_causal: bool, rows: int) -> None:
    """Each row is as it is alone, with what is left of the mask; lists count from the first valid token."""
    n, padded = 64, ((24, 0), (0, 0), (5, 60 - 5))[:rows]
    mask = block_mask(n, n, 8, 4, seed=3)
    support = sb.Blocks.from_mask(mask, 8, 4, is_causal=is_causal)
    padding = testkit.padding(n, [right for right, _ in padded], [left for _, left in padded])
    tokens, low_rank = qkv(n, batch=rows, heads=4, kv_heads=2), sb.Favor(8)
    call = dict(key_padding_mask=padding, is_causal=is_causal)
    got = out_and_gradients(
        lambda *t: sb.attention(*t, support, low_rank, **call), tokens, d_out=rand(rows, 4, n, 8, seed=9)
    )
    want = out_and_gradients(
        lambda *t: sb.reference.attention(*t, support, low_rank, **call),
        [t.double() for t in tokens],
        d_out=rand(rows, 4, n, 8, seed=9, dtype=torch.float64),
    )
    assert_all_close([t.double() for t in got], want)
    for row, valid in enumerate(~padding):
        length = int(valid.sum())
        own = sb.Blocks.from_mask(mask[:length, :length], 8, 4, is_causal=is_causal)
        alone = sb.attention(*(t[row : row + 1, :, valid] for t in tokens), own, low_rank, is_causal=is_causal)
        torch.testing.assert_close(got[0][row, :, valid], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("low_rank", [None, sb.Favor(8)], ids=["sparse", "favor"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("blocks", [(1, 1), (None, None), (2, 2)], ids=str)
def test_keys_that_only_padded_queries_see_are_left_out_of_causal_lists(blocks: tuple, per_row: bool, low_rank) -> None:
    """Also where keys are not padded, and in a part of a longer sequence."""
    n, offset, padded = 22, 6, ((0, 7), (3, 0), (2, 15))
    i, j = torch.arange(n)[:, None] + offset, torch.arange(n + offset)
    mask = (i // 4 - j // 4).abs() <= 1
    if per_row:
        mask = mask.expand(3, 1, -1, -1)
    support = sb.Blocks.from_mask(mask, *blocks, is_causal=True, query_offset=offset)
    padding = testkit.padding(n, [right for _, right in padded], [left for left, _ in padded])
    tokens = qkv(n, n + offset, batch=3, heads=4, kv_heads=2)
    call = dict(query_padding_mask=padding, is_causal=True, query_offset=offset)
    got = out_and_gradients(
        lambda *t: sb.attention(*t, support, low_rank, **call), tokens, d_out=rand(3, 4, n, 8, seed=9)
    )
    want = out_and_gradients(
        lambda *t: sb.reference.attention(*t, support, low_rank, **call),
        [t.double() for t in tokens],
        d_out=rand(3, 4, n, 8, seed=9, dtype=torch.float64),
    )
    assert_all_close([t.double() for t in got], want)
    compiled = torch.compile(lambda *t: sb.attention(*t, support, low_rank, **call), backend="aot_eager")
    torch.testing.assert_close(compiled(*tokens), got[0])


def test_a_key_behind_a_blocks_last_query_is_refused_beside_padding_too() -> None:
    index, count = torch.full((1, 1, 3, 2), -1, dtype=torch.int32), torch.zeros(1, 1, 3, dtype=torch.int32)
    index[0, 0, 0, 0], count[0, 0, 0] = 4, 1  # of a block of queries 0 to 3
    padding = testkit.padding(12, [10, 0], [0, 0])
    with pytest.raises(ValueError, match="breaks causality"):
        sb.attention(*qkv(12), sb.Blocks(index, count, 4, 1), None, is_causal=True, query_padding_mask=padding)


def test_an_order_for_every_row_and_head_is_one_for_each() -> None:
    tokens = qkv(32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).to(torch.int32)[None, None]
    index, count = torch.arange(3, dtype=torch.int32).expand(1, 1, 2, 3), torch.full((1, 1, 2), 3, dtype=torch.int32)
    one = sb.Blocks(index, count, 16, 4, order)
    each = sb.Blocks(index.repeat(2, 2, 1, 1), count.repeat(2, 2, 1), 16, 4, order.repeat(2, 2, 1))
    assert torch.equal(sb.attention(*tokens, one, sb.Favor(8)), sb.attention(*tokens, each, sb.Favor(8)))
    want = sb.reference.attention(*tokens, one, sb.Favor(8))
    torch.testing.assert_close(sb.attention(*tokens, one, sb.Favor(8)).double(), want, rtol=1e-5, atol=1e-5)


MASK = block_mask(32, 32, 8, 8, 1, 2)
# id: (call, error, words that the message holds, in this order)
CALLS = {
    "scores": (
        lambda: sb.Blocks.from_mask(torch.zeros(4, 4)),
        TypeError,
        "from_mask: mask must be a bool tensor, True where weights are exact, got torch.float32; compare it first",
    ),
    "a list": (lambda: sb.Blocks.from_mask([[True]]), TypeError, "mask must be a bool tensor.*got list"),
    "three dimensions": (
        lambda: sb.Blocks.from_mask(MASK[0]),
        ValueError,
        r"mask must be \(queries, keys\) or \(batch, heads, queries, keys\), got shape \(2, 32, 32\); a batch",
    ),
    "a mask without values": (lambda: sb.Blocks.from_mask(MASK.to("meta")), ValueError, "meta device.*no values"),
    "no queries in a block": (
        lambda: sb.Blocks.from_mask(MASK, 0),
        ValueError,
        "Blocks.from_mask: block_q must be at least 1, got 0",
    ),
    "half a key": (lambda: sb.Blocks.from_mask(MASK, 8, 0.5), TypeError, "block_k must be an int, got 0.5"),
    "an offset without an edge": (
        lambda: sb.Blocks.from_mask(MASK, query_offset=3),
        ValueError,
        "query_offset shifts the causal edge and needs is_causal=True, got 3",
    ),
    "a block that is neither": (
        lambda: sb.Blocks.from_mask(torch.arange(32)[:, None] // 8 >= torch.arange(32) // 8, 16, 8),
        ValueError,
        "expected every block of 16 queries and 8 keys to be all True or all False, got queries 0 to 15 and keys 8 to "
        r"15 with 64 of 128 pairs True \(2 such blocks\); pass block_q=8 and block_k=8, the largest that fit, or None",
    ),
    "a block of one head that is neither": (
        lambda: sb.Blocks.from_mask(torch.stack([~MASK[0, 0], torch.eye(32) > 0])[None], 8, 8),
        ValueError,
        "queries 0 to 7 and keys 0 to 7 in batch row 0, head 1 with 8 of 64 pairs True .4 such blocks.; pass block_q=1",
    ),
    "lists for other rows": (
        lambda: sb.attention(*qkv(32, batch=3), sb.Blocks.from_mask(MASK.expand(2, 2, 32, 32)), None),
        ValueError,
        r"index must lead with \(batch, heads\) = \(3, 2\) or \(3, 1\), or 1 for all of them, got \(2, 2\)",
    ),
    "the future": (
        lambda: sb.attention(*qkv(32), sb.Blocks.from_mask(torch.ones(32, 32) > 0, 8, 8), None, is_causal=True),
        ValueError,
        "a list names keys after its block's last query, which breaks causality; leave them out",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_mask_of_blocks_is_refused(name: str) -> None:
    assert_refused(*CALLS[name])
