"""The backward pass on tensor cores, in the emulator: as near to float64 as the CPU's kernel, by bits under
padding, layouts and repetition, without bank conflicts in its loops; and faults that are planted into it."""

from __future__ import annotations

import pytest
import torch
from emulated import Emulator
from half_products import Definition, are_the_cpus, gradients_of
from operator_cases import operator_arguments
from oracle import row_error
from planted import BFLOAT16, Kernels
from testkit import assert_same_bits, rand
from tile_gradients import HALF, LOW_RANKS, NAMES, excess, given_of, gradients, on_tensor_cores
from tiles import lists, ragged, rms, statistics_of
from torch import Tensor
from torch.nn.functional import pad

import scatterbrain as sb
from scatterbrain.operators.arguments import QUADRATIC, AttentionArguments

OPERATORS = torch.ops.scatterbrain
N = 96


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", LOW_RANKS)
def test_errors_are_those_of_the_cpu_kernel(emulator: Emulator, kind: str, dtype: torch.dtype) -> None:
    holes = torch.zeros(1, N, dtype=torch.bool)
    holes[:, 3::7] = holes[:, -9:] = True
    window = sb.Window(43, 32, sinks=5)
    assert not excess(emulator, given_of(dtype), window, LOW_RANKS[kind], key_padding_mask=holes)
    assert not excess(emulator, given_of(dtype), ragged(N, 2, 70, True, 1), LOW_RANKS[kind])


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "low_rank"),
    [(16, 8, sb.Quadratic(9)), (72, 128, None), (128, 56, sb.Centroid(40)), (64, 64, sb.Quadratic(9))],
    ids=str,
)
def test_every_width_fits(emulator: Emulator, head_dim: int, value_dim: int, low_rank: object) -> None:
    """Groups of one query head too, and queries of a state alone."""
    given = given_of(torch.bfloat16, head_dim, value_dim, heads=2, n=85)
    assert not excess(emulator, given, sb.Window(16, 16) if low_rank is None else sb.Empty(), low_rank)


@pytest.mark.parametrize("factor", [2.0**-14, 2.0**7])
def test_small_and_large_gradients_are_as_exact_in_float16(emulator: Emulator, factor: float) -> None:
    given = given_of(torch.float16)
    given[3], given[4] = given[3] * factor, given[4] * factor
    if factor < 1:
        given[1] = given[1] * 2**6  # gradients of queries that float16 has as normal numbers
    support = sb.Window(32, 16)
    with on_tensor_cores(emulator):
        ours = gradients(given, support, None, scale=2.0**-7)[0]
    cpu, exact = (gradients(given, support, None, reference=wide, scale=2.0**-7)[0] for wide in (False, True))
    assert rms(ours, exact) <= 1.1 * rms(cpu, exact)


def test_what_does_not_fit_runs_without_tensor_cores(emulator: Emulator) -> None:
    given = given_of(torch.bfloat16)
    for change in ({"head_dim": 20}, {"value_dim": 20}, {"head_dim": 136}):
        with on_tensor_cores(emulator, expected=False):
            gradients(given_of(torch.bfloat16, n=20, **change), sb.Window(16), None)
    with on_tensor_cores(emulator, expected=False):
        gradients(given, lists(N, 1, 1, 9, batch=1), None)
        gradients([t.double() for t in given], sb.Window(16), None)


def map_arguments(dtype: torch.dtype) -> tuple[AttentionArguments, list[Tensor]]:
    """A call with maps that affine projections of its tokens make, and the projections."""
    given = [t.to(dtype) for t in (rand(2, 4, 90, 16), rand(2, 2, 90, 16, seed=1), rand(2, 2, 90, 16, seed=2))]
    weights = [0.2 * rand(1, 2, 4, 16, seed=3), 0.2 * rand(2, 1, 4, 16, seed=4)]
    maps = [OPERATORS.project(t, w, torch.zeros(*w.shape[:3])) for t, w in zip(given, weights)]
    fields = dict(zip(("query", "key", "value", "query_map", "key_map"), (*given, *maps)), low_rank=QUADRATIC)
    span = torch.tensor([[[0, 9], [10, 20], [30, 44], [5, 9], [60, 70], [70, 90]]], dtype=torch.int32)
    return operator_arguments(AttentionArguments, **fields, span=span, span_keys=20, block_q=16), weights


