"""The forward pass on tensor cores, in the emulator: as near to float64 as the CPU's kernel, by bits under padding,
layouts and repetition, without bank conflicts in its loop; and faults that are planted into it. Its tiles of 16 queries
share a list, or are ragged: with lists of fewer queries, or causal."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from emulated import Emulator, Observed
from oracle import row_error
from planted import BFLOAT16, Kernels
from testkit import assert_same_bits, rand
from tiles import excess as excess_of_kernel
from tiles import kernel_starts, lists, ragged, rms, statistics_of
from torch import Tensor
from torch.nn.functional import pad

import scatterbrain as sb

OPERATORS = torch.ops.scatterbrain
HALF = [torch.bfloat16, torch.float16]
SUPPORTS = {
    "window": sb.Window(64),
    "window with sinks": sb.Window(43, 32, sinks=5),
    "routed": sb.Routed(48, 16),
    "empty": sb.Empty(),
}
LOW_RANKS = {"none": None, "quadratic": sb.Quadratic(4), "centroid": sb.Centroid(20)}
PAIRS = [(s, k) for s in SUPPORTS for k in LOW_RANKS if (s, k) != ("empty", "none")]
N = 200


on_tensor_cores = partial(kernel_starts, kernel="attention_tile")


def tokens_of(dtype: torch.dtype, head_dim: int = 24, value_dim: int = 40, n: int = N, heads: int = 1) -> list[Tensor]:
    query, key = rand(2, 2, n, head_dim, seed=1), rand(2, heads, n, head_dim, seed=2)
    return [query.to(dtype), key.to(dtype), rand(2, heads, n, value_dim, seed=3).to(dtype)]


def excess(emulator: Emulator, tokens: list[Tensor], support: object, low_rank: object, **more: object) -> str:
    return excess_of_kernel(emulator, "attention_tile", tokens, support, low_rank, **more)


# Lists that two routings choose may differ where scores are near; other tests have lists of given keys.
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("support", "kind"), [pair for pair in PAIRS if pair[0] != "routed"])
def test_errors_are_those_of_the_cpu_kernel(emulator: Emulator, support: str, kind: str, dtype: torch.dtype) -> None:
    assert not excess(emulator, tokens_of(dtype), SUPPORTS[support], LOW_RANKS[kind])


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 8), (64, 64), (72, 128), (128, 56)])
@pytest.mark.parametrize("low_rank", [None, sb.Quadratic(9), sb.Centroid(70)], ids=["none", "quadratic", "centroid"])
def test_every_width_fits(emulator: Emulator, head_dim: int, value_dim: int, low_rank: object) -> None:
    tokens = tokens_of(torch.bfloat16, head_dim, value_dim, heads=2)
    assert not excess(emulator, tokens, sb.Window(48, 16), low_rank)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("kind", LOW_RANKS)
def test_long_ragged_lists_and_orders(emulator: Emulator, kind: str, ordered: bool, dtype: torch.dtype) -> None:
    assert not excess(emulator, tokens_of(dtype), ragged(N, 2, 100, ordered), LOW_RANKS[kind])


@pytest.mark.parametrize("form", [(16, 3, 40), (16, 24, 5), (32, 40, 3)], ids=str)
def test_entries_of_any_number_of_keys_are_listed(emulator: Emulator, form: tuple[int, int, int]) -> None:
    holes = torch.zeros(2, N, dtype=torch.bool)
    holes[1, 5::7] = True
    assert not excess(emulator, tokens_of(torch.bfloat16), lists(N, *form), None, key_padding_mask=holes)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_scores_may_rise_from_stage_to_stage(emulator: Emulator, dtype: torch.dtype, is_causal: bool) -> None:
    for bits in (3, 12):
        query, key, value = tokens_of(dtype, 16, 16)
        key = (key.float() / 64 + ((torch.arange(N) // 16 - 6) * bits * 0.6931 / 16)[:, None]).to(dtype)
        tokens = [torch.ones_like(query), key, value]
        given = {"support": sb.Window(64), "low_rank": None, "scale": 1.0, "is_causal": is_causal, "return_lse": True}
        with on_tensor_cores(emulator):
            out, lse = sb.attention(*tokens, **given)
        exact, exact_lse = sb.reference.attention(*tokens, **given, dtype=torch.float64)
        assert rms(out, exact) <= torch.finfo(dtype).eps / 2 and float((lse - exact_lse).abs().max()) <= 1e-5


@pytest.mark.parametrize(("scale", "kind"), [(-0.3, "none"), (-0.3, "centroid"), (0.0, "none")])
def test_a_scale_may_be_negative_or_zero(emulator: Emulator, scale: float, kind: str) -> None:
    tokens, more = tokens_of(torch.bfloat16), {}
    if kind == "centroid":
        more["statistics"] = sb.reference.cluster(*(t.float() for t in tokens[:2]), 20, scale=scale)
    assert not excess(emulator, tokens, SUPPORTS["window"], LOW_RANKS[kind], scale=scale, **more)


@pytest.mark.parametrize("kind", LOW_RANKS)
def test_what_does_not_fit_runs_without_tensor_cores(emulator: Emulator, kind: str) -> None:
    for change in ({"head_dim": 20}, {"value_dim": 20}, {"head_dim": 136}):
        tokens = tokens_of(torch.bfloat16, **change)
        statistics = statistics_of(LOW_RANKS[kind], tokens)
        with on_tensor_cores(emulator, expected=False):
            sb.attention(*tokens, sb.Window(16), LOW_RANKS[kind], statistics=statistics)
    tokens = tokens_of(torch.bfloat16)
    statistics = statistics_of(LOW_RANKS[kind], tokens)
    with on_tensor_cores(emulator, expected=False):
        sb.attention(*tokens, lists(N, 1, 1, 9), LOW_RANKS[kind], statistics=statistics)


# -------------------- ragged tiles


# Lists one after the other, merged, and more of a tile than one block of queries; long ones.
FORMS = {"8 queries": (8, 1, 60), "24 queries": (24, 1, 30), "4 queries": (4, 1, 21), "single queries": (1, 8, 6)}
FORMS |= {"blocks of keys": (2, 16, 5), "16 queries": (16, 1, 90)}
KINDS = [(False, kind) for kind in LOW_RANKS] + [(True, "none"), (True, "quadratic")]


@pytest.mark.parametrize(("is_causal", "kind"), KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_errors_of_ragged_lists_are_those_of_the_cpu_kernel(
    emulator: Emulator, form: str, is_causal: bool, kind: str
) -> None:
    dtype = HALF[list(FORMS).index(form) % 2]
    support = lists(N, *FORMS[form], is_causal, is_ordered=not is_causal and form == "8 queries")
    assert not excess(emulator, tokens_of(dtype), support, LOW_RANKS[kind], is_causal=is_causal)


RAGGED = {
    "window": sb.Window(64),
    "window of 8": sb.Window(40, 8, sinks=3),
    "window of 24": sb.Window(48, 24, sinks=19),
    "pooled": sb.Routed(48, 16),
    "pooled of 8": sb.Routed(24, 8),
    "per query": sb.Routed(32, block_q=1, block_k=8, window=16),
    "empty": sb.Empty(),
}
CAUSAL = [(s, k) for s in RAGGED for k in ("none", "quadratic")]
CAUSAL = [pair for pair in CAUSAL if pair not in (("empty", "none"), ("per query", "none"))]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", ["none", "quadratic"])
@pytest.mark.parametrize("support", ["window", "window of 8", "window of 24"])
def test_errors_of_causal_windows_are_those_of_the_cpu_kernel(
    emulator: Emulator, support: str, kind: str, dtype: torch.dtype
) -> None:
    for offset in (0, -37, 23):
        given = RAGGED[support], LOW_RANKS[kind]
        assert not excess(emulator, tokens_of(dtype), *given, is_causal=True, query_offset=offset)


@pytest.mark.parametrize("kind", ["none", "quadratic"])
@pytest.mark.parametrize("form", ["single queries", "blocks of keys"])
def test_edges_of_causal_tiles_may_lie_within_a_group_of_listed_keys(emulator: Emulator, form: str, kind: str) -> None:
    """What such a group holds from the edge on is weighed after all groups."""
    tokens = [t[:, :, :100] for t in tokens_of(torch.bfloat16)]
    support = lists(100, *FORMS[form], is_causal=True)
    assert not excess(emulator, tokens, support, LOW_RANKS[kind], is_causal=True, query_offset=5)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (128, 56)])
def test_every_width_of_ragged_tiles_fits(emulator: Emulator, head_dim: int, value_dim: int) -> None:
    tokens = tokens_of(torch.bfloat16, head_dim, value_dim, heads=2)
    for low_rank, is_causal in ((None, True), (sb.Quadratic(9), True), (sb.Centroid(70), False)):
        assert not excess(emulator, tokens, lists(N, 8, 1, 40, is_causal), low_rank, is_causal=is_causal)


@pytest.mark.parametrize(("support", "kind"), CAUSAL)
def test_no_bit_of_the_past_depends_on_the_future(emulator: Emulator, support: str, kind: str) -> None:
    """Later tokens choose other lists of later queries, too."""
    tokens = tokens_of(torch.bfloat16)
    base = attend(emulator, tokens, RAGGED[support], LOW_RANKS[kind], is_causal=True)
    for edge, content in ((70, 1e4), (101, torch.inf), (137, torch.nan)):
        changed = [t.clone() for t in tokens]
        for t in changed:
            t[:, :, edge:] = content * torch.sign(t[:, :, edge:])
        got = attend(emulator, changed, RAGGED[support], LOW_RANKS[kind], is_causal=True)
        assert_same_bits([t[:, :, :edge] for t in got], [t[:, :, :edge] for t in base], ("out", "lse"))


@pytest.mark.parametrize(
    ("support", "is_causal"),
    [("window of 24", True), ("pooled of 8", False), ("pooled of 8", True), ("per query", True)],
)
def test_no_bit_of_ragged_tiles_depends_on_padding(emulator: Emulator, support: str, is_causal: bool) -> None:
    tokens, given = tokens_of(torch.bfloat16), (RAGGED[support], LOW_RANKS["quadratic"])
    holes = torch.zeros(2, N, dtype=torch.bool)
    holes[0, 3::4] = True
    base = attend(emulator, tokens, *given, key_padding_mask=holes, is_causal=is_causal)
    for left, right, content in ((0, 77, torch.inf), (5, 3, torch.nan)):
        mask = pad(holes, (left, right), value=True)
        moved = [pad(t, (0, 0, left, right)).masked_fill(mask[:, None, :, None], content) for t in tokens]
        got = attend(emulator, moved, *given, key_padding_mask=mask, is_causal=is_causal)
        assert_same_bits([t[:, :, left : left + N] for t in got], base, ("out", "lse"))


@pytest.mark.parametrize("form", ["8 queries", "single queries"])
def test_values_that_are_no_numbers_reach_those_who_list_them_alone(emulator: Emulator, form: str) -> None:
    tokens, support = tokens_of(torch.bfloat16), lists(N, *FORMS[form])
    base = attend(emulator, tokens, support, None)[0]
    one_hot = torch.eye(N)[40:42].T.expand(2, 1, N, 2)
    lists_it = sb.reference.attention(*tokens[:2], one_hot, support, low_rank=None) > 0
    tokens[2][:, :, 40, 1], tokens[2][:, :, 41, 2] = torch.nan, torch.inf
    out = attend(emulator, tokens, support, None)[0]
    assert torch.equal(out[..., 1].isnan(), lists_it[..., 0]) and torch.equal(
        out[..., 2] == torch.inf, lists_it[..., 1]
    )
    assert lists_it.any() and not lists_it.all() and out.isfinite().sum() == out.numel() - lists_it.sum()
    assert_same_bits([out[~lists_it.any(-1)]], [base[~lists_it.any(-1)]], ("out",))
    assert rms(out[out.isfinite()], base[out.isfinite()].double()) <= 1e-2


# -------------------- bits


def attend(emulator: Emulator, tokens: list[Tensor], support: object, low_rank: object, **more: object) -> list[Tensor]:
    if isinstance(low_rank, sb.Quadratic):
        more["statistics"] = sb.fit_statistics(rand(1, 2, 99, 24, seed=4), rand(1, 1, 99, 24, seed=5), 4)
    with on_tensor_cores(emulator):
        return list(sb.attention(*tokens, support, low_rank, return_lse=True, **more))


@pytest.mark.parametrize(("support", "kind"), PAIRS)
def test_no_bit_depends_on_what_padding_holds(emulator: Emulator, support: str, kind: str) -> None:
    """To the left, to the right and in holes."""
    mask = torch.zeros(2, N, dtype=torch.bool)
    mask[0, :9] = mask[0, N - 31 :] = mask[0, 13::4] = True
    results = []
    for content in (0.0, 1e4, torch.nan, torch.inf):
        given = [t.masked_fill(mask[:, None, :, None], content) for t in tokens_of(torch.bfloat16)]
        results.append(attend(emulator, given, SUPPORTS[support], LOW_RANKS[kind], key_padding_mask=mask))
    for got in results[1:]:
        assert_same_bits(got, results[0], ("out", "lse"))
    assert not results[0][0][0][:, mask[0]].any()


@pytest.mark.parametrize(("support", "kind"), PAIRS)
def test_no_bit_depends_on_how_much_padding_there_is(emulator: Emulator, support: str, kind: str) -> None:
    tokens = tokens_of(torch.float16)
    base = attend(emulator, tokens, SUPPORTS[support], LOW_RANKS[kind])
    for left, right in ((5, 77), (64, 3)):
        mask = pad(torch.zeros(2, N, dtype=torch.bool), (left, right), value=True)
        given = [pad(t, (0, 0, left, right), value=1e4) for t in tokens]
        got = attend(emulator, given, SUPPORTS[support], LOW_RANKS[kind], key_padding_mask=mask)
        assert_same_bits([t[:, :, left : left + N] for t in got], base, ("out", "lse"))


@pytest.mark.parametrize("kind", LOW_RANKS)
def test_two_runs_and_every_layout_give_the_same_bits(emulator: Emulator, kind: str) -> None:
    tokens = tokens_of(torch.bfloat16)
    base = attend(emulator, tokens, sb.Window(48), LOW_RANKS[kind])
    heads_inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tokens]
    width_first = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tokens]
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in tokens]  # not at 16 bytes
    odd_rows = [pad(t, (0, 3))[..., :-3] for t in tokens]
    for given in (tokens, heads_inside, width_first, shifted, odd_rows):
        assert_same_bits(attend(emulator, given, sb.Window(48), LOW_RANKS[kind]), base, ("out", "lse"))


# -------------------- flags, conflicts, empty calls


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_queries_where_subtraction_would_cancel_are_computed_again(emulator: Emulator, dtype: torch.dtype) -> None:
    query, key, value = (rand(1, 2, N, 16, seed=seed).to(dtype) for seed in range(3))
    query_map, key_map = 30 * torch.ones(1, 2, N, 3), 30 * torch.ones(1, 2, N, 3)
    query_map[..., -1] = key_map[..., -1] = 0
    query_map[:, :, ::2], key_map[:, :, 20:] = 0, 0  # every other query cancels
    index = torch.arange(20, dtype=torch.int32).expand(1, 2, 1, 20).contiguous()
    rest = [*[None] * 4, index, torch.full((1, 2, 1), 20, dtype=torch.int32), *[None] * 7, 1, 208, 1, 0, 0, False, 0.2]
    with on_tensor_cores(emulator):
        out, lse = OPERATORS.attention(query, key, value, query_map, key_map, *rest)
    cpu = OPERATORS.attention(query, key, value, query_map, key_map, *rest)[0]
    exact, exact_lse = OPERATORS.attention(*(t.double() for t in (query, key, value, query_map, key_map)), *rest)
    assert float((lse - exact_lse).abs().max()) <= 1e-5 and rms(out, exact) <= 1.1 * rms(cpu, exact)


@pytest.mark.parametrize("block_q", [16, 8])
def test_what_listed_keys_take_back_may_be_beyond_float16(emulator: Emulator, block_q: int) -> None:
    """The state holds a million times what any key weighs, and a tenth of it is listed."""
    tokens = [rand(1, 2, N, 16, seed=seed).half() for seed in range(3)]
    maps = [torch.cat([rand(1, 2, N, 3, seed=seed).sign() * 25, torch.zeros(1, 2, N, 1)], -1) for seed in (4, 5)]
    index = torch.arange(9, 200, 10, dtype=torch.int32).expand(1, 2, -(-N // block_q), 20).contiguous()
    rest = [*[None] * 4, index, torch.full(index.shape[:3], 20, dtype=torch.int32), *[None] * 7, 1, block_q, 1, 0, 0]
    with on_tensor_cores(emulator):
        out, lse = OPERATORS.attention(*tokens, *maps, *rest, False, 0.2)
    cpu = OPERATORS.attention(*tokens, *maps, *rest, False, 0.2)[0]
    exact, exact_lse = OPERATORS.attention(*(t.double() for t in (*tokens, *maps)), *rest, False, 0.2)
    assert float((lse - exact_lse).abs().max()) <= 1e-5
    assert rms(out, exact) <= 1.1 * rms(cpu, exact) and row_error(out, exact) <= 1.5 * row_error(cpu, exact)


def conflicts_of_tiles(emulator: Emulator, tokens: list[Tensor], given: tuple[object, object], **more: object) -> int:
    counts = []

    def observe(launch: Observed, is_after: bool) -> None:
        if launch.kernel == b"attention_tile":
            counts.append(emulator.statistics()["bank_conflicts"])

    with emulator.installed(), emulator.observed(observe):
        sb.attention(*tokens, *given, **more)
    assert counts, "no call of the kernel on tensor cores"
    return sum(counts[1::2]) - sum(counts[::2])


def first_keys(keys: int) -> sb.Blocks:
    """So many keys for every 8 queries, of the same 48; the memory of a list is the same."""
    chosen = torch.randperm(N, generator=torch.Generator().manual_seed(5))[:48].sort().values
    index = chosen.masked_fill(torch.arange(48) >= keys, N).int().expand(1, 2, -(-N // 8), 48).contiguous()
    return sb.Blocks(index, torch.full(index.shape[:3], keys, dtype=torch.int32), 8, 1)


# Calls that differ by keys of every list, or by keys behind the state, of which no tile has one.
LOOPS: dict[str, list[tuple[object, dict[str, object]]]] = {
    "shared": [(sb.Window(keys), {}) for keys in (32, 80)],
    "merged": [(sb.Window(keys, 8), {}) for keys in (32, 96)],
    "in turn": [(first_keys(keys), {}) for keys in (16, 48)],
    "behind": [(sb.Window(64), {"is_causal": True, "query_offset": offset}) for offset in (-100, -60)],
}


def conflicts_of_the_loops(emulator: Emulator) -> list[str]:
    """Kinds and loops where further keys cost bank conflicts. Keys are of one cluster: clusters are looked up wherever
    the keys' are."""
    found = []
    for kind, head_dim in (("none", 24), ("quadratic", 128), ("centroid", 64)):
        tokens = [t[:1] for t in tokens_of(torch.bfloat16, head_dim, head_dim)]
        statistics = statistics_of(LOW_RANKS[kind], tokens)
        if kind == "centroid":
            statistics = replace(statistics, index=torch.zeros_like(statistics.index))
        for loop, calls in LOOPS.items():
            if (kind, loop) == ("centroid", "behind"):
                continue
            counts = [
                conflicts_of_tiles(emulator, tokens, (support, LOW_RANKS[kind]), statistics=statistics, **more)
                for support, more in calls
            ]
            if counts[0] != counts[1]:
                found.append(f"{kind} {loop}")
    return found


