"""Routing on tensor cores, in the emulator: the lists of the definition in bfloat16 and float16, by bits under
padding, causality and repetition, without bank conflicts; and faults that are planted into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from emulated import Emulator, build
from planted import BFLOAT16, Kernels
from supports.test_route import (
    ALWAYS,
    PER_QUERY,
    PER_QUERY_IN_TWO,
    POOLED,
    TWO_POOLS,
    Inputs,
    assert_near,
    ids,
    padded,
    random_mask,
)
from testkit import rand
from torch import Tensor

import scatterbrain as sb

HALF = [torch.bfloat16, torch.float16]
FORMS = [POOLED[1], TWO_POOLS[1], ALWAYS[2]]
OF_QUERIES = [*PER_QUERY, *PER_QUERY_IN_TWO, *ALWAYS[5:8]]
WIDE = {"keys": 200, "block_q": 32, "window": 40, "sinks": 3, "pools": 2}  # more candidates than most lists need


@contextmanager
def on_tensor_cores(emulator: Emulator, expected: bool = True) -> Iterator[None]:
    """Operators run in the emulator, and a kernel on tensor cores is started or not, as expected."""
    started = []
    with emulator.installed(), emulator.observed(lambda launch, is_after: started.append(launch.kernel)):
        yield
    on_scalars = {b"route_pooled", b"route_per_query"} & set(started)
    on_tiles = {b"route_pooled_tile", b"route_per_query_tile"} & set(started)
    assert (len(on_tiles), len(on_scalars)) == ((1, 0) if expected else (0, 1))


def inputs_of(dtype: torch.dtype, *shape: int, **more: int) -> Inputs:
    inputs = Inputs(*shape, **more)
    inputs.query, inputs.key = inputs.query.to(dtype), inputs.key.to(dtype)
    return inputs


def lists(emulator: Emulator, inputs: Inputs, form: dict) -> tuple[Tensor, Tensor]:
    with on_tensor_cores(emulator):
        return inputs.route(**form)


def assert_as_defined(emulator: Emulator, inputs: Inputs, form: dict) -> None:
    assert_near(lists(emulator, inputs, form), sb.Routed(**form), inputs.definition())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("form", [*POOLED, *TWO_POOLS, ALWAYS[2], ALWAYS[4], WIDE, *OF_QUERIES], ids=ids)
def test_lists_are_those_of_the_definition(emulator: Emulator, form: dict, dtype: torch.dtype) -> None:
    """Both ways and causal, with every low-rank kernel, holes, and keys that some stages drop."""
    for low_rank, (n, m, d) in enumerate([(70, 640, 40), (40, 130, 64), (77, 77, 24)]):
        inputs = inputs_of(dtype, n, m, low_rank=low_rank, d=d, batch=1, seed=n + form["keys"])
        inputs.mask(random_mask(1, m, n), random_mask(1, n, m + 1))
        assert_as_defined(emulator, inputs, form)
        assert_as_defined(emulator, inputs.causal([m - n]), form)


@pytest.mark.parametrize(("keys", "fits"), [(312, True), (336, False)])
def test_lists_that_need_more_memory_than_every_device_has_are_made_without_tensor_cores(
    emulator: Emulator, keys: int, fits: bool
) -> None:
    query, key = (rand(1, 1, 40, 128, dtype=torch.float16), rand(1, 1, 700, 128, seed=1, dtype=torch.float16))
    support, low_rank = sb.Routed(keys, 16), sb.Centroid(64)
    statistics = sb.reference.cluster(query.float(), key.float(), 64)
    with on_tensor_cores(emulator, fits):
        found = sb.route(query, key, support, low_rank, statistics=statistics)
    inputs = sb.reference.Inputs.of(query, key, low_rank, statistics=statistics)
    assert_near((found.index, found.count), support, inputs)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_clusters_serve_keys_as_in_the_definition(emulator: Emulator, form: dict, dtype: torch.dtype) -> None:
    query, key = (rand(1, 4, 90, 16, dtype=dtype), rand(1, 2, 90, 16, seed=1, dtype=dtype))
    mask, low_rank = random_mask(1, 90, 4), sb.Centroid(37)
    statistics = sb.reference.cluster(query.float(), key.float(), 37, mask)
    arguments = dict(statistics=statistics, key_padding_mask=mask)
    with on_tensor_cores(emulator):
        found = sb.route(query, key, sb.Routed(**form), low_rank, **arguments)
    definition = sb.reference.Inputs.of(query, key, low_rank, **arguments)
    assert_near((found.index, found.count), sb.Routed(**form), definition)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("pools", [1, 2])
def test_queries_choose_among_the_best_superblocks(
    emulator: Emulator, pools: int, is_causal: bool, dtype: torch.dtype
) -> None:
    inputs = inputs_of(dtype, 7, 1400, batch=1, low_rank=0)
    assert_as_defined(emulator, inputs.causal([1390]) if is_causal else inputs, PER_QUERY[1] | {"pools": pools})


@pytest.mark.parametrize(
    ("keys", "pools", "has_tiles"),
    [(2048, 1, True), (2056, 1, False), (9000, 1, False), (4096, 2, True), (4112, 2, False)],
)
def test_lists_that_registers_cannot_hold_go_without_tensor_cores(
    emulator: Emulator, keys: int, pools: int, has_tiles: bool
) -> None:
    query, key = rand(1, 1, 20, 16).bfloat16(), rand(1, 1, 20, 16).bfloat16()
    with on_tensor_cores(emulator, has_tiles):
        sb.route(query, key, sb.Routed(16 + keys, block_q=1, block_k=8, window=16, pools=pools), None)


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
def test_superblocks_of_long_rows_choose_as_the_definition(emulator: Emulator, is_causal: bool) -> None:
    inputs = inputs_of(torch.bfloat16, 20, 17000, heads=1, d=8, batch=1, seed=5)
    if is_causal:
        inputs.causal([16960])
    assert_as_defined(emulator, inputs, POOLED[1])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_large_and_small_tokens_are_told_apart(emulator: Emulator, dtype: torch.dtype) -> None:
    """Pools beyond what float16 holds in one part, times keys below its normal numbers."""
    for size in (2.0**12, 2.0**-12):
        inputs = inputs_of(dtype, 40, 300, low_rank=0, batch=1)
        inputs.query, inputs.key = inputs.query * size, inputs.key / size
        assert_as_defined(emulator, inputs, POOLED[1])


def close_call() -> tuple[Tensor, Tensor]:
    """A pool whose first two coordinates differ by 2^-22 of them: only a product with all digits of the pool prefers
    key 41 to key 40, and beside the window, keys 52 to 67, there is room for one of them."""
    query, key = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 120, 16)
    query[..., :2] = 1
    query[0, 0, 0, :2] = torch.tensor([0, 2.0**-18])
    key[0, 0, 40, 0], key[0, 0, 41, 1] = 1, 1
    return query.bfloat16(), key.bfloat16()


def chosen_of_close_call(emulator: Emulator) -> list[int]:
    query, key = close_call()
    with on_tensor_cores(emulator):
        return sb.route(query, key, sb.Routed(16 + 1, 16, window=16), None).index.flatten()[:1].tolist()


def test_scores_have_all_digits_of_a_pool(emulator: Emulator) -> None:
    assert chosen_of_close_call(emulator) == [41]


def test_equal_scores_go_to_the_lowest_keys(emulator: Emulator) -> None:
    query, key = rand(1, 1, 64, 16).bfloat16(), torch.zeros(1, 1, 90, 16).bfloat16()
    with on_tensor_cores(emulator):
        index = sb.route(query, key, sb.Routed(24, 16), None).index
    expected = sb.reference.routed_lists(sb.Routed(24, 16), sb.reference.Inputs.of(query, key, None))[0]
    assert torch.equal(index, expected.int())


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("form", [*FORMS, PER_QUERY[2], PER_QUERY_IN_TWO[1]], ids=ids)
def test_padding_changes_no_list(emulator: Emulator, form: dict, is_causal: bool) -> None:
    mask = torch.rand(1, 70, generator=torch.Generator().manual_seed(0)) < 0.1
    mask[:, 0] = mask[:, -1] = False
    inputs = inputs_of(torch.bfloat16, 70, batch=1).mask(mask)
    inputs.is_causal = is_causal
    index, count = lists(emulator, inputs, form)
    for left, right, fill in ((0, 45, torch.nan), (13, 0, 1e4), (40, 600, torch.inf)):
        wide_index, wide_count = lists(emulator, padded(inputs, left, right, fill), form)
        blocks = index.shape[2]
        assert torch.equal(wide_index[:, :, :blocks, : index.shape[3]], index)
        assert torch.equal(wide_count[:, :, :blocks], count)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("form", [*FORMS, PER_QUERY[2], PER_QUERY_IN_TWO[1]], ids=ids)
def test_lists_read_nothing_after_the_first_query(emulator: Emulator, form: dict, dtype: torch.dtype) -> None:
    """Not even where later tokens are no numbers."""
    before = inputs_of(dtype, 101, heads=1, batch=1).causal()
    index, count = lists(emulator, before, form)
    for cut in (1, 33, 100):
        after = inputs_of(dtype, 101, heads=1, batch=1).causal()
        for name in ("query", "key", "query_map", "key_map"):
            getattr(after, name)[:, :, cut:] = torch.nan
        unchanged = -(-cut // form["block_q"])
        for got, want in zip(lists(emulator, after, form), (index, count)):
            assert torch.equal(got[:, :, :unchanged], want[:, :, :unchanged])


def test_two_runs_give_the_same_lists(emulator: Emulator) -> None:
    for got, again in zip(*(lists(emulator, inputs_of(torch.float16, 90), TWO_POOLS[1]) for _ in range(2))):
        assert torch.equal(got, again)


@pytest.mark.parametrize(
    "dtype, d", [(torch.float32, 16), (torch.float64, 16), (torch.bfloat16, 20), (torch.bfloat16, 264)], ids=str
)
def test_other_types_and_widths_are_routed_by_scalars(emulator: Emulator, dtype: torch.dtype, d: int) -> None:
    with on_tensor_cores(emulator, expected=False):
        inputs_of(dtype, 20, batch=1, d=d).route(**POOLED[1])
    with on_tensor_cores(emulator, expected=False):
        inputs_of(dtype, 20, batch=1, d=d).route(**PER_QUERY[1])


def test_keys_that_do_not_begin_at_16_bytes_are_copied(emulator: Emulator) -> None:
    inputs = inputs_of(torch.bfloat16, 90, batch=1)
    expected = lists(emulator, inputs, POOLED[1])
    wide = torch.zeros(*inputs.key.shape[:3], 19, dtype=torch.bfloat16)
    wide[..., 3:] = inputs.key
    inputs.key = wide[..., 3:]
    assert all(torch.equal(*pair) for pair in zip(lists(emulator, inputs, POOLED[1]), expected))


@pytest.mark.parametrize("low_rank", [0, 1, 2])
def test_scoring_and_choosing_have_no_bank_conflicts(emulator: Emulator, low_rank: int) -> None:
    inputs = inputs_of(torch.bfloat16, 64, 600, heads=1, batch=1, d=64, low_rank=low_rank)
    before = emulator.statistics()["bank_conflicts"]
    lists(emulator, inputs, {"keys": 48, "block_q": 16})
    assert emulator.statistics()["bank_conflicts"] == before


class Fault(NamedTuple):
    file: str
    old: str
    new: str
    name: str


FAULTS = {
    "lost low part of pools": Fault("route_tile.cuh", "is_third ? low[2] : 0", "0", "digits"),
    "swapped candidates": Fault(
        "route_tile.cuh",
        "lane_index() % 4 * 2 + lane_index() / 16",
        "lane_index() % 4 + lane_index() / 16 * 4",
        "digits|lists",
    ),
    "ties to the highest": Fault(
        "route_tile.cuh", "bits_set(equal & before) < ties", "bits_set(equal & ~before) <= ties", "ties"
    ),
    "another query's scores": Fault(
        "route_per_query_tile.cuh", "if (query == warp)", "if (query == 0)", "queries|race"
    ),
    "the other group left out": Fault(
        "route_per_query_tile.cuh", "score = log2_of_sum(keys, score, others, other);", "", "groups"
    ),
    "points of the whole run": Fault("route_groups.cuh", "is_first ? weight : 0.0f, run)", "weight, run)", "groups"),
    "missing barrier before lists": Fault(
        "route_pooled_tile.cuh", "weigh(warp, runs);\n      sync_block();", "weigh(warp, runs);", "race"
    ),
}


def complaint(emulator: Emulator) -> str:
    """What is wrong, or nothing."""
    try:
        if chosen_of_close_call(emulator) != [41]:
            return "digits"
        for form in (TWO_POOLS[1], POOLED[1]):
            inputs = inputs_of(torch.bfloat16, 75, 600, batch=1)
            for name in ("lists", "causal"):
                try:
                    assert_as_defined(emulator, inputs.causal([500]) if name == "causal" else inputs, form)
                except (AssertionError, IndexError, ValueError):
                    return name
        try:
            assert_as_defined(emulator, inputs_of(torch.bfloat16, 20, 300, batch=1, low_rank=0), PER_QUERY[1])
        except (AssertionError, IndexError, ValueError):
            return "queries"
        try:
            assert_as_defined(emulator, inputs_of(torch.bfloat16, 20, 300, batch=1, low_rank=0), PER_QUERY_IN_TWO[1])
        except (AssertionError, IndexError, ValueError):
            return "groups"
        try:
            test_equal_scores_go_to_the_lowest_keys(emulator)
        except AssertionError:
            return "ties"
    except RuntimeError as error:
        return str(error)
    return ""


def test_kernels_without_a_fault_raise_no_complaint(emulator: Emulator) -> None:
    assert complaint(emulator) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_name(kernels: Kernels, fault: str) -> None:
    file, old, new, name = FAULTS[fault]
    kernels.assert_caught(file, old, new, name, complaint, BFLOAT16)


def test_runs_that_do_not_fit_into_registers_come_in_turn(kernels: Kernels) -> None:
    """As where a row has more superblocks than a warp holds: here registers for 64 of them."""
    with kernels.planted("route_tile.cuh", "room = kRows * kWarp - taken", "room = 2 * kWarp - taken"):
        few = Emulator(build(kernels.csrc, BFLOAT16))
    assert_as_defined(few, inputs_of(torch.bfloat16, 75, 3500, batch=1, d=8), POOLED[1])
    assert_as_defined(few, inputs_of(torch.bfloat16, 6, 6000, batch=1, d=8, low_rank=0), PER_QUERY[1])
