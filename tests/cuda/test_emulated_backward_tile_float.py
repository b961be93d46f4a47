"""The backward pass on tensor cores for float32 tokens, in the emulator: as near to float64 as the CPU's kernel, by
bits under padding, the future, layouts and repetition, without bank conflicts in its loops; and planted faults."""

from __future__ import annotations

import math

import pytest
import torch
from emulated import Emulator
from operator_cases import operator_arguments
from oracle import row_error, row_errors
from planted import FLOAT, Kernels
from testkit import assert_same_bits, rand
from tile_gradients import NAMES, excess, given_of, gradients, on_tensor_cores
from tiles import statistics_of
from torch import Tensor
from torch.nn.functional import pad

import scatterbrain as sb
from scatterbrain.operators.arguments import QUADRATIC, AttentionArguments

OPERATORS = torch.ops.scatterbrain
N = 150
LONG = 230  # of which a tile reads a state while some of its queries see a whole chunk behind it
LOW_RANKS = {"none": None, "quadratic": sb.Quadratic(4), "centroid": sb.Centroid(20)}
SUPPORTS = {
    "window": sb.Window(43, 32, sinks=5),
    "window of 8": sb.Window(40, 8, sinks=3),
    "window of 24": sb.Window(48, 24, sinks=19),
    "window of each": sb.Window(9, 1),
    "routed": sb.Routed(32, 16, window=16),
    "routed of 8": sb.Routed(32, 8),
    "routed of each": sb.Routed(48, 1, 8, window=16),
}
CAUSAL = ("none", "quadratic")
FORMS = [
    (form, is_causal, kind)
    for form in SUPPORTS
    for is_causal in (False, True)
    for kind in LOW_RANKS
    if not (is_causal and kind == "centroid") and form != "window of each"
]


def tokens_of(head_dim: int = 24, value_dim: int = 40, heads: int = 1, n: int = N) -> list[Tensor]:
    return given_of(torch.float32, head_dim, value_dim, heads, n)


# -------------------- errors


@pytest.mark.parametrize(("form", "is_causal", "kind"), [*FORMS, ("window of each", True, "quadratic")])
def test_errors_are_those_of_the_cpu_kernel(emulator: Emulator, form: str, is_causal: bool, kind: str) -> None:
    given = tokens_of(64, 64, heads=2, n=LONG)
    more = dict(is_causal=is_causal, query_offset=23 * is_causal)
    assert not excess(emulator, given, SUPPORTS[form], LOW_RANKS[kind], **more)


@pytest.mark.parametrize(
    ("widths", "low_rank"),
    [((16, 8), sb.Quadratic(9)), ((40, 64), sb.Quadratic(9)), ((64, 24), None), ((24, 64), sb.Centroid(50))],
    ids=str,
)
def test_every_width_fits(emulator: Emulator, widths: tuple[int, int], low_rank: object) -> None:
    """Queries of a state alone too, and keys in holes."""
    given, holes = tokens_of(*widths, n=LONG), torch.zeros(1, LONG, dtype=torch.bool)
    holes[:, 3::7] = holes[:, -9:] = True
    support = sb.Window(40, 32) if low_rank is None else sb.Empty()
    with on_tensor_cores(emulator):
        more = dict(statistics=statistics_of(low_rank, given), key_padding_mask=holes)
        got = gradients(given, support, low_rank, **more)
    exact = gradients(given, support, low_rank, reference=True, **more)
    assert all(row_error(a, b) <= 5e-6 for a, b in zip(got, exact))