def test_loops_over_keys_have_no_bank_conflicts(emulator: Emulator) -> None:
    assert conflicts_of_the_loops(emulator) == []


@pytest.mark.parametrize("queries", [0, 5])
@pytest.mark.parametrize("keys", [0, 7])
def test_empty_and_short_calls_are_fine(emulator: Emulator, queries: int, keys: int) -> None:
    for low_rank in (None, sb.Quadratic(4)):
        tokens = [rand(1, 2, n, width).bfloat16() for n, width in ((queries, 24), (keys, 24), (keys, 16))]
        with emulator.installed():
            statistics = sb.fit_statistics(rand(1, 2, 99, 24), rand(1, 2, 99, 24), 4) if low_rank else None
            out, lse = sb.attention(*tokens, sb.Window(16), low_rank, statistics=statistics, return_lse=True)
        assert out.shape == (1, 2, queries, 16) and (keys or (not out.any() and (lse == -torch.inf).all()))


# -------------------- planted faults

FAULTS = {
    "off-by-one wait": ("wait_copies<1>();", "wait_copies<2>();", "asynchronous copy"),
    "missing wait at the end": (
        "  }\n  wait_copies<0>();\n}",
        "  }\n}",
        "asynchronous copy",
    ),
    "missing barrier at the end of the loop": (
        "    sync_warp();  // before the buffer is filled again\n",
        "",
        "race|asynchronous copy",
    ),
    "missing barrier before a stage": (
        "    wait_copies<1>();\n    sync_warp();",
        "    wait_copies<1>();",
        "race|async",
    ),
    "lost swizzle": (
        "((chunk ^ (row & 7)) << 4)",
        "(chunk << 4)",
        "conflicts: none shared, none merged, none in turn, none behind, quadratic shared.*centroid in turn",
    ),
    "lost swizzle of coordinates": (
        "(chunk ^ (row >> 1 & 3)) << 4",
        "chunk << 4",
        "conflicts: quadratic shared, quadratic merged, quadratic in turn, quadratic behind$",
    ),
    "lost low part": ("multiply_add(sum[n], high, y[2], y[3], Bfloat16{});", "", "lse"),
    "missing rescale": ("    exact[r] *= by;\n", "", "lse"),
    "an exponent that stays behind": ("bool is_high = above[0] > 0 || above[1] > 0;", "bool is_high = false;", "lse"),
    "swapped operand": ("keys[2], keys[3], E{});", "keys[3], keys[2], E{});", "lse"),
    "lost group offset": ("kv(int32_t(p.kv_head(h)))", "kv(int32_t(h % p.kv_heads))", "lse"),
    "holes count": ("ballot(of_lane.key >= 0);", "ballot(true);", "lse|rms|row"),
    "lost rest of a block": ("offset -= steps.at[0], ++entry;", "offset = 0, ++entry;", "lse|rms|row"),
    "lost second row of a copy": ("shuffle_in_eight(key, j)", "shuffle_in_eight(key, j / 2)", "lse|rms|row"),
}


