"""Operators below autograd that untraced calls use: results saved for the backward pass, projections, routing and
attention in one call, gradients of maps that continue to the tokens, packed rows."""

from __future__ import annotations

import pytest
import torch
from operator_cases import (
    DTYPES,
    MASK,
    SAMPLES,
    WITHOUT_GRADIENT,
    attention_arguments,
    detached,
    operator_arguments,
)
from testkit import KV, B, H, N, assert_same_bits, leaves, qkv, rand
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import scatterbrain as sb
from scatterbrain.operators.arguments import (
    QUADRATIC,
    AttentionArguments,
    CentroidArguments,
    ForwardResults,
    QuadraticArguments,
    RouteArguments,
)

GRADIENTS = ("dq", "dk", "dv", "d_query_map", "d_key_map")


def check_saved_results(arguments: AttentionArguments) -> tuple[Tensor, Tensor]:
    """The saved key/value state and scores, after a check that the backward pass has the same bits with and without."""
    torch.library.opcheck(torch.ops.scatterbrain.attention_with_state.default, arguments, test_utils=WITHOUT_GRADIENT)
    out, lse, state, scores = torch.ops.scatterbrain.attention_with_state(*arguments)
    assert_same_bits((out, lse), torch.ops.scatterbrain.attention(*arguments))
    backward = (*ForwardResults(torch.randn_like(out), None, out, lse), *arguments)
    again = torch.ops.scatterbrain.attention_backward(*backward)
    for kept in ({"state": state}, {"scores": scores}, {"state": state, "scores": scores}):
        assert_same_bits(torch.ops.scatterbrain.attention_backward(*backward, **kept), again, GRADIENTS)
    if scores.numel():  # the backward pass reads them
        noise = torch.linspace(0, 1, scores.numel()).reshape(scores.shape)
        others = torch.ops.scatterbrain.attention_backward(*backward, scores=scores + noise)
        assert not torch.equal(others[0], again[0])
    return state, scores


@pytest.mark.parametrize("kernel, lists, dtype, is_causal", SAMPLES)
def test_saved_results_change_no_bit_of_the_backward_pass(
    kernel: str, lists: str, dtype: torch.dtype, is_causal: bool
) -> None:
    state, scores = check_saved_results(detached(attention_arguments(kernel, lists, dtype, is_causal)))
    assert (state.numel() > 0) == (kernel != "none" and not is_causal)
    assert scores.numel() == 0  # heads of width 8 are computed in float64


