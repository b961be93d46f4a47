"""Shares of ragged tiles, of lists of other than 16 queries or with a causal edge, in the emulator: as near to float64
as the CPU's kernel, causal by bits, free of what is no number elsewhere, without bank conflicts; planted faults."""

from __future__ import annotations

import pytest
import torch
from emulated import Emulator
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
from tiles import lists, statistics_of

import scatterbrain as sb
from scatterbrain.operators.arguments import AttentionArguments

OPERATORS = torch.ops.scatterbrain
N = 150
PER_QUERY = sb.Routed(32, block_q=1, block_k=8, window=16)
SUPPORTS = {
    "per query": PER_QUERY,
    "a window and lists": sb.Routed(32, 16, window=16),
    "8 queries": lists(N, 8, 1, 40, True, batch=1),
    "24 queries": lists(N, 24, 8, 6, True, batch=1),
    "3 queries": lists(N, 3, 8, 4, True, batch=1),
    "16 queries": lists(200, 16, 1, 20, True, batch=1),
}


# -------------------- errors


@pytest.mark.parametrize(
    ("support", "is_causal", "kind", "offset", "dtype"),
    [
        ("per query", True, "quadratic", 0, torch.bfloat16),
        ("per query", True, "none", 23, torch.float16),
        ("per query", False, "quadratic", 0, torch.float16),
        ("per query", False, "centroid", 0, torch.bfloat16),
        ("a window and lists", True, "quadratic", 0, torch.bfloat16),
        ("24 queries", True, "none", 0, torch.bfloat16),
        ("3 queries", True, "quadratic", 9, torch.float16),
        ("16 queries", True, "quadratic", 0, torch.float16),
    ],
)
def test_errors_are_those_of_the_cpu_kernel(
    emulator: Emulator, support: str, is_causal: bool, kind: str, offset: int, dtype: torch.dtype
) -> None:
    """Of one head of keys for two of queries, and tiles that read a state while keys behind it are listed."""
    given = given_of(dtype, n=200 if support == "16 queries" else N)
    assert not excess(emulator, given, SUPPORTS[support], LOW_RANKS[kind], is_causal=is_causal, query_offset=offset)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_queries_have_their_second_part_with_shared_lists(emulator: Emulator, dtype: torch.dtype) -> None:
    """Lists of 16 queries without a causal edge, where one part had 1.14 times the CPU's error."""
    assert not excess(emulator, given_of(dtype, n=64), sb.Routed(24, 16, window=16), None)


@pytest.mark.parametrize("widths", [(128, 104), (16, 72)], ids=str)
def test_every_width_fits(emulator: Emulator, widths: tuple[int, int]) -> None:
    given = given_of(torch.bfloat16, *widths, heads=2, n=100)
    assert not excess(emulator, given, PER_QUERY, sb.Quadratic(9), is_causal=True)


def complaint_of_windows(emulator: Emulator, dtype: torch.dtype = torch.bfloat16) -> str:
    """Empty where keys that a query's list has beside its window or its sinks count once."""
    n, support = 96, lists(96, 1, 8, 4, True, batch=1)
    given = [t.to(dtype) for t in (rand(1, 2, n, 16), rand(1, 2, n, 16, seed=1), rand(1, 2, n, 16, seed=2))]
    edge = torch.arange(n, dtype=torch.int32)
    fields = dict(zip(("query", "key", "value"), given), index=support.index, count=support.count)
    fields |= dict(span=torch.stack([edge - 15, edge + 1], -1)[None], span_keys=16, span_sinks=5)
    arguments = operator_arguments(AttentionArguments, **fields, block_q=1, block_k=8, is_causal=True)
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    grad = rand(1, 2, n, 16, seed=3).to(dtype)
    want = OPERATORS.attention_backward(grad.double(), None, *OPERATORS.attention(*wide), *wide)
    with by_shares(emulator):
        got = OPERATORS.attention_backward(grad, None, *OPERATORS.attention(*arguments), *arguments)
    wrong = [name for name, a, b in list(zip(NAMES, got, want))[1:] if not row_error(a, b) <= 0.02]
    return " ".join(["windows:", *wrong]) if wrong else ""


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_listed_keys_of_windows_and_sinks_count_once(emulator: Emulator, dtype: torch.dtype) -> None:
    assert complaint_of_windows(emulator, dtype) == ""


def test_ragged_lists_go_by_shares(emulator: Emulator) -> None:
    given = given_of(torch.bfloat16, n=40)
    for support in (PER_QUERY, lists(40, 5, 2, 6, True, batch=1), lists(40, 32, 1, 9, True, batch=1)):
        gradients_of_keys(emulator, given, support, None, is_causal=True)
    with by_shares(emulator, expected=False):  # no tile of the forward pass takes single keys of so few queries
        gradients(given, lists(40, 3, 1, 9, True, batch=1), None, is_causal=True)


# -------------------- bits


def changed_by_the_future(emulator: Emulator, support: object, dtype: torch.dtype) -> str:
    """Whether gradients of the past change with later tokens, where later queries have no gradients: of weights near to
    zero and to one, since in float16 they have a power of two. A tile begins before these and ends behind."""
    edge, given = 101, given_of(dtype, n=N)
    given[0] = 6 * given[0]
    for t in given[3:]:
        t[:, :, edge:] = 0
    results = []
    for content in (None, 0.0, 3.0):
        now = [t.clone() for t in given]
        for t in now[:3] if content is not None else ():
            t[:, :, edge:] = content
        results.append(gradients_of_keys(emulator, now, support, None, is_causal=True))
    for other in results[1:]:
        for name, a, b in zip(NAMES[1:], results[0], other):
            if not torch.equal(a[:, :, :edge], b[:, :, :edge]):
                return f"{name} of the past"
    return ""


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("support", ["per query", "a window and lists"])
def test_no_bit_of_the_past_depends_on_the_future(emulator: Emulator, support: str, dtype: torch.dtype) -> None:
    assert changed_by_the_future(emulator, SUPPORTS[support], dtype) == ""


