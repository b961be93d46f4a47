"""Gradients by the CUDA kernels, through the registered operators and their autograd on CPU tensors: parity
with the definition over the drawn cases of the CPU's table, causality and padding by bits, queries computed again."""

from __future__ import annotations

import pytest
import torch
from emulated import Emulator
from heavy_keys import Call, late_call
from operator_cases import operator_arguments
from oracle import CASES, assert_as_exact, assert_parity, draw, row_error
from testkit import assert_same_bits, rand
from torch import Tensor
from torch.nn.functional import pad

import scatterbrain as sb
from scatterbrain.operators.arguments import CENTROID, QUADRATIC, AttentionArguments

OPERATORS = torch.ops.scatterbrain
N, D = 76, 16
NAMES = ("out", "dq", "dk", "dv")

# -------------------- parity


@pytest.mark.parametrize("seed", range(CASES - 288, CASES))
def test_float32_matches_the_definition(emulator: Emulator, seed: int) -> None:
    case = draw(seed)
    with emulator.installed():
        assert_parity(case, torch.float32, 1e-5, case.low_rank_share())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(1, CASES, 31))
def test_half_precision_errs_no_more_than_twice_the_formula_in_torch(
    emulator: Emulator, seed: int, dtype: torch.dtype
) -> None:
    with emulator.installed():
        assert_parity(draw(seed, dtype), dtype, 0.0, 0.0)


@pytest.mark.parametrize("seed", range(2, CASES, 23))
def test_float64_accumulates_in_float64(emulator: Emulator, seed: int) -> None:
    case = draw(seed)
    with emulator.installed():
        results = case.judged(torch.float64)
    for got, exact in zip(results, case.defined()):
        assert got.dtype == torch.float64
        assert row_error(got, exact) <= max(1e-10, 1e-14 * case.low_rank_share())


# -------------------- calls of one row

SUPPORTS = {
    "window": sb.Window(20, 8),
    "window with sinks": sb.Window(29, 16, sinks=5),
    "pooled": sb.Routed(24, 16),
    "per query": sb.Routed(32, block_q=1, block_k=8, window=16),
    "empty": sb.Empty(),
}
LOW_RANKS = {"none": None, "quadratic": sb.Quadratic(4), "favor": sb.Favor(8), "centroid": sb.Centroid(5)}
PAIRS = [(s, k) for s in SUPPORTS for k in LOW_RANKS if (s, k) != ("empty", "none")]
CALLS = [(*pair, False) for pair in PAIRS] + [(s, k, True) for s, k in PAIRS if k != "centroid"]
CAUSAL_PAIRS = [(s, k) for s, k, is_causal in CALLS if is_causal]


def tokens() -> list[Tensor]:
    """query, key, value, and the gradients of out and lse."""
    q, k, v = rand(1, 2, N, D, seed=1), rand(1, 1, N, D, seed=2), rand(1, 1, N, D + 3, seed=3)
    return [q, k, v, rand(1, 2, N, D + 3, seed=4), rand(1, 2, N, seed=5)]


def arguments_of(support: str, kind: str, given: list[Tensor], is_causal: bool, **arguments: object) -> dict:
    """The call's arguments; its clusters, lists and statistics are those of the CPU."""
    low_rank = LOW_RANKS[kind]
    arguments |= dict(low_rank=low_rank, is_causal=is_causal)
    if kind == "quadratic":
        arguments["statistics"] = sb.fit_statistics(rand(1, 2, 99, D, seed=6), rand(1, 1, 99, D, seed=7), 4)
    return arguments | dict(support=SUPPORTS[support])


