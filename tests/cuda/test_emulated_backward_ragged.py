"""Ragged tiles of the backward pass on tensor cores, with lists of other than 16 queries or causal, in the emulator: as
near to float64 as the CPU's kernel, causal and free of padding by bits, without bank conflicts; and planted faults."""

from __future__ import annotations

import pytest
import torch
from emulated import Emulator
from planted import BFLOAT16, Kernels
from testkit import assert_same_bits, rand
from tile_gradients import HALF, LOW_RANKS, NAMES, excess, given_of, gradients, on_tensor_cores
from tiles import lists, rms, statistics_of
from torch import Tensor
from torch.nn.functional import pad

import scatterbrain as sb

OPERATORS = torch.ops.scatterbrain
N = 150
LONG = 230  # of which a tile reads a state while some of its queries see a whole chunk behind it
WINDOWS = {
    "window": sb.Window(40),
    "window of 8": sb.Window(40, 8, sinks=3),
    "window of 24": sb.Window(48, 24, sinks=19),
    "window of each": sb.Window(9, 1),
}
# block_q, block_k and the most entries: lists one after the other, and merged.
FORMS = {"8 queries": (8, 1, 60), "4 queries": (4, 1, 21), "single queries": (1, 8, 6), "blocks of keys": (2, 16, 5)}
FORMS |= {"24 queries": (24, 1, 30), "16 queries": (16, 1, 90)}


# -------------------- errors


@pytest.mark.parametrize(
    ("support", "kind", "offset", "dtype"),
    [
        ("window", "none", 23, torch.bfloat16),
        ("window", "quadratic", -37, torch.bfloat16),
        ("window", "quadratic", 23, torch.float16),
        ("window of 8", "none", -37, torch.float16),
        ("window of 8", "quadratic", 23, torch.bfloat16),
        ("window of 24", "quadratic", 0, torch.bfloat16),
        ("window of each", "none", 0, torch.bfloat16),
        ("window of each", "quadratic", 23, torch.bfloat16),
    ],
)
def test_errors_of_causal_windows_are_those_of_the_cpu_kernel(
    emulator: Emulator, support: str, kind: str, offset: int, dtype: torch.dtype
) -> None:
    given = given_of(dtype, n=LONG if offset == 23 else N)
    assert not excess(emulator, given, WINDOWS[support], LOW_RANKS[kind], is_causal=True, query_offset=offset)


@pytest.mark.parametrize(
    ("form", "is_causal", "kind"),
    [
        ("8 queries", False, "none"),
        ("8 queries", True, "quadratic"),
        ("4 queries", False, "centroid"),
        ("4 queries", True, "none"),
        ("single queries", False, "quadratic"),
        ("single queries", True, "none"),
        ("blocks of keys", False, "centroid"),
        ("blocks of keys", True, "quadratic"),
        ("24 queries", True, "quadratic"),
        ("16 queries", True, "none"),
    ],
)
def test_errors_of_ragged_lists_are_those_of_the_cpu_kernel(
    emulator: Emulator, form: str, is_causal: bool, kind: str
) -> None:
    given = given_of(HALF[list(FORMS).index(form) % 2], n=N)
    support = lists(N, *FORMS[form], is_causal, is_ordered=not is_causal and form == "8 queries", batch=1)
    holes = torch.zeros(1, N, dtype=torch.bool)
    holes[:, 3::7] = True
    assert not excess(emulator, given, support, LOW_RANKS[kind], is_causal=is_causal, key_padding_mask=holes)


@pytest.mark.parametrize(
    ("widths", "low_rank", "is_causal"),
    [
        ((64, 64), sb.Quadratic(9), True),
        ((128, 56), sb.Quadratic(9), True),
        ((72, 128), sb.Centroid(20), False),
    ],
    ids=str,
)
def test_every_width_of_ragged_tiles_fits(
    emulator: Emulator, widths: tuple[int, int], low_rank: object, is_causal: bool
) -> None:
    given = given_of(torch.bfloat16, *widths, heads=2, n=100)
    assert not excess(emulator, given, sb.Window(24, 8), low_rank, is_causal=is_causal, query_offset=60 * is_causal)


# -------------------- bits


def bits(emulator: Emulator, given: list[Tensor], support: object, kind: str, **more: object) -> list[Tensor]:
    if kind == "quadratic":
        more["statistics"] = sb.fit_statistics(rand(1, 2, 99, 24, seed=4), rand(1, 1, 99, 24, seed=5), 4)
    with on_tensor_cores(emulator):
        return list(gradients(given, support, LOW_RANKS[kind], **more))


