"""The forward pass on tensor cores where neighbouring tiles share the keys of their windows, in the emulator: as near
to float64 as the CPU's kernel, by bits under padding, later tokens, layouts and repetition, without bank conflicts in
its loop, with fewer bytes read than tiles read by themselves; and faults that are planted into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from emulated import Emulator, Observed
from planted import BFLOAT16, Kernels
from testkit import assert_same_bits, rand
from tiles import excess as excess_of_kernel
from tiles import kernel_starts, statistics_of
from torch import Tensor
from torch.nn.functional import pad

import scatterbrain as sb
from scatterbrain.call import Call
from scatterbrain.supports.base import BlockLists, Support

N = 200
HALF = [torch.bfloat16, torch.float16]
LOW_RANKS = {"none": None, "quadratic": sb.Quadratic(4), "centroid": sb.Centroid(20)}
WINDOWS = {
    "96": sb.Window(96),
    "with sinks": sb.Window(117, sinks=5),
    "blocks of 32": sb.Window(75, 32),
    "blocks of 64": sb.Window(41, 64, sinks=19),
    "blocks of 128": sb.Window(70, 128),
}
PAIRS = [(window, kind) for window in WINDOWS for kind in LOW_RANKS]
CAUSAL = [(window, kind) for window in WINDOWS for kind in ("none", "quadratic")]


def tokens_of(dtype: torch.dtype, head_dim: int = 24, value_dim: int = 40, n: int = N, heads: int = 1) -> list[Tensor]:
    query, key = rand(2, 2, n, head_dim, seed=1), rand(2, heads, n, head_dim, seed=2)
    return [query.to(dtype), key.to(dtype), rand(2, heads, n, value_dim, seed=3).to(dtype)]


def excess(emulator: Emulator, tokens: list[Tensor], support: object, low_rank: object, **more: object) -> str:
    return excess_of_kernel(emulator, "attention_window", tokens, support, low_rank, **more)


def attend(emulator: Emulator, tokens: list[Tensor], support: object, low_rank: object, **more: object) -> list[Tensor]:
    if isinstance(low_rank, sb.Quadratic):
        more["statistics"] = sb.fit_statistics(rand(1, 2, 99, 24, seed=4), rand(1, 1, 99, 24, seed=5), 4)
    with kernel_starts(emulator, "attention_window"):
        return list(sb.attention(*tokens, support, low_rank, return_lse=True, **more))


# -------------------- which calls


@pytest.mark.parametrize(
    ("support", "is_shared"),
    [
        (sb.Window(96), True),
        (sb.Window(95), False),
        (sb.Window(100, sinks=5), False),
        (sb.Window(64, 32), True),
        (sb.Window(63, 32), False),
        (sb.Window(17, 64), True),
        (sb.Window(17, 128), True),
        (sb.Window(192, 48), False),
        (sb.Window(192, 96), False),
        (sb.Window(192, 8), False),
        (sb.Routed(160, 16, window=128), False),
    ],
    ids=str,
)
def test_windows_twice_as_wide_as_they_lie_apart_share_their_keys(
    emulator: Emulator, support: object, is_shared: bool
) -> None:
    started = []
    with emulator.installed(), emulator.observed(lambda launch, is_after: started.append(launch.kernel)):
        sb.attention(*tokens_of(torch.bfloat16), support, None)
    assert (b"attention_window" in started, b"attention_tile" in started) == (is_shared, not is_shared)


# -------------------- errors


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("window", "kind"), PAIRS)
def test_errors_are_those_of_the_cpu_kernel(emulator: Emulator, window: str, kind: str, dtype: torch.dtype) -> None:
    assert not excess(emulator, tokens_of(dtype), WINDOWS[window], LOW_RANKS[kind])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("window", "kind"), CAUSAL)
def test_errors_of_causal_windows_are_those_of_the_cpu_kernel(
    emulator: Emulator, window: str, kind: str, dtype: torch.dtype
) -> None:
    for offset in (0, -37, 23):
        given = WINDOWS[window], LOW_RANKS[kind]
        assert not excess(emulator, tokens_of(dtype), *given, is_causal=True, query_offset=offset)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 8), (64, 64), (72, 128), (128, 56)])
@pytest.mark.parametrize("low_rank", [None, sb.Quadratic(9), sb.Centroid(70)], ids=["none", "quadratic", "centroid"])
def test_every_width_fits(emulator: Emulator, head_dim: int, value_dim: int, low_rank: object) -> None:
    tokens = tokens_of(torch.bfloat16, head_dim, value_dim, heads=2)
    for is_causal in (False, True)[: 1 if isinstance(low_rank, sb.Centroid) else 2]:
        assert not excess(emulator, tokens, sb.Window(100), low_rank, is_causal=is_causal)


@pytest.mark.parametrize("clusters", [130, 256])
def test_clusters_that_leave_room_for_fewer_warps_fit(emulator: Emulator, clusters: int) -> None:
    tokens = tokens_of(torch.bfloat16, 128, 128, n=400)
    assert not excess(emulator, tokens, sb.Window(100), sb.Centroid(clusters))


@pytest.mark.parametrize("kind", LOW_RANKS)
def test_windows_may_lie_far_apart(emulator: Emulator, kind: str) -> None:
    """With many times as many keys as queries there are keys between them; with fewer they are nearly the same."""
    for queries, keys in ((70, 1500), (300, 130)):
        query, key = rand(1, 2, queries, 24, seed=1).bfloat16(), rand(1, 1, keys, 24, seed=2).bfloat16()
        tokens = [query, key, rand(1, 1, keys, 40, seed=3).bfloat16()]
        assert not excess(emulator, tokens, sb.Window(100, sinks=3), LOW_RANKS[kind])


@pytest.mark.parametrize(
    ("window", "kind", "keys"),
    [
        (sb.Window(200, sinks=80), "quadratic", N),
        (sb.Window(128, sinks=4), "quadratic", 12),
        (sb.Window(64, 64, sinks=4), "none", 12),
    ],
    ids=str,
)
def test_tiles_whose_keys_are_all_of_the_sinks_read_no_others(
    emulator: Emulator, window: sb.Window, kind: str, keys: int
) -> None:
    """What no warp has copied must not be weighed, be it keys of the round before or what memory held."""
    mask = torch.zeros(2, N, dtype=torch.bool)
    mask[0, keys:] = True
    given = {"key_padding_mask": mask, "query_padding_mask": mask, "is_causal": True}
    assert not excess(emulator, tokens_of(torch.bfloat16), window, LOW_RANKS[kind], **given)


@pytest.mark.parametrize(("is_causal", "kind"), [(False, "none"), (False, "centroid"), (True, "quadratic")])
def test_holes_and_padding_on_both_sides(emulator: Emulator, is_causal: bool, kind: str) -> None:
    mask = torch.zeros(2, N, dtype=torch.bool)
    mask[0, 5::7] = mask[1, :9] = mask[1, N - 31 :] = True
    mask[1, 40:100] = True
    given = {"key_padding_mask": mask, "query_padding_mask": mask, "is_causal": is_causal}
    tokens = tokens_of(torch.bfloat16)
    if kind == "centroid":
        given["statistics"] = sb.cluster(*(t.float() for t in tokens[:2]), 20, key_padding_mask=mask)
    for window in (sb.Window(96), sb.Window(80, 64, sinks=11)):
        assert not excess(emulator, tokens, window, LOW_RANKS[kind], **given)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_scores_may_rise_from_stage_to_stage(emulator: Emulator, dtype: torch.dtype, is_causal: bool) -> None:
    for bits in (3, 12):
        query, key, value = tokens_of(dtype, 16, 16)
        key = (key.float() / 64 + ((torch.arange(N) // 16 - 6) * bits * 0.6931 / 16)[:, None]).to(dtype)
        assert not excess(
            emulator, [torch.ones_like(query), key, value], sb.Window(96), None, scale=1.0, is_causal=is_causal
        )


# -------------------- bits


@pytest.mark.parametrize(("window", "kind"), PAIRS)
def test_no_bit_depends_on_what_padding_holds(emulator: Emulator, window: str, kind: str) -> None:
    mask = torch.zeros(2, N, dtype=torch.bool)
    mask[0, :9] = mask[0, N - 31 :] = mask[0, 13::4] = True
    results = []
    for content in (0.0, 1e4, torch.nan, torch.inf):
        given = [t.masked_fill(mask[:, None, :, None], content) for t in tokens_of(torch.bfloat16)]
        results.append(attend(emulator, given, WINDOWS[window], LOW_RANKS[kind], key_padding_mask=mask))
    for got in results[1:]:
        assert_same_bits(got, results[0], ("out", "lse"))
    assert not results[0][0][0][:, mask[0]].any()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("window", "kind"), PAIRS)
def test_no_bit_depends_on_how_much_padding_there_is(
    emulator: Emulator, window: str, kind: str, is_causal: bool
) -> None:
    if is_causal and kind == "centroid":
        pytest.skip("clusters have no causal calls")
    tokens, holes = tokens_of(torch.float16), torch.zeros(2, N, dtype=torch.bool)
    holes[0, 3::4] = True
    given = WINDOWS[window], LOW_RANKS[kind]
    base = attend(emulator, tokens, *given, key_padding_mask=holes, is_causal=is_causal)
    for left, right, content in ((5, 77, torch.nan), (64, 3, 1e4)):
        mask = pad(holes, (left, right), value=True)
        moved = [pad(t, (0, 0, left, right)).masked_fill(mask[:, None, :, None], content) for t in tokens]
        got = attend(emulator, moved, *given, key_padding_mask=mask, is_causal=is_causal)
        assert_same_bits([t[:, :, left : left + N] for t in got], base, ("out", "lse"))


@pytest.mark.parametrize(("window", "kind"), CAUSAL)
def test_no_bit_of_the_past_depends_on_the_future(emulator: Emulator, window: str, kind: str) -> None:
    tokens = tokens_of(torch.bfloat16)
    base = attend(emulator, tokens, WINDOWS[window], LOW_RANKS[kind], is_causal=True)
    for edge, content in ((70, 1e4), (101, torch.inf), (137, torch.nan)):
        changed = [t.clone() for t in tokens]
        for t in changed:
            t[:, :, edge:] = content * torch.sign(t[:, :, edge:])
        got = attend(emulator, changed, WINDOWS[window], LOW_RANKS[kind], is_causal=True)
        assert_same_bits([t[:, :, :edge] for t in got], [t[:, :, :edge] for t in base], ("out", "lse"))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "quadratic"])
def test_what_is_no_number_reaches_those_who_list_it_alone(emulator: Emulator, kind: str, is_causal: bool) -> None:
    """A tile that lists none of a stage's bad keys, or of whose rows some do not, keeps the bits of the others."""
    tokens, support = tokens_of(torch.bfloat16), sb.Window(99)
    one_hot = torch.eye(N)[40:42].T.expand(2, 1, N, 2)
    lists_it = sb.reference.attention(*tokens[:2], one_hot, support, low_rank=None, is_causal=is_causal) > 0
    if kind == "quadratic":  # values reach all that see them by the state
        tokens[0][:], tokens[1][:, :, 100:] = 0, 0
    base = attend(emulator, tokens, support, None, is_causal=is_causal)[0]
    tokens[2][:, :, 40, 1], tokens[2][:, :, 41, 2] = torch.nan, torch.inf
    if kind == "none":
        tokens[1][:, :, 42] = torch.nan
    lists_bad_key = sb.reference.attention(
        *tokens[:2], torch.eye(N)[42:43].T.expand(2, 1, N, 1), support, low_rank=None
    )
    out = attend(emulator, tokens, support, None, is_causal=is_causal)[0]
    bad = lists_it.any(-1) | ~lists_bad_key[..., 0].isfinite() | (lists_bad_key[..., 0] > 0)
    assert bad.any() and not bad.all()
    assert_same_bits([out[~bad]], [base[~bad]], ("out",))


