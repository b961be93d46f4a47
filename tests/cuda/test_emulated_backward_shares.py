"""Gradients of listed blocks' keys by shares, in the emulator: as near to float64 as the CPU's kernel, by bits under
padding, repetition and other rounds, without bank conflicts in the loop; and faults that are planted into it."""

from __future__ import annotations

import pytest
import torch
from emulated import Emulator, build
from operator_cases import operator_arguments
from oracle import row_error
from planted import BFLOAT16, Kernels
from testkit import assert_same_bits, rand
from tile_gradients import (
    HALF,
    LOW_RANKS,
    NAMES,
    SHARES,
    by_shares,
    excess,
    given_of,
    gradients,
    gradients_of_keys,
)
from tiles import ragged, rms, statistics_of
from torch import Tensor
from torch.nn.functional import pad

import scatterbrain as sb
from scatterbrain.operators.arguments import QUADRATIC, AttentionArguments

OPERATORS = torch.ops.scatterbrain
N = 120  # enough for queries whose complement is not summed key by key


def lists(n: int, heads: int, block_q: int, block_k: int, keys: int | None = None) -> sb.Blocks:
    """Lists of 0 to 5 blocks of the keys, and two of all blocks."""
    generator = torch.Generator().manual_seed(1)
    shape, blocks = (1, heads, -(-n // block_q)), -(-(keys or n) // block_k)
    rows = shape[1] * shape[2]
    count = torch.randint(0, min(5, blocks) + 1, (rows,), generator=generator)
    count[:2] = blocks
    index = torch.stack([torch.randperm(blocks, generator=generator) for _ in range(rows)])
    index = index.masked_fill(torch.arange(blocks) >= count[:, None], blocks).sort(-1).values
    return sb.Blocks(index.view(*shape, blocks).int(), count.view(shape).int(), block_q=block_q, block_k=block_k)


# -------------------- errors


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", LOW_RANKS)
def test_errors_are_those_of_the_cpu_kernel(emulator: Emulator, kind: str, dtype: torch.dtype) -> None:
    """Of groups of query heads with a list for all or for each, blocks of several tiles and keys, holes, and lists
    beside a window. Lists of single keys and orders: test_emulated_backward_tile.py."""
    holes = torch.zeros(1, N, dtype=torch.bool)
    holes[:, 3::7] = holes[:, -9:] = True
    for support, more in (
        (lists(N, 1, 32, 8, N - 9), dict(key_padding_mask=holes)),
        (sb.Routed(32, 16, window=16), {}),
    ):
        assert not excess(emulator, given_of(dtype, n=N), support, LOW_RANKS[kind], **more)


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "low_rank"),
    [(16, 8, sb.Quadratic(9)), (72, 128, None), (128, 56, sb.Quadratic(4)), (128, 128, sb.Centroid(33))],
    ids=str,
)
def test_every_width_fits(emulator: Emulator, head_dim: int, value_dim: int, low_rank: object) -> None:
    given = given_of(torch.bfloat16, head_dim, value_dim, heads=2, n=85)
    assert not excess(emulator, given, lists(85, 2, 16, 3), low_rank)


def excess_over_rounding(emulator: Emulator, dtype: torch.dtype, kind: str) -> str:
    """Empty where gradients of keys err little more than by the rounding of exact ones. In bfloat16 those of values do,
    since weights are rounded."""
    given, support = given_of(dtype, n=N), ragged(N, 2, 60, False, 1)
    more = dict(statistics=statistics_of(LOW_RANKS[kind], given))
    ours = gradients_of_keys(emulator, given, support, LOW_RANKS[kind], **more)
    exact = gradients(given, support, LOW_RANKS[kind], reference=True, **more)[1:]
    for name, got, want in zip(("dk", "dv")[: 1 if dtype == torch.bfloat16 else 2], ours, exact):
        if not rms(got, want) <= 1.1 * rms(want.to(dtype), want):
            return f"{name} rounding: {rms(got, want) / rms(want.to(dtype), want):.2f} times"
    return ""


@pytest.mark.parametrize("kind", LOW_RANKS)
def test_gradients_of_keys_err_by_their_rounding(emulator: Emulator, kind: str) -> None:
    assert excess_over_rounding(emulator, torch.float16, kind) == ""


@pytest.mark.parametrize("factor", [2.0**-14, 2.0**9])
def test_small_and_large_gradients_are_as_exact_in_float16(emulator: Emulator, factor: float) -> None:
    given = given_of(torch.float16, n=N)
    given[3], given[4] = given[3] * factor, given[4] * factor
    given[0] = given[0] / factor  # gradients of keys that float16 has as normal numbers
    support, more = ragged(N, 2, 40, False, 1), dict(scale=2.0**-7 * min(factor, 1))
    ours, exact = (
        gradients_of_keys(emulator, given, support, None, **more)[0],
        gradients(given, support, None, reference=True, **more)[1],
    )
    assert rms(ours, exact) <= 1.1 * rms(exact.half(), exact)


