"""Lists by the CUDA kernels, run by the registered operator through the emulator, against the definition."""

from __future__ import annotations

import math
import random

import pytest
import torch
from emulated import Emulator
from operator_cases import operator_arguments
from supports.test_route import (
    ALWAYS,
    BY_SKETCH,
    PER_QUERY,
    PER_QUERY_IN_TWO,
    POOLED,
    TWO_POOLS,
    Inputs,
    assert_as_defined,
    assert_near,
    assert_same,
    ids,
    padded,
    random_mask,
)
from supports.test_route_groups import assert_runs_of_infinite_keys_come_first
from testkit import rand
from torch import Tensor

import scatterbrain as sb
from scatterbrain.operators.arguments import RouteArguments

FORMS = [POOLED[1], TWO_POOLS[1], ALWAYS[2], ALWAYS[5]]


@pytest.fixture(autouse=True)
def installed(emulator: Emulator):
    with emulator.installed():
        yield


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("form", POOLED + TWO_POOLS + PER_QUERY[1:] + PER_QUERY_IN_TWO + BY_SKETCH + ALWAYS, ids=ids)
def test_lists_are_those_of_the_definition(form: dict, is_causal: bool) -> None:
    for n, m in ((0, 0), (5, 0), (1, 1), (77, 77), (40, 130)):
        inputs = Inputs(n, m, low_rank=(n + m + form["keys"] // 8) % 3, d=24, seed=n + m)
        key_mask = random_mask(2, m, n)
        inputs.mask(key_mask, key_mask if n == m else random_mask(2, n, m + 1))
        assert_as_defined(inputs.causal() if is_causal else inputs, **form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # bfloat16: on tensor cores
@pytest.mark.parametrize("form", [ALWAYS[2], PER_QUERY[2], PER_QUERY_IN_TWO[1], BY_SKETCH[1]], ids=ids)
def test_heads_list_their_own_numbers_of_keys(form: dict, dtype: torch.dtype) -> None:
    support = sb.Routed(**form | {"keys": tuple(form["keys"] + 8 * more for more in (2, 0, 5, 2))})
    query, key = (rand(1, heads, 150, 16, seed=heads).to(dtype) for heads in (4, 2))
    lists = sb.route(query, key, support, None, is_causal=True)
    inputs = sb.reference.Inputs.of(query, key, is_causal=True)
    assert_near((lists.index, lists.count), support, inputs)


@pytest.mark.parametrize("low_rank", [0, 1, 2])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
def test_stages_choose_as_the_definition(low_rank: int, is_causal: bool) -> None:
    """More keys than all candidate blocks hold, so that the stages really drop some."""
    inputs = Inputs(90, 1100, low_rank=low_rank, heads=1, batch=1, seed=low_rank)
    if is_causal:
        inputs.causal([1010])
    assert_as_defined(inputs, **POOLED[1])
    every_key, _ = sb.reference.routed_lists(sb.Routed(**POOLED[1]), inputs.definition(), stages=False)
    assert (every_key != inputs.route(**POOLED[1])[0]).any()


@pytest.mark.parametrize(
    "form, inputs",
    [(POOLED[0], dict(n=9, heads=70, kv_heads=2, batch=16)), (PER_QUERY[2], dict(n=140, heads=4, kv_heads=2))],
    ids=["pooled", "per-query"],
)
def test_blocks_of_threads_make_lists_in_turn(form: dict, inputs: dict) -> None:
    """More lists than there are blocks of threads with memory for one."""
    assert_as_defined(Inputs(**inputs, d=4), **form)


@pytest.mark.parametrize("pools", [0, 1, 2])
def test_queries_choose_among_the_best_superblocks(pools: int) -> None:
    assert_as_defined(Inputs(3, 1400, heads=1, batch=1), **PER_QUERY[1] | {"pools": pools})


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
def test_superblocks_of_long_rows_choose_as_the_definition(is_causal: bool) -> None:
    inputs = Inputs(20, 17000, heads=1, d=4, batch=1, seed=5)
    if is_causal:
        inputs.causal([16960])
    assert_as_defined(inputs, **POOLED[1])


@pytest.mark.parametrize("form", FORMS[:3], ids=ids)
def test_clusters_serve_keys_as_in_the_definition(form: dict) -> None:
    query, key, mask = rand(2, 4, 90, 12), rand(2, 2, 90, 12, seed=1), random_mask(2, 90, 4)
    low_rank = sb.Centroid(7)
    arguments = dict(statistics=sb.reference.cluster(query, key, 7, mask), key_padding_mask=mask)
    lists = sb.route(query, key, sb.Routed(**form), low_rank, **arguments)
    definition = sb.reference.Inputs.of(query, key, low_rank, **arguments)
    assert_near((lists.index, lists.count), sb.Routed(**form), definition)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_other_types_are_routed_as_their_float_copies(form: dict, dtype: torch.dtype) -> None:
    query, key = (
        t.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for t in (rand(1, 6, 60, 16), rand(1, 2, 60, 16))
    )
    given, copies = (sb.route(q, k, sb.Routed(**form), None) for q, k in ((query, key), (query.float(), key.float())))
    assert torch.equal(given.index, copies.index) and torch.equal(given.count, copies.count)


@pytest.mark.parametrize("low_rank, form", [(0, POOLED[1]), (1, POOLED[1]), (2, TWO_POOLS[1]), (1, PER_QUERY[2])])
@pytest.mark.parametrize(
    "query, key",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_tokens_of_all_types_come_with_maps_in_float32(
    query: torch.dtype, key: torch.dtype, low_rank: int, form: dict
) -> None:
    """Queries and keys may have two types, as on the CPU."""
    given, copies = (
        Inputs(45, low_rank=low_rank, heads=4, kv_heads=2),
        Inputs(45, low_rank=low_rank, heads=4, kv_heads=2),
    )
    given.query, given.key = given.query.to(query), given.key.to(key)
    copies.query, copies.key = given.query.float(), given.key.float()
    for got, expected in zip(given.route(**form), copies.route(**form)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_clusters_of_other_types_serve_keys_in_float32(dtype: torch.dtype) -> None:
    query, key = (t.to(dtype) for t in (rand(1, 4, 70, 12), rand(1, 2, 70, 12, seed=1)))
    support, clusters = sb.Routed(**POOLED[1]), sb.reference.cluster(query.float(), key.float(), 7)
    given, copies = (
        sb.route(q, k, support, sb.Centroid(7), statistics=clusters)
        for q, k in ((query, key), (query.float(), key.float()))
    )
    assert torch.equal(given.index, copies.index) and torch.equal(given.count, copies.count)


def test_packed_maps_are_the_maps() -> None:
    """Rows of packed maps: coordinates, 1, the log scale in base 2, zeros."""
    inputs = Inputs(90, heads=4, kv_heads=2)
    expected = inputs.route(**POOLED[1])
    for name in ("query_map", "key_map"):
        rows = getattr(inputs, name)
        packed = torch.zeros(*rows.shape[:3], torch.ops.scatterbrain.packed_width(5))
        packed[..., :5], packed[..., 5], packed[..., 6] = rows[..., :5], 1, rows[..., 5] * math.log2(math.e)
        setattr(inputs, name, packed)
    inputs.packed_rank = 5
    assert_same(inputs.route(**POOLED[1]), expected)


DRAWN = 42


def drawn_route(seed: int) -> RouteArguments:
    """Arguments as the operator takes them, also where no public function makes them: ranges that no mask has, offsets
    far outside, other strides, clusters of no kernel."""
    r, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, group, m = (
        r.choice([1, 2, 3]),
        r.choice([1, 2]),
        r.choice([1, 2, 3]),
        r.choice([1, 31, 64, 200, 1100]),
    )
    n, d, rank = (
        r.choice([m, 1, 7, 33, 140]) if m < 200 else r.choice([1, 33]),
        r.choice([1, 3, 17, 64]),
        r.choice([1, 5]),
    )
    is_causal = r.random() < 0.5
    given: dict[str, object] = dict(is_causal=is_causal, low_rank=r.choice([0, 1, 2] if is_causal else [0, 1, 2, 3]))
    given["query"] = 1.5 * rand(batch, kv_heads * group, n, d, seed=seed)
    given["key"] = r.choice([0.01, 1.5, 1.5, 10]) * rand(batch, kv_heads, m, d, seed=seed + 1)
    if given["low_rank"] in (1, 2):
        x, y = (
            rand(batch, kv_heads * group, n, rank + 1, seed=seed + 2),
            rand(batch, kv_heads, m, rank + 1, seed=seed + 3),
        )
        if given["low_rank"] == 2:  # features are not negative
            x[..., :-1].abs_(), y[..., :-1].abs_()
        given["query_map"], given["key_map"] = x.mT.contiguous().mT, y.transpose(1, 2).contiguous().transpose(1, 2)
    if given["low_rank"] == 3:
        given["cluster_index"] = torch.randint(rank, (batch, kv_heads, m), dtype=torch.int32, generator=generator)
        given["representatives"] = rand(batch, kv_heads, rank, d, seed=seed + 4)
        given["log_mass"] = 2 * rand(batch, kv_heads, m, seed=seed + 5)
    for name, tokens in (("query", n), ("key", m)):
        given[name] = given[name].to(r.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
        if r.random() < 0.4:
            given[f"{name}_mask"] = torch.rand(batch, tokens, generator=generator) < r.choice([0.1, 0.5, 0.95])
        if r.random() < 0.4:
            ends = torch.randint(tokens + 1, (batch, 2), dtype=torch.int32, generator=generator)
            given[f"{name}_range"] = ends.sort(1).values
    if is_causal and r.random() < 0.7:
        offsets = [0, 1, m - n, m // 2, -n // 2, -5, m + 50, 2**31 - 1 - n, -(2**31)]
        given["query_offset"] = torch.tensor([r.choice(offsets) for _ in range(batch)], dtype=torch.int32)
    sinks = r.choice([0, 0, r.randint(1, 20)])
    if r.random() < 0.7:
        block_q = r.choice([8, 16, 32])
        window = r.choice([0, block_q, block_q + r.randint(1, 40)])
        keys = max(window, block_q) + sinks + r.choice([0, 1, 16, 50, 300])
        given |= dict(block_q=block_q, window=window, keys=keys, pools=r.choice([1, 2]))
    else:
        window = r.choice([0, 0, 8, 24, 48])
        keys = window + -(-sinks // 8) * 8 + r.choice([8, 24, 160])
        given |= dict(block_q=1, block_k=8, window=window, keys=keys, pools=r.choice([0, 1, 2]))
    return operator_arguments(RouteArguments, **given, sinks=sinks)


@pytest.fixture(scope="module")
def cpu_lists() -> list[tuple[Tensor, Tensor]]:
    """Made before the emulator takes the CPU's place."""
    return [torch.ops.scatterbrain.route(*drawn_route(seed)) for seed in range(DRAWN)]


@pytest.mark.parametrize("seed", range(DRAWN))
def test_drawn_calls_list_what_the_cpu_lists(seed: int, cpu_lists: list[tuple[Tensor, Tensor]]) -> None:
    """One entry of a list may be another where float32 does not tell their scores apart."""
    index, count = torch.ops.scatterbrain.route(*drawn_route(seed))
    expected, expected_count = cpu_lists[seed]
    assert torch.equal(count, expected_count)
    others = (index != expected).any(-1).nonzero().tolist()
    assert len(others) <= count.numel() / 100
    for at in map(tuple, others):
        assert len(set(index[at].tolist()) ^ set(expected[at].tolist())) == 2


@pytest.mark.parametrize("seed", range(0, DRAWN, 3))
def test_numbers_that_are_none_and_clusters_that_do_not_exist_break_no_list(seed: int) -> None:
    """Infinities, NaN, the largest numbers, and clusters out of range: the emulator sees every access, and the lists
    stay in their form."""
    arguments, generator = drawn_route(seed), torch.Generator().manual_seed(seed)
    for tokens in arguments:
        if isinstance(tokens, Tensor) and tokens.is_floating_point():
            at = torch.rand(tokens.shape, generator=generator)
            for i, number in enumerate((torch.nan, torch.inf, -torch.inf, torch.finfo(tokens.dtype).max)):
                tokens[(at >= i / 100) & (at < (i + 1) / 100)] = number
    if arguments.cluster_index is not None:
        at = torch.rand(arguments.cluster_index.shape, generator=generator)
        arguments.cluster_index[at < 0.1], arguments.cluster_index[at > 0.9] = -(2**31), 2**31 - 1
    index, count = torch.ops.scatterbrain.route(*arguments)
    units, used = -(-arguments.key.shape[2] // arguments.block_k), torch.arange(index.shape[-1]) < count[..., None]
    assert (index[~used] == -1).all() and (index[used] >= 0).all() and (index[used] < units).all()
    assert ((index.diff() > 0) | ~used[..., 1:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # bfloat16: on tensor cores
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_scores_that_are_no_numbers_come_first(value: float, dtype: torch.dtype) -> None:
    assert_runs_of_infinite_keys_come_first(value, dtype)


def test_equal_scores_go_to_the_lowest_keys() -> None:
    index = sb.route(rand(1, 1, 64, 16), torch.zeros(1, 1, 90, 16), sb.Routed(24, 16), None).index
    assert torch.equal(index, torch.arange(24, dtype=torch.int32).expand_as(index))


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_padding_changes_no_list(form: dict, is_causal: bool) -> None:
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.1
    mask[:, 0] = mask[:, -1] = False
    inputs = Inputs(70).mask(mask)
    inputs.is_causal = is_causal
    index, count = inputs.route(**form)
    for left, right, fill in ((0, 45, torch.nan), (13, 0, 1e4), (40, 3, torch.inf)):
        wide_index, wide_count = padded(inputs, left, right, fill).route(**form)
        blocks = index.shape[2]
        assert torch.equal(wide_index[:, :, :blocks, : index.shape[3]], index)
        assert torch.equal(wide_count[:, :, :blocks], count)
        assert (wide_count[:, :, blocks:] == 0).all() and (wide_index[:, :, blocks:] == -1).all()


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_lists_read_nothing_after_the_first_query(form: dict) -> None:
    before = Inputs(101, heads=1, batch=1).causal()
    index, count = before.route(**form)
    for cut in (1, 16, 33, 100):
        after = Inputs(101, heads=1, batch=1, seed=99).causal()
        for name in ("query", "key", "query_map", "key_map"):
            changed = getattr(after, name).mul(3)
            changed[:, :, :cut] = getattr(before, name)[:, :, :cut]
            setattr(after, name, changed)
        unchanged = -(-cut // form["block_q"])
        for got, want in zip(after.route(**form), (index, count)):
            assert torch.equal(got[:, :, :unchanged], want[:, :, :unchanged])


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_two_runs_give_the_same_lists(form: dict) -> None:
    for got, again in zip(Inputs(90).route(**form), Inputs(90).route(**form)):
        assert torch.equal(got, again)