def error_of_maps(emulator: Emulator, dtype: torch.dtype) -> float:
    """Of d_query_map and d_key_map, and of dq and dk beyond a rounding where they hold those too."""
    arguments, weights = map_arguments(dtype)
    grad = rand(2, 4, 90, 16, seed=5).to(dtype)
    wide = AttentionArguments(
        *(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    )
    want = OPERATORS.attention_backward(grad.double(), None, *OPERATORS.attention(*wide), *wide)
    with on_tensor_cores(emulator):
        results = OPERATORS.attention(*arguments)
        alone = OPERATORS.attention_backward(grad, None, *results, *arguments)
        through = OPERATORS.attention_backward(grad, None, *results, *arguments, None, None, *weights)
    by_head = [w.double().expand(2, -1, -1, -1).repeat_interleave(h // w.shape[1], 1) for w, h in zip(weights, (4, 2))]
    for got, direct, of_map, weight in zip(through, alone[:2], alone[3:], by_head):
        if row_error(got, direct.double() + of_map.double() @ weight) > torch.finfo(dtype).eps:
            return torch.inf
    return max(row_error(got, exact) for got, exact in zip(alone[3:], want[3:]))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_maps_are_exact_and_go_on_through_given_projections(
    emulator: Emulator, dtype: torch.dtype
) -> None:
    assert error_of_maps(emulator, dtype) <= 2.5e-4


def test_sinks_inside_of_a_window_count_once(emulator: Emulator) -> None:
    arguments = map_arguments(torch.bfloat16)[0]._replace(span_sinks=5, low_rank=0, query_map=None, key_map=None)
    wide = AttentionArguments(
        *(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    )
    grad = rand(2, 4, 90, 16, seed=5).bfloat16()
    with on_tensor_cores(emulator):
        ours = OPERATORS.attention_backward(grad, None, *OPERATORS.attention(*arguments), *arguments)
    cpu = OPERATORS.attention_backward(grad, None, *OPERATORS.attention(*arguments), *arguments)
    want = OPERATORS.attention_backward(grad.double(), None, *OPERATORS.attention(*wide), *wide)
    yardsticks = [cpu]
    if not are_the_cpus(torch.bfloat16):
        one_each = torch.eye(90, dtype=torch.float64).expand(2, 2, 90, 90).contiguous()
        weights, _ = OPERATORS.attention(*wide._replace(value=one_each))[:2]
        value = wide.value.repeat_interleave(2, 1)
        exact = Definition(weights, weights, weights @ value, value, wide.scale)
        given = [arguments.query, arguments.key, arguments.value, grad, torch.zeros(2, 4, 90)]
        yardsticks.append(gradients_of(exact, given, want[:3]))
    for i in range(3):
        for error, most in ((rms, 1.1), (row_error, 1.5)):
            assert error(ours[i], want[i]) <= most * max(error(other[i], want[i]) for other in yardsticks)


# -------------------- bits


def bits(emulator: Emulator, given: list[Tensor], kind: str, **more: object) -> tuple[Tensor, Tensor, Tensor]:
    if kind == "quadratic":
        more["statistics"] = sb.fit_statistics(rand(1, 2, 99, 24, seed=4), rand(1, 1, 99, 24, seed=5), 4)
    with on_tensor_cores(emulator):
        return gradients(given, sb.Window(32), LOW_RANKS[kind], **more)


@pytest.mark.parametrize("kind", LOW_RANKS)
def test_no_bit_depends_on_padding(emulator: Emulator, kind: str) -> None:
    """On what it holds, and on how much of it there is."""
    mask = torch.zeros(1, N, dtype=torch.bool)
    mask[:, :7] = mask[:, 40::9] = True
    results = []
    for content in (0.0, torch.nan):
        given = [t.masked_fill(mask[:, None, :, None], content) for t in given_of(torch.bfloat16)[:4]]
        results.append(bits(emulator, [*given, given_of(torch.bfloat16)[4]], kind, key_padding_mask=mask))
    assert_same_bits(*results, NAMES)
    assert not any(t[:, :, mask[0]].any() for t in results[0])
    longer = pad(mask, (5, 40), value=True)
    given = [pad(t, (0, 0, 5, 40), value=1e4) for t in given_of(torch.bfloat16)[:4]]
    got = bits(emulator, [*given, pad(given_of(torch.bfloat16)[4], (5, 40))], kind, key_padding_mask=longer)
    assert_same_bits([t[:, :, 5 : 5 + N] for t in got], results[0], NAMES)


@pytest.mark.parametrize("kind", ["none", "quadratic"])
def test_another_run_and_layout_gives_the_same_bits(emulator: Emulator, kind: str) -> None:
    given = given_of(torch.float16)
    base = bits(emulator, given, kind)
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in given]  # not at 16 bytes
    inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in shifted]
    assert_same_bits(bits(emulator, [*shifted[:2], *inside[2:4], given[4]], kind), base, NAMES)


# -------------------- flags, conflicts, empty calls


def test_queries_where_subtraction_would_cancel_are_computed_again(emulator: Emulator) -> None:
    query, key, value, grad = (rand(1, 2, N, 16, seed=seed).bfloat16() for seed in range(4))
    query_map, key_map = 30 * torch.ones(1, 2, N, 3), 30 * torch.ones(1, 2, N, 3)
    query_map[..., -1] = key_map[..., -1] = 0
    query_map[:, :, ::2], key_map[:, :, 20:] = 0, 0  # every other query cancels
    index = torch.arange(20, dtype=torch.int32).expand(1, 2, 1, 20).contiguous()
    rest = [*[None] * 4, index, torch.full((1, 2, 1), 20, dtype=torch.int32), *[None] * 7, 1, 112, 1, 0, 0, False, 0.2]
    given = [query, key, value, query_map, key_map]
    wide = [t.double() for t in given]
    want = OPERATORS.attention_backward(grad.double(), None, *OPERATORS.attention(*wide, *rest), *wide, *rest)
    cpu = OPERATORS.attention_backward(grad, None, *OPERATORS.attention(*given, *rest), *given, *rest)
    with on_tensor_cores(emulator):
        ours = OPERATORS.attention_backward(grad, None, *OPERATORS.attention(*given, *rest), *given, *rest)
    for name, got, other, exact in zip(NAMES, ours, cpu, want):
        assert rms(got, exact) <= 1.1 * rms(other, exact), name


@pytest.mark.parametrize(("queries", "keys"), [(0, 7), (5, 0), (5, 7), (33, 1)])
def test_empty_and_short_calls_are_fine(emulator: Emulator, queries: int, keys: int) -> None:
    for low_rank in (None, sb.Quadratic(4)):
        given = [rand(1, 2, n, width).bfloat16() for n, width in ((queries, 24), (keys, 24), (keys, 16), (queries, 16))]
        with emulator.installed():
            statistics = sb.fit_statistics(rand(1, 2, 99, 24), rand(1, 2, 99, 24), 4) if low_rank else None
            got = gradients([*given, rand(1, 2, queries)], sb.Window(16), low_rank, statistics=statistics)
        assert [t.shape for t in got] == [t.shape for t in given[:3]] and all(t.isfinite().all() for t in got)


def conflicts_of(emulator: Emulator, kernel: bytes, low_rank: object, keys: int) -> int:
    """Bank conflicts of a kernel where lists have so many keys."""
    counts = []

    def observe(launch: object, is_after: bool) -> None:
        if launch.kernel == kernel:
            counts.append(emulator.statistics()["bank_conflicts"])

    given = given_of(torch.bfloat16, n=64)
    with emulator.installed(), emulator.observed(observe):
        gradients(given, sb.Window(keys), low_rank, statistics=statistics_of(low_rank, given))
    before, after = counts
    return after - before


@pytest.mark.parametrize("kernel", [b"attention_backward_tile", b"attention_backward_tile_keys"], ids=str)
@pytest.mark.parametrize("kind", ["none", "quadratic"])
def test_the_loops_over_keys_have_no_bank_conflicts(emulator: Emulator, kind: str, kernel: bytes) -> None:
    """So that further keys have none. Clusters are looked up wherever the keys' are."""
    few, more = (conflicts_of(emulator, kernel, LOW_RANKS[kind], keys) for keys in (16, 64))
    assert few == more


# -------------------- planted faults

QUERIES, KEYS = "attention_backward_tile.cuh", "attention_backward_tile_keys.cuh"
STAGES = "attention_tile_stages.cuh"
END_OF_LOOP = "    sync_warp();  // before the buffer is filled again\n"
# Where they are, and the kind of calls that show them.
FAULTS = {
    "missing barrier at the end of the loop": (STAGES, "none", END_OF_LOOP, "", "race|asynchronous copy"),
    "missing barrier at the end of the loop of keys": (KEYS, "none", "  " + END_OF_LOOP, "", "race|asynchronous copy"),
    "stale mask of a stage": (QUERIES, "none", "ballot(of_lane.key >= 0)", "ballot(true)", "d[qkv] (rms|row)"),
    "swapped operand": (
        QUERIES,
        "none",
        "      multiply_add(dq[c + 1], d_score, keys[2], keys[3], E{});\n",
        "      multiply_add(dq[c + 1], d_score, keys[3], keys[2], E{});\n",
        "dq (rms|row)",
    ),
    "lost last stage": (
        STAGES,
        "none",
        "if (position >= list.positions()) return false;",
        "if (position + kStage >= list.positions()) return false;",
        "d[qkv] (rms|row)",
    ),
    "a stage's keys for all": (KEYS, "none", "&& key < stage.hi;", ";", "d[kv] (rms|row)"),
    "lost low part of the queries' coordinates": (
        KEYS,
        "quadratic",
        "multiply_add(root[n], high, x[2], x[3], Bfloat16{});",
        "",
        "map",
    ),
    "what is taken back is not": (QUERIES, "quadratic", "of.removed_value += held * of_value", "(void)of_value", "map"),
    "clusters of both halves": (QUERIES, "centroid", "cluster % 2 != lane / kTile", "false", "race"),
}


def first_complaint(emulator: Emulator, kind: str) -> str:
    try:
        if kind == "quadratic":
            error = error_of_maps(emulator, torch.bfloat16)
            return f"map: {error:.1e}" if error > 2.5e-4 else ""
        given = given_of(torch.bfloat16)
        for support in (sb.Window(32, 16, sinks=9), ragged(N, 2, 60, False, 1)):
            wrong = excess(emulator, given, support, LOW_RANKS[kind])
            if wrong:
                return wrong
        return ""
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("kind", LOW_RANKS)
def test_the_kernel_without_a_fault_raises_no_complaint(emulator: Emulator, kind: str) -> None:
    assert first_complaint(emulator, kind) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_name(kernels: Kernels, fault: str) -> None:
    file, kind, old, new, name = FAULTS[fault]
    kernels.assert_caught(file, old, new, name, lambda emulator: first_complaint(emulator, kind), BFLOAT16)