def gradients(emulator: Emulator, given: list[Tensor], **arguments: object) -> list[Tensor]:
    """out, dq, dk and dv where out and lse get a gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in given[:3]]
    with emulator.installed():
        out, lse = sb.attention(*leaves, return_lse=True, **arguments)
        got = torch.autograd.grad([out, lse], leaves, [given[3].to(out.dtype), given[4].to(lse.dtype)])
    return [out.detach(), *got]


def defined(given: list[Tensor], dtype: torch.dtype, **arguments: object) -> list[Tensor]:
    """The same by the definition, in ``dtype``."""
    leaves = [t.to(dtype).requires_grad_() for t in given[:3]]
    out, lse = sb.reference.attention(*leaves, return_lse=True, dtype=dtype, **arguments)
    return [out.detach(), *torch.autograd.grad([out, lse], leaves, [t.to(dtype) for t in given[3:]])]


@pytest.mark.parametrize(("support", "kind", "is_causal"), CALLS)
def test_gradients_of_out_and_lse_match_the_definition(
    emulator: Emulator, support: str, kind: str, is_causal: bool
) -> None:
    given = tokens()
    arguments = arguments_of(support, kind, given, is_causal)
    if kind == "centroid":
        arguments["statistics"] = sb.reference.cluster(*given[:2], 5)
    if isinstance(arguments["support"], sb.Routed):
        routing = {k: v for k, v in arguments.items() if k != "support"}
        arguments["support"] = sb.route(*given[:2], arguments["support"], **routing)
    got = gradients(emulator, given, **arguments)
    exact, plain = (defined(given, dtype, **arguments) for dtype in (torch.float64, torch.float32))
    for name, ours, want, same_dtype in zip(NAMES, got, exact, plain):
        assert_as_exact(ours, want, same_dtype, floor=2.5e-5, message=name)  # the CPU errs by 2.1e-5


@pytest.mark.parametrize(("support", "kind"), CAUSAL_PAIRS)
def test_no_bit_of_the_pasts_gradients_depends_on_the_future(emulator: Emulator, support: str, kind: str) -> None:
    """dq of a query by its edge alone. Where the future's results get no gradient, dk and dv by the past alone."""
    edge, given = 65, tokens()
    given[3][:, :, edge:] = given[4][:, :, edge:] = 0
    base = gradients(emulator, given, **arguments_of(support, kind, given, True))
    changed = [*(t.clone() for t in given[:3]), *given[3:]]
    for t in changed[:3]:
        t[:, :, edge:] = 1e4 * torch.sign(t[:, :, edge:])
    got = gradients(emulator, changed, **arguments_of(support, kind, given, True))
    assert_same_bits([t[:, :, :edge] for t in got], [t[:, :, :edge] for t in base], NAMES)
    for t in changed[:3]:
        t[:, :, edge:] = torch.nan
    got = gradients(emulator, changed, **arguments_of(support, kind, given, True))
    assert_same_bits([t[:, :, :edge] for t in got[:2]], [t[:, :, :edge] for t in base[:2]], NAMES)


@pytest.mark.parametrize(("support", "kind"), PAIRS)
def test_no_bit_depends_on_what_padding_holds(emulator: Emulator, support: str, kind: str) -> None:
    mask = torch.zeros(1, N, dtype=torch.bool)
    mask[:, :5] = mask[:, -9:] = mask[:, 8::7] = True
    results = []
    for content in (0.0, torch.nan):
        given = [t.masked_fill(mask[:, None, :, None], content) for t in tokens()[:4]] + tokens()[4:]
        arguments = arguments_of(support, kind, given, kind != "centroid", key_padding_mask=mask)
        results.append(gradients(emulator, given, **arguments))
    assert_same_bits(*results, NAMES)
    assert not any(t[:, :, mask[0]].any() for t in results[0])


@pytest.mark.parametrize(("support", "kind", "is_causal"), CALLS)
def test_no_bit_depends_on_how_much_padding_there_is(
    emulator: Emulator, support: str, kind: str, is_causal: bool
) -> None:
    base = gradients(emulator, tokens(), **arguments_of(support, kind, tokens(), is_causal))
    left, right = 5, 77
    mask = pad(torch.zeros(1, N, dtype=torch.bool), (left, right), value=True)
    given = [pad(t, (0, 0, left, right), value=1e4) for t in tokens()[:4]]
    given.append(pad(tokens()[4], (left, right), value=1e4))
    got = gradients(emulator, given, **arguments_of(support, kind, given, is_causal, key_padding_mask=mask))
    assert_same_bits([t[:, :, left : left + N] for t in got], base, NAMES)


@pytest.mark.parametrize(("support", "kind"), PAIRS)
def test_another_run_and_layout_gives_the_same_bits(emulator: Emulator, support: str, kind: str) -> None:
    arguments = arguments_of(support, kind, tokens(), False)
    heads_inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tokens()]
    assert_same_bits(*(gradients(emulator, given, **arguments) for given in (tokens(), heads_inside)), NAMES)


