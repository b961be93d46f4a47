"""Where a support covers every key, torch's own kernel computes exact attention; nothing else changes."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import row_error
from testkit import (
    KV,
    D,
    H,
    assert_all_close,
    assert_same_bits,
    counting_backend,
    fitted,
    leaves,
    out_and_gradients,
    padding,
    projections,
    qkv,
    rand,
    weights,
)
from torch import Tensor
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import scatterbrain as sb
from scatterbrain.execution import covers_every_key
from scatterbrain.reference import visible

STATISTICS = fitted()
LEARNED = sb.Quadratic(3, "learned")
SUPPORTS = {
    "full": sb.Full(),
    "window 24": sb.Window(24),
    "window 21 of 5": sb.Window(21, 5),
    "window 24 of 32": sb.Window(24, 32),
    "window 24 with sinks": sb.Window(24, sinks=5),
    "window 24 of sinks": sb.Window(24, sinks=24),
    "pooled 8": sb.Routed(20, 8),
    "pooled 16": sb.Routed(24, 16),
    "pooled 16 with window and sinks": sb.Routed(32, 16, window=20, sinks=4),
    "per query": sb.Routed(24, 1, 8, 8),
    "per query with sinks": sb.Routed(32, 1, 8, 8, sinks=3),
    "per query, wide window with sinks": sb.Routed(32, 1, 8, 24, sinks=3),
    "per query, wide window": sb.Routed(32, 1, 8, 24),
    "per query without window": sb.Routed(24, 1, 8),
    "per query of two pools": sb.Routed(24, 1, 8, 8, pools=2),
    "per query by sketches": sb.Routed(24, 1, 8, 8, pools=0),
    "lsh": sb.LSH(24, rounds=2),
    "empty": sb.Empty(),
}


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", SUPPORTS)
def test_covering_means_that_the_mask_is_all_that_may_be_seen(name: str, is_causal: bool) -> None:
    """For every pair of lengths around the edge; and some lengths are covered, others not."""
    support = SUPPORTS[name]
    if is_causal and name == "lsh":
        return
    answers = set()
    for n in (*range(1, 34), 39, 40, 41):
        for m in {n, max(1, n - 9), n + 3, 42 - n}:
            covered = covers_every_key(support, n, m, is_causal)
            answers.add(covered)
            if covered:
                query, key, _ = qkv(n, m)
                mask = sb.reference.mask(support, query, key, None, is_causal=is_causal)
                assert torch.equal(mask, visible(query, key, is_causal=is_causal).expand_as(mask)), (n, m)
    never = name == "empty" or (name == "window 24 of 32" and is_causal)  # its first queries see no key
    assert answers == ({True} if name == "full" else {False} if never else {False, True})


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", [n for n in SUPPORTS if n.startswith(("window", "pooled"))])
def test_windows_and_pooled_lists_that_cover_every_key_are_found(name: str, is_causal: bool) -> None:
    support = SUPPORTS[name]
    for n in range(1, 37):
        query, key, _ = qkv(n)
        mask = sb.reference.mask(support, query, key, None, is_causal=is_causal)
        covered = bool(torch.equal(mask, visible(query, key, is_causal=is_causal).expand_as(mask)))
        assert covers_every_key(support, n, n, is_causal) == covered, n


@pytest.mark.parametrize("tokens", [(0, 5), (5, 0), (0, 0)])
def test_nothing_is_covered_without_queries_or_keys(tokens: tuple[int, int]) -> None:
    assert not covers_every_key(sb.Full(), *tokens, is_causal=False)
    out = sb.attention(*qkv(*tokens), sb.Window(24), sb.Quadratic(3), statistics=STATISTICS)
    assert out.shape == (2, H, tokens[0], D) and not out.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", [n for n in SUPPORTS if n != "empty"])
def test_covered_attention_has_the_bits_of_torch(name: str, is_causal: bool, dtype: torch.dtype) -> None:
    """Out and gradients, with grouped heads, a scale, and fewer queries than keys."""
    if is_causal and name in ("lsh", "window 24 of 32"):
        return
    for n, m, scale in ((7, 7, None), (5, 11, 0.3), (1, 1, 2.0)):
        settings = dict(is_causal=is_causal, scale=scale)
        exact = partial(F.scaled_dot_product_attention, **settings, enable_gqa=True)
        given = dict(support=SUPPORTS[name], low_rank=sb.Quadratic(3), statistics=fitted(scale=scale))
        ours = partial(sb.attention, **given, **settings)
        assert_same_bits(*(out_and_gradients(f, qkv(n, m, dtype=dtype)) for f in (ours, exact)))


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("head_dim", range(1, 8))
def test_heads_too_narrow_for_the_kernel_of_torch_are_those_of_the_definition(head_dim: int, is_causal: bool) -> None:
    """The operator computes them in float64."""
    inputs = [rand(2, 3, 190, head_dim, seed=seed) for seed in range(3)]
    given = dict(support=sb.Full(), low_rank=None, is_causal=is_causal)
    mine = out_and_gradients(partial(sb.attention, **given), inputs)
    exact = out_and_gradients(partial(sb.reference.attention, **given, dtype=torch.float64), inputs)
    for got, want in zip(mine, exact):
        assert row_error(got, want) <= 1e-5


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("name", ["full", "window 24"])
def test_the_future_stays_masked_whatever_the_scale(name: str, scale: float) -> None:
    """torch's own kernel multiplies masked scores by the scale."""
    given = dict(support=SUPPORTS[name], low_rank=None, is_causal=True, scale=scale)
    mine = out_and_gradients(partial(sb.attention, **given), qkv(9))
    assert_all_close(mine, [t.float() for t in out_and_gradients(partial(sb.reference.attention, **given), qkv(9))])