def complaint_of_maps(emulator: Emulator) -> str:
    """Empty where the gradient of given maps is as exact as float32, and those of keys that windows and lists both have
    are not doubled."""
    generator = torch.Generator().manual_seed(0)
    given = [t.bfloat16() for t in (rand(1, 4, N, 16), rand(1, 2, N, 16, seed=1), rand(1, 2, N, 16, seed=2))]
    fields = dict(zip(("query", "key", "value"), given), query_map=0.5 * rand(1, 4, N, 4, seed=3), low_rank=QUADRATIC)
    index = torch.stack([torch.randperm(N, generator=generator)[:24].sort().values for _ in range(2 * 8)])
    fields |= dict(index=index.view(1, 2, 8, 24).int(), count=torch.full((1, 2, 8), 24, dtype=torch.int32))
    fields |= dict(span=torch.tensor([[[9 * i, 9 * i + 16] for i in range(8)]], dtype=torch.int32), span_keys=16)
    arguments = operator_arguments(
        AttentionArguments, **fields, key_map=0.5 * rand(1, 2, N, 4, seed=4), block_q=16, block_k=1
    )
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    grad = rand(1, 4, N, 16, seed=5).bfloat16()
    want = OPERATORS.attention_backward(grad.double(), None, *OPERATORS.attention(*wide), *wide)
    with by_shares(emulator):
        got = OPERATORS.attention_backward(grad, None, *OPERATORS.attention(*arguments), *arguments)
    for name, at, bound in (("map", 4, 1e-4), ("dk", 1, 0.02), ("dv", 2, 0.02)):
        if not row_error(got[at], want[at]) <= bound:
            return f"{name} error: {row_error(got[at], want[at]):.1e}"
    return ""


def test_what_is_no_number_stays_one(emulator: Emulator) -> None:
    """In the gradients of all keys that its query lists, and in no others."""
    given, support = given_of(torch.bfloat16, n=N), lists(N, 1, 16, 1)
    given[3][0, 1, 40, 7] = torch.inf
    listed = torch.zeros(N, dtype=torch.bool)
    listed[support.index[0, 0, 2, : support.count[0, 0, 2]].long()] = True
    for of_keys in gradients_of_keys(emulator, given, support, None):
        assert torch.equal(~of_keys[0, 0].isfinite().all(-1), listed)


# -------------------- which calls


def test_what_does_not_fit_runs_without_shares(emulator: Emulator) -> None:
    support = lists(20, 1, 16, 1)
    with by_shares(emulator, expected=False):
        gradients(given_of(torch.bfloat16, n=20), sb.Window(16), None)
        for change in ({"head_dim": 20}, {"value_dim": 20}, {"head_dim": 136}):
            gradients(given_of(torch.bfloat16, n=20, **change), support, None)
        gradients([t.double() for t in given_of(torch.bfloat16, n=20)], support, None)
        gradients(given_of(torch.float32, 72, n=20), support, None)