def drawn(seed: int, kind: str) -> tuple[list[Tensor], object, dict[str, object]]:
    """A call of any form, width, number of heads and sharpness."""
    generator = torch.Generator().manual_seed(seed)

    def one_of(*choices: object) -> object:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    n, kv_heads, widths = int(one_of(97, 150, 230)), int(one_of(1, 2)), [int(one_of(16, 24, 48, 64)) for _ in range(2)]
    shapes = [(2, widths[0]), (kv_heads, widths[0]), (kv_heads, widths[1]), (2, widths[1])]
    given = [torch.randn(1, heads, n, width, generator=generator) for heads, width in shapes]
    given[0] *= float(one_of(1.0, 2.0, 4.0))  # to where a key in three takes more than half of a query
    given.append(torch.randn(1, 2, n, generator=generator))
    block_q, is_causal = int(one_of(1, 8, 16, 24, 32)), kind == "quadratic" or bool(one_of(False, True))
    is_causal = is_causal and kind != "centroid"
    more: dict[str, object] = dict(is_causal=is_causal, statistics=statistics_of(LOW_RANKS[kind], given))
    if one_of(False, True):
        more["key_padding_mask"] = torch.rand(1, n, generator=generator) < 0.2
    window = sb.Window(int(one_of(34, 48, 64)), block_q, sinks=int(one_of(0, 0, 7)))
    if block_q == 24 or one_of(False, True):
        return given, window, more
    beside = dict(window=32 * (n % 2), sinks=window.sinks)
    return given, sb.Routed(64, block_q, 8 if block_q == 1 else 1, **beside), more


DRAWN = range(30)


@pytest.mark.parametrize("kind", LOW_RANKS)
def test_errors_of_drawn_calls_are_those_of_the_cpu_kernel(emulator: Emulator, kind: str) -> None:
    """Of all together: the worst row of one call is chance, in either kernel."""
    squares, worst = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    for seed in DRAWN:
        given, support, more = drawn(seed, kind)
        with on_tensor_cores(emulator):
            ours = gradients(given, support, LOW_RANKS[kind], **more)
        cpu, exact = (gradients(given, support, LOW_RANKS[kind], reference=wide, **more) for wide in (False, True))
        for i, want in enumerate(exact):
            for j, got in enumerate((ours[i], cpu[i])):
                squares[i, j] += ((got.double() - want).norm() / want.norm()) ** 2
                worst[i, j] = max(worst[i, j], row_errors(got, want).max())
    for name, (of_all, of_cpu), (row, row_of_cpu) in zip(NAMES, squares.sqrt().tolist(), worst.tolist()):
        assert of_all <= 1.1 * of_cpu, f"{name} rms: {of_all / of_cpu:.2f} times the CPU's"
        assert row <= 1.5 * row_of_cpu, f"{name} row: {row / row_of_cpu:.2f} times the CPU's"


def map_arguments(draw: int = 0) -> tuple[AttentionArguments, list[Tensor]]:
    """A call with maps that affine projections of its tokens make, and the projections."""
    first = 10 * draw
    given = [rand(2, 4, 90, 16, seed=first), *(rand(2, 2, 90, 16, seed=first + number) for number in (1, 2))]
    weights = [0.2 * rand(1, 2, 4, 16, seed=first + 3), 0.2 * rand(2, 1, 4, 16, seed=first + 4)]
    maps = [OPERATORS.project(t, w, torch.zeros(*w.shape[:3])) for t, w in zip(given, weights)]
    fields = dict(zip(("query", "key", "value", "query_map", "key_map"), (*given, *maps)), low_rank=QUADRATIC)
    span = torch.tensor([[[0, 9], [10, 20], [30, 44], [5, 9], [60, 70], [70, 90]]], dtype=torch.int32)
    return operator_arguments(AttentionArguments, **fields, span=span, span_keys=20, block_q=16), weights


def wrong_maps(emulator: Emulator, is_causal: bool) -> str:
    """Empty where the worst row of the gradients of maps errs by 1.5 times that of the CPU's kernel at most, and of dq
    and dk where they hold those too: by the rms of four calls, since the worst row of one is chance. A state of all
    keys, few of which are not listed, errs more by itself: without tensor cores it is 1.9 times as much."""
    names = ("query map", "key map", "query map to dq", "key map to dk")
    of_calls = [errors_of_maps(emulator, is_causal, draw) for draw in range(4)]
    for name, *calls in zip(names, *of_calls):
        error, of_cpu = (math.hypot(*errors) for errors in zip(*calls))
        if not error <= (1.5 if is_causal else 2.2) * of_cpu:
            return f"{name}: {error / of_cpu:.2f} times the CPU's"
    return ""


