"""LSH clusters: budget, balance, union of rounds, padding."""

from __future__ import annotations

import pytest
import torch
from testkit import rand

import scatterbrain as sb
from scatterbrain.reference.lsh import transformed


def tokens(n: int, heads: int = 2, d: int = 16, seed: int = 0) -> torch.Tensor:
    return rand(2, heads, n, d, seed=seed)


def listed(lists: sb.Blocks) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(lists.index.flatten(0, 2), lists.count.flatten().tolist())]


@pytest.mark.parametrize(
    "n, m, keys, rounds", [(96, 96, 32, 2), (97, 97, 32, 4), (50, 80, 16, 1), (5, 3, 32, 2), (1, 1, 8, 2)]
)
def test_lists_are_ascending_unique_and_within_the_budget(n: int, m: int, keys: int, rounds: int) -> None:
    lists = sb.route(tokens(n, seed=1), tokens(m, seed=2), sb.LSH(keys, rounds))
    assert lists.block_q == lists.block_k == 1
    for row in listed(lists):
        assert row == sorted(set(row)) and 0 < len(row) <= keys and row[-1] < m


def test_one_round_partitions_the_keys_into_equal_clusters() -> None:
    rows = {
        tuple(row)
        for row in listed(
            sb.route(tokens(96, heads=1, seed=1)[:1], tokens(96, heads=1, seed=2)[:1], sb.LSH(16, rounds=1))
        )
    }
    assert len(rows) == 6 and sorted(sum(rows, ())) == list(range(96)) and {len(r) for r in rows} == {16}


def test_more_rounds_are_the_union_of_single_rounds_counted_once() -> None:
    q, k = tokens(64, seed=1), tokens(64, seed=2)
    both = listed(sb.route(q, k, sb.LSH(16, rounds=2, seed=3)))
    assert any(len(row) < 16 for row in both)  # some pair fell into one cluster twice and is listed once


def test_padded_keys_are_in_no_cluster_and_in_no_norm() -> None:
    q, k = tokens(60, seed=1), tokens(60, seed=2)
    mask = torch.zeros(2, 60, dtype=torch.bool)
    mask[:, 40:] = True
    clean = sb.route(q[:, :, :40], k[:, :, :40], sb.LSH(16))
    for rubbish in (float("nan"), 1e4):
        q[:, :, 40:], k[:, :, 40:] = rubbish, rubbish
        padded = sb.route(q, k, sb.LSH(16), key_padding_mask=mask)
        assert torch.equal(padded.index[:, :, :40], clean.index) and padded.count[:, :, 40:].eq(0).all()


def test_the_transform_turns_inner_products_into_distances() -> None:
    """XBOX+: transformed queries lie on one sphere, keys on another, so that the nearest key has the largest inner
    product."""
    q, k = tokens(10, seed=1).double(), tokens(12, seed=2).double()
    hq, hk = transformed(sb.reference.Inputs.of(q, k))
    for norm in (hq.norm(dim=-1), hk.norm(dim=-1)):
        assert torch.allclose(norm, norm[..., :1].expand_as(norm))
    assert torch.allclose(hq @ hk.transpose(-1, -2), q @ k.transpose(-1, -2))


@pytest.mark.parametrize("padding", ["none", "keys", "both"])
@pytest.mark.parametrize("n, m, kv_heads", [(96, 96, 2), (97, 97, 4), (50, 80, 1), (5, 3, 2), (1, 1, 1)])
@pytest.mark.parametrize("support", [sb.LSH(32), sb.LSH(12, rounds=4, seed=5), sb.LSH(7, rounds=1)], ids=str)
def test_lists_hold_the_pairs_of_the_definition(support: sb.LSH, n: int, m: int, kv_heads: int, padding: str) -> None:
    q, k = tokens(n, heads=4, seed=1), tokens(m, heads=kv_heads, seed=2)
    masks = {}
    if padding != "none":
        masks["key_padding_mask"] = tokens(m, heads=1, d=1, seed=3).flatten(1) > 0.6
    if padding == "both":
        masks["query_padding_mask"] = tokens(n, heads=1, d=1, seed=4).flatten(1) > 0.6
    lists = sb.route(q, k, support, **masks)
    assert torch.equal(sb.reference.mask(lists, q, k, **masks), sb.reference.mask(support, q, k, **masks))


def test_close_pairs_fall_into_one_cluster_more_often_than_others() -> None:
    q = tokens(256, seed=1)
    k = q + 0.05 * tokens(256, seed=2)
    mask = sb.reference.mask(sb.LSH(32, rounds=1), q, k)
    assert float(torch.diagonal(mask, dim1=-2, dim2=-1).float().mean()) > 2.5 * float(mask.float().mean())


def test_the_seed_decides() -> None:
    q, k = tokens(64, seed=1), tokens(64, seed=2)
    one, same, other = (sb.route(q, k, sb.LSH(16, seed=s)).index for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
