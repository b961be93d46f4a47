"""LSH clusters: budget, balance, union of rounds, padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from testkit import rand

import scatterbrain as sb
from scatterbrain.call import Call
from scatterbrain.padding import padding_info
from scatterbrain.reference.lsh import transformed
from scatterbrain.supports.cluster_lists import cluster_lists, composed_cluster_lists
from scatterbrain.supports.lsh import lsh_clusters

HASHES = pytest.mark.parametrize("hash", ["e2lsh", "angular"])


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


@HASHES
def test_padded_keys_are_in_no_cluster_and_in_no_norm(hash: str) -> None:
    q, k = tokens(60, seed=1), tokens(60, seed=2)
    mask = torch.zeros(2, 60, dtype=torch.bool)
    mask[:, 40:] = True
    clean = sb.route(q[:, :, :40], k[:, :, :40], sb.LSH(16, hash=hash))
    for rubbish in (float("nan"), 1e4):
        q[:, :, 40:], k[:, :, 40:] = rubbish, rubbish
        padded = sb.route(q, k, sb.LSH(16, hash=hash), key_padding_mask=mask)
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
@pytest.mark.parametrize(
    "support",
    [
        *(sb.LSH(32), sb.LSH(12, rounds=4, seed=5), sb.LSH(7, rounds=1)),
        *(sb.LSH(32, hash="angular"), sb.LSH(12, rounds=4, hash="angular", seed=5), sb.LSH(7, 1, "angular")),
    ],
    ids=str,
)
def test_lists_hold_the_pairs_of_the_definition(support: sb.LSH, n: int, m: int, kv_heads: int, padding: str) -> None:
    q, k = tokens(n, heads=4, seed=1), tokens(m, heads=kv_heads, seed=2)
    masks = {}
    if padding != "none":
        masks["key_padding_mask"] = tokens(m, heads=1, d=1, seed=3).flatten(1) > 0.6
    if padding == "both":
        masks["query_padding_mask"] = tokens(n, heads=1, d=1, seed=4).flatten(1) > 0.6
    lists = sb.route(q, k, support, **masks)
    assert torch.equal(sb.reference.mask(lists, q, k, **masks), sb.reference.mask(support, q, k, **masks))


@HASHES
def test_close_pairs_fall_into_one_cluster_more_often_than_others(hash: str) -> None:
    q = tokens(256, seed=1)
    k = q + 0.05 * tokens(256, seed=2)
    mask = sb.reference.mask(sb.LSH(32, rounds=1, hash=hash), q, k)
    assert float(torch.diagonal(mask, dim1=-2, dim2=-1).float().mean()) > 2.5 * float(mask.float().mean())


def test_angular_hashing_sees_directions_and_no_norms() -> None:
    q, k = tokens(80, seed=1), tokens(80, seed=2)
    powers = 2.0 ** torch.randint(-8, 8, (2, 2, 80, 1), generator=torch.Generator().manual_seed(3))
    angular, e2lsh = (
        [sb.route(*pair, sb.LSH(16, hash=hash)).index for pair in ((q, k), (q * powers, k * powers.flip(2)))]
        for hash in ("angular", "e2lsh")
    )
    assert torch.equal(*angular) and not torch.equal(*e2lsh)


def test_an_angular_bucket_meets_its_own_keys_however_queries_and_keys_are_spread() -> None:
    """Most queries point one way, most keys another: ranks of the whole row would pair them with strangers."""
    q, k = tokens(256, heads=1, seed=1), tokens(256, heads=1, seed=2)
    away = 6 * tokens(1, heads=1, seed=3)
    q[:, :, 64:] += away
    k[:, :, :192] -= away
    k[:, :, 192:] = q[:, :, :64] + 0.05 * tokens(64, heads=1, seed=4)
    mask = sb.reference.mask(sb.LSH(16, rounds=1, hash="angular"), q, k)
    met = mask[:, :, torch.arange(64), torch.arange(192, 256)]
    assert float(met.float().mean()) > 0.4 > 4 * float(mask.float().mean())


@HASHES
@pytest.mark.parametrize("m, masked", [(90, False), (60, True), (3, True)])
def test_lists_of_torchs_own_operations_are_those_of_the_operator(hash: str, m: int, masked: bool) -> None:
    """Other devices than the CPU, and vmap, make them without the operator."""
    q, k = tokens(60, heads=4, seed=1), tokens(m, heads=2, seed=2)
    mask = torch.rand(2, m, generator=torch.Generator().manual_seed(0)) < 0.3 if masked else None
    support = sb.LSH(24, rounds=3, hash=hash)
    call = Call(q, k, None, support, None, None, 0.25, padding_info(q, k, mask, None, 0), False)
    rounds, per_round = (1, 3) if m == 3 else (3, 8)
    clusters = lsh_clusters(support, call, rounds)
    mine, composed = (make(*clusters, call.padding, per_round) for make in (cluster_lists, composed_cluster_lists))
    assert torch.equal(mine.index, composed.index) and torch.equal(mine.count, composed.count)
    assert mine.count.max() > per_round or m == 3


@pytest.mark.parametrize(
    "clusters, words",
    [
        (lambda q, k: (q.long(), k), "query_cluster must be int32"),
        (
            lambda q, k: (q + 8, k),
            "query_cluster must name clusters 0 to 8, no more than there.*got 9",
        ),
        (lambda q, k: (q, k[:, :1]), "same batch, heads and rounds"),
        (lambda q, k: (q, k.mT.contiguous().mT), "key_cluster must be contiguous"),
        (lambda q, k: (q, k * 0), "a cluster has more than largest = 3 keys"),
    ],
)
def test_clusters_that_make_no_lists_are_refused(clusters, words: str) -> None:
    q, k = (torch.arange(12, dtype=torch.int32).view(1, 2, 2, 3) % 4 // f for f in (2, 1))
    k = torch.cat([k, k, k], -1)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.scatterbrain.cluster_lists(*clusters(q, k), None, None, 3)


@pytest.mark.parametrize("name", ["query_range", "key_range"])
@pytest.mark.parametrize("row", [(0, 10), (-1, 3), (3, 1)])
def test_lists_of_clusters_refuse_ranges_outside_the_tokens(name: str, row: tuple[int, int]) -> None:
    q, k = (torch.zeros(1, 2, 2, n, dtype=torch.int32) for n in (3, 9))
    ranges = {"query_range": None, "key_range": None, name: torch.tensor([row], dtype=torch.int32)}
    words = f"^cluster_lists: {name} of batch row 0 must be .*, got .{row[0]}, {row[1]}"
    with pytest.raises(RuntimeError, match=words):
        torch.ops.scatterbrain.cluster_lists(q, k, *ranges.values(), 9)


def test_opcheck_of_lists_of_clusters() -> None:
    q, k = (torch.arange(48, dtype=torch.int32).view(2, 2, 3, 4) % 5 // f - 1 for f in (1, 2))
    ranges = torch.tensor([[0, 4], [1, 3]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.scatterbrain.cluster_lists.default, (q, k, ranges, ranges.clone(), 3))


@HASHES
def test_one_graph_serves_every_length_and_vmap_every_row(hash: str) -> None:
    support, graphs = sb.LSH(16, hash=hash), []

    def counted(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    def attend(*t: torch.Tensor) -> torch.Tensor:
        return sb.attention(*t, support, sb.Favor(8))

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counted)
    for n in (40, 56, 200):
        given = [tokens(n, seed=i) for i in range(3)]
        want = attend(*given)
        torch.testing.assert_close(compiled(*given), want)
        mapped = torch.vmap(lambda *t: attend(*(x[None] for x in t))[0])
        torch.testing.assert_close(mapped(*given), want)
    assert len(graphs) == 1


@HASHES
def test_the_seed_decides(hash: str) -> None:
    q, k = tokens(64, seed=1), tokens(64, seed=2)
    one, same, other = (sb.route(q, k, sb.LSH(16, hash=hash, seed=s)).index for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