def first_complaint(emulator: Emulator) -> str:
    tokens = tokens_of(torch.bfloat16, 64, 64, heads=2)
    tokens[0] = rand(2, 4, N, 64, seed=1).bfloat16()
    holes = torch.zeros(2, N, dtype=torch.bool)
    holes[:, 5::7] = True
    try:
        for low_rank in LOW_RANKS.values():
            more = {} if low_rank is not None else {"key_padding_mask": holes}
            wrong = excess(emulator, tokens, ragged(N, 4, 70, False), low_rank, **more)
            if wrong:
                return wrong
        wrong = excess(emulator, tokens_of(torch.bfloat16), lists(N, 16, 24, 5), None)
        if wrong:
            return wrong
        conflicts = conflicts_of_the_loops(emulator)
        return f"conflicts: {', '.join(conflicts)}" if conflicts else ""
    except RuntimeError as error:
        return str(error)


def test_the_kernel_without_a_fault_raises_no_complaint(emulator: Emulator) -> None:
    assert first_complaint(emulator) == ""


RAGGED_FAULTS = {
    "stale pattern": (
        "    has_next = next_stage(next);",
        "    StageKeys kept = next;\n    has_next = next_stage(next);\n    next.pattern = kept.pattern;",
        "lse|rms|row",
    ),
    "wrong edge of one row": (
        "bits_between(0, first + row + 1 - begin)",
        "bits_between(0, first + row + (row != 9) - begin)",
        "lse",
    ),
    "lost bit of a pattern": ("? (1u << high) - (1u << low) : 0", "? ((1u << high) - (1u << low)) & ~0x20u : 0", "lse"),
    "a stage too few": (
        "if (group >= edges.seen_end) return false;",
        "if (group + kStage >= edges.seen_end) return false;",
        "lse",
    ),
    "no care": ("is_careful = !are_numbers(sum);", "is_careful = false;", "bits"),
}