@pytest.mark.parametrize(("is_causal", "kind"), [(False, kind) for kind in LOW_RANKS] + [(True, "quadratic")])
def test_two_runs_every_layout_and_every_grid_give_the_same_bits(
    emulator: Emulator, kind: str, is_causal: bool
) -> None:
    tokens = tokens_of(torch.bfloat16)
    given = WINDOWS["with sinks"], LOW_RANKS[kind]
    base = attend(emulator, tokens, *given, is_causal=is_causal)
    heads_inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tokens]
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in tokens]  # not at 16 bytes
    odd_rows = [pad(t, (0, 3))[..., :-3] for t in tokens]
    for again in (tokens, heads_inside, shifted, odd_rows):
        assert_same_bits(attend(emulator, again, *given, is_causal=is_causal), base, ("out", "lse"))
    with emulator.limited_to(3):
        assert_same_bits(attend(emulator, tokens, *given, is_causal=is_causal), base, ("out", "lse"))


# -------------------- conflicts and bytes


def counted(emulator: Emulator, kernel: bytes, number: str, call: Callable[[], object]) -> int:
    """How much a count of the emulator grows in launches of a kernel."""
    counts = []

    def observe(launch: Observed, is_after: bool) -> None:
        if launch.kernel == kernel:
            counts.append(emulator.statistics()[number])

    with emulator.installed(), emulator.observed(observe):
        call()
    assert counts, f"no launch of {kernel.decode()}"
    return sum(counts[1::2]) - sum(counts[::2])


