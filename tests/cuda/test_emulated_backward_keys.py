"""Gradients of keys on tensor cores where other than a multiple of 16 queries share a list, or states are causal: as
near to float64 as the CPU's kernel; what is no number reaches those alone that see it; no bank conflicts in loops; and
planted faults. In the emulator."""

from __future__ import annotations

import pytest
import torch
from emulated import Emulator
from operator_cases import operator_arguments
from oracle import row_error
from planted import BFLOAT16, Kernels
from testkit import rand
from tile_gradients import LOW_RANKS, NAMES, excess, given_of, gradients, on_tensor_cores
from tiles import statistics_of
from torch import Tensor

import scatterbrain as sb
from scatterbrain.operators.arguments import QUADRATIC as QUADRATIC_KERNEL
from scatterbrain.operators.arguments import AttentionArguments

OPERATORS = torch.ops.scatterbrain
N = 150
LONG = 230  # of which tiles of queries read states, and see a whole chunk behind them
QUADRATIC, CENTROID = LOW_RANKS["quadratic"], LOW_RANKS["centroid"]


def kernels_of(emulator: Emulator, widths: tuple[int, int], *arguments: object, **more: object) -> list[bytes]:
    """Those that gradients of a short call start."""
    started, given = [], given_of(torch.bfloat16, *widths, n=40)
    more["statistics"] = statistics_of(arguments[1], given)
    with emulator.installed(), emulator.observed(lambda launch, is_after: started.append(launch.kernel)):
        gradients(given, *arguments, **more)
    return started


@pytest.mark.parametrize(
    ("support", "is_causal"),
    [(sb.Window(20), True), (sb.Window(20, 8), False), (sb.Window(9, 1), True), (sb.Window(32, 16, sinks=3), False)],
    ids=str,
)
@pytest.mark.parametrize("widths", [(24, 40), (128, 104)], ids=str)
def test_keys_of_windows_go_by_tiles_alone(
    emulator: Emulator, widths: tuple[int, int], support: object, is_causal: bool
) -> None:
    """In the pass without float64: that of queries that are computed again follows with a low-rank kernel."""
    for low_rank in (None, QUADRATIC, CENTROID)[: 2 if is_causal else 3]:
        started = kernels_of(emulator, widths, support, low_rank, is_causal=is_causal)
        assert b"attention_backward_tile_keys" in started
        assert started.count(b"attention_backward_keys") == 2 * (low_rank is not None)  # before and after the launch


# -------------------- errors


@pytest.mark.parametrize(
    ("support", "low_rank", "dtype", "is_causal", "offset"),
    [
        (sb.Window(64, 32, sinks=19), sb.Quadratic(9), torch.bfloat16, True, 0),
        (sb.Window(9, 12, sinks=3), sb.Quadratic(1), torch.float16, True, 110),
        (sb.Window(20, 24), QUADRATIC, torch.float16, False, 0),
        (sb.Window(40, 3, sinks=5), None, torch.bfloat16, False, 0),
        (sb.Empty(), QUADRATIC, torch.bfloat16, True, 23),
        (sb.Window(64, 32, sinks=19), CENTROID, torch.bfloat16, False, 0),
        (sb.Window(40, 3, sinks=5), sb.Centroid(33), torch.float16, False, 0),
        (sb.Empty(), CENTROID, torch.float16, False, 0),
    ],
    ids=str,
)
def test_errors_are_those_of_the_cpu_kernel(
    emulator: Emulator, support: object, low_rank: object, dtype: torch.dtype, is_causal: bool, offset: int
) -> None:
    holes = torch.zeros(1, LONG, dtype=torch.bool)
    holes[:, 3::7] = holes[:, 20:50] = True
    more = dict(is_causal=is_causal, query_offset=offset, key_padding_mask=holes)
    assert not excess(emulator, given_of(dtype, 40, 64, n=LONG), support, low_rank, **more)


@pytest.mark.parametrize("widths", [(128, 128), (96, 16), (40, 72)], ids=str)
@pytest.mark.parametrize(
    ("support", "dtype", "is_causal"),
    [
        (sb.Window(32, 16, sinks=5), torch.bfloat16, False),
        (sb.Window(24, 8), torch.float16, True),
        (sb.Empty(), torch.float16, False),
    ],
    ids=str,
)
def test_halves_of_wide_sums_are_as_exact(
    emulator: Emulator, support: object, dtype: torch.dtype, is_causal: bool, widths: tuple[int, int]
) -> None:
    """With a kernel the sums of more than 64 columns are two tasks, of which one may have none."""
    holes = torch.zeros(1, LONG, dtype=torch.bool)
    holes[:, 3::7] = True
    more = dict(is_causal=is_causal, key_padding_mask=holes)
    for low_rank in (QUADRATIC, CENTROID)[: 1 if is_causal else 2]:
        assert not excess(emulator, given_of(dtype, *widths, n=LONG), support, low_rank, **more)