def changed_by_the_future(emulator: Emulator, support: object, kind: str) -> str:
    """What of the past changes with later tokens: dq, be they no numbers; and where later queries have no gradients, dk
    and dv."""
    given = given_of(torch.bfloat16, n=N)
    base = bits(emulator, given, support, kind, is_causal=True)[0]
    for edge, content in ((137, torch.inf), (70, torch.nan)):
        later = [t.clone() for t in given]
        for t in later:
            t[:, :, edge:] = content * torch.sign(t[:, :, edge:])
        now = bits(emulator, later, support, kind, is_causal=True)[0]
        if not torch.equal(base[:, :, :edge], now[:, :, :edge]):
            return "dq of the past"
    later = [t.clone() for t in given]
    for t in given[3:]:
        t[:, :, 101:] = 0
    for t in later[:3]:
        t[:, :, 101:] = -2
    results = [bits(emulator, [*g[:3], *given[3:]], support, kind, is_causal=True) for g in (given, later)]
    same = [torch.equal(a[:, :, :101], b[:, :, :101]) for a, b in zip(*results)]
    return "" if all(same) else f"gradients of the past: {same}"


@pytest.mark.parametrize("kind", ["none", "quadratic"])
@pytest.mark.parametrize("support", ["window", "window of 8"])
def test_no_bit_of_the_past_depends_on_the_future(emulator: Emulator, support: str, kind: str) -> None:
    assert changed_by_the_future(emulator, WINDOWS[support], kind) == ""


@pytest.mark.parametrize(
    ("support", "is_causal"),
    [
        (WINDOWS["window of 24"], True),
        (sb.Routed(32, block_q=1, block_k=8, window=16), True),
        (sb.Routed(24, 8), False),
    ],
    ids=["window of 24", "per query", "pooled"],
)
def test_no_bit_of_ragged_tiles_depends_on_padding(emulator: Emulator, support: object, is_causal: bool) -> None:
    given = given_of(torch.bfloat16, n=N)
    holes = torch.zeros(1, N, dtype=torch.bool)
    holes[:, 3::4] = True
    more = dict(is_causal=is_causal)
    base = bits(emulator, given, support, "quadratic", key_padding_mask=holes, **more)
    assert_same_bits(bits(emulator, given, support, "quadratic", key_padding_mask=holes, **more), base, NAMES)
    mask = pad(holes, (5, 40), value=True)
    padded = [pad(t, (0, 0, 5, 40)).masked_fill(mask[:, None, :, None], torch.nan) for t in given[:4]]
    moved = bits(emulator, [*padded, pad(given[4], (5, 40))], support, "quadratic", key_padding_mask=mask, **more)
    assert_same_bits([t[:, :, 5 : 5 + N] for t in moved], base, NAMES)


@pytest.mark.parametrize("form", ["8 queries", "single queries"])
def test_keys_that_are_no_numbers_reach_those_who_list_them_alone(emulator: Emulator, form: str) -> None:
    given, support = given_of(torch.bfloat16, n=N), lists(N, *FORMS[form], batch=1)
    base = bits(emulator, given, support, "none")[0]
    one_hot = torch.zeros(1, 1, N, 8)
    one_hot[:, :, 40, 0] = 1
    lists_it = sb.reference.attention(*given[:2], one_hot, support, low_rank=None)[..., 0] > 0
    assert lists_it.any() and not lists_it.all()
    for content in (torch.nan, torch.inf):
        given[1][:, :, 40, 3] = content
        dq = bits(emulator, given, support, "none")[0]
        assert content == torch.inf or dq[lists_it].isnan().all()  # an infinite score of no weight gives nothing
        assert_same_bits([dq[~lists_it]], [base[~lists_it]], ("dq",))


@pytest.mark.parametrize("kind", LOW_RANKS)
def test_a_gradient_that_is_no_number_leaves_those_of_other_queries_alone(emulator: Emulator, kind: str) -> None:
    given, support = given_of(torch.bfloat16, n=N), lists(N, *FORMS["4 queries"], batch=1)
    more = {"statistics": statistics_of(LOW_RANKS[kind], given)} if kind == "centroid" else {}
    base = bits(emulator, given, support, kind, **more)[0]
    given[3][0, 0, 17, 2] = torch.nan
    got = bits(emulator, given, support, kind, **more)[0]
    others = torch.ones(1, 2, N, dtype=torch.bool)
    others[0, 0, 17] = False
    assert got[0, 0, 17].isnan().all() and torch.equal(got[others], base[others])


def reached_by_no_number(emulator: Emulator) -> str:
    """Whether dk or dv has one beyond the keys that a query lists which has, or whose gradient has."""
    base = bits(emulator, given_of(torch.bfloat16, n=N), sb.Window(20), "none", is_causal=True)
    one_hot = torch.eye(N)[None, None]
    probability = sb.reference.attention(
        *given_of(torch.bfloat16, n=N)[:2], one_hot, sb.Window(20), low_rank=None, is_causal=True
    )
    listed = probability[0, 0, 70] > 0
    assert 0 < listed.sum() < 71
    for which in (0, 3):
        given = given_of(torch.bfloat16, n=N)
        given[which][:, 0, 70, 3] = torch.nan
        got = bits(emulator, given, sb.Window(20), "none", is_causal=True)
        for name, a, b in list(zip(NAMES, got, base))[1:]:
            if not a[0, 0, listed].isnan().any(-1).all():
                return f"{name}: numbers"
            if not torch.equal(a[:, :, ~listed], b[:, :, ~listed]):
                return f"{name}: keys that are not listed"
    return ""