def first_complaint_of_ragged_tiles(emulator: Emulator) -> str:
    tokens = tokens_of(torch.bfloat16)
    try:
        for is_causal, form in ((False, (8, 1, 60)), (False, (1, 8, 6)), (True, (8, 1, 60)), (True, (16, 1, 40))):
            low_rank = LOW_RANKS["quadratic" if is_causal else "none"]
            wrong = excess(emulator, tokens, lists(N, *form, is_causal), low_rank, is_causal=is_causal)
            if wrong:
                return wrong
        base = attend(emulator, tokens, sb.Window(64), None, is_causal=True)[0]
        tokens[2][:, :, 70:] = torch.nan
        got = attend(emulator, tokens, sb.Window(64), None, is_causal=True)[0]
        return "" if torch.equal(got[:, :, :70], base[:, :, :70]) else "bits"
    except RuntimeError as error:
        return str(error)


def test_ragged_tiles_without_a_fault_raise_no_complaint(emulator: Emulator) -> None:
    assert first_complaint_of_ragged_tiles(emulator) == ""


@pytest.mark.parametrize("fault", [*FAULTS, *RAGGED_FAULTS])
def test_a_planted_fault_is_caught_by_name(kernels: Kernels, fault: str) -> None:
    old, new, name = (FAULTS | RAGGED_FAULTS)[fault]
    ask = first_complaint if fault in FAULTS else first_complaint_of_ragged_tiles
    names = ("attention_tile", "attention_tile_list", "attention_tile_queries", "attention_tile_rows")
    files = [f"{name}.cuh" for name in (*names, "attention_tile_stages", "tile_memory")]
    file = next((file for file in files if old in (kernels.csrc / "cuda" / file).read_text()), files[0])
    kernels.assert_caught(file, old, new, name, ask, BFLOAT16)