BAD = {
    "uncalibrated": (sb.Quadratic(3), None, "not calibrated"),
    "another rank": (sb.Quadratic(4), STATISTICS, "rank"),
    "random features": (sb.Quadratic(3), sb.RandomFeatures(rand(3, D)), "Statistics"),
    "of no use": (None, STATISTICS, "low-rank kernel"),
}


@pytest.mark.parametrize("name", BAD)
def test_short_sequences_do_not_hide_mistakes(name: str) -> None:
    low_rank, statistics, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        sb.attention(*qkv(5), sb.Window(24), low_rank, statistics=statistics)


def test_statistics_of_a_wrong_shape_are_found_on_short_sequences() -> None:
    wide = fitted(kv_heads=H)
    with pytest.raises(ValueError, match="per key/value head"):
        sb.attention(*qkv(5), sb.Window(24), sb.Quadratic(3), statistics=wide)


def test_projections_that_were_not_needed_get_gradients_of_zero() -> None:
    """DDP waits for the gradient of every parameter."""
    parameters = leaves(weights(projections()))
    function = partial(sb.attention, support=sb.Window(24), low_rank=LEARNED, statistics=sb.Projections(*parameters))
    _, d_query, _, _, *gradients = out_and_gradients(function, qkv(9), parameters)
    assert d_query.any() and not any(g.any() for g in gradients)
    assert [g.shape for g in gradients] == [p.shape for p in parameters]


@pytest.mark.parametrize("low_rank", ["stored", "learned"])
def test_padding_of_short_sequences_may_hold_anything(low_rank: str) -> None:
    mask, results = padding(9, (3, 9)), []
    kernel, statistics = (LEARNED, projections()) if low_rank == "learned" else (sb.Quadratic(3), STATISTICS)
    given = dict(support=sb.Window(24), low_rank=kernel, key_padding_mask=mask, statistics=statistics)
    for content in (0.0, math.nan):
        tensors = [t.masked_fill(mask[:, None, :, None], content) for t in qkv(9)]
        d_out = torch.ones_like(tensors[0])
        results.append(out_and_gradients(partial(sb.attention, **given), tensors, d_out=d_out))
        assert not results[-1][0][mask[:, None].expand(2, H, 9)].any()
    assert_same_bits(*results)