def reached_by_no_number(emulator: Emulator, form: str, which: int) -> str:
    """Whether dk or dv has one beyond the keys that its query, or that of its gradient, lists; or has none there."""
    given, slot, support = given_of(torch.bfloat16, n=N), 75, SUPPORTS[form]
    one_hot = torch.eye(N)[None, None]
    probability = sb.reference.attention(*given[:2], one_hot, support, low_rank=None, is_causal=True)
    base = gradients_of_keys(emulator, given, support, None, is_causal=True)
    given[which][:, 0, slot, 3] = torch.nan if which == 0 else torch.inf
    got, listed = gradients_of_keys(emulator, given, support, None, is_causal=True), probability[0, 0, slot] > 0
    assert 0 < listed.sum() < slot
    for name, a, b in zip(NAMES[1:], got, base):
        if a[0, 0, listed].isfinite().all(-1).any():
            return f"{name}: numbers"
        if not torch.equal(a[:, :, ~listed], b[:, :, ~listed]):
            return f"{name}: keys that are not listed"
    return ""


@pytest.mark.parametrize("which", [0, 3], ids=["query", "gradient"])
@pytest.mark.parametrize("form", ["8 queries", "3 queries"])
def test_what_is_no_number_reaches_the_keys_that_its_query_lists_alone(
    emulator: Emulator, form: str, which: int
) -> None:
    assert reached_by_no_number(emulator, form, which) == ""


def test_no_bit_depends_on_the_run(emulator: Emulator) -> None:
    given, support = given_of(torch.bfloat16, n=N), SUPPORTS["3 queries"]
    first, second = (gradients_of_keys(emulator, given, support, None, is_causal=True) for _ in range(2))
    assert_same_bits(first, second, NAMES[1:])


# -------------------- conflicts


def conflicts_of(emulator: Emulator, support: sb.Blocks) -> int:
    counts: list[int] = []

    def observe(launch: object, is_after: bool) -> None:
        if launch.kernel == SHARES:
            counts.append(emulator.statistics()["bank_conflicts"])

    given = given_of(torch.bfloat16, 64, 64, n=64)
    statistics = statistics_of(LOW_RANKS["quadratic"], given)
    with emulator.installed(), emulator.observed(observe):
        gradients(given, support, LOW_RANKS["quadratic"], statistics=statistics)
    before, after = counts
    return after - before


def test_the_loop_over_ragged_lists_has_no_bank_conflicts(emulator: Emulator) -> None:
    def of_blocks(entries: int) -> sb.Blocks:
        index = torch.arange(entries, dtype=torch.int32).expand(1, 1, 64, entries).contiguous()
        return sb.Blocks(index, torch.full((1, 1, 64), entries, dtype=torch.int32), 1, 8)

    assert conflicts_of(emulator, of_blocks(2)) == conflicts_of(emulator, of_blocks(8))


# -------------------- planted faults

FILE, UNIONS = "attention_backward_shares.cuh", "union_lists.cuh"
FAULTS = {
    "a ragged list longer than two stages": (
        FILE,
        "has_next = ballot(entry < count) != 0;",
        "has_next = buffer == 0 && ballot(entry < count) != 0;",
        "uninitialised global memory",
    ),
    "keys of the window count twice": (
        FILE,
        "to.slots &= ~(in_span | shuffle_xor(in_span, kTile));",
        "to.slots &= ~(in_span & shuffle_xor(in_span, kTile));",
        "windows",
    ),
    "stale mask per query": (
        FILE,
        "slots = shuffle_from(of_lane.slots, key) >> 2 * t;",
        "slots = shuffle_from(of_lane.slots, key ^ 8) >> 2 * t;",
        "d[kv] (rms|row)",
    ),
    "an entry of two lists for the first alone": (
        UNIONS,
        "warp_total(named == last ? slots : 0)",
        "named == last ? slots : 0",
        "d[kv] (rms|row)",
    ),
    "a query before the key": (
        FILE,
        "to.slots &= bits_between(to.key - edges.first, kTile) & computed;",
        "to.slots &= computed;",
        "d[kv] of the past|d[kv] (rms|row)",
    ),
    "zeros that meet what is no number": (
        FILE,
        "has_no_number = of_slots(!are_numbers)",
        "has_no_number = of_slots(false)",
        "d[kv]: keys",
    ),
}


def first_complaint(emulator: Emulator) -> str:
    def complaints() -> object:
        yield excess(emulator, given_of(torch.bfloat16, n=N), PER_QUERY, None, is_causal=True)
        yield excess(emulator, given_of(torch.bfloat16, n=N), SUPPORTS["3 queries"], None, is_causal=True)
        yield complaint_of_windows(emulator)
        yield reached_by_no_number(emulator, "3 queries", 0)

    try:
        return next(filter(None, complaints()), "")
    except RuntimeError as error:
        return str(error)


def test_the_kernels_without_a_fault_raise_no_complaint(emulator: Emulator) -> None:
    assert first_complaint(emulator) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_name(kernels: Kernels, fault: str) -> None:
    file, old, new, name = FAULTS[fault]
    kernels.assert_caught(file, old, new, name, first_complaint, BFLOAT16)
