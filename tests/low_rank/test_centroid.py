"""Clusters of keys: the operator against the definition, padding, determinism, layouts, and attention that runs with
them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from cluster_cases import PADDING, SIZES, assert_agree, fields, padding_of, tokens_of
from operator_cases import DTYPES, MASK, WITHOUT_GRADIENT, attention_arguments, operator_arguments
from testkit import KV, LAYOUTS, B, D, H, N, assert_same_bits, leaves, padding, qkv, rand, run_python
from torch import Tensor

import scatterbrain as sb
from scatterbrain.call import Call
from scatterbrain.operators.arguments import ClusterArguments, RouteArguments
from scatterbrain.padding import EVERYTHING
from scatterbrain.supports import BlockLists


def distances(key: Tensor, of: sb.Clusters) -> Tensor:
    """The sum of the squared distances of keys to the mean of their cluster."""
    one_hot = (
        torch.nn.functional.one_hot(of.index.clamp_min(0).long(), of.clusters).to(key) * (of.index >= 0)[..., None]
    )
    mean = one_hot.mT @ key / one_hot.sum(2).clamp_min(1)[..., None]
    return (one_hot @ mean - key).square().sum(-1).where(of.index >= 0, 0).sum(-1)


# -------------------- the definition


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SIZES)
def test_clusters_are_those_of_the_definition(name: str, dtype: torch.dtype) -> None:
    query, key, clusters = tokens_of(name, dtype)
    found, want = (f(query, key, clusters, scale=0.3) for f in (sb.cluster, sb.reference.cluster))
    assert found.index.dtype == torch.int32 and found.scale == want.scale == 0.3
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(t.dtype == precision for t in fields(found)[1:])
    assert_agree(
        found, want, **(dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-5, atol=2e-6))
    )


@pytest.mark.parametrize("pattern", PADDING)
@pytest.mark.parametrize("keys", [44, 1100])
def test_padded_rows_are_clustered_as_the_definition(pattern: str, keys: int) -> None:
    query, key, _ = qkv(40, keys, heads=4, kv_heads=2)
    of_query, mask = padding_of(pattern, 40, keys)
    found, want = (f(query, key, 6, mask, None, of_query) for f in (sb.cluster, sb.reference.cluster))
    assert found.index[:, 0][mask].eq(-1).all()
    assert_agree(found, want, rtol=1e-5, atol=1e-6)


def test_equal_keys_are_in_one_cluster_and_ties_go_to_the_lowest() -> None:
    key = rand(1, 1, 4, 8)[:, :, torch.arange(600) % 4]
    found = sb.cluster(rand(1, 1, 9, 8, seed=1), key, 16)
    of_kind = found.index[0, 0].view(-1, 4)
    assert of_kind.eq(of_kind[0]).all() and len(of_kind[0].unique()) == 4
    same = sb.cluster(rand(1, 1, 9, 8), torch.ones(1, 1, 600, 8), 16)
    assert same.index.eq(0).all()


def test_extreme_keys_stay_in_range() -> None:
    """Overflowing, infinite and undefined scores name some cluster; sb.cluster refuses what has no mean."""
    query, key, _ = qkv(40, 90)
    for factor in (1e-30, 1e15, 1e25):
        found = sb.cluster(query, factor * key, 8)
        assert found.index.ge(0).all() and found.index.lt(8).all() and found.representatives.isfinite().all()
    for value in (math.nan, math.inf):
        spoilt = key.clone()
        spoilt[0, 0, 3] = value
        index, *_ = torch.ops.scatterbrain.cluster(query, spoilt, None, None, None, None, None, 8, 0.3)
        assert index.ge(0).all() and index.lt(8).all()
        with pytest.raises(ValueError, match="Clusters: .* must be finite, got NaN or infinity"):
            sb.cluster(query, spoilt, 8)


def test_centres_beyond_the_last_cluster_are_never_the_nearest() -> None:
    """Centres are compared 16 at a time: behind 5 there are 11 that are none, also where every score overflows."""
    row = torch.ones(256)
    query, key = torch.full((1, 1, 2, 256), 1e-18), torch.stack([2e18 * row, -2e18 * row])[None, None]
    found = sb.cluster(query, key, 5)
    assert found.index.ge(0).all() and found.index.lt(5).all()
    assert sb.attention(query, key, rand(1, 1, 2, 16), sb.Window(1), sb.Centroid(5)).isfinite().all()


def test_a_common_vector_leaves_clusters_as_they_are() -> None:
    query, key, _ = qkv(60, 300, heads=2, kv_heads=2)
    found, moved = sb.cluster(query, key, 16), sb.cluster(query, key + 10 * rand(8, seed=3), 16)
    assert (found.index == moved.index).float().mean() > 0.99
    assert torch.allclose(distances(key, found), distances(key, moved), rtol=1e-2)


# -------------------- bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    query, key, _ = qkv(1500, 2100, heads=4, kv_heads=2, head_dim=24, dtype=dtype)
    mask = torch.rand(B, 2100, generator=torch.Generator().manual_seed(1)) < 0.2
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(fields(sb.cluster(query, key, 40, mask)))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("left, right", [(0, 7), (5, 0), (33, 600)])
@pytest.mark.parametrize("fill", [math.nan, math.inf, 1e4])
def test_padding_changes_no_bit(left: int, right: int, fill: float) -> None:
    """Neither what padded tokens hold nor how many there are, with holes in the row too."""
    query, key, _ = qkv(700, heads=2, kv_heads=1)
    holes = torch.rand(B, 700, generator=torch.Generator().manual_seed(4)) < 0.3
    holes[:, [0, -1]] = False
    want = sb.cluster(query, key, 12, holes)
    mask = torch.nn.functional.pad(holes, (left, right), value=True)
    padded = [torch.nn.functional.pad(t, (0, 0, left, right)) for t in (query, key)]
    padded = [t.masked_fill(mask[:, None, :, None], fill) for t in padded]
    found = sb.cluster(*padded, 12, mask)
    inside = slice(left, left + 700)
    moved = replace(found, index=found.index[..., inside], log_mass=found.log_mass[..., inside])
    assert_same_bits(fields(moved), fields(want))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_no_bit(layout: str) -> None:
    tokens = qkv(300, heads=4, kv_heads=2, head_dim=24)[:2]
    want = sb.cluster(*tokens, 12)
    assert_same_bits(fields(sb.cluster(*(LAYOUTS[layout](t) for t in tokens), 12)), fields(want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_clustered_as_their_float_copies(dtype: torch.dtype) -> None:
    tokens = qkv(300, heads=4, kv_heads=2, head_dim=24, dtype=dtype)[:2]
    assert_same_bits(fields(sb.cluster(*tokens, 12)), fields(sb.cluster(*(t.float() for t in tokens), 12)))


def test_rows_and_heads_do_not_depend_on_each_other() -> None:
    query, key, _ = qkv(300, heads=4, kv_heads=2)
    whole = sb.cluster(query, key, 12)
    for b in range(B):
        for h in range(2):
            alone = sb.cluster(query[b : b + 1, 2 * h : 2 * h + 2], key[b : b + 1, h : h + 1], 12)
            assert_same_bits([t[0, 0] for t in fields(alone)], [t[b, h] for t in fields(whole)])


@pytest.mark.parametrize("tokens, heads, head_dim", [(33, 1, 1), (150, 2, 3), (533, 4, 8)])
def test_threads_change_no_bit_of_attention_and_its_gradients(tokens: int, heads: int, head_dim: int) -> None:
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            inputs = leaves(qkv(tokens, batch=1, heads=heads, kv_heads=heads, head_dim=head_dim))
            out = sb.attention(*inputs, sb.Window(1), sb.Centroid(16))
            results.append([out, *torch.autograd.grad((out * rand(*out.shape, seed=5)).sum(), inputs)])
    finally:
        torch.set_num_threads(before)
    assert_same_bits(*results)


def test_memory_is_linear() -> None:
    """65,536 tokens in a process that may grow by 16 MB; distances to all centres would take 64 MB."""
    program = """