@pytest.mark.parametrize(("block_q", "dtype"), [(16, torch.bfloat16), (8, torch.float16)])
def test_keys_of_routed_lists_and_windows_count_once(emulator: Emulator, block_q: int, dtype: torch.dtype) -> None:
    """Listed ones come from another kernel, and states hold those before, so that neither has a weight of L."""
    support = sb.Routed(32, block_q, window=16)
    assert not excess(emulator, given_of(dtype, n=LONG), support, QUADRATIC, is_causal=True)
    assert not excess(emulator, given_of(dtype, n=LONG), support, CENTROID)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_clusters_of_all_heads_of_a_group(emulator: Emulator, dtype: torch.dtype) -> None:
    """Products of a query with representatives are those of its own head, in a batch too."""
    assert not excess(emulator, batch_of(dtype), sb.Window(24, 16), sb.Centroid(12))


def batch_of(dtype: torch.dtype) -> list[Tensor]:
    """Two rows of four heads of queries and two of keys, of other tokens each."""
    shapes = [(2, 4, N, 24), (2, 2, N, 24), (2, 2, N, 40), (2, 4, N, 40)]
    return [*(rand(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)), rand(2, 4, N, seed=5)]


def error_of_maps(emulator: Emulator) -> float:
    """Of d_query_map and d_key_map of a causal call."""
    tokens = [rand(1, heads, LONG, 16, seed=heads + i).bfloat16() for i, heads in enumerate((2, 1, 1))]
    maps = [0.7 * rand(1, heads, LONG, 5, seed=heads + 5) for heads in (2, 1)]
    fields = dict(zip(("query", "key", "value", "query_map", "key_map"), (*tokens, *maps)), low_rank=QUADRATIC_KERNEL)
    begin = 8 * torch.arange(-(-LONG // 8), dtype=torch.int32)
    fields |= dict(span=torch.stack([begin - 12, begin + 8], -1)[None], span_keys=20, block_q=8, is_causal=True)
    arguments, grad = operator_arguments(AttentionArguments, **fields), rand(1, 2, LONG, 16, seed=9).bfloat16()
    wide = AttentionArguments(
        *(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    )
    want = OPERATORS.attention_backward(grad.double(), None, *OPERATORS.attention(*wide), *wide)
    with on_tensor_cores(emulator):
        got = OPERATORS.attention_backward(grad, None, *OPERATORS.attention(*arguments), *arguments)
    return max(row_error(a, b) for a, b in zip(got[3:], want[3:]))


def test_gradients_of_maps_are_exact(emulator: Emulator) -> None:
    assert error_of_maps(emulator) <= 2.5e-4


# -------------------- what is no number


def reached_by_no_number(emulator: Emulator, at: int) -> str:
    """Whether query ``at`` that is none reaches dk or dv of keys that it does not see, though its tile does, or leaves
    those that it sees a number; then the same of its gradient."""
    more = dict(is_causal=True, statistics=statistics_of(QUADRATIC, given_of(torch.bfloat16, n=N)))

    def of(given: list[Tensor]) -> tuple[Tensor, ...]:
        with on_tensor_cores(emulator):
            return gradients(given, sb.Window(20), QUADRATIC, **more)

    base = of(given_of(torch.bfloat16, n=N))
    for which in (0, 3):
        given = given_of(torch.bfloat16, n=N)
        given[which][:, 0, at, 3] = torch.nan
        for name, got, want in list(zip(NAMES, of(given), base))[1:]:
            if not torch.equal(got[:, :, at + 1 :], want[:, :, at + 1 :]):
                return f"{name}: keys that are not seen"
            if not got[:, :, : at + 1].isnan().any(-1).all():
                return f"{name}: numbers"
    return ""


@pytest.mark.parametrize("at", [70, 140], ids=["a tile without a state", "a tile with one"])
def test_queries_that_are_no_numbers_reach_the_keys_that_they_see_alone(emulator: Emulator, at: int) -> None:
    assert reached_by_no_number(emulator, at) == ""


def changed_by_the_future(emulator: Emulator, block_q: int) -> str:
    """Which gradients of the past change with later queries that have no gradients: in float16, whose weights have a
    power of two for every key. Those that count are near to zero, and gradients large, so that no bit of them is lost
    in results."""
    edge, given = 57, given_of(torch.float16, n=96)
    given[0], given[3] = 8 * given[0], 1000 * given[3]
    for t in given[3:]:
        t[:, :, edge:] = 0
    later = [t.clone() for t in given]
    later[0][:, :, edge:] = 0
    with on_tensor_cores(emulator):
        results = [gradients(g, sb.Window(40, block_q), None, is_causal=True) for g in (given, later)]
    changed = [name for name, a, b in zip(NAMES, *results) if not torch.equal(a[:, :, :edge], b[:, :, :edge])]
    return f"{', '.join(changed)} of the past" if changed else ""


@pytest.mark.parametrize("block_q", [1, 16])
def test_no_bit_of_the_past_depends_on_queries_that_nothing_is_asked_of(emulator: Emulator, block_q: int) -> None:
    assert changed_by_the_future(emulator, block_q) == ""


# -------------------- conflicts


def conflicts_of(emulator: Emulator, window: int, block_q: int, widths: tuple[int, int], low_rank: object) -> int:
    counts = []

    def observe(launch: object, is_after: bool) -> None:
        if launch.kernel == b"attention_backward_tile_keys":
            counts.append(emulator.statistics()["bank_conflicts"])

    given = given_of(torch.bfloat16, *widths, n=N)
    more = dict(is_causal=low_rank is QUADRATIC, statistics=statistics_of(low_rank, given))
    with emulator.installed(), emulator.observed(observe):
        gradients(given, sb.Window(window, block_q), low_rank, **more)
    return counts[1] - counts[0]


@pytest.mark.parametrize("low_rank", [QUADRATIC, CENTROID], ids=str)
@pytest.mark.parametrize("widths", [(24, 40), (128, 128)], ids=str)
def test_the_loop_over_query_slots_has_no_bank_conflicts(
    emulator: Emulator, widths: tuple[int, int], low_rank: object
) -> None:
    """So that further ones have none."""
    assert conflicts_of(emulator, 9, 8, widths, low_rank) == conflicts_of(emulator, 64, 8, widths, low_rank)


# -------------------- planted faults

KEYS, SLOTS = "attention_backward_tile_keys.cuh", "attention_backward_tile_slots.cuh"
FAULTS = {
    "wrong chunk edge": (
        SLOTS,
        "if (edges.state_end > first) break;",
        "if (edges.state_end >= first) break;",
        "maps|d[kv]",
    ),
    "share of the wrong state": (
        KEYS,
        "set_share(of_lane.state_log);",
        "set_share(log_of_state<float>(p, head, 0));",
        "maps|d[kv]",
    ),
    "lost low part of the keys' coordinates": (KEYS, "multiply_add(root[n], low, x[0], x[1], Bfloat16{});", "", "maps"),
    "listed keys that count twice": (SLOTS, "~(seen ? bits_of_list(own) : 0)", "~0u", "d[kv]"),
    "windows of blocks that were not named": (
        SLOTS,
        "(named >> (own_block - first_block) & 1)",
        "true",
        "maps|d[kv]",
    ),
    "zeros that meet a root that is no number": (
        KEYS,
        "weight += has_low_rank ? low_rank * root[n][at] : 0.0f;",
        "weight += low_rank * root[n][at];",
        "dv: keys",
    ),
    "the first half twice": (KEYS, "first_chunk + c + lane / 16), rows);", "c + lane / 16), rows);", "d[kv]"),
    "clusters of other keys": (KEYS, "from + cluster[r], query", "from + cluster[0], query", "clusters"),
    "clusters of another head": (
        KEYS,
        "p.cluster_scores + ((b * p.q_heads + h) * p.q_tokens",
        "p.cluster_scores + ((b * p.q_heads + kv) * p.q_tokens",
        "clusters",
    ),
    "log masses without what lists take back": (
        KEYS,
        "d_log_mass[i / 2] += root[n][i];",
        "d_log_mass[i / 2] += 0.0f;",
        "clusters: dk",
    ),
    "log masses without what their clusters give": (
        KEYS,
        "d_log_mass[r] = share[r] * product;",
        "",
        "clusters: dk",
    ),
    "zeros that meet what is no number": (KEYS, "if (kIsCareful && is_careful)", "if (false)", "d[kv]: keys"),
}


def first_complaint(emulator: Emulator) -> str:
    calls = (
        (sb.Window(64), QUADRATIC, given_of(torch.bfloat16, n=LONG)),
        (sb.Routed(32, 16, window=16), QUADRATIC, given_of(torch.bfloat16, n=LONG)),
        (sb.Window(70, 3), None, given_of(torch.bfloat16, n=N)),
        (sb.Window(24, 8), QUADRATIC, given_of(torch.bfloat16, 96, 96, n=N)),
    )
    of_clusters = (sb.Window(24, 16), sb.Window(9, 8, sinks=3))
    try:
        if (error := error_of_maps(emulator)) > 2.5e-4:
            return f"maps: {error:.1e}"
        for support, low_rank, given in calls:
            wrong = excess(emulator, given, support, low_rank, is_causal=True)
            if wrong:
                return wrong
        for support in of_clusters:
            wrong = excess(emulator, batch_of(torch.bfloat16), support, sb.Centroid(12))
            if wrong:
                return f"clusters: {wrong}"
        return reached_by_no_number(emulator, 140) or reached_by_no_number(emulator, 70)
    except RuntimeError as error:
        return str(error)


def test_the_kernel_without_a_fault_raises_no_complaint(emulator: Emulator) -> None:
    assert first_complaint(emulator) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_name(kernels: Kernels, fault: str) -> None:
    file, old, new, name = FAULTS[fault]
    kernels.assert_caught(file, old, new, name, first_complaint, BFLOAT16)