@pytest.mark.parametrize(("queries", "keys", "capacity"), [(0, 7, 1), (5, 0, 0), (5, 7, 0), (33, 1, 1)])
def test_empty_and_short_calls_are_fine(emulator: Emulator, queries: int, keys: int, capacity: int) -> None:
    given = [rand(1, 2, n, width).bfloat16() for n, width in ((queries, 24), (keys, 24), (keys, 16), (queries, 16))]
    blocks = -(-queries // 16)
    index = torch.zeros(1, 2, blocks, capacity, dtype=torch.int32)
    support = sb.Blocks(index, torch.full((1, 2, blocks), capacity, dtype=torch.int32), 16, 1)
    with emulator.installed():
        got = gradients([*given, rand(1, 2, queries)], support, None)
    cpu = gradients([*given, rand(1, 2, queries)], support, None)
    for ours, want in zip(got, cpu):
        assert ours.shape == want.shape
        torch.testing.assert_close(ours, want, rtol=0.05, atol=0.05)


# -------------------- bits


@pytest.mark.parametrize("kind", LOW_RANKS)
def test_no_bit_depends_on_padding_or_on_the_run(emulator: Emulator, kind: str) -> None:
    """On what it holds, and on how much of it there is."""
    mask = torch.zeros(1, N, dtype=torch.bool)
    mask[:, :7] = mask[:, 30::9] = True
    support, statistics = lists(N, 1, 32, 1, N - 7), None
    if kind != "none":
        statistics = statistics_of(LOW_RANKS[kind], given_of(torch.float16, n=N))
    results = []
    for content in (0.0, torch.nan, torch.nan) if kind == "none" else (0.0, torch.nan):
        given = [t.masked_fill(mask[:, None, :, None], content) for t in given_of(torch.float16, n=N)[:4]]
        given.append(given_of(torch.float16, n=N)[4])
        more = dict(statistics=statistics, key_padding_mask=mask)
        with by_shares(emulator):
            results.append(gradients(given, support, LOW_RANKS[kind], **more))
    assert_same_bits(results[0], results[1], NAMES)
    assert_same_bits(results[1], results[-1], NAMES)
    assert not any(t[:, :, mask[0]].any() for t in results[0])
    if kind == "centroid":  # its clusters are given token by token
        return
    longer = pad(mask, (0, 72), value=True)
    given = [*(pad(t, (0, 0, 0, 72), value=1e4) for t in given[:4]), pad(given[4], (0, 72))]
    index, count = pad(support.index, (0, 0, 0, 2)), pad(support.count, (0, 2))
    more = dict(statistics=statistics, key_padding_mask=longer)
    with by_shares(emulator):
        got = gradients(given, sb.Blocks(index, count, support.block_q, support.block_k), LOW_RANKS[kind], **more)
    assert_same_bits([t[:, :, :N] for t in got], results[0], NAMES)


@pytest.mark.parametrize("kind", ["none", "quadratic"])
def test_no_bit_depends_on_how_many_rounds_there_are(emulator: Emulator, kernels: Kernels, kind: str) -> None:
    """One of all tiles, or one for every tile: beside sums that are there before, and where the first writes them."""
    file, old = "attention_backward_shares.cpp", "std::max(kBytesOfRound, p.k_tokens * bytes)"
    with kernels.planted(file, old, "std::max<int64_t>(0, 0 * kBytesOfRound)"):
        of_tiles = Emulator(build(kernels.csrc))
    given, support = given_of(torch.bfloat16, n=N), lists(N, 1, 32, 8)
    assert_same_bits(*(gradients_of_keys(e, given, support, LOW_RANKS[kind]) for e in (emulator, of_tiles)), NAMES[1:])


# -------------------- conflicts


def conflicts_of(emulator: Emulator, low_rank: object, keys: int, dtype: torch.dtype) -> int:
    """Bank conflicts of the kernel where lists have so many keys."""
    counts = []

    def observe(launch: object, is_after: bool) -> None:
        if launch.kernel == SHARES:
            counts.append(emulator.statistics()["bank_conflicts"])

    given, shape = given_of(dtype, 64, 64, n=64), (1, 1, 4)
    index = torch.arange(keys, dtype=torch.int32).expand(*shape, keys).contiguous()
    support = sb.Blocks(index, torch.full(shape, keys, dtype=torch.int32), 16, 1)
    with emulator.installed(), emulator.observed(observe):
        gradients(given, support, low_rank, statistics=statistics_of(low_rank, given))
    before, after = counts
    return after - before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["none", "quadratic"])
def test_the_loop_over_keys_has_no_bank_conflicts(emulator: Emulator, kind: str, dtype: torch.dtype) -> None:
    """So that further keys have none. Clusters are looked up wherever the keys' are."""
    few, more = (conflicts_of(emulator, LOW_RANKS[kind], keys, dtype) for keys in (16, 64))
    assert few == more


# -------------------- planted faults

FILE = "attention_backward_shares.cuh"
# Where they are, and the kind of calls that show them.
FAULTS = {
    "lost share": (
        "sum_shares.cuh",
        "none",
        "if (rows[i] < 0) continue;",
        "if (rows[i] < 0 || i == 2) continue;",
        "d[kv] r",
    ),
    "swapped position": (
        "transposed_lists.cuh",
        "none",
        "int32_t(named.place)",
        "int32_t(named.place ^ 1)",
        "d[kv] r|uninit",
    ),
    "keys of the window count twice": (FILE, "quadratic", "ballot(of_lane.key >= 0)", "ballot(true)", "d[kv] e"),
    "missing barrier at the end of the loop": (
        FILE,
        "none",
        "      sync_warp();  // before the buffer is filled again\n",
        "",
        "race|asynchronous copy",
    ),
    "lost low part": (
        FILE,
        "none",
        "for (int i = kParts - 1; i >= 0; --i) {",
        "for (int i = 0; i == 0; ++i) {",
        "dk rou",
    ),
    "lost low part of the queries' coordinates": (
        FILE,
        "quadratic",
        "      multiply_add(root[n], high, x[2], x[3], Bfloat16{});\n",
        "",
        "map",
    ),
}


def first_complaint(emulator: Emulator, kind: str) -> str:
    try:
        if kind == "quadratic":
            return complaint_of_maps(emulator)
        given = given_of(torch.bfloat16, n=N)
        wrong = excess(emulator, given, lists(N, 1, 32, 8), LOW_RANKS[kind])
        return wrong or excess_over_rounding(emulator, torch.bfloat16, kind)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["none", "quadratic"])
def test_the_kernel_without_a_fault_raises_no_complaint(emulator: Emulator, kind: str) -> None:
    assert first_complaint(emulator, kind) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_name(kernels: Kernels, fault: str) -> None:
    file, kind, old, new, name = FAULTS[fault]
    kernels.assert_caught(file, old, new, name, lambda emulator: first_complaint(emulator, kind), BFLOAT16)