# Calls that differ by keys of every window, or by keys behind the state, of which no tile has one.
LOOPS: dict[str, tuple[str, int, list[tuple[object, dict[str, object]]]]] = {
    "none": ("none", 24, [(sb.Window(keys), {}) for keys in (96, 160)]),
    "quadratic": ("quadratic", 128, [(sb.Window(keys), {}) for keys in (96, 160)]),
    "centroid": ("centroid", 64, [(sb.Window(keys), {}) for keys in (96, 160)]),
    "causal": ("none", 64, [(sb.Window(keys), {"is_causal": True}) for keys in (96, 160)]),
    "behind": ("quadratic", 24, [(sb.Window(96), {"is_causal": True, "query_offset": by}) for by in (-100, -60)]),
}


def conflicts_of_the_loops(emulator: Emulator) -> list[str]:
    """Loops where further keys cost bank conflicts. They are of one cluster: clusters are looked up wherever the keys'
    are."""
    found = []
    for loop, (kind, head_dim, calls) in LOOPS.items():
        tokens = [t[:1] for t in tokens_of(torch.bfloat16, head_dim, head_dim)]
        statistics = statistics_of(LOW_RANKS[kind], tokens)
        if kind == "centroid":
            statistics = replace(statistics, index=torch.zeros_like(statistics.index))

        def run(
            support: object, more: dict[str, object], kind: str = kind, given: object = (tokens, statistics)
        ) -> None:
            sb.attention(*given[0], support, LOW_RANKS[kind], statistics=given[1], **more)

        counts = [counted(emulator, b"attention_window", "bank_conflicts", partial(run, *call)) for call in calls]
        if counts[0] != counts[1]:
            found.append(loop)
    return found