# Tiles of 8, 16 and 32 queries, partly filled ones, queries with lists of their own, few keys (lists as masks), and
# lists too long to be worth keeping.
KEPT = [(8, 1, 40), (12, 1, 40), (16, 1, 64), (32, 1, 64), (40, 4, 64), (1, 8, 64), (1, 1, 100), (16, 8, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("low_rank", [0, 1, 2])
@pytest.mark.parametrize("n", [75, 150])
@pytest.mark.parametrize(("block_q", "block_k", "keys"), KEPT)
def test_saved_scores_change_no_bit_of_the_backward_pass(
    block_q: int, block_k: int, keys: int, n: int, low_rank: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(block_q + n)
    q, k, v = qkv(n, head_dim=WIDE, dtype=dtype)
    maps = [None, None]
    if low_rank:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        maps = [torch.rand(B, h, n, 4, generator=generator).to(wide) / 3 for h in (H, KV)]
    blocks, key_blocks = -(-n // block_q), -(-n // block_k)
    used = min(keys // block_k, key_blocks - 1)
    rows = [torch.randperm(key_blocks, generator=generator)[:used].sort().values for _ in range(B * H * blocks)]
    index = torch.stack(rows).to(torch.int32).reshape(B, H, blocks, used)
    count = torch.randint(1, used + 1, (B, H, blocks), generator=generator).to(torch.int32)
    mask = torch.zeros(B, n, dtype=torch.bool)
    mask[0, ::7] = True
    # The second row is short: its keys may all be evaluated together where those of the first are not.
    count[1] = count[1].clamp(max=(n * 2 // 3) // block_k).clamp(min=1)
    index[1] = torch.arange(used).clamp(max=(n * 2 // 3) // block_k - 1)
    ends = torch.tensor([[0, n], [0, n * 2 // 3]], dtype=torch.int32)
    arguments = operator_arguments(
        AttentionArguments,
        query=q,
        key=k,
        value=v,
        query_map=maps[0],
        key_map=maps[1],
        index=index,
        count=count,
        query_mask=mask,
        key_mask=mask,
        query_range=ends,
        key_range=ends,
        low_rank=low_rank,
        block_q=block_q,
        block_k=block_k,
    )
    _, scores = check_saved_results(arguments)
    is_short = keys <= 80 or (block_q == 1 and low_rank != 0 and n <= 128) or min(keys, n) <= 80
    has_full_tiles = block_q not in (12, 40)
    assert (scores.numel() > 0) == (dtype != torch.float64 and is_short and has_full_tiles)


WIDE = 32  # narrower heads are computed in float64 and do not use packed rows


def quadratic_arguments(block_q: int, block_k: int, window: int, dtype: torch.dtype) -> QuadraticArguments:
    """A call that routes, or for block_q 0 has a window given."""
    n, rank = 150, 5
    fields: dict[str, object] = dict(zip(("query", "key", "value"), qkv(n, head_dim=WIDE, dtype=dtype)))
    for token, heads in (("query", H), ("key", KV)):
        for part, width in (("weight", (WIDE,)), ("bias", ())):
            fields[f"{token}_{part}"] = rand(1, heads, rank + 1, *width, seed=7 + heads) / 9
    if block_q == 0:
        span = torch.tensor([[[max(0, i - 20), i + 20] for i in range(8, n + 8, 16)]], dtype=torch.int32).clamp(max=n)
        fields |= dict(span=span, span_keys=40)
    else:
        fields |= dict(keys=32, window=window, block_q=block_q, block_k=block_k)
    return operator_arguments(QuadraticArguments, **fields, packed_rank=rank)


ONE_CALL = pytest.mark.parametrize("block_q, block_k, window", [(16, 1, 0), (1, 8, 16), (0, 0, 0)])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ONE_CALL
def test_one_call_projects_routes_and_attends(
    block_q: int, block_k: int, window: int, dtype: torch.dtype, trained: bool
) -> None:
    """As the separate operators do."""
    library, given = torch.ops.scatterbrain, quadratic_arguments(block_q, block_k, window, dtype)
    operator = library.quadratic_attention_with_state if trained else library.quadratic_attention
    torch.library.opcheck(operator.default, given, test_utils=WITHOUT_GRADIENT)
    separate = library.attention_with_state if trained else library.attention
    with FlopCounterMode(display=False) as flops:
        fields = dict(
            query_map=library.project_packed(given.query, given.query_weight, given.query_bias),
            key_map=library.project_packed(given.key, given.key_weight, given.key_bias),
            low_rank=QUADRATIC,
        )
        if given.keys:
            index, count = library.route(*operator_arguments(RouteArguments, given, **fields))
            fields |= dict(index=index, count=count)
        attention = operator_arguments(AttentionArguments, given, **fields)
        expected = separate(*attention)
    with FlopCounterMode(display=False) as flops_of_one:
        operator(*given)
    assert flops_of_one.get_total_flops() == flops.get_total_flops() > 0
    if trained:
        routed = (attention.index, attention.count) if given.keys else (torch.empty(0, dtype=torch.int32),) * 2
        expected = (*expected, attention.query_map, attention.key_map, *routed)
    results = operator(*given)
    assert len(results) == len(expected)
    for name, a, b in zip(operator.default._schema.returns, results, expected):
        assert_same_result(name.name, a, b)


def assert_same_result(name: str, a: Tensor, b: Tensor) -> None:
    if name == "state":  # a slot ends in one number of sixteen
        a, b = a[..., :-15], b[..., :-15]
    # Scores have room that no list reaches.
    assert a.shape == b.shape if name == "scores" else torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ONE_CALL
def test_a_prepared_call_passes_the_arguments_of_a_plain_one(
    block_q: int, block_k: int, window: int, dtype: torch.dtype
) -> None:
    library, given = torch.ops.scatterbrain, quadratic_arguments(block_q, block_k, window, dtype)
    tokens = dict(query=given.query, key=given.key, value=given.value)
    kept = {name: value for name, value in given._asdict().items() if name not in tokens}
    source = torch.arange(7.0)
    prepared = library.prepare(**kept, sources=[source], copies=[source.clone()])
    expected = library.quadratic_attention_with_state(*given)
    results = library.prepared_attention_with_state(**tokens, call=prepared, fitted=[])
    out, lse, state, scores, made, *routed = results
    query_map, key_map = made
    names = library.quadratic_attention_with_state.default._schema.returns
    for name, a, b in zip(names, (out, lse, state, scores, *made, *routed), expected):
        assert_same_result(name.name, a, b)
    assert torch.equal(library.prepared_attention(**tokens, call=prepared, fitted=[]), expected[0])
    others = [2 * t for t in (given.query_weight, given.query_bias, given.key_weight, given.key_bias)]
    other = given._replace(query_weight=others[0], query_bias=others[1], key_weight=others[2], key_bias=others[3])
    assert torch.equal(
        library.prepared_attention(**tokens, call=prepared, fitted=others), library.quadratic_attention(*other)[0]
    )
    with pytest.raises(RuntimeError, match="expected a projection of query_weight, .* or none, got 2 tensors"):
        library.prepared_attention(**tokens, call=prepared, fitted=others[:2])

    saved = dict(out=out, lse=lse, state=state, scores=scores, made=made)
    lists = dict(zip(("index", "count"), routed)) if given.keys else {}
    maps = dict(query_map=query_map, key_map=key_map, low_rank=QUADRATIC)
    forward = ForwardResults(rand(*out.shape, seed=9, dtype=dtype), None, out, lse)
    attention = operator_arguments(AttentionArguments, given, **maps, **lists)
    weights = dict(query_weight=given.query_weight, key_weight=given.key_weight)
    want = library.attention_backward(*forward, *attention, state=state, scores=scores, **weights)
    got = library.prepared_attention_backward(d_out=forward.d_out, **saved, **tokens, call=prepared, **lists)
    assert len(got) == 3 and all(map(torch.equal, got, want))

    source[3] += 1
    assert library.prepared_attention(**tokens, call=prepared, fitted=[]).numel() == 0
    out, lse, state, scores, made, *routed = library.prepared_attention_with_state(**tokens, call=prepared, fitted=[])
    assert [t.numel() for t in (out, lse, state, scores, *routed)] == [0] * 6 and made == []
    other = library.prepare(**kept, sources=[], copies=[])
    assert other != prepared
    library.discard_prepared(prepared)
    library.discard_prepared(prepared)  # as after a copy of the process
    with pytest.raises(
        RuntimeError, match=f"expected the number of a prepared call that was not discarded, got {prepared}"
    ):
        library.prepared_attention(**tokens, call=prepared, fitted=[])
    assert torch.equal(library.prepared_attention(**tokens, call=other, fitted=[]), expected[0])
    with pytest.raises(RuntimeError, match="fit together"):
        library.prepared_attention(given.query, given.key, given.value[:, :, 1:], other, [])
    library.discard_prepared(other)


def test_a_prepared_call_refuses_what_another_kernel_made_of_the_tokens() -> None:
    library, given = torch.ops.scatterbrain, quadratic_arguments(16, 1, 0, torch.float32)
    tokens = dict(query=given.query, key=given.key, value=given.value)
    settings = {name: value for name, value in given._asdict().items() if name in CentroidArguments._fields}
    prepared = library.prepare_centroid(**settings | dict(clusters=4, packed_rank=0))
    out, lse, state, scores, made, *routed = library.prepared_attention_with_state(**tokens, call=prepared, fitted=[])
    saved = dict(out=out, lse=lse, state=state, scores=scores, **tokens, call=prepared)
    if given.keys:
        saved |= dict(zip(("index", "count"), routed))
    assert len(library.prepared_attention_backward(d_out=out, made=made, **saved)) == 3
    with pytest.raises(RuntimeError, match="expected the four tensors of clusters, got 2"):
        library.prepared_attention_backward(d_out=out, made=made[:2], **saved)
    with pytest.raises(RuntimeError, match="the centroid kernel has no projection, got 1 tensors"):
        library.prepared_attention(**tokens, call=prepared, fitted=[out])
    library.discard_prepared(prepared)


def test_equal_bytes_sees_every_difference() -> None:
    equal = torch.ops.scatterbrain.equal_bytes
    tensors = [rand(2, 3, seed=1), rand(4, seed=2, dtype=torch.float64), torch.full((2,), float("nan")), torch.zeros(0)]
    assert equal(tensors, [t.clone() for t in tensors])
    assert equal(tensors, [tensors[0].t().contiguous().t(), *tensors[1:]])
    for i in range(3):
        other = [t.clone() for t in tensors]
        other[i].view(-1)[-1] = 7
        assert not equal(tensors, other)
    assert not equal(tensors, [tensors[0].t().contiguous(), *tensors[1:]])
    assert not equal(tensors, [tensors[0].double(), *tensors[1:]])
    assert not equal(tensors, tensors[:3]) and not equal(tensors[:3], tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 20, 32])  # computed in float64, padded, and in place
@pytest.mark.parametrize("block_q", [1, 16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shared", [False, True])  # one weight for the batch, and for all heads
def test_gradients_go_through_the_projections_inside_the_backward_pass(
    shared: bool, is_causal: bool, block_q: int, width: int, dtype: torch.dtype
) -> None:
    maps_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = qkv(head_dim=width, dtype=dtype)
    heads = ((1, KV), (1, KV)) if shared else ((B, H), (B, KV))
    weights = [rand(b, h, 4, width, seed=3 + i, dtype=maps_dtype) / width for i, (b, h) in enumerate(heads)]
    query_map, key_map = (torch.ops.scatterbrain.project(t, w, None) for t, w in zip((q, k), weights))
    starts = torch.arange(0, N, block_q).clamp(max=N - 12)
    span = torch.stack([starts, starts + 12], -1)[None].to(torch.int32)
    ends = torch.tensor([[0, N], [0, N - 9]], dtype=torch.int32)
    arguments = operator_arguments(
        AttentionArguments,
        query=q,
        key=k,
        value=v,
        query_map=query_map,
        key_map=key_map,
        span=span,
        query_mask=MASK,
        key_mask=MASK,
        query_range=ends,
        key_range=ends,
        low_rank=QUADRATIC,
        block_q=block_q,
        span_keys=12,
        is_causal=is_causal,
        scale=0.3,
    )
    out, lse = torch.ops.scatterbrain.attention(*arguments)
    backward = (*ForwardResults(rand(*out.shape, seed=9, dtype=dtype), None, out, lse), *arguments)
    fused = dict(query_weight=weights[0], key_weight=weights[1])
    torch.library.opcheck(
        torch.ops.scatterbrain.attention_backward.default, backward, fused, test_utils=WITHOUT_GRADIENT
    )
    *tokens, dv, d_query_map, d_key_map = torch.ops.scatterbrain.attention_backward(*backward)
    *through, dv_again, _, _ = torch.ops.scatterbrain.attention_backward(*backward, **fused)
    assert torch.equal(dv, dv_again)
    for plain, d_map, weight, result in zip(tokens, (d_query_map, d_key_map), weights, through):
        expected = plain.double() + d_map.double() @ weight.double()
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}[dtype]
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max())


def test_results_saved_by_other_arguments_are_refused() -> None:
    arguments = detached(attention_arguments("quadratic", "span", torch.float64, False))
    out, lse, state, _ = torch.ops.scatterbrain.attention_with_state(*arguments)
    forward = ForwardResults(out, None, out, lse)
    with pytest.raises(RuntimeError, match="state must be what attention_with_state returned"):
        torch.ops.scatterbrain.attention_backward(*forward, *arguments, state=state[..., 1:].contiguous())
    q, k, v = qkv(40, batch=1, kv_heads=H, head_dim=16)
    span = torch.tensor([[[0, 20], [10, 30], [20, 40]]], dtype=torch.int32)
    arguments = operator_arguments(AttentionArguments, query=q, key=k, value=v, span=span, span_keys=20)
    out, lse, _, scores = torch.ops.scatterbrain.attention_with_state(*arguments)
    forward = ForwardResults(out, None, out, lse)
    for wrong in (scores[..., 1:].contiguous(), scores.transpose(1, 2)):
        with pytest.raises(RuntimeError, match="scores must be what attention_with_state returned"):
            torch.ops.scatterbrain.attention_backward(*forward, *arguments, scores=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 9, 14, 15])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_rows_are_the_map_in_another_layout(rank: int, is_causal: bool, dtype: torch.dtype) -> None:
    q, k, v = qkv(head_dim=WIDE, dtype=dtype)
    weights = [
        (rand(1, h, rank + 1, WIDE, seed=3 + h) / WIDE, rand(1, h, rank + 1, seed=5 + h) / rank) for h in (H, KV)
    ]
    maps = [torch.ops.scatterbrain.project(t, *w) for t, w in zip((q, k), weights)]
    packed = [torch.ops.scatterbrain.project_packed(t, *w) for t, w in zip((q, k), weights)]
    for rows, map_ in zip(packed, maps):
        assert torch.equal(rows[..., :rank], map_[..., :rank]) and (rows[..., rank] == 1).all()
        torch.testing.assert_close(rows[..., rank + 1], map_[..., rank] / torch.log(torch.tensor(2.0)))
        assert not rows[..., rank + 2 :].any()
    torch.library.opcheck(torch.ops.scatterbrain.project_packed.default, (q, *weights[0]), test_utils=WITHOUT_GRADIENT)
    plain, in_rows = ({"query_map": x, "key_map": y, "low_rank": QUADRATIC} for x, y in (maps, packed))
    in_rows["packed_rank"] = rank
    routing = operator_arguments(RouteArguments, query=q.float(), key=k.float(), keys=16, is_causal=is_causal)
    lists, of_packed = (torch.ops.scatterbrain.route(*routing._replace(**form)) for form in (plain, in_rows))
    assert_same_bits(of_packed, lists, ("index", "count"))
    index, count = lists
    given = dict(query=q, key=k, value=v, index=index, count=count, is_causal=is_causal)
    d_out, results = rand(*q.shape[:3], v.shape[3], seed=9, dtype=dtype), []
    for form in (plain, in_rows):
        arguments = operator_arguments(AttentionArguments, **given, **form)
        out, lse = torch.ops.scatterbrain.attention(*arguments)
        forward = ForwardResults(d_out, None, out, lse)
        results.append((out, lse, *torch.ops.scatterbrain.attention_backward(*forward, *arguments)))
    assert_same_bits(*results, ("out", "lse", *GRADIENTS))


def test_packed_rows_of_another_rank_are_refused() -> None:
    q = rand(B, H, N, WIDE)
    rows = torch.ops.scatterbrain.project_packed(q, rand(1, 1, 4, WIDE), rand(1, 1, 4))
    given = operator_arguments(AttentionArguments, query=q, key=q, value=q, query_map=rows, key_map=rows)
    with pytest.raises(RuntimeError, match="packed_rank 20 must be 32 wide"):
        torch.ops.scatterbrain.attention(*given._replace(low_rank=QUADRATIC, packed_rank=20))
    with pytest.raises(RuntimeError, match="packed_rank is for the quadratic kernel"):
        torch.ops.scatterbrain.attention(*given._replace(low_rank=2, packed_rank=3))


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("tokens", [0, 40])
@pytest.mark.parametrize("batch", [0, 2])
def test_gradients_are_zero_where_nothing_is_attended(batch: int, tokens: int, threads: int) -> None:
    """An empty batch, no token at all, and rows that are padding, on more threads than heads."""
    torch.set_num_threads(threads)
    tensors = leaves(qkv(tokens, batch=batch, heads=1, head_dim=WIDE))
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    rows = [torch.randn(batch, 1, 5, WIDE), torch.randn(batch, 1, WIDE)] * 2
    statistics = sb.Statistics(*rows, scale=WIDE**-0.5)
    for low_rank, given in ((None, None), (sb.Quadratic(5), statistics), (sb.Quadratic(5, "input"), None)):
        out = sb.attention(*tensors, sb.Window(16), low_rank, key_padding_mask=mask, statistics=given)
        assert not any(g.count_nonzero() for g in torch.autograd.grad(out.sum(), tensors))
