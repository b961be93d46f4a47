"""Multiply-adds per query: against torch's FLOP counter, and against counts by hand of what it does not see."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
import torch
from testkit import rand
from torch.utils.flop_counter import FlopCounterMode

import scatterbrain as sb
from scatterbrain import low_rank, supports
from scatterbrain.analysis.cost import Cost, Shape, cost, low_rank_cost, support_cost, with_keys_for, with_size_for

HEADS, D, DV = 2, 16, 24
SUPPORTS = [sb.Empty(), sb.Window(24), sb.Routed(48, block_q=16), sb.LSH(32)]
KERNELS = [
    None,
    sb.Quadratic(5),
    sb.Favor(12),
    sb.Favor(12, hyperbolic=True),
    sb.Favor(12, centred=True),
    sb.Features(torch.exp),
    sb.Centroid(10),
]


def name_of(kernel: object) -> str:
    """Without the addresses of functions, which differ from process to process."""
    return re.sub(r" of type object at 0x[0-9a-f]+", "", str(kernel))


@pytest.mark.parametrize("kernel", KERNELS, ids=name_of)
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.parametrize("keys", [96, 160])
def test_exact_and_low_rank_are_half_of_the_flops_that_torch_counts(
    support: sb.Empty, kernel: sb.Centroid | None, keys: int
) -> None:
    if kernel is None and isinstance(support, sb.Empty):
        return
    query, key, value = rand(1, HEADS, 96, D), rand(1, HEADS, keys, D), rand(1, HEADS, keys, DV)
    statistics = sb.fit_statistics(query, key, 5) if isinstance(kernel, sb.Quadratic) else None
    lists = sb.route(query, key, support, kernel, statistics=statistics) if support.depends_on_content else support
    with FlopCounterMode(display=False) as counter:
        sb.attention(query, key, value, lists, kernel, statistics=statistics)
    by_operator = counter.get_flop_counts()["Global"]
    by_operator.pop(torch.ops.aten.bmm, None)  # the maps of the quadratic kernel from its statistics, once a head
    counted = sum(by_operator.values())
    found = cost(support, kernel, Shape(96, keys, D, DV))
    assert (found.exact + found.low_rank) * 2 * HEADS * 96 == pytest.approx(counted)


def test_the_search_by_sketches_by_hand() -> None:
    """A token of 80 columns is filled up to 128, 7 doublings, three times; 112 keys behind the window are 14 blocks, so
    28 are scored of 1,024 keys, and all of 200."""
    support, making = sb.Routed(128, block_q=1, block_k=8, window=16, pools=0), 3 * 128 * 7
    assert cost(support, None, Shape(512, 1024, 80, 80)).search == 5 * 1024 + 28 * 8 * 80 + making * (1 + 2)
    assert cost(support, None, Shape(200, 200, 80, 80)).search == 25 * 8 * 80 + making * 2


def test_the_search_of_pooled_lists_by_hand() -> None:
    """1024 keys are 32 runs, of which 16 are kept: 32 means and 512 keys are scored for each block of 16 queries."""
    shape = Shape(1024, 1024, 64, 64)
    assert cost(sb.Routed(64, block_q=16), None, shape).search == (32 + 512) * 64 / 16 + 64
    assert cost(sb.Routed(64, block_q=16), sb.Quadratic(9), shape).search == (32 + 512) * 73 / 16 + 64
    assert cost(sb.Routed(64, block_q=16, pools=2), None, shape).search == 2 * (32 + 512) * 64 / 16 + 64
    # 128 keys keep 24 runs
    assert cost(sb.Routed(128, block_q=32), None, shape).search == (32 + 24 * 32) * 64 / 32 + 64
    # 65536 keys are 128 superblocks; the 32 best have 512 runs
    long = Shape(65536, 65536, 64, 64)
    assert cost(sb.Routed(64, block_q=16), None, long).search == (128 + 512 + 512) * 64 / 16 + 64


def test_the_search_of_lists_for_single_queries_by_hand() -> None:
    """1024 keys are 128 blocks of 8 in 16 superblocks: all are scored. 4096 keys have 64 superblocks: 16 are kept."""
    support = sb.Routed(64, block_q=1, block_k=8, window=16)
    assert cost(support, None, Shape(1024, 1024, 64, 64)).search == 128 * 65 + 2 * 64
    assert cost(support, None, Shape(4096, 4096, 64, 64)).search == (64 + 16 * 8) * 65 + 2 * 64
    # Of two pools: 8 superblocks are kept, and all is scored twice.
    in_two = replace(support, pools=2)
    assert cost(in_two, None, Shape(512, 512, 64, 64)).search == 2 * 64 * 65 + 6 * 64
    assert cost(in_two, None, Shape(1024, 1024, 64, 64)).search == 2 * (16 + 8 * 8) * 65 + 6 * 64


def test_hashing_clustering_and_moments_by_hand() -> None:
    shape = Shape(512, 1024, 64, 32)
    assert cost(sb.LSH(64, rounds=4), None, shape).search == 4 * 66 * 3
    angular = sb.LSH(64, rounds=4, hash="angular")  # 64 clusters of 16 keys: 32 directions
    assert cost(angular, None, shape).search == 4 * 32 * 64 * 3
    assert cost(sb.LSH(4, rounds=4, hash="angular"), None, shape).search == 4 * 64 * 64 * 3  # no more than d of them
    assert cost(sb.Empty(), sb.Quadratic(9, "input"), shape).search == (256 + 256) * 64 * 64 / 512 + 2 * 64 * 2
    of_input = cost(sb.Empty(), sb.Quadratic(9, "input"), shape).search
    assert cost(sb.Empty(), sb.Favor(centred=True), shape).search == of_input
    assert cost(sb.Empty(), sb.Quadratic(9), shape).search == cost(sb.Empty(), sb.Favor(), shape).search == 0
    each_key, samples = 16 * 64 + 16 * 50 + 2 * 64, 256 * 16 * (5 * 64 + 50)
    assert cost(sb.Empty(), sb.Centroid(50), shape).search == samples / 512 + 2 * each_key
    together = cost(sb.Routed(64, block_q=32), sb.Centroid(50), shape).search
    alone = (32 + 512) * 64 / 32 + 2 * 64
    assert together == cost(sb.Empty(), sb.Centroid(50), shape).search + alone + 50 * 64 / 32 + 2 * 64


def test_a_support_that_covers_every_key_costs_what_exact_attention_does() -> None:
    shape = Shape(40, 40, 8, 8)
    for support in (sb.Full(), sb.Window(50), sb.Routed(64), sb.LSH(80)):
        assert cost(support, sb.Centroid(10), shape) == Cost(40 * 16, 0, 0)


def test_unused_entries_of_lists_cost_nothing() -> None:
    shape = Shape(40, 40, 8, 8)
    blocks = sb.Blocks(torch.tensor([[[[0, 3], [1, -1]]]], dtype=torch.int32),
                       torch.tensor([[[2, 1]]], dtype=torch.int32), 20, 4)  # fmt: skip
    assert cost(blocks, None, shape).exact == 1.5 * 4 * 16


@dataclass(frozen=True)
class First(supports.Support):
    kind = "first"


@dataclass(frozen=True)
class Elu(low_rank.LowRankKernel):
    kind = "elu"


def test_own_parts_are_counted_once_they_are_registered() -> None:
    shape = Shape(10, 10, 4, 4)
    with pytest.raises(TypeError, match="First has no registered cost; .*support_cost.register"):
        cost(First(), None, shape)
    with pytest.raises(TypeError, match="Elu has no registered cost; .*low_rank_cost.register"):
        cost(sb.Empty(), Elu(), shape)

    @support_cost.register
    def _(support: First, low_rank: object, shape: Shape) -> tuple[float, float]:
        return 3, 5

    @low_rank_cost.register
    def _(low_rank: Elu, listed: float, shape: Shape) -> tuple[float, float]:
        return 7 * listed, 11

    assert cost(First(), Elu(), shape) == Cost(3 * 8, 21, 16)


# ---------------------------------------------------------------------------------------- equal cost

SHAPE = Shape(200, 200, 16, 16)


@pytest.mark.parametrize(
    "support, step",
    [(sb.Window(1), 1), (sb.Routed(64), 1), (sb.LSH(8, rounds=4), 4), (sb.Routed(64, 1, 8, 16), 8)],
    ids=str,
)
def test_sparse_alone_has_as_many_keys_as_the_budget_pays_for(support: sb.Window, step: int) -> None:
    budget = cost(replace(support, keys=96), None, SHAPE).total
    assert with_keys_for(budget, support, None, SHAPE) == replace(support, keys=96)
    assert with_keys_for(budget - 1, support, None, SHAPE) == replace(support, keys=96 - step)
    assert with_keys_for(10, support, None, SHAPE) is None
    both = cost(replace(support, keys=96), sb.Favor(5), SHAPE).total
    assert with_keys_for(both, support, sb.Favor(5), SHAPE) == replace(support, keys=96)


@pytest.mark.parametrize(
    "kernel, size, most",
    [(sb.Centroid(), "clusters", 256), (sb.Favor(), "features", None), (sb.Quadratic(9, "input"), "rank", 16)],
    ids=str,
)
def test_low_rank_alone_is_as_large_as_the_budget_pays_for(kernel: sb.Centroid, size: str, most: int | None) -> None:
    budget = cost(sb.Empty(), replace(kernel, **{size: 7}), SHAPE).total
    assert with_size_for(budget, kernel, SHAPE) == replace(kernel, **{size: 7})
    assert with_size_for(budget - 1, kernel, SHAPE) == replace(kernel, **{size: 6})
    assert with_size_for(10, kernel, SHAPE) is None
    if most is not None:
        assert with_size_for(1e6, kernel, SHAPE) == replace(kernel, **{size: most})


def test_a_kernel_without_a_size_has_no_counterpart() -> None:
    assert with_size_for(1e6, Elu(), SHAPE) is None