import resource, torch, scatterbrain as sb
tokens = torch.randn(1, 1, 65536, 32)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sb.cluster(tokens[:, :, :1024], tokens[:, :, :1024], 256)
before = peak()
sb.cluster(tokens, tokens, 256)
grown = (peak() - before) / 1024
assert grown < 16, f"clustering took {grown:.0f} MB"
"""
    run = run_python("-c", program)
    assert run.returncode == 0, run.stderr


# -------------------- as an operator


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    query, key, _ = qkv(dtype=dtype)
    ranges = torch.tensor([[0, N], [0, N - 9]], dtype=torch.int32)
    arguments = ClusterArguments(query, key, MASK, MASK.clone(), ranges, ranges.clone(), None, clusters=5, scale=0.3)
    torch.library.opcheck(torch.ops.scatterbrain.cluster.default, arguments, test_utils=WITHOUT_GRADIENT)


def test_vmap_is_a_loop() -> None:
    query, key = rand(3, B, H, N, 8), rand(3, B, 1, N, 8, seed=1)
    operator = torch.ops.scatterbrain.cluster
    mapped = torch.func.vmap(lambda q, k: operator(q, k, None, None, None, None, None, 5, 0.3))(query, key)
    for i in range(3):
        assert_same_bits([t[i] for t in mapped], operator(query[i], key[i], None, None, None, None, None, 5, 0.3))


def test_the_operator_refuses_what_does_not_fit() -> None:
    query, key, _ = qkv()
    operator = torch.ops.scatterbrain.cluster
    plain = [None] * 5
    with pytest.raises(RuntimeError, match="clusters must be from 1 to 256, got 0"):
        operator(query, key, *plain, 0, 0.3)
    with pytest.raises(RuntimeError, match="share one floating-point dtype"):
        operator(query, key.double(), *plain, 4, 0.3)
    with pytest.raises(RuntimeError, match="shapes of query and key"):
        operator(query, key[..., :7], *plain, 4, 0.3)
    with pytest.raises(RuntimeError, match="query_offset is for causal calls"):
        operator(query, key, *plain[:4], torch.zeros(B, dtype=torch.int32), 4, 0.3)


def test_attention_and_routing_refuse_clusters_that_do_not_fit() -> None:
    given = attention_arguments("centroid", "empty", torch.float32, False)
    routing = operator_arguments(RouteArguments, given, keys=16)
    keys, few = torch.ones(B, KV, N, dtype=torch.bool), torch.zeros(B, KV, N, dtype=torch.int32)
    wrong = few.masked_fill(keys, 5)
    changes = {
        "needs cluster_index, representatives and log_mass": dict(log_mass=None),
        "needs is_causal=False": dict(is_causal=True),
        r"cluster_index must be int32 of shape \(2, 1, 37\)": dict(cluster_index=few[..., 1:]),
        r"representatives must be \(2, 1, 1 to 256 clusters, 8\)": dict(representatives=rand(B, KV, 257, D)),
        r"log_mass must be \(2, 1, 37\)": dict(log_mass=rand(B, KV, 3)),
        "representatives and log_mass must be float32": dict(log_mass=rand(B, KV, N).double()),
        "cluster_index must name clusters 0 to 4 for every key": dict(cluster_index=wrong),
    }
    for message, change in changes.items():
        for operator, arguments in (("attention", given), ("route", routing)):
            with pytest.raises(RuntimeError, match=message):
                getattr(torch.ops.scatterbrain, operator)(*arguments._replace(**change))
    with pytest.raises(RuntimeError, match=r"needs query_mean \(2, 1, 8\)"):
        torch.ops.scatterbrain.attention(*given._replace(query_mean=None))
    with pytest.raises(RuntimeError, match=r"need low_rank 3 \(centroid\), got low_rank 0"):
        torch.ops.scatterbrain.attention(*given._replace(low_rank=0))
    hidden = torch.zeros(B, N, dtype=torch.bool).index_fill(1, torch.tensor([3]), True)
    torch.ops.scatterbrain.attention(
        *given._replace(cluster_index=few.index_fill(2, torch.tensor([3]), -1), key_mask=hidden)
    )  # of padding it may name none


def test_a_key_without_a_cluster_is_found_on_every_device_that_may_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice(Tensor):
        """A tensor that says it is not on the CPU."""

        is_cpu = False

    query, key, _ = qkv()
    mask = padding(N, (0, 9))
    made = sb.cluster(query, key, 5, mask)
    index = made.index.as_subclass(OnDevice)
    clusters = replace(made, index=index)
    call = Call(query, key, None, sb.Empty(), sb.Centroid(5), clusters, made.scale, EVERYTHING, False)
    clusters.check_geometry(call)  # nobody looks
    monkeypatch.setenv("SCATTERBRAIN_CHECK", "1")
    clusters.check_geometry(call._replace(padding=EVERYTHING._replace(key_mask=mask)))
    with pytest.raises(ValueError, match="0 to 4 for every key that is not ignored, got -1 for .* key_padding_mask"):
        clusters.check_geometry(call)


def test_the_function_refuses_what_does_not_fit() -> None:
    query, key, _ = qkv()
    with pytest.raises(ValueError, match="Centroid: clusters must be at most 256"):
        sb.cluster(query, key, 300)
    padded = sb.cluster(query, key, 5, key_padding_mask=padding(N, (0, 4), (0, 0)))
    with pytest.raises(
        RuntimeError, match="every key that is not ignored; make the clusters with the key_padding_mask"
    ):
        sb.attention(query, key, key, sb.Window(4), statistics=padded)
    with pytest.raises(TypeError, match="scale must be a number"):
        sb.cluster(query, key, scale="a")
    with pytest.raises(ValueError, match="key must have the head_dim of query"):
        sb.cluster(query, key[..., :7])
    with pytest.raises(TypeError, match="key_padding_mask must be a bool tensor"):
        sb.cluster(query, key, 4, torch.zeros(B, N))


# -------------------- attention

SUPPORTS = [sb.Empty(), sb.Window(16), sb.Window(24, sinks=4), sb.LSH(16)]


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_mask", [True, False], ids=["clusters of the mask", "of all keys"])
def test_attention_and_its_gradients_are_those_of_the_definition(
    support: object, dtype: torch.dtype, with_mask: bool
) -> None:
    query, key, value = qkv(70, 90, heads=4, kv_heads=2, value_dim=12, dtype=dtype)
    mask = torch.rand(B, 90, generator=torch.Generator().manual_seed(4)) < 0.2
    found = sb.cluster(query, key, 9, mask if with_mask else None)
    d_out = rand(B, 4, 70, 12, seed=7, dtype=torch.float64)
    results = []
    for attend in (sb.attention, sb.reference.attention):
        tokens = leaves((query, key, value))
        out = attend(*tokens, support, sb.Centroid(9), mask, statistics=found)
        results.append([out, *torch.autograd.grad((out * d_out).sum(), tokens)])
    for mine, theirs in zip(*results, strict=True):
        error = float((mine.double() - theirs).detach().norm() / theirs.detach().norm())
        assert error < (1e-10 if dtype == torch.float64 else 3e-6)


LISTS = {  # a list for every tile form, kept scores or not, by key or by state
    "no list": sb.Empty(),
    "window": sb.Window(40),
    "tiles of 8": sb.Routed(48, block_q=8),
    "tiles of 16": sb.Routed(64),
    "tiles of 32": sb.Routed(64, block_q=32),
    "long lists": sb.Routed(128, block_q=32),
    "own lists": sb.Routed(32, block_q=1, block_k=8),
    "own long lists": sb.Routed(96, block_q=1, block_k=8),
    "lists of blocks": sb.LSH(64),
}


@pytest.mark.parametrize("keys", [33, 110, 430])
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_form_of_a_list_has_the_values_and_gradients_of_the_definition(
    name: str, keys: int, dtype: torch.dtype
) -> None:
    """Rows of up to 64 unlisted keys are summed key by key, short ones with lists of single queries as bitmasks."""
    support, low_rank = LISTS[name], sb.Centroid(20)
    query, key, value = qkv(keys, heads=4, kv_heads=2, head_dim=24, value_dim=40, dtype=dtype)
    mask = padding(keys, (3, 9))
    found = sb.cluster(query, key, 20, mask)
    if support.depends_on_content:
        support = sb.route(query, key, support, low_rank, mask, statistics=found)
    d_out, results = rand(B, 4, keys, 40, seed=7, dtype=torch.float64), []
    for attend in (sb.attention, sb.reference.attention):
        tokens = leaves((query, key, value))
        out = attend(*tokens, support, low_rank, mask, statistics=found)
        results.append([out, *torch.autograd.grad((out * d_out).sum(), tokens)])
    for mine, theirs in zip(*results, strict=True):
        error = float((mine.double() - theirs.double()).detach().norm() / theirs.double().detach().norm())
        assert error < {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("support", [sb.Window(16), sb.Routed(32), sb.Routed(32, block_q=1, block_k=8)], ids=str)
@pytest.mark.parametrize("keys", [100, 500])
@pytest.mark.parametrize("factor", [3.0, 30.0, 300.0])
def test_clusters_far_heavier_than_what_is_left_of_them_lose_nothing(
    factor: float, keys: int, support: sb.Support
) -> None:
    """Large scores: representatives overshoot their keys by many orders of magnitude, and lists take that back."""
    query, key, value = qkv(keys, batch=1, heads=2, kv_heads=1, head_dim=24)
    query = query * factor
    found = sb.cluster(query, key, 8)
    if support.depends_on_content:
        support = sb.route(query, key, support, sb.Centroid(8), statistics=found)
    d_out, results = rand(1, 2, keys, 24, seed=7), []
    for attend in (sb.attention, sb.reference.attention):
        tokens = leaves((query, key, value))
        out = attend(*tokens, support, sb.Centroid(8), statistics=found)
        results.append([out, *torch.autograd.grad((out * d_out).sum(), tokens)])
    for mine, theirs in zip(*results, strict=True):
        error = float((mine.double() - theirs.double()).detach().norm() / theirs.double().detach().norm())
        assert error < 1e-6 * (factor + 3)


@pytest.mark.parametrize("tokens, pass_", [(200, "queries again by key"), (600, "queries again in double")])
def test_queries_whose_lists_take_nearly_all_back_are_computed_again(tokens: int, pass_: str) -> None:
    """Representatives that outweigh all else, of clusters that are listed whole."""
    index = torch.arange(tokens) // 20
    representatives = rand(1, 1, int(index[-1]) + 1, 24, seed=5)
    query = 5 * representatives[:, :, index] + 0.1 * rand(1, 1, tokens, 24)
    key, value = 0.1 * rand(1, 1, tokens, 24, seed=1), rand(1, 1, tokens, 24, seed=2)
    log_mass, mean = torch.zeros(1, 1, tokens), torch.zeros(1, 1, 24)
    found = sb.Clusters(index.int()[None, None], representatives, log_mass, mean, 24**-0.5)
    d_out, results = rand(1, 1, tokens, 24, seed=7), []
    for attend in (sb.attention, sb.reference.attention):
        leaf, low_rank = leaves((query, key, value)), sb.Centroid(found.clusters)
        with sb.profile() as profile:
            out = attend(*leaf, sb.Window(64), low_rank, statistics=found)
            results.append([out, *torch.autograd.grad((out * d_out).sum(), leaf)])
        assert (pass_ in profile.stages) == (attend is sb.attention)
    for mine, theirs in zip(*results, strict=True):
        error = float((mine.double() - theirs.double()).detach().norm() / theirs.double().detach().norm())
        assert error < 3e-6


@pytest.mark.parametrize("support", [sb.Window(16), sb.Routed(32), sb.Routed(32, block_q=1, block_k=8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_and_threads_change_no_bit_of_attention_and_its_gradients(
    support: sb.Support, dtype: torch.dtype
) -> None:
    """Of wide heads, whatever padded tokens hold and however many there are."""
    tokens = qkv(500, batch=1, heads=4, kv_heads=2, head_dim=24, dtype=dtype)
    d_out, results, before = rand(1, 4, 500, 24, seed=7, dtype=dtype), [], torch.get_num_threads()
    try:
        for threads, left, right, fill in ((1, 0, 0, 0.0), (3, 0, 0, 0.0), (2, 37, 90, math.nan), (1, 0, 600, 1e9)):
            torch.set_num_threads(threads)
            mask = torch.nn.functional.pad(torch.zeros(1, 500, dtype=torch.bool), (left, right), value=True)
            padded = [torch.nn.functional.pad(t, (0, 0, left, right), value=fill) for t in tokens]
            inputs, inside = leaves(padded), slice(left, left + 500)
            out = sb.attention(*inputs, support, sb.Centroid(16), mask, query_padding_mask=mask)
            out.backward(torch.nn.functional.pad(d_out, (0, 0, left, right)))
            results.append([t[:, :, inside] for t in (out.detach(), *(t.grad for t in inputs))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("block_q, pools", [(8, 1), (16, 1), (32, 1), (16, 2), (32, 2)])
@pytest.mark.parametrize("keys", [70, 700, 1300])
def test_routed_lists_are_those_of_the_definition(keys: int, block_q: int, pools: int) -> None:
    """Of all keys, and of candidate blocks; float32 may order two nearly equal scores otherwise."""
    query, key, _ = qkv(keys, heads=2, kv_heads=1, head_dim=24)
    mask = torch.rand(B, keys, generator=torch.Generator().manual_seed(4)) < 0.1
    found, low_rank = sb.cluster(query, key, 20, mask), sb.Centroid(20)
    support = sb.Routed(48, block_q=block_q, pools=pools)
    lists = sb.route(query, key, support, low_rank, mask, statistics=found)
    inputs = sb.reference.Inputs.of(query, key, low_rank, mask, statistics=found)
    index, count = sb.reference.routed_lists(support, inputs)
    assert torch.equal(lists.count, count)
    width = min(lists.index.shape[-1], index.shape[-1])
    other = (lists.index[..., :width] != index[..., :width]).any(-1)
    assert other.sum() <= max(1, other.numel() // 100)


def test_routing_scores_keys_by_what_their_representatives_miss() -> None:
    """Of two kinds of keys with equal scores those are listed that are far from the key that stands for them."""
    found = sb.Clusters(
        torch.arange(64, dtype=torch.int32).remainder(2)[None, None],
        torch.zeros(1, 1, 2, 16),
        torch.zeros(1, 1, 64),
        torch.zeros(1, 1, 16),
        1.0,
    )
    query = torch.zeros(1, 1, 32, 16)
    query[..., 0] = torch.tensor([1.0, -1.0]).repeat(16)
    key = torch.zeros(1, 1, 64, 16)
    key[:, :, 1::2, 1] = 0.5  # no query sees it, but queries like these could
    lists = sb.route(query, key, sb.Routed(32, block_q=32), sb.Centroid(2), statistics=found, scale=1.0)
    assert lists.index[0, 0, 0].tolist() == list(range(1, 64, 2))


@pytest.mark.parametrize("block_q", [8, 16, 32])
def test_routed_attention_runs_with_its_own_clusters(block_q: int) -> None:
    query, key, value = qkv(200, heads=2, kv_heads=2)
    found = sb.cluster(query, key, 16)
    low_rank, support = sb.Centroid(16), sb.Routed(48, block_q=block_q)
    out = sb.attention(query, key, value, support, low_rank)
    assert torch.equal(out, sb.attention(query, key, value, support, low_rank, statistics=found))
    lists = sb.route(query, key, support, low_rank)
    assert torch.equal(out, sb.attention(query, key, value, lists, low_rank, statistics=found))
    want = sb.reference.attention(query, key, value, lists, low_rank, statistics=found)
    assert torch.allclose(out.double(), want, atol=1e-5)


def test_supports_that_read_coordinates_get_the_features_of_clusters() -> None:
    """Whose product is L, as in the definition of the kernel."""
    seen = []

    @dataclass(frozen=True)
    class Watching(sb.Window):
        reads_coordinates = True

        def lists(self, call: Call, query_map: Tensor | None, key_map: Tensor | None) -> BlockLists:
            seen.append((query_map, key_map))
            return super().lists(call, None, None)

    query, key, value = qkv(60, 70, heads=2, kv_heads=2)
    found = sb.cluster(query, key, 6)
    out = sb.attention(query, key, value, Watching(8), sb.Centroid(6), statistics=found)
    assert torch.equal(out, sb.attention(query, key, value, sb.Window(8), sb.Centroid(6), statistics=found))
    ((x, y),) = seen
    log = torch.log(x[..., :-1] @ y[..., :-1].mT) + x[..., -1:] + y[..., None, :, -1]
    inputs = sb.reference.Inputs.of(query, key, sb.Centroid(6), statistics=found)
    assert torch.allclose(log, sb.reference.log_kernel(sb.Centroid(6), inputs)[0], atol=1e-5)


def test_modules_and_drop_ins_need_no_calibration() -> None:
    tokens = qkv(60, heads=2, kv_heads=2)
    core = sb.ScatterbrainAttention(2, 8, support=sb.Window(8), low_rank=sb.Centroid(6))
    assert not list(core.buffers()) and not list(core.parameters())
    want = sb.reference.attention(*tokens, sb.Window(8), sb.Centroid(6))
    assert torch.allclose(core(*tokens).double(), want, atol=1e-5)
    model = torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True).eval()
    sb.replace_attention(model, sb.Window(8), sb.Centroid(6))
    x = rand(B, 40, 16)
    out = model(x, src_key_padding_mask=padding(40, (0, 9)))
    assert out.isfinite().all()
    with pytest.raises(ValueError, match="Centroid clusters the keys of the whole sequence.*use low_rank=Quadratic"):
        core(*tokens, is_causal=True)


def test_autocast_and_half_types_cluster_in_float32() -> None:
    tokens = qkv(60, heads=2, kv_heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        out, found = sb.attention(*tokens, sb.Window(8), sb.Centroid(6)), sb.cluster(*tokens[:2], 6)
    halves = [t.bfloat16() for t in tokens]
    assert torch.equal(out, sb.attention(*halves, sb.Window(8), sb.Centroid(6))) and out.dtype == torch.bfloat16
    assert_same_bits(fields(found), fields(sb.cluster(*halves[:2], 6)))


def test_a_graph_holds_clusters_and_attention_for_any_length() -> None:
    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sb.attention(query, key, value, sb.Window(8), sb.Centroid(6))

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (40, 57):
        tokens, other = leaves(qkv(n)), leaves(qkv(n))
        mine, theirs = compiled(*tokens), step(*other)
        assert torch.allclose(mine, theirs, atol=1e-6)
        for a, b in zip(torch.autograd.grad(mine.sum(), tokens), torch.autograd.grad(theirs.sum(), other), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