def test_several_segments_of_queries_and_keys_add_up(emulator: Emulator) -> None:
    """Without a causal edge: more keys than a segment of states has, more queries than one of their gradients."""
    for low_rank in (sb.Favor(4), sb.Centroid(3)):
        given = [
            rand(1, 2, 530, 16),
            rand(1, 1, 560, 16, seed=1),
            rand(1, 1, 560, 8, seed=2),
            rand(1, 2, 530, 8, seed=3),
        ]
        given.append(rand(1, 2, 530, seed=4))
        statistics = sb.reference.cluster(*given[:2], 3) if isinstance(low_rank, sb.Centroid) else None
        arguments = dict(support=sb.Window(8, 32), low_rank=low_rank, statistics=statistics)
        got = gradients(emulator, given, **arguments)
        want = defined(given, torch.float64, **arguments)
        assert all(row_error(ours, exact) <= 2e-5 for ours, exact in zip(got, want))


@pytest.mark.parametrize("queries", [0, 5])
@pytest.mark.parametrize("keys", [0, 7])
@pytest.mark.parametrize("kind", ["none", "favor"])
def test_empty_inputs_have_gradients_of_zero(emulator: Emulator, queries: int, keys: int, kind: str) -> None:
    given = [rand(1, 2, queries, 16), rand(1, 2, keys, 16), rand(1, 2, keys, 8), rand(1, 2, queries, 8)]
    given.append(rand(1, 2, queries))
    got = gradients(emulator, given, support=sb.Window(4), low_rank=LOW_RANKS[kind])
    assert [t.shape for t in got[1:]] == [t.shape for t in given[:3]]
    assert (queries and keys) or not any(t.any() for t in got)


def test_a_query_with_a_single_key_has_no_gradient(emulator: Emulator) -> None:
    given = [rand(1, 2, 40, 64), rand(1, 2, 1, 64, seed=1), rand(1, 2, 1, 48, seed=2), rand(1, 2, 40, 48, seed=3)]
    _, dq, dk, _ = gradients(emulator, [*given, torch.zeros(1, 2, 40)], support=sb.Window(4), low_rank=None)
    assert not dq.any() and not dk.any()


# -------------------- lists


def test_lists_of_any_content_are_safe(emulator: Emulator) -> None:
    """What comes out of lists that do not ascend is not defined, but made of the row's own tokens."""
    query, key, value = (t[:, :2, :64].clone().requires_grad_() for t in tokens()[:3])
    index = torch.tensor([-5, 3, 3, 1, 3, 1, 2**31 - 1, -(2**31)], dtype=torch.int32).expand(1, 2, 4, 8).contiguous()
    span = torch.tensor([[[-9, 0], [60, 69], [2**31 - 10, 2**31 - 1], [7, 3]]], dtype=torch.int32)
    given = dict(query=query, key=key, value=value, index=index, count=torch.full((1, 2, 4), 99, dtype=torch.int32))
    arguments = operator_arguments(AttentionArguments, **given, span=span, span_keys=9, block_k=4)
    with emulator.installed():
        out, _ = OPERATORS.attention(*arguments)
        assert all(torch.isfinite(t).all() for t in torch.autograd.grad(out.sum(), [query, key, value]))


def listing_call(n: int) -> AttentionArguments:
    """Every query lists one key, the same for all."""
    given = dict(zip(("query", "key", "value"), (rand(1, 1, n, 16, seed=i).requires_grad_() for i in range(3))))
    index, count = torch.zeros(1, 1, n, 1, dtype=torch.int32), torch.ones(1, 1, n, dtype=torch.int32)
    return operator_arguments(AttentionArguments, **given, index=index, count=count, block_q=1)


def test_a_key_that_every_query_lists_takes_linear_time(emulator: Emulator) -> None:
    shuffles = []
    for n in (400, 800):
        arguments = listing_call(n)
        before = emulator.statistics()
        with emulator.installed():
            out, _ = OPERATORS.attention(*arguments)
            torch.autograd.grad(out.sum(), arguments[:3])
        shuffles.append(emulator.statistics()["shared_accesses"] - before["shared_accesses"])
    assert shuffles[1] <= 2.2 * shuffles[0], shuffles


