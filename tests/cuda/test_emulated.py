"""The CUDA kernels, run by the registered operators on CPU tensors through the emulator: parity with the definition
over the drawn cases of the CPU's table, causality and padding by bits, projections."""

from __future__ import annotations

import pytest
import torch
from cuda_calls import (
    CAUSAL_PAIRS,
    LOW_RANKS,
    PAIRS,
    SUPPORTS,
    N,
    attend,
    cancelling_call,
    excess,
    tokens,
)
from emulated import Emulator
from oracle import CASES, draw, row_error
from testkit import assert_same_bits, rand
from torch.nn.functional import pad

import scatterbrain as sb

OPERATORS = torch.ops.scatterbrain
CAUSAL_CALLS = [(*pair, torch.float32) for pair in CAUSAL_PAIRS]
CAUSAL_CALLS += [(support, kind, torch.bfloat16) for support, kind in CAUSAL_PAIRS if support == "per query"]

# -------------------- parity


# The other cases' outputs are compared with their gradients, without lse, in test_emulated_backward.py.
@pytest.mark.parametrize("seed", [*range(CASES - 288), *range(CASES - 288, CASES, 4)])
def test_float32_matches_the_definition(emulator: Emulator, seed: int) -> None:
    assert not excess(emulator, draw(seed), torch.float32, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(0, CASES, 11))
def test_half_precision_errs_no_more_than_twice_the_formula_in_torch(
    emulator: Emulator, seed: int, dtype: torch.dtype
) -> None:
    assert not excess(emulator, draw(seed, dtype), dtype, 0.0)


@pytest.mark.parametrize("seed", range(48))
def test_float64_accumulates_in_float64(emulator: Emulator, seed: int) -> None:
    case = draw(seed)
    assert not excess(emulator, case, torch.float64, max(1e-10, 1e-14 * case.low_rank_share()))


def test_the_widest_heads_and_values_fit(emulator: Emulator) -> None:
    query, key, value = rand(1, 2, 70, 256), rand(1, 1, 70, 256, seed=1), rand(1, 1, 70, 256, seed=2)
    statistics = sb.fit_statistics(query, key, 9)
    arguments = dict(support=sb.Window(16), low_rank=sb.Quadratic(9), statistics=statistics, is_causal=True)
    with emulator.installed():
        out = sb.attention(query, key, value, **arguments)
        with pytest.raises(RuntimeError, match="query, key and value at most 256 wide on a CUDA device, got 257"):
            sb.attention(rand(1, 1, 9, 257), rand(1, 1, 9, 257), rand(1, 1, 9, 8), sb.Window(4), None)
    exact = sb.reference.attention(query, key, value, **arguments)
    assert row_error(out, exact) <= 1e-5


@pytest.mark.parametrize(
    "low_rank", [sb.Quadratic(4), sb.Favor(16), sb.Centroid(5)], ids=["quadratic", "favor", "centroid"]
)
def test_states_of_several_segments_add_up(emulator: Emulator, low_rank: object) -> None:
    query, key, value = rand(1, 2, 20, 16), rand(1, 1, 1300, 16, seed=1), rand(1, 1, 1300, 16, seed=2)
    statistics = sb.fit_statistics(query, key, 4) if isinstance(low_rank, sb.Quadratic) else None
    if isinstance(low_rank, sb.Centroid):
        statistics = sb.reference.cluster(query, key, 5)
    arguments = dict(support=sb.Window(64), low_rank=low_rank, statistics=statistics)
    with emulator.installed():
        out = sb.attention(query, key, value, **arguments)
    assert row_error(out, sb.reference.attention(query, key, value, **arguments)) <= 1e-5