def test_the_lse_of_a_short_sequence_is_that_of_exact_attention() -> None:
    query, key, value = qkv(9)
    out, lse = sb.attention(
        query, key, value, sb.Window(24), sb.Quadratic(3), statistics=STATISTICS, return_lse=True, is_causal=True
    )
    scores = query @ key.transpose(-1, -2) * D**-0.5
    scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1))
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True), rtol=1e-4, atol=1e-5
    )


# ---------------------------------------------------------------------------------------- traced


@pytest.mark.parametrize(
    "support, is_causal",
    [
        (sb.Window(48), False),
        (sb.Window(48, sinks=5), False),
        (sb.Window(48, sinks=5), True),
        (sb.Routed(48), True),
        (sb.Routed(48, window=24, sinks=5), True),
        (sb.Routed(48, 1, 8, 8), True),
        (sb.Full(), True),
    ],
    ids=str,
)
def test_one_graph_serves_lengths_on_both_sides(support: object, is_causal: bool) -> None:
    graphs, backend = counting_backend()

    def function(query: Tensor, key: Tensor, value: Tensor, *parameters: Tensor) -> Tensor:
        return sb.attention(
            query, key, value, support, LEARNED, is_causal=is_causal, statistics=sb.Projections(*parameters)
        )

    parameters = leaves(weights(projections()))
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for n in (60, 33, 18, 70):  # more than one block of queries: torch specialises on sizes of 1
        assert_all_close(*(out_and_gradients(lambda *t: f(*t, *parameters), qkv(n)) for f in (function, compiled)))
    assert len(graphs) == 1


def test_a_graph_for_one_short_length_gives_zero_gradients_to_projections() -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, *parameters: Tensor) -> Tensor:
        return sb.attention(query, key, value, sb.Window(24), LEARNED, statistics=sb.Projections(*parameters))

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)
    parameters = leaves(weights(projections()))
    out = compiled(*qkv(9), *parameters)
    torch.testing.assert_close(out, function(*qkv(9), *parameters), rtol=1e-4, atol=1e-5)
    for gradient in torch.autograd.grad(out.sum(), parameters):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


EXPORTED = {
    "window": (17, sb.Window(24), LEARNED),
    "routed": (17, sb.Routed(24), LEARNED),
    "default": (33, *sb.presets.drop_in()),
}


@pytest.mark.parametrize("pair", EXPORTED)
@pytest.mark.parametrize("tokens", ["min", Dim.AUTO, Dim.DYNAMIC], ids=repr)
def test_export_has_no_condition_on_lengths_of_more_than_a_block(tokens: object, pair: str) -> None:
    least, support, low_rank = EXPORTED[pair]
    tokens = Dim("tokens", min=least, max=4096) if tokens == "min" else tokens
    module = sb.ScatterbrainAttention(H, D, KV, support, low_rank).eval()
    program = torch.export.export(module, tuple(qkv(40)), dynamic_shapes=({2: tokens},) * 3)
    for n in (least, 34, 35, 70, 4096):
        torch.testing.assert_close(program.module()(*qkv(n)), module(*qkv(n)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 2, 2)])
@pytest.mark.parametrize("low_rank", ["stored", "learned"])
def test_vmap_of_short_sequences_is_a_loop(low_rank: str, in_dims: tuple) -> None:
    kernel, statistics = (LEARNED, projections()) if low_rank == "learned" else (sb.Quadratic(3), STATISTICS)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sb.attention(query, key, value, sb.Window(24), kernel, statistics=statistics)

    tensors = [t if d is None else torch.stack([t, 0.5 * t], d) for t, d in zip(qkv(9), in_dims)]
    got = torch.vmap(function, in_dims)(*tensors)
    for i in range(2):
        one = [t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims)]
        torch.testing.assert_close(got[i], function(*one), rtol=1e-4, atol=1e-5)


def test_a_graph_of_symbolic_lengths_serves_longer_ones() -> None:
    """Traced where the window covers every key, run where it does not."""

    def attend(*tokens: Tensor) -> Tensor:
        return sb.attention(*tokens, sb.Window(64), None)

    graph = make_fx(attend, tracing_mode="symbolic")(*qkv(50))
    longer = qkv(300)
    assert torch.equal(graph(*longer), attend(*longer))