def spans_call(n: int, spans: Tensor) -> tuple[AttentionArguments, list[Tensor]]:
    """A span (n, 2) for every query, of which little is known but that none is longer than the row."""
    leaves = [rand(1, 1, n, 16, seed=seed).requires_grad_() for seed in range(3)]
    fields = dict(zip(("query", "key", "value"), leaves), span=spans[None].int(), span_keys=n + 18, block_q=1)
    return operator_arguments(AttentionArguments, **fields), leaves


def test_spans_of_every_length_have_gradients(emulator: Emulator) -> None:
    n = 600
    ends = torch.randint(-9, n + 9, (n, 2), generator=torch.Generator().manual_seed(0)).sort(-1).values
    ends[:70, 1] = ends[:70, 0] + torch.arange(70)
    ends[70:80] = torch.tensor([0, n])
    arguments, leaves = spans_call(n, ends)
    grad = rand(1, 1, n, 16, seed=3)
    with emulator.installed():
        got = torch.autograd.grad(OPERATORS.attention(*arguments)[0], leaves, grad)
    query, key, value = wide = [t.detach().double().requires_grad_() for t in leaves]
    at = torch.arange(n)
    outside = (at < ends[:, :1]) | (at >= ends[:, 1:])
    weight = (0.2 * query @ key.mT).masked_fill(outside, -torch.inf).softmax(-1).nan_to_num()
    want = torch.autograd.grad(weight @ value, wide, grad.double())
    for ours, exact in zip(got, want):
        assert row_error(ours, exact) <= 1e-5


def test_spans_far_shorter_than_their_bound_take_linear_time(emulator: Emulator) -> None:
    """As those of packed sequences, whose lengths the host does not know."""
    accesses = []
    for n in (512, 1024):
        first = torch.arange(n) // 32 * 32
        arguments, leaves = spans_call(n, torch.stack([first, first + 32], -1))
        before = emulator.statistics()["shared_accesses"]
        with emulator.installed():
            torch.autograd.grad(OPERATORS.attention(*arguments)[0].sum(), leaves)
        accesses.append(emulator.statistics()["shared_accesses"] - before)
    assert accesses[1] <= 2.2 * accesses[0], accesses


def test_more_entries_than_32_bits_count_are_an_error(emulator: Emulator) -> None:
    index = torch.zeros((), dtype=torch.int32).expand(1, 1, 2**16, 2**15)
    tokens = rand(1, 1, 2**16, 1)
    fields = dict(zip(("query", "key", "value"), (tokens, tokens, tokens)), index=index, block_q=1)
    arguments = operator_arguments(AttentionArguments, **fields, count=index[..., 0].contiguous())
    with emulator.installed(), pytest.raises(RuntimeError, match=r"fewer than 2\^31 entries .* got 2147483648 .* use"):
        OPERATORS.attention_backward(tokens, None, tokens, tokens[..., 0], *arguments)


def sparse_rows(n: int, case: str) -> dict:
    """Of n queries and keys, in which all but a few queries see no key, or all but two keys are padding."""
    if case == "queries before the first key":
        return dict(is_causal=True, query_offset=8 - n)
    mask = torch.ones(1, n, dtype=torch.bool)
    mask[:, 0] = mask[:, -1] = False
    return dict(is_causal="causal" in case, key_padding_mask=mask, query_padding_mask=torch.zeros_like(mask))


@pytest.mark.parametrize("case", ["queries before the first key", "two keys", "two keys of causal rows"])
def test_what_is_summed_key_by_key_takes_linear_time(emulator: Emulator, case: str) -> None:
    accesses = []
    for n in (300, 600):
        leaves = [rand(1, 1, n, 16, seed=seed).requires_grad_() for seed in range(3)]
        arguments = dict(support=sb.Window(4), low_rank=sb.Favor(4), **sparse_rows(n, case))
        before = emulator.statistics()["shared_accesses"]
        with emulator.installed():
            out = sb.attention(*leaves, **arguments)
            got = torch.autograd.grad(out.sum(), leaves)
        accesses.append(emulator.statistics()["shared_accesses"] - before)
    assert accesses[1] <= 2.2 * accesses[0], accesses
    leaves = [t.detach().double().requires_grad_() for t in leaves]
    want = torch.autograd.grad(sb.reference.attention(*leaves, **arguments).sum(), leaves)
    assert all(row_error(ours, exact) <= 2.5e-4 for ours, exact in zip(got, want))  # the CPU errs by 1.1e-4