def errors_of_maps(emulator: Emulator, is_causal: bool, draw: int) -> list[tuple[float, float]]:
    """Worst rows, ours and the CPU's, of the gradients that :func:`wrong_maps` names."""
    arguments, weights = map_arguments(draw)
    arguments = arguments._replace(is_causal=is_causal)
    grad = rand(2, 4, 90, 16, seed=10 * draw + 5)
    wide = AttentionArguments(
        *(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    )
    want = OPERATORS.attention_backward(grad.double(), None, *OPERATORS.attention(*wide), *wide)

    def found() -> list[Tensor]:
        """Gradients of the maps, and of queries and keys with what goes on to them."""
        results = OPERATORS.attention(*arguments)
        alone = OPERATORS.attention_backward(grad, None, *results, *arguments)
        through = OPERATORS.attention_backward(grad, None, *results, *arguments, None, None, *weights)
        return [*alone[3:], *through[:2]]

    with on_tensor_cores(emulator):
        ours = found()
    by_head = [w.double().expand(2, -1, -1, -1).repeat_interleave(h // w.shape[1], 1) for w, h in zip(weights, (4, 2))]
    exact = [*want[3:], *(direct + of_map @ weight for direct, of_map, weight in zip(want, want[3:], by_head))]
    return [(row_error(got, wanted), row_error(cpu, wanted)) for got, cpu, wanted in zip(ours, found(), exact)]


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_maps_are_exact_and_go_on_through_given_projections(emulator: Emulator, is_causal: bool) -> None:
    assert wrong_maps(emulator, is_causal) == ""


def test_what_does_not_fit_runs_without_tensor_cores(emulator: Emulator) -> None:
    """Windows of few keys go without, and so do their queries; and other widths and types."""
    for widths in ((20, 40), (24, 20), (72, 40), (24, 72)):
        with on_tensor_cores(emulator, expected=False):
            gradients(tokens_of(*widths, n=20), sb.Window(16), None)
    with on_tensor_cores(emulator, expected=False):
        gradients(tokens_of(n=90), SUPPORTS["window of each"], None)
        gradients([t.double() for t in tokens_of(n=20)], sb.Window(16), None)


# -------------------- bits


def bits(emulator: Emulator, given: list[Tensor], support: object, kind: str, **more: object) -> list[Tensor]:
    if kind == "quadratic":
        more["statistics"] = sb.fit_statistics(rand(1, 2, 99, 24, seed=4), rand(1, 1, 99, 24, seed=5), 4)
    with on_tensor_cores(emulator):
        return list(gradients(given, support, LOW_RANKS[kind], **more))


def changed_by_the_future(emulator: Emulator, support: object, kind: str) -> str:
    """What of the past changes with later tokens: dq, be they no numbers; and where later queries have no gradients, dk
    and dv."""
    given = tokens_of()
    base = bits(emulator, given, support, kind, is_causal=True)[0]
    for edge, content in ((137, torch.inf), (101, 3.4028e38), (70, torch.nan)):
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


@pytest.mark.parametrize(
    ("form", "kind"),
    [("window", "none"), ("window of 8", "quadratic"), ("window", "quadratic"), ("routed of each", "quadratic")],
)
def test_no_bit_of_the_past_depends_on_the_future(emulator: Emulator, form: str, kind: str) -> None:
    assert changed_by_the_future(emulator, SUPPORTS[form], kind) == ""


@pytest.mark.parametrize(
    ("form", "is_causal", "kind"),
    [
        *(
            (form, is_causal, kind)
            for form, is_causal in (("window", False), ("window of 24", True))
            for kind in CAUSAL
        ),
        ("window", False, "centroid"),
        ("routed of 8", False, "centroid"),
        ("routed", True, "quadratic"),
    ],
)
def test_no_bit_depends_on_padding(emulator: Emulator, form: str, is_causal: bool, kind: str) -> None:
    """To the left, to the right and in holes, however much there is and whatever it holds; nor on the run."""
    given, holes = tokens_of(), torch.zeros(1, N, dtype=torch.bool)
    holes[:, 13::4] = True
    more = dict(is_causal=is_causal)
    base = bits(emulator, given, SUPPORTS[form], kind, key_padding_mask=holes, **more)
    assert_same_bits(bits(emulator, given, SUPPORTS[form], kind, key_padding_mask=holes, **more), base, NAMES)
    for left, right, content in ((5, 77, torch.inf), (64, 3, torch.nan)):
        mask = pad(holes, (left, right), value=True)
        moved = [pad(t, (0, 0, left, right)).masked_fill(mask[:, None, :, None], content) for t in given[:4]]
        moved.append(pad(given[4], (left, right)))
        got = bits(emulator, moved, SUPPORTS[form], kind, key_padding_mask=mask, **more)
        assert_same_bits([t[:, :, left : left + N] for t in got], base, NAMES)


@pytest.mark.parametrize("block_q", [1, 16])
def test_no_bit_of_a_short_row_depends_on_padding(emulator: Emulator, block_q: int) -> None:
    """Its lists are as wide as the row, so wider with padding."""
    support = sb.Routed(32, block_q, 8 if block_q == 1 else 1)
    with emulator.installed():
        base = gradients(tokens_of(n=10), support, None)
        moved = [pad(t, (0, 0, 0, 30)) for t in tokens_of(n=10)[:4]]
        mask = torch.arange(40)[None] >= 10
        got = gradients([*moved, pad(tokens_of(n=10)[4], (0, 30))], support, None, key_padding_mask=mask)
    assert_same_bits([t[:, :, :10] for t in got], base, NAMES)


@pytest.mark.parametrize("kind", LOW_RANKS)
def test_another_layout_gives_the_same_bits(emulator: Emulator, kind: str) -> None:
    given = tokens_of()
    base = bits(emulator, given, sb.Window(40), kind)
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in given]  # not at 16 bytes
    inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in shifted]
    assert_same_bits(bits(emulator, [*shifted[:2], *inside[2:4], given[4]], sb.Window(40), kind), base, NAMES)


def reached_by_no_number(emulator: Emulator) -> str:
    """Whether dk or dv has one beyond the keys that a query lists which has, or whose gradient has; parts of what is
    infinite, or rounds to it in TF32, are none either."""
    base = bits(emulator, tokens_of(), sb.Window(20, 8), "none", is_causal=True)
    one_hot = torch.eye(N)[None, None]
    probability = sb.reference.attention(*tokens_of()[:2], one_hot, sb.Window(20, 8), low_rank=None, is_causal=True)
    listed = probability[0, 0, 70] > 0
    assert 0 < listed.sum() < 71
    for which, content in ((0, torch.nan), (3, torch.nan), (0, torch.inf), (3, 3.4028e38)):
        given = tokens_of()
        given[which][:, 0, 70, 3] = content
        got = bits(emulator, given, sb.Window(20, 8), "none", is_causal=True)
        for name, a, b in list(zip(NAMES, got, base))[1:]:
            if not a[0, 0, listed].isnan().any(-1).all():
                return f"{name}: numbers"
            if not torch.equal(a[:, :, ~listed], b[:, :, ~listed]):
                return f"{name}: keys that are not listed"
    return ""


def test_queries_that_are_no_numbers_reach_the_keys_that_they_list_alone(emulator: Emulator) -> None:
    assert reached_by_no_number(emulator) == ""


# -------------------- flags, conflicts, empty calls


@pytest.mark.parametrize("is_causal", [False, True])
def test_queries_where_subtraction_would_cancel_are_computed_again(emulator: Emulator, is_causal: bool) -> None:
    n = 200
    query, key, value, grad = (rand(1, 2, n, 16, seed=seed) for seed in range(4))
    query_map, key_map = 30 * torch.ones(1, 2, n, 3), 30 * torch.ones(1, 2, n, 3)
    query_map[..., -1] = key_map[..., -1] = 0
    query_map[:, :, ::2], key_map[:, :, 20:] = 0, 0  # every other query cancels
    given = [query, key, value, query_map, key_map]
    fields = dict(zip(("query", "key", "value", "query_map", "key_map"), given), low_rank=QUADRATIC)
    span = torch.tensor([[[0, 20]]], dtype=torch.int32)
    arguments = operator_arguments(
        AttentionArguments, **fields, span=span, span_keys=20, block_q=208, is_causal=is_causal
    )
    wide = AttentionArguments(
        *(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    )
    want = OPERATORS.attention_backward(grad.double(), None, *OPERATORS.attention(*wide), *wide)
    with on_tensor_cores(emulator):
        ours = OPERATORS.attention_backward(grad, None, *OPERATORS.attention(*arguments), *arguments)
    assert all(row_error(got, exact) <= 1e-5 for got, exact in zip(ours[:3], want))


@pytest.mark.parametrize(("queries", "keys"), [(0, 7), (5, 0), (5, 7), (33, 1)])
def test_empty_and_short_calls_are_fine(emulator: Emulator, queries: int, keys: int) -> None:
    for low_rank in LOW_RANKS.values():
        given = [rand(1, 2, n, width) for n, width in ((queries, 24), (keys, 24), (keys, 16), (queries, 16))]
        with emulator.installed():
            fitted = sb.fit_statistics(rand(1, 2, 99, 24), rand(1, 2, 99, 24), 4)
            statistics = fitted if isinstance(low_rank, sb.Quadratic) else None
            got = gradients([*given, rand(1, 2, queries)], sb.Window(16), low_rank, statistics=statistics)
        assert [t.shape for t in got] == [t.shape for t in given[:3]] and all(t.isfinite().all() for t in got)


def conflicts_of_further_keys(emulator: Emulator) -> list[int]:
    """Bank conflicts that further keys of every window cost, by kernel: of queries and of keys, shared and ragged.
    Clusters are looked up wherever the keys' are."""
    found = []
    cases = (
        ("none", 16, False, 100, (16, 64)),
        ("quadratic", 16, False, 160, (16, 64)),  # more keys are not listed than are summed key by key
        ("quadratic", 8, True, 230, (70, 120)),  # of one state
    )
    for kind, block_q, is_causal, n, numbers in cases:
        counts = []

        def observe(launch: object, is_after: bool, counts: list[int] = counts) -> None:
            if launch.kernel in (b"attention_backward_tile", b"attention_backward_tile_keys"):
                counts.append(emulator.statistics()["bank_conflicts"])

        given = tokens_of(64, 64, n=n)
        with emulator.installed(), emulator.observed(observe):
            for keys in numbers:
                gradients(
                    given,
                    sb.Window(keys, block_q),
                    LOW_RANKS[kind],
                    is_causal=is_causal,
                    statistics=statistics_of(LOW_RANKS[kind], given),
                )
        of_launches = [after - before for before, after in zip(counts[::2], counts[1::2])]
        assert len(of_launches) == 4
        found += [more - few for few, more in zip(of_launches[:2], of_launches[2:])]
    return found


# -------------------- planted faults

QUERIES, KEYS = "attention_backward_tile.cuh", "attention_backward_tile_keys.cuh"
SHARES = "attention_backward_shares.cuh"
PRODUCTS, TILE_PRODUCTS = "float_products.cuh", "attention_backward_tile_products.cuh"
# Where they are, and how the complaint begins.
FAULTS = {
    "lost low part of a right operand": (
        PRODUCTS,
        "  multiply_add(small, left.high, low[0], low[1], Tf32{});\n",
        "",
        "d",
    ),
    "lost second part of queries": (
        TILE_PRODUCTS,
        "add(small[n], 0, 1), add(small[n], 1, 0);",
        "add(small[n], 0, 1);",
        "d",
    ),
    "lost third part of keys": (TILE_PRODUCTS, "add(small[n], 0, 2), ", "", "d"),
    "a product that keys' weights alone lose": (
        TILE_PRODUCTS,
        "const int l = kIsOfQueries ? of_query : of_key,",
        "if (!kIsOfQueries && of_query + of_key == 2) return;\n        const int l = kIsOfQueries ? of_query : of_key,",
        "d[kv]",
    ),
    "records that are not balanced": (
        QUERIES,
        "      of.inverse /= weight, of.state_weight /= weight;\n      of.correction += moment / weight;\n",
        "",
        "d",
    ),
    "stale mask of a stage": (QUERIES, "ballot(of_lane.key >= 0)", "ballot(true)", "d"),
    "lost swizzle": (TILE_PRODUCTS, "return ((row ^ row >> 2) & 1) << 2 | (row & 2);", "return 0 * row;", "conflicts"),
    "lost swizzle of coordinates": (TILE_PRODUCTS, " ^ (row & 6)) << 4)", ") << 4)", "conflicts"),
    "zeros of keys that meet what is no number": (KEYS, "kIsCareful && is_careful)", "false)", "d[kv]: keys"),
    "zeros that meet what is no number": (QUERIES, "if (kIsRagged && is_careful)", "if (false)", "dq of the past"),
    "shares without a correction": (
        SHARES,
        "(value[n][at] - shift[n][i]) - correction[n][i]",
        "(value[n][at] - shift[n][i])",
        "routed none: d[kv]",
    ),
    "shares of keys in place of those of values": (
        SHARES,
        "row + 8 * r) * p.share_words + kPart * p.head_dim",
        "row + 8 * r) * p.share_words + 0 * p.head_dim",
        "routed none: d[kv]|uninit",
    ),
    "clusters that are not balanced": (
        QUERIES,
        "if (kHasClusters && is_listed)",
        "if (false && is_listed)",
        "routed centroid: d",
    ),
    "what is taken back has no moment": (
        QUERIES,
        "if (kHasQuadratic && !kIsBehind && is_listed) weight -=",
        "if (false) weight -=",
        "query map|key map",
    ),
}


def first_complaint(emulator: Emulator) -> str:
    try:
        wrong = changed_by_the_future(emulator, sb.Window(20), "none") or reached_by_no_number(emulator)
        if wrong:
            return wrong
        sharp = tokens_of(64, 64, n=N)
        sharp[0] = 4 * sharp[0]
        for given, is_causal in ((tokens_of(64, 64, n=N), True), (sharp, False)):
            wrong = excess(emulator, given, sb.Window(40, 16, sinks=5), None, is_causal=is_causal)
            if wrong:
                return wrong
        for kind in ("none", "centroid"):
            wrong = excess(emulator, tokens_of(24, 40, n=N), SUPPORTS["routed of 8"], LOW_RANKS[kind])
            if wrong:
                return f"routed {kind}: {wrong}"
        wrong = wrong_maps(emulator, True) or wrong_maps(emulator, False)
        return wrong or ("conflicts" if any(conflicts_of_further_keys(emulator)) else "")
    except RuntimeError as error:
        return str(error)


def test_neither_a_complaint_nor_a_bank_conflict_without_a_fault(emulator: Emulator) -> None:
    assert first_complaint(emulator) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_name(kernels: Kernels, fault: str) -> None:
    file, old, new, name = FAULTS[fault]
    kernels.assert_caught(file, old, new, name, first_complaint, FLOAT)