def test_loops_over_keys_have_no_bank_conflicts(emulator: Emulator) -> None:
    assert conflicts_of_the_loops(emulator) == []


def as_lists(window: sb.Window, n: int) -> sb.Blocks:
    """The same keys, key by key: a list for every tile."""
    blocks = -(-n // window.block_q)
    lo = (torch.arange(blocks) * window.block_q + window.block_q // 2 - window.keys // 2).clamp(0, n - window.keys)
    index = (lo[:, None] + torch.arange(window.keys)).int().expand(1, 2, blocks, window.keys).contiguous()
    return sb.Blocks(index, torch.full((1, 2, blocks), window.keys, dtype=torch.int32), window.block_q, 1)


@pytest.mark.parametrize(
    ("window", "share"),
    [(sb.Window(96), 0.37), (sb.Window(128), 0.34), (sb.Window(256), 0.29), (sb.Window(64, 64), 0.25)],
)
def test_fewer_bytes_of_keys_are_read_than_tiles_read_by_themselves(
    emulator: Emulator, window: sb.Window, share: float
) -> None:
    """Away from the ends, of 64 queries: a stream of 48 keys more than a window, for four windows."""
    n = 1024
    tokens = [t[:1].expand(1, 2, n, 64) for t in tokens_of(torch.bfloat16, 64, 64, n, 2)]
    read = [
        counted(emulator, kernel, "copied_bytes", lambda: sb.attention(*tokens, support, None))
        for kernel, support in ((b"attention_window", window), (b"attention_tile", as_lists(window, n)))
    ]
    of_queries = tokens[0].numel() * 2
    assert read[1] == of_queries + 2 * (n // 16) * window.keys * 256
    assert read[0] - of_queries <= share * (read[1] - of_queries)


@dataclass(frozen=True)
class Prefix(Support):
    """The first keys of every row."""

    kind: ClassVar[str] = "prefix"
    keys: int = 99
    block_q: ClassVar[int] = 16

    def lists(self, call: Call, query_map: Tensor | None, key_map: Tensor | None) -> BlockLists:
        span = torch.tensor([0, self.keys], dtype=torch.int32).expand(1, -(-call.query.shape[2] // self.block_q), 2)
        return BlockLists(span=span.contiguous(), block_q=self.block_q, span_keys=self.keys)


@sb.reference.support_mask.register
def _(support: Prefix, inputs: sb.reference.Inputs) -> Tensor:
    chosen = inputs.pairs(False)
    chosen[..., : support.keys] = True
    return chosen


def test_keys_between_a_far_window_and_the_causal_edge_are_not_read(emulator: Emulator) -> None:
    """Time is linear wherever windows lie: a query reads its window, and what lies between its state and itself."""
    given = Prefix(), LOW_RANKS["quadratic"]
    assert not excess(emulator, tokens_of(torch.bfloat16, n=500), *given, is_causal=True)
    read = []
    for n in (512, 1024):
        tokens = [t[:1] for t in tokens_of(torch.bfloat16, n=n)]
        statistics = statistics_of(LOW_RANKS["quadratic"], tokens)
        call = partial(sb.attention, *tokens, *given, statistics=statistics, is_causal=True)
        read.append(counted(emulator, b"attention_window", "copied_bytes", call))
    assert read[1] <= 2.2 * read[0]  # the first tiles have less behind their state


# -------------------- empty calls


@pytest.mark.parametrize("queries", [0, 5])
@pytest.mark.parametrize("keys", [0, 7])
def test_empty_and_short_calls_are_fine(emulator: Emulator, queries: int, keys: int) -> None:
    for low_rank in (None, sb.Quadratic(4)):
        tokens = [rand(1, 2, n, width).bfloat16() for n, width in ((queries, 24), (keys, 24), (keys, 16))]
        with emulator.installed():
            statistics = sb.fit_statistics(rand(1, 2, 99, 24), rand(1, 2, 99, 24), 4) if low_rank else None
            out, lse = sb.attention(*tokens, sb.Window(5, 64), low_rank, statistics=statistics, return_lse=True)
        assert out.shape == (1, 2, queries, 16) and (keys or (not out.any() and (lse == -torch.inf).all()))


# -------------------- planted faults

KERNEL, TILE, MEMORY = "attention_window.cuh", "attention_tile.cuh", "tile_memory.cuh"
FAULTS = {
    "stale mask": (
        KERNEL,
        "    const uint32_t valid = shared_array<uint32_t>(numbers).get(0);",
        "    const uint32_t valid = shared_array<uint32_t>(numbers_at(base, buffer)).get(0);",
        "lse|rms|row",
    ),
    "a mask of no window": (
        KERNEL,
        "const bool is_listed = cell.lists(cell.begin + key) && (valid >> lane & 1);",
        "const bool is_listed = valid >> lane & 1;",
        "lse|rms|row",
    ),
    "stale pattern": (
        KERNEL,
        "of_lane.pattern = cell.pattern() & edges.seen_by(lane % kTile, cell.begin);",
        "of_lane.pattern = cell.pattern() & edges.seen_by(lane % kTile, cell.begin - kStage);",
        "lse|rms|row",
    ),
    "lost tile": (KERNEL, "for (; at < end; ++at,", "for (; at + 1 < end; ++at,", "lse|rms|row"),
    "lost swizzle": (
        MEMORY,
        "((chunk ^ (row & 7)) << 4)",
        "(chunk << 4)",
        "conflicts: none, quadratic, centroid",
    ),
    "missing barrier of a round": (
        KERNEL,
        "        sync_block();\n      if (round",
        "        sync_warp();\n      if (round",
        "race|asynchronous copy|uninitialised shared memory",
    ),
    "missing barrier at the end": (
        KERNEL,
        "if (!this->is_careful) sync_block();  // all are",
        "if (!this->is_careful) sync_warp();  // all are",
        "race|divergent",
    ),
    "no care": (TILE, "is_careful = !are_numbers(sum);", "is_careful = false;", "bits"),
    "others' keys once more": (
        KERNEL,
        "of_lane.key = is_wanted && is_key(cell, key) ? key : -1;",
        "of_lane.key = is_key(cell, key) ? key : -1;",
        "bits",
    ),
}


def first_complaint(emulator: Emulator) -> str:
    tokens = tokens_of(torch.bfloat16, 64, 64, heads=2)
    tokens[0] = rand(2, 4, N, 64, seed=1).bfloat16()
    holes = torch.zeros(2, N, dtype=torch.bool)
    holes[:, 5::7] = True
    try:
        for kind, low_rank in LOW_RANKS.items():
            for is_causal in (False, True)[: 1 if kind == "centroid" else 2]:
                more = {"is_causal": is_causal} | ({} if kind != "none" else {"key_padding_mask": holes})
                for window in (sb.Window(107, sinks=5), sb.Window(75, 32)):
                    wrong = excess(emulator, tokens, window, low_rank, **more)
                    if wrong:
                        return wrong
        for is_causal in (False, True):
            given = tokens_of(torch.bfloat16)
            base = attend(emulator, given, sb.Window(99), None, is_causal=is_causal)[0]
            given[2][:, :, 150:] = torch.nan
            got = attend(emulator, given, sb.Window(99), None, is_causal=is_causal)[0]
            if not torch.equal(got[:, :, :90], base[:, :, :90]):
                return "bits"
            with emulator.limited_to(3):
                again = attend(emulator, given, sb.Window(99), None, is_causal=is_causal)[0]
            if not torch.equal(again[:, :, :90], base[:, :, :90]):
                return "grid"
        conflicts = conflicts_of_the_loops(emulator)
        return f"conflicts: {', '.join(conflicts)}" if conflicts else ""
    except RuntimeError as error:
        return str(error)


def test_the_kernel_without_a_fault_raises_no_complaint(emulator: Emulator) -> None:
    assert first_complaint(emulator) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_name(kernels: Kernels, fault: str) -> None:
    kernels.assert_caught(*FAULTS[fault], first_complaint, BFLOAT16)