# -------------------- cancelling


def peaked_call(n: int) -> tuple[AttentionArguments, list[Tensor]]:
    """L overrates the listed keys by far, so that every query is computed again: few keys have nearly all of it, and
    every other query lists them."""
    leaves = [rand(1, 2, n, 16, seed=seed) for seed in range(3)]
    query_map, key_map = 0.3 * rand(1, 2, n, 3, seed=3), 0.3 * rand(1, 2, n, 3, seed=4)
    query_map[..., 0], key_map[:, :, :20, 0] = 4.0, 500.0
    query_map[:, :, 1::3, -1] = -60.0  # queries without a low-rank part to speak of, which are not
    leaves = [t.requires_grad_() for t in (*leaves, query_map, key_map)]
    index = torch.arange(20, dtype=torch.int32).expand(1, 2, 1, 20).contiguous()
    given = dict(zip(("query", "key", "value", "query_map", "key_map"), leaves), index=index, low_rank=QUADRATIC)
    count = torch.full((1, 2, 1), 20, dtype=torch.int32)
    return operator_arguments(AttentionArguments, **given, count=count, block_q=n, scale=0.25), leaves


@pytest.mark.parametrize("is_causal", [False, True])
def test_queries_that_are_computed_again_have_gradients_as_exact_as_others(emulator: Emulator, is_causal: bool) -> None:
    n = 130
    arguments, leaves = peaked_call(n)
    grads = [rand(1, 2, n, 16, seed=5), rand(1, 2, n, seed=6)]
    with emulator.installed():
        got = torch.autograd.grad(OPERATORS.attention(*arguments._replace(is_causal=is_causal)), leaves, grads)
    query, key, value, query_map, key_map = wide = [t.detach().double().requires_grad_() for t in leaves]
    x, y = query_map[..., :-1], key_map[..., :-1]
    low_rank = (query_map[..., -1:] + key_map[..., -1][..., None, :]).exp() * (1 + x @ y.mT / 2).square()
    weight = torch.where(torch.arange(n) < 20, (0.25 * query @ key.mT).exp(), low_rank)
    weight = weight.tril() if is_causal else weight
    total = weight.sum(-1)
    out, lse = weight @ value / total[..., None], total.log()
    want = torch.autograd.grad([out, lse], wide, [t.double() for t in grads])
    for name, ours, exact in zip(("dq", "dk", "dv", "d_query_map", "d_key_map"), got, want):
        assert row_error(ours, exact) <= (2.5e-5 if "map" in name else 1e-5), name


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_key_that_states_hold_out_has_its_gradients(emulator: Emulator, is_causal: bool) -> None:
    """An attention sink: its queries are computed again, with states that do not hold it."""
    call, support = Call(40.0, [20], tokens=160), sb.Window(24)
    with emulator.installed():
        results = call.run(support, is_causal)
    exact, plain = (call.defined(support, is_causal, dtype) for dtype in (torch.float64, torch.float32))
    for got, want, same_dtype in zip(results, exact, plain):
        assert_as_exact(got, want, same_dtype, floor=5e-5)  # float32 states have no centre


def test_a_key_that_states_hold_out_at_first_has_its_gradients(emulator: Emulator) -> None:
    arguments, _ = late_call()
    leaves = [t.requires_grad_() for t in arguments[:5]]
    with emulator.installed():
        out, _ = OPERATORS.attention(*leaves, *arguments[5:])
        _, dv, dx, dy = torch.autograd.grad(out, leaves[1:], rand(*out.shape, seed=8))
    value, query_map, key_map = (t.detach().double().requires_grad_() for t in leaves[2:])
    low_rank = (1 + query_map[..., :-1] @ key_map[..., :-1].mT / 2).square()
    weight = (low_rank * (query_map[..., -1:] + key_map[..., -1][..., None, :]).exp()).tril()
    dense = weight @ value / weight.sum(-1, keepdim=True)
    want = torch.autograd.grad(dense, (value, query_map, key_map), rand(*out.shape, seed=8).double())
    for ours, exact in zip((dv, dx, dy), want):
        assert row_error(ours, exact) <= 1e-5


