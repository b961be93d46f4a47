"""Clusters of keys by the CUDA kernels, run by the registered operator on CPU tensors through the emulator: the
definition over the CPU's cases, padding and layouts by bits, and attention that makes its own clusters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cluster_cases import PADDING, SIZES, assert_agree, fields, padding_of, tokens_of
from emulated import Emulator, build
from planted import FLOAT, Kernels
from testkit import LAYOUTS, B, assert_same_bits, qkv, rand

import scatterbrain as sb

OPERATOR = torch.ops.scatterbrain.cluster
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def cluster(emulator: Emulator, *arguments: object, **named: object) -> sb.Clusters:
    with emulator.installed():
        return sb.cluster(*arguments, **named)


def counts_of(emulator: Emulator, act: Callable[[], object]) -> dict[str, int]:
    """What is counted while it acts."""
    before = emulator.statistics()
    act()
    return {name: count - before[name] for name, count in emulator.statistics().items()}


# -------------------- the definition


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_clusters_are_those_of_the_definition(emulator: Emulator, name: str, dtype: torch.dtype) -> None:
    query, key, clusters = tokens_of(name, dtype)
    found = cluster(emulator, query, key, clusters, scale=0.3)
    assert found.index.dtype == torch.int32
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(t.dtype == precision for t in fields(found)[1:])
    tolerance = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-5, atol=2e-6)
    assert_agree(found, sb.reference.cluster(query, key, clusters, scale=0.3), **tolerance)


@pytest.mark.parametrize("pattern", PADDING)
@pytest.mark.parametrize("keys", [44, 1100])
def test_padded_rows_are_clustered_as_the_definition(emulator: Emulator, pattern: str, keys: int) -> None:
    query, key, _ = qkv(40, keys, heads=4, kv_heads=2)
    of_query, mask = padding_of(pattern, 40, keys)
    found = cluster(emulator, query, key, 6, mask, None, of_query)
    assert found.index[:, 0][mask].eq(-1).all() and not found.log_mass[:, 0][mask].any()
    assert_agree(found, sb.reference.cluster(query, key, 6, mask, None, of_query), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dimensions", [1, 2, 5])
def test_keys_of_few_dimensions_are_clustered_as_the_definition(emulator: Emulator, dimensions: int) -> None:
    """Most samples depend on others there and add no direction."""
    key = rand(1, 1, 300, dimensions, dtype=torch.float64) @ rand(dimensions, 24, seed=1, dtype=torch.float64)
    query = rand(1, 1, 9, 24, seed=2, dtype=torch.float64)
    assert_agree(cluster(emulator, query, key, 12), sb.reference.cluster(query, key, 12), rtol=1e-10, atol=1e-10)


def test_equal_keys_are_in_one_cluster_and_ties_go_to_the_lowest(emulator: Emulator) -> None:
    key = rand(1, 1, 4, 8)[:, :, torch.arange(600) % 4]
    of_kind = cluster(emulator, rand(1, 1, 9, 8, seed=1), key, 16).index[0, 0].view(-1, 4)
    assert of_kind.eq(of_kind[0]).all() and len(of_kind[0].unique()) == 4
    assert cluster(emulator, rand(1, 1, 9, 8), torch.ones(1, 1, 600, 8), 16).index.eq(0).all()


def test_a_common_vector_leaves_clusters_as_they_are(emulator: Emulator) -> None:
    """Where it rounds all distances, keys between two centres may move: each is as near to either within rounding."""
    query, key, _ = qkv(60, 300, heads=2, kv_heads=2)
    found = cluster(emulator, query, key, 16)
    moved = cluster(emulator, query, key + 10 * rand(8, seed=3), 16)
    assert (found.index == moved.index).float().mean() > 0.99


def test_extreme_keys_stay_in_range(emulator: Emulator) -> None:
    query, key, _ = qkv(40, 90)
    for factor in (1e-30, 1e15, 1e25):
        found = cluster(emulator, query, factor * key, 8)
        assert found.index.ge(0).all() and found.index.lt(8).all() and found.representatives.isfinite().all()
    for value in (math.nan, math.inf):
        spoilt = key.clone()
        spoilt[0, 0, 3] = value
        with emulator.installed():
            index, *_ = OPERATOR(query, spoilt, None, None, None, None, None, 8, 0.3)
        assert index.ge(0).all() and index.lt(8).all()


def test_ranges_are_clustered_as_their_tokens_alone(emulator: Emulator) -> None:
    query, key, _ = qkv(40, 90)
    of_query, of_key = [[3, 40], [0, 0]], [[5, 85], [7, 7]]
    ranges = [torch.tensor(rows, dtype=torch.int32) for rows in (of_query, of_key)]
    with emulator.installed():
        got = OPERATOR(query, key, None, None, *ranges, None, 8, 0.3)
        for row, (queries, keys) in enumerate(zip(of_query, of_key, strict=True)):
            alone = query[row : row + 1, :, slice(*queries)], key[row : row + 1, :, slice(*keys)]
            want = OPERATOR(*alone, None, None, None, None, None, 8, 0.3)
            inside = [t[row : row + 1] for t in got]
            inside[0], inside[2] = (t[..., slice(*keys)] for t in (inside[0], inside[2]))
            assert_same_bits(inside, want)
            assert int(got[0][row].ge(0).sum()) == key.shape[1] * (keys[1] - keys[0])


def test_the_widest_heads_fit_and_wider_ones_are_refused(emulator: Emulator) -> None:
    query, key, _ = qkv(9, 300, batch=1, heads=1, kv_heads=1, head_dim=256, dtype=torch.float64)
    assert_agree(cluster(emulator, query, key, 256), sb.reference.cluster(query, key, 256), rtol=1e-10, atol=1e-10)
    with pytest.raises(
        RuntimeError, match="cluster: expected query and key at most 256 wide on a CUDA device, got 257"
    ):
        cluster(emulator, rand(1, 1, 9, 257), rand(1, 1, 9, 257), 4)


def test_a_batch_without_rows_is_fine(emulator: Emulator) -> None:
    with emulator.installed():
        found = OPERATOR(rand(0, 4, 9, 8), rand(0, 2, 7, 8), None, None, None, None, None, 4, 0.3)
    assert [t.shape for t in found] == [(0, 2, 7), (0, 2, 4, 8), (0, 2, 7), (0, 2, 8)]


# -------------------- tensor cores


def test_centres_are_found_as_exactly_as_in_float32(emulator: Emulator) -> None:
    """Of so many keys some are as near to two centres to 16 bits, and none to 24."""
    for seed in range(3):
        key, query = rand(1, 1, 20_000, 16, seed=seed), rand(1, 1, 9, 16, seed=5)
        assert torch.equal(cluster(emulator, query, key, 256).index, sb.reference.cluster(query, key, 256).index)


def test_finding_centres_has_no_bank_conflicts(emulator: Emulator, kernels: Kernels) -> None:
    """Sorting has some. So the search of a copy of the kernel is done twice, which adds its own."""
    search = "    memory.nearest.template find<E>("
    with kernels.planted("cluster_keys.cuh", search, "    for (int twice = 0; twice < 2; ++twice) " + search.strip()):
        searching_twice = Emulator(build(kernels.csrc, FLOAT))
    query, key, _ = qkv(600, heads=2, kv_heads=1, head_dim=72)
    once, twice = (counts_of(of, lambda of=of: cluster(of, query, key, 100)) for of in (emulator, searching_twice))
    assert twice["shared_accesses"] > once["shared_accesses"] + 1000
    assert twice["bank_conflicts"] == once["bank_conflicts"]


# -------------------- bits


def test_two_runs_give_the_same_bits(emulator: Emulator) -> None:
    query, key, _ = qkv(70, 600, heads=4, kv_heads=2)
    assert_same_bits(fields(cluster(emulator, query, key, 20)), fields(cluster(emulator, query, key, 20)))


@pytest.mark.parametrize(("left", "right"), [(0, 7), (5, 0), (33, 600)])
@pytest.mark.parametrize("fill", [math.nan, math.inf, 1e4])
def test_padding_changes_no_bit(emulator: Emulator, left: int, right: int, fill: float) -> None:
    """Neither what padded tokens hold nor how many there are, with holes in the row too."""
    query, key, _ = qkv(700, heads=2, kv_heads=1)
    holes = torch.rand(B, 700, generator=torch.Generator().manual_seed(4)) < 0.3
    holes[:, [0, -1]] = False
    want = cluster(emulator, query, key, 12, holes)
    mask = torch.nn.functional.pad(holes, (left, right), value=True)
    padded = [torch.nn.functional.pad(t, (0, 0, left, right)) for t in (query, key)]
    padded = [t.masked_fill(mask[:, None, :, None], fill) for t in padded]
    found = cluster(emulator, *padded, 12, mask)
    inside = slice(left, left + 700)
    moved = replace(found, index=found.index[..., inside], log_mass=found.log_mass[..., inside])
    assert_same_bits(fields(moved), fields(want))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_no_bit(emulator: Emulator, layout: str) -> None:
    tokens = qkv(300, heads=4, kv_heads=2, head_dim=24)[:2]
    want = cluster(emulator, *tokens, 12)
    assert_same_bits(fields(cluster(emulator, *(LAYOUTS[layout](t) for t in tokens), 12)), fields(want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_clustered_as_their_float_copies(emulator: Emulator, dtype: torch.dtype) -> None:
    tokens = qkv(300, heads=4, kv_heads=2, head_dim=24, dtype=dtype)[:2]
    want = cluster(emulator, *(t.float() for t in tokens), 12)
    assert_same_bits(fields(cluster(emulator, *tokens, 12)), fields(want))


def test_rows_and_heads_do_not_depend_on_each_other(emulator: Emulator) -> None:
    query, key, _ = qkv(300, heads=4, kv_heads=2)
    whole = cluster(emulator, query, key, 12)
    for b in range(B):
        for h in range(2):
            alone = cluster(emulator, query[b : b + 1, 2 * h : 2 * h + 2], key[b : b + 1, h : h + 1], 12)
            assert_same_bits([t[0, 0] for t in fields(alone)], [t[b, h] for t in fields(whole)])


# -------------------- attention


@pytest.mark.parametrize("support", [sb.Empty(), sb.Window(16), sb.Routed(24, 16)], ids=str)
def test_attention_makes_the_same_clusters(emulator: Emulator, support: object) -> None:
    query, key, value = qkv(200, heads=4, kv_heads=2, head_dim=24)
    mask = torch.rand(B, 200, generator=torch.Generator().manual_seed(4)) < 0.2
    with emulator.installed():
        found = sb.cluster(query, key, 9, mask, query_padding_mask=mask)
        results = [
            sb.attention(query, key, value, support, sb.Centroid(9), mask, statistics=given, return_lse=True)
            for given in (None, found)
        ]
    assert_same_bits(*results)
