"""The parity table: forward and every gradient against the dense float64 definition, over drawn cases of all axes."""

from __future__ import annotations

import random

import pytest
import torch
from oracle import Case, row_error

import scatterbrain as sb

SUPPORTS = [
    lambda r: sb.Full(),
    lambda r: sb.Empty(),
    lambda r: sb.Window(r.choice([1, 7, 16, 32, 100]), block_q=r.choice([1, 5, 8, 16, 32])),
    lambda r: sb.Window(r.choice([16, 33, 64]), block_q=16),
    lambda r: sb.Routed(r.choice([32, 48]), block_q=r.choice([8, 16, 32])),
    lambda r: sb.Routed(r.choice([24, 32, 40]), block_q=1, block_k=8, window=r.choice([0, 8, 16])),
    lambda r: sb.LSH(r.choice([8, 32]), rounds=r.choice([1, 2, 4]), seed=r.randrange(100)),
    lambda r: "blocks",
]
LOW_RANKS = [
    lambda r, d: None,
    lambda r, d: sb.Quadratic(min(d, r.choice([1, 4, 9, 16])), "stored"),
    lambda r, d: sb.Quadratic(min(d, r.choice([3, 9])), "learned"),
    lambda r, d: sb.Quadratic(min(d, 9), "input"),
    lambda r, d: sb.Favor(r.choice([8, 17, 64]), hyperbolic=False, seed=r.randrange(100)),
    lambda r, d: sb.Favor(r.choice([8, 32]), hyperbolic=True, orthogonal=False),
]


def draw_blocks(r: random.Random, batch: int, heads: int, queries: int, keys: int, is_causal: bool) -> sb.Blocks:
    """Random lists: any block_q and block_k, any capacity, empty lists among them; causal ones name no block that their
    queries cannot see."""
    block_q, block_k, capacity = r.choice([1, 3, 8, 16, 24]), r.choice([1, 4, 8]), r.choice([1, 5, 12])
    blocks = -(-queries // block_q)
    index = torch.full((batch, heads, blocks, capacity), -1, dtype=torch.int32)
    count = torch.zeros(batch, heads, blocks, dtype=torch.int32)
    for b in range(batch):
        for h in range(heads):
            for t in range(blocks):
                last = min((t + 1) * block_q, queries) - 1
                available = -(-keys // block_k) if not is_causal else min(-(-keys // block_k), last // block_k + 1)
                n = r.randint(0, min(capacity, available))
                index[b, h, t, :n] = torch.tensor(sorted(r.sample(range(available), n)), dtype=torch.int32)
                count[b, h, t] = n
    order = None
    if not is_causal and r.random() < 0.4:
        order = torch.stack(
            [torch.randperm(queries, generator=torch.Generator().manual_seed(i)) for i in range(batch * heads)]
        )
        order = order.reshape(batch, heads, queries).to(torch.int32)
        order[..., : queries // 5] = -1  # slots without a query, and so queries that no slot names
    return sb.Blocks(index, count, block_q, block_k, order)


def draw(seed: int, dtype: torch.dtype = torch.float32) -> Case:
    """The seed's case. Supports and low-rank kernels are taken in turn, so that every pair of them appears; the rest is
    drawn."""
    r = random.Random(seed)
    support, head_dim = SUPPORTS[seed % len(SUPPORTS)](r), r.choice([3, 8, 16, 32, 40, 64])
    low_rank = LOW_RANKS[seed // len(SUPPORTS) % len(LOW_RANKS)](r, head_dim)
    if isinstance(support, sb.Full):
        low_rank = None
    if isinstance(support, sb.Empty) and low_rank is None:
        low_rank = sb.Quadratic(min(head_dim, 9), "stored")
    is_causal = (
        not isinstance(support, sb.LSH)
        and not (isinstance(low_rank, sb.Quadratic) and low_rank.statistics == "input")
        and r.random() < 0.5
    )
    kv_heads = r.choice([1, 2])
    q_heads = kv_heads * r.choice([1, 2, 3])
    queries = r.choice([0, 1, 2, 15, 33, 64, 65, 100, 129, 190])
    keys = queries if r.random() < 0.6 else r.choice([0, 1, 17, 64, 77, 150])
    padding = r.choice(["none", "none", "right", "left", "both", "holes", "all"])
    offset = 0
    if is_causal and r.random() < 0.3:
        offset = r.choice([5, 64, torch.tensor([3, 70])])
    if support == "blocks":
        padding, offset = r.choice(["none", "none"]), 0
        support = draw_blocks(r, 2, r.choice([q_heads, kv_heads]), queries, keys, is_causal)
    return Case(
        support,
        low_rank,
        2,
        q_heads,
        kv_heads,
        queries,
        keys,
        head_dim,
        r.choice([head_dim, 5, 16, 48]),
        is_causal,
        padding,
        offset,
        r.choice([None, None, 0.3, 1.0, -0.2]),
        dtype,
        r.random() < 0.5,
        seed,
    )


NAMES = ("out", "dq", "dk", "dv", "dPq", "db", "dc", "dPk", "da")


def check(case: Case, precision: torch.dtype, floor: float, share: float) -> None:
    """Every row of the output and of every gradient: at most max(floor, twice the same formula in torch at this
    precision, 1e-6 of ``share``)."""
    for name, got, exact, plain in zip(NAMES, case.judged(precision), case.defined(), case.defined(precision)):
        assert got.shape == exact.shape and (got.dtype == precision or got.dtype == torch.float32)
        error, allowed = row_error(got, exact), max(floor, 2 * row_error(plain, exact), 1e-6 * share)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}; {case.support} {case.low_rank}"


def check_float32(seed: int) -> None:
    """One row of the parity table."""
    case = draw(seed)
    check(case, torch.float32, 1e-5, case.low_rank_share())


@pytest.mark.parametrize("seed", range(288))
def test_float32_matches_the_definition(seed: int) -> None:
    check_float32(seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(48))
def test_half_precision_errs_no_more_than_twice_the_formula_in_torch(seed: int, dtype: torch.dtype) -> None:
    check(draw(seed, dtype), dtype, 0.0, 0.0)


@pytest.mark.parametrize("seed", range(48))
def test_float64_accumulates_in_float64(seed: int) -> None:
    case = draw(seed)
    for got, exact in zip(case.judged(torch.float64), case.defined()):
        assert got.dtype == torch.float64
        assert row_error(got, exact) <= max(1e-10, 1e-14 * case.low_rank_share())