def test_queries_that_are_no_numbers_reach_the_keys_that_they_list_alone(emulator: Emulator) -> None:
    assert reached_by_no_number(emulator) == ""


# -------------------- flags and conflicts


def test_causal_queries_where_subtraction_would_cancel_are_computed_again(emulator: Emulator) -> None:
    n = 200
    query, key, value, grad = (rand(1, 2, n, 16, seed=seed).bfloat16() for seed in range(4))
    query_map, key_map = 30 * torch.ones(1, 2, n, 3), 30 * torch.ones(1, 2, n, 3)
    query_map[..., -1] = key_map[..., -1] = 0
    query_map[:, :, ::2], key_map[:, :, 20:] = 0, 0  # every other query cancels
    index = torch.arange(20, dtype=torch.int32).expand(1, 2, 1, 20).contiguous()
    rest = [*[None] * 4, index, torch.full((1, 2, 1), 20, dtype=torch.int32), *[None] * 7, 1, 208, 1, 0, 0, True, 0.2]
    given = [query, key, value, query_map, key_map]
    wide = [t.double() for t in given]
    want = OPERATORS.attention_backward(grad.double(), None, *OPERATORS.attention(*wide, *rest), *wide, *rest)
    cpu = OPERATORS.attention_backward(grad, None, *OPERATORS.attention(*given, *rest), *given, *rest)
    with on_tensor_cores(emulator):
        ours = OPERATORS.attention_backward(grad, None, *OPERATORS.attention(*given, *rest), *given, *rest)
    for name, got, other, exact in zip(NAMES, ours, cpu, want):
        assert rms(got, exact) <= 1.1 * rms(other, exact), name


def test_loops_of_ragged_tiles_have_no_bank_conflicts(emulator: Emulator) -> None:
    """Without a kernel nothing but the loops and the queries is in shared memory."""
    counts = []

    def observe(launch: object, is_after: bool) -> None:
        if launch.kernel == b"attention_backward_tile":
            counts.append(emulator.statistics()["bank_conflicts"])

    given = given_of(torch.bfloat16, n=100)
    with emulator.installed(), emulator.observed(observe):
        gradients(given, sb.Window(64), None, is_causal=True)
        gradients(given, sb.Window(40, 8), None)
        gradients(given, lists(100, 8, 1, 40, batch=1), None)
    assert len(counts) == 6 and counts[::2] == counts[1::2]


# -------------------- planted faults

TILE, KEYS = "attention_backward_tile.cuh", "attention_backward_tile_keys.cuh"
FAULTS = {
    "stale mask per query": (TILE, "valid & shuffle_from(of_lane.pattern, row_of(r))", "valid", "dq|d[qkv] (rms|row)"),
    "lost low part": (
        TILE,
        "      multiply_add(dq[c], d_rest, keys[0], keys[1], E{});\n",
        "",
        "dq (rms|row)",
    ),
    "a list longer than two stages": (
        "attention_tile_stages.cuh",
        "    has_next = next_stage(next);\n",
        "    has_next = buffer == 0 && next_stage(next);\n",
        "d[qkv] (rms|row)",
    ),
    "wrong chunk edge": (
        TILE,
        "state_slot = kIsRagged ? edges.state_slot :",
        "state_slot = kIsRagged ? int32_t(kv_state_of_edge(p, edge_of_slot(p, range, first_slot + kTile - 1))) :",
        "d[qkv] (rms|row)",
    ),
    "a query before the key": (
        KEYS,
        "valid & bits_between(key - stage.edge, kTile)",
        "valid",
        "gradients of the past|d[kv]",
    ),
    "zeros of keys that meet what is no number": (KEYS, "kIsCareful && is_careful)", "false)", "d[kv]: keys"),
    "zeros that meet what is no number": (TILE, "if (kIsRagged && is_careful)", "if (false)", "dq of the past"),
}


def first_complaint(emulator: Emulator) -> str:
    try:
        changed = changed_by_the_future(emulator, sb.Window(20), "none") or reached_by_no_number(emulator)
        if changed:
            return changed
        quadratic = LOW_RANKS["quadratic"]
        calls = ((sb.Window(9, 1), None, N), (sb.Window(48), None, N), (sb.Window(20), quadratic, LONG))
        for support, low_rank, n in calls:
            given = given_of(torch.bfloat16, n=n)
            wrong = excess(emulator, given, support, low_rank, is_causal=True, query_offset=23)
            if wrong:
                return wrong
        return ""
    except RuntimeError as error:
        return str(error)


def test_the_kernels_without_a_fault_raise_no_complaint(emulator: Emulator) -> None:
    assert first_complaint(emulator) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_name(kernels: Kernels, fault: str) -> None:
    file, old, new, name = FAULTS[fault]
    kernels.assert_caught(file, old, new, name, first_complaint, BFLOAT16)