# -------------------- gradients of maps


def map_call(kind: int, packed: bool) -> tuple[AttentionArguments, list[Tensor]]:
    """A call with maps that affine projections of its tokens make, and the projections."""
    given = [rand(2, 4, 70, 16), rand(2, 2, 70, 16, seed=1), rand(2, 2, 70, 16, seed=2)]
    weights = [0.2 * rand(1, 2, 4, 16, seed=3), 0.2 * rand(2, 1, 4, 16, seed=4)]
    project = OPERATORS.project_packed if packed else OPERATORS.project
    maps = [project(t, w, torch.zeros(*w.shape[:3])) for t, w in zip(given, weights)]
    span = torch.tensor([[[0, 9], [10, 20], [30, 44], [5, 9], [60, 70]]], dtype=torch.int32)
    fields = dict(zip(("query", "key", "value", "query_map", "key_map"), (*given, *maps)), low_rank=kind, span=span)
    return operator_arguments(AttentionArguments, **fields, span_keys=16, packed_rank=3 * packed), weights


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_maps_go_on_through_given_projections(emulator: Emulator, packed: bool) -> None:
    arguments, weights = map_call(QUADRATIC, packed)
    grad = rand(2, 4, 70, 16, seed=5)
    with emulator.installed():
        out, lse = OPERATORS.attention(*arguments)
        dq, dk, dv, dx, dy = OPERATORS.attention_backward(grad, None, out, lse, *arguments)
        through = OPERATORS.attention_backward(grad, None, out, lse, *arguments, None, None, *weights)
    assert dx.shape == (2, 4, 70, 4) and dy.shape == (2, 2, 70, 4)
    assert through[3].shape == (2, 4, 0, 4) and through[4].shape == (2, 2, 0, 4)
    by_head = [w.expand(2, -1, -1, -1).repeat_interleave(h // w.shape[1], 1) for w, h in zip(weights, (4, 2))]
    assert torch.equal(through[2], dv)
    for got, alone, of_map, weight in zip(through, (dq, dk), (dx, dy), by_head):
        assert row_error(got, alone + of_map @ weight) <= 1e-6


def test_results_have_the_shapes_and_types_that_the_fakes_promise(emulator: Emulator) -> None:
    arguments, _ = map_call(QUADRATIC, False)
    half = arguments._replace(**{name: getattr(arguments, name).half() for name in ("query", "key", "value")})
    for call in (arguments, half, half._replace(low_rank=0, query_map=None, key_map=None)):
        with emulator.installed():
            results = OPERATORS.attention(*call)
            got = OPERATORS.attention_backward(torch.ones_like(results[0]), None, *results, *call)
        want = OPERATORS.attention_backward(torch.ones_like(results[0]), None, *results, *call)
        assert [(t.shape, t.dtype, t.stride()) for t in got] == [(t.shape, t.dtype, t.stride()) for t in want]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_gradient_of_out_may_have_another_dtype(emulator: Emulator, dtype: torch.dtype) -> None:
    """As on the CPU: it is converted."""
    given = [rand(1, 2, 30, 16, seed=seed, dtype=dtype) for seed in range(3)]
    span = torch.tensor([[[0, 9], [10, 20]]], dtype=torch.int32)
    fields = dict(zip(("query", "key", "value"), given), span=span, span_keys=10)
    arguments = operator_arguments(AttentionArguments, **fields)
    grad = rand(1, 2, 30, 16, seed=3).half()
    with emulator.installed():
        results = OPERATORS.attention(*arguments)
        want = OPERATORS.attention_backward(grad.to(dtype), None, *results, *arguments)
        got = OPERATORS.attention_backward(grad, None, *results, *arguments)
    assert_same_bits(got[:3], want[:3], NAMES[1:])


def test_nothing_is_saved_for_the_backward_pass(emulator: Emulator) -> None:
    arguments, _ = map_call(QUADRATIC, False)
    with emulator.installed():
        saved = OPERATORS.attention_with_state(*arguments)[2:]
        sizes = OPERATORS.saved_sizes("cpu", torch.float32, 2, 4, 70, 16, 2, 70, 16, CENTROID, 5, 16, 16, False)
    assert [t.shape for t in saved] == [(0,), (0,)] and sizes == ([0], [0], "float32")