@pytest.mark.parametrize("low_rank", [sb.Favor(16), sb.Centroid(5)], ids=["favor", "centroid"])
def test_segments_count_from_the_rows_first_key(emulator: Emulator, low_rank: object) -> None:
    """Padding before, behind and inside of a row of several segments changes no bit."""
    given = rand(1, 2, 20, 16), rand(1, 1, 1100, 16, seed=1), rand(1, 1, 1100, 16, seed=2)
    holes = torch.arange(1100)[None] % 7 == 3
    base = attend(emulator, given, sb.Empty(), low_rank, key_padding_mask=holes)
    mask = pad(holes, (30, 520), value=True)
    for content in (1e4, torch.nan):
        moved = [given[0], *(pad(t, (0, 0, 30, 520)) for t in given[1:])]
        moved[1:] = [t.masked_fill(mask[:, None, :, None], content) for t in moved[1:]]
        assert_same_bits(attend(emulator, moved, sb.Empty(), low_rank, key_padding_mask=mask), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # bfloat16: on tensor cores
@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("low_rank", [sb.Quadratic(4), sb.Favor(16)], ids=["quadratic", "favor"])
def test_segments_without_a_number_stay_none(
    emulator: Emulator, low_rank: object, is_causal: bool, dtype: torch.dtype
) -> None:
    """Keys 64 to 127, a causal segment, and 512 to 575, which begin a segment and here are all of it."""
    query, key, value = (rand(1, 1, 576, 16, seed=i, dtype=dtype) for i in range(3))
    statistics = sb.fit_statistics(query.float(), key.float(), 4) if isinstance(low_rank, sb.Quadratic) else None
    first = 64 if is_causal else 512
    key[:, :, first : first + 64] = torch.nan
    with emulator.installed():
        out = sb.attention(query, key, value, sb.Window(8), low_rank, statistics=statistics, is_causal=is_causal)
    assert out[:, :, first if is_causal else 0 :].isnan().all() and not (is_causal and out[:, :, :first].isnan().any())


# -------------------- causality and padding


@pytest.mark.parametrize(("support", "kind", "dtype"), CAUSAL_CALLS)
def test_no_bit_of_the_past_depends_on_the_future(
    emulator: Emulator, support: str, kind: str, dtype: torch.dtype
) -> None:
    given = [t.to(dtype) for t in tokens()]
    base = attend(emulator, given, SUPPORTS[support], LOW_RANKS[kind], is_causal=True)
    for edge, content in ((1, 1e4), (64, torch.nan), (101, 1e4), (101, torch.nan)):
        changed = [t.clone() for t in given]
        for t in changed:
            t[:, :, edge:] = content * torch.sign(t[:, :, edge:])
        got = attend(emulator, changed, SUPPORTS[support], LOW_RANKS[kind], is_causal=True)
        assert_same_bits([t[:, :, :edge] for t in got], [t[:, :, :edge] for t in base], ("out", "lse"))


@pytest.mark.parametrize(("support", "kind"), PAIRS)
def test_no_bit_depends_on_what_padding_holds(emulator: Emulator, support: str, kind: str) -> None:
    """To the left, to the right and in holes."""
    mask = torch.zeros(1, N, dtype=torch.bool)
    mask[:, :9] = mask[:, N - 31 :] = mask[:, 13::4] = True
    is_causal = kind != "centroid"
    results = []
    for content in (0.0, 1e4, torch.nan, torch.inf):
        given = [t.masked_fill(mask[:, None, :, None], content) for t in tokens()]
        results.append(
            attend(emulator, given, SUPPORTS[support], LOW_RANKS[kind], is_causal=is_causal, key_padding_mask=mask)
        )
    for got in results[1:]:
        assert_same_bits(got, results[0], ("out", "lse"))
    assert not results[0][0][:, :, mask[0]].any()


@pytest.mark.parametrize(
    ("support", "kind", "is_causal"), [(*pair, False) for pair in PAIRS] + [(*pair, True) for pair in CAUSAL_PAIRS]
)
def test_no_bit_depends_on_how_much_padding_there_is(
    emulator: Emulator, support: str, kind: str, is_causal: bool
) -> None:
    base = attend(emulator, tokens(), SUPPORTS[support], LOW_RANKS[kind], is_causal=is_causal)
    for left, right in ((5, 77), (64, 3)):
        mask = pad(torch.zeros(1, N, dtype=torch.bool), (left, right), value=True)
        given = [pad(t, (0, 0, left, right), value=1e4) for t in tokens()]
        got = attend(emulator, given, SUPPORTS[support], LOW_RANKS[kind], is_causal=is_causal, key_padding_mask=mask)
        assert_same_bits([t[:, :, left : left + N] for t in got], base, ("out", "lse"))


def test_lists_of_any_content_are_safe(emulator: Emulator) -> None:
    """Entries that name no key list nothing; what comes out of lists that do not ascend is not defined, but computed
    from the row's own keys."""
    query, key, value = (t[:, :2] for t in tokens())
    blocks = -(-N // 16)
    index = torch.tensor([-5, 3, 3, 1, 2**31 - 1, -(2**31)], dtype=torch.int32).expand(1, 2, blocks, 6).contiguous()
    count = torch.full((1, 2, blocks), 99, dtype=torch.int32)
    nothing = [None] * 6
    with emulator.installed():
        out, lse = OPERATORS.attention(
            query,
            key,
            value,
            *nothing,
            index,
            count,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            0,
            16,
            4,
            0,
            0,
            False,
            0.2,
        )
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()


# -------------------- cancelling


@pytest.mark.parametrize("is_causal", [False, True])
def test_where_subtraction_would_cancel_queries_are_computed_again(emulator: Emulator, is_causal: bool) -> None:
    arguments = cancelling_call(N, is_causal)
    with emulator.installed():
        out, lse = OPERATORS.attention(*arguments)
    want, want_lse = OPERATORS.attention(*(t.double() for t in arguments[:5]), *arguments[5:])
    assert row_error(out, want) <= 1e-5 and float((lse - want_lse).abs().max()) <= 1e-5


@pytest.mark.parametrize("is_causal", [False, True])
def test_queries_that_are_computed_again_take_linear_time(emulator: Emulator, is_causal: bool) -> None:
    """Every query of these calls is one, but for the first 128 of causal ones, which read no state. Warps that walk
    their keys exchange the largest exponent of every step."""
    shuffles = []
    for n in (900, 1800):
        before = emulator.statistics()["shuffles"]
        with emulator.installed():
            OPERATORS.attention(*cancelling_call(n, is_causal))
        shuffles.append(emulator.statistics()["shuffles"] - before)
    assert shuffles[1] <= 2.2 * shuffles[0], shuffles


# -------------------- bits, layouts, projections


@pytest.mark.parametrize(("support", "kind"), PAIRS)
def test_two_runs_and_every_layout_give_the_same_bits(emulator: Emulator, support: str, kind: str) -> None:
    base = attend(emulator, tokens(), SUPPORTS[support], LOW_RANKS[kind])
    heads_inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tokens()]
    width_first = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tokens()]
    for given in (heads_inside, width_first):
        assert_same_bits(attend(emulator, given, SUPPORTS[support], LOW_RANKS[kind]), base, ("out", "lse"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_projections_and_their_gradients_match_the_definition(
    emulator: Emulator, dtype: torch.dtype, heads: int, batch: int
) -> None:
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    x = rand(3, 4, 300, 20).to(dtype)
    weight, bias = rand(batch, heads, 7, 20, seed=1, dtype=accumulate), rand(batch, heads, 7, seed=2, dtype=accumulate)
    grad = rand(3, 4, 300, 7, seed=3, dtype=accumulate)
    grad[:, :, 9], x[:, :, 9] = 0, torch.nan  # padding: no gradient, and never read
    with emulator.installed():
        z, packed = OPERATORS.project(x, weight, bias), OPERATORS.project_packed(x, weight, bias)
        dx, dw, db = OPERATORS.project_backward(grad, x, weight)
        assert_same_bits(OPERATORS.project_backward(grad, x, weight), (dx, dw, db), ("dx", "dw", "db"))
    clean = x.double()
    clean[:, :, 9] = 0
    by_head = [t.double().repeat_interleave(4 // heads, dim=1) for t in (weight, bias)]
    want = (torch.einsum("bhnd,bhod->bhno", clean, by_head[0].expand(3, -1, -1, -1)) + by_head[1][:, :, None]).clone()
    valid = torch.arange(300) != 9
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert row_error(z[:, :, valid], want[:, :, valid]) <= tolerance and torch.isnan(z[:, :, 9]).all()
    assert torch.equal(packed[..., :6][:, :, valid], z[..., :6][:, :, valid])
    assert (packed[..., 6] == 1).all() and not packed[..., 8:].any()
    log2e = 1.4426950408889634
    assert torch.allclose(packed[..., 7][:, :, valid].double(), want[..., 6][:, :, valid] * log2e, tolerance, tolerance)
    wide = grad.double()
    narrow = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, tolerance)
    want_dx = torch.einsum("bhno,bhod->bhnd", wide, by_head[0].expand(3, -1, -1, -1))
    assert dx.dtype == dtype and row_error(dx, want_dx) <= narrow
    per_row = torch.einsum("bhno,bhnd->bhod", wide, clean).unflatten(1, (heads, -1)).sum(2)
    per_bias = wide.sum(2).unflatten(1, (heads, -1)).sum(2)
    want_dw, want_db = (
        (per_row, per_bias) if batch == 3 else (per_row.sum(0, keepdim=True), per_bias.sum(0, keepdim=True))
    )
    assert row_error(dw, want_dw) <= tolerance and row_error(db, want_db) <= tolerance


@pytest.mark.parametrize("queries", [0, 5])
@pytest.mark.parametrize("keys", [0, 7])
def test_empty_inputs_are_fine(emulator: Emulator, queries: int, keys: int) -> None:
    for low_rank in (None, sb.Favor(8)):
        given = [rand(1, 2, queries, 16), rand(1, 2, keys, 16), rand(1, 2, keys, 16)]
        out, lse = attend(emulator, given, sb.Window(4), low_rank)
        assert out.shape == (1, 2, queries, 16) and (keys or (not out.any() and (lse == -torch.inf).all()))
    with emulator.installed():
        assert OPERATORS.project(rand(1, 2, 0, 16), rand(1, 1, 3, 16), None).shape == (1, 2, 0, 3)
        assert not any(
            t.any() for t in OPERATORS.project_backward(rand(1, 2, 0, 3), rand(1, 2, 0, 16), rand(1, 1, 3, 16))
        )


@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_of_keys_longer_than_the_row_take_no_time_for_keys_that_do_not_exist(
    emulator: Emulator, is_causal: bool
) -> None:
    query, key, value = (t[:, :, :40] for t in tokens())
    index = torch.tensor([0, 1, 2**31 - 1], dtype=torch.int32).expand(1, 2, 3, 3).contiguous()
    count = torch.full((1, 2, 3), 3, dtype=torch.int32)
    results, shuffles = [], []
    for block_k in (40, 2**20):
        before = emulator.statistics()["shuffles"]
        with emulator.installed():
            lists = index, count, *[None] * 7
            call = query, key, value, *[None] * 6, *lists, 0, 16, block_k, 0, 0, is_causal, 0.2
            results.append(OPERATORS.attention(*call))
        shuffles.append(emulator.statistics()["shuffles"] - before)
    assert_same_bits(*results)
    assert shuffles[1] <= shuffles[0], shuffles


# -------------------- sizes that no test can fill


@pytest.mark.parametrize(("support", "kind"), [("pooled", k) for k in LOW_RANKS])
def test_blocks_that_take_several_tasks_give_the_same_bits(emulator: Emulator, support: str, kind: str) -> None:
    """Grids are limited, tasks are not: here the device lets a launch have three blocks."""
    base = attend(emulator, tokens(), SUPPORTS[support], LOW_RANKS[kind])
    with emulator.limited_to(3):
        got = attend(emulator, tokens(), SUPPORTS[support], LOW_RANKS[kind])
    assert_same_bits(got, base, ("out", "lse"))


def test_projections_by_blocks_that_take_several_tasks_give_the_same_bits(emulator: Emulator) -> None:
    x, weight, grad = rand(2, 4, 300, 20), rand(1, 2, 7, 20, seed=1), rand(2, 4, 300, 7, seed=2)

    def results() -> list[torch.Tensor]:
        with emulator.installed():
            return [OPERATORS.project(x, weight, None), *OPERATORS.project_backward(grad, x, weight)]

    base = results()
    with emulator.limited_to(2):
        assert_same_bits(results(), base)


@pytest.mark.parametrize("far", [0, 1, 2], ids=["batch", "head", "token"])
@pytest.mark.parametrize("kind", LOW_RANKS)
def test_offsets_beyond_32_bits_reach_the_right_rows(emulator: Emulator, kind: str, far: int) -> None:
    """Rows lie far apart in memory that nothing else touches, so that little of it is ever there."""
    shape, stride = (2, 2, 40, 16), [2 * 40 * 16, 40 * 16, 16]
    stride[far] = 2**31 // (shape[far] - 1) + 64
    near = [rand(*shape, seed=seed).bfloat16() for seed in range(3)]
    spread = []
    for t in near:
        room = torch.empty(1 + sum((n - 1) * s for n, s in zip(shape, [*stride, 1])), dtype=torch.bfloat16)
        spread.append(room.as_strided(shape, [*stride, 1]).copy_(t))
    assert all((n - 1) * s >= 2**31 for n, s in [(shape[far], spread[0].stride(far))])
    statistics = sb.fit_statistics(near[0].float(), near[1].float(), 4) if kind == "quadratic" else None
    base, got = (
        attend(emulator, given, sb.Window(8), LOW_RANKS[kind], statistics=statistics) for given in (near, spread)
    )
    assert_same_bits(got, base, ("out", "lse"))


@pytest.mark.parametrize("far", [0, 1, 2], ids=["batch", "head", "token"])
def test_projections_reach_rows_beyond_32_bits(emulator: Emulator, far: int) -> None:
    shape, stride = (2, 2, 40, 16), [2 * 40 * 16, 40 * 16, 16]
    stride[far] = 2**31 // (shape[far] - 1) + 64
    room = torch.empty(1 + sum((n - 1) * s for n, s in zip(shape, [*stride, 1])), dtype=torch.bfloat16)
    near = rand(*shape).bfloat16()
    spread = room.as_strided(shape, [*stride, 1]).copy_(near)
    weight, grad = rand(1, 2, 5, 16, seed=1), rand(2, 2, 40, 5, seed=2)
    with emulator.installed():
        got, base = (
            [OPERATORS.project(x, weight, None), *OPERATORS.project_backward(grad, x, weight)] for x in (spread, near)
        )
    assert_same_bits(got, base)


@pytest.mark.parametrize("kind", LOW_RANKS)
def test_expanded_rows_are_read_in_place(emulator: Emulator, kind: str) -> None:
    """Strides of 0, and rows that overlap."""
    row = rand(1, 1, 1, 16)
    query, key = row.expand(2, 4, 50, 16), rand(90).as_strided((2, 2, 60, 16), (3, 0, 1, 1))
    value = rand(1, 1, 60, 5, seed=3).expand(2, 2, 60, 5)
    given = [query, key, value]
    statistics = sb.fit_statistics(rand(1, 4, 50, 16), rand(1, 2, 60, 16, seed=1), 4) if kind == "quadratic" else None
    copies = [t.contiguous() for t in given]
    base, got = (attend(emulator, g, sb.Window(8), LOW_RANKS[kind], statistics=statistics) for g in (copies, given))
    assert_same_bits(got, base, ("out", "lse"))
