"""Where a support covers every key, attention is exact and torch's own kernel computes it; nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import scatterbrain as sb
from scatterbrain.execution import covers_every_key
from scatterbrain.reference import visible

H, KV, D = 2, 1, 8


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(n: int, m: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    m = n if m is None else m
    return [rand(2, h, t, D, seed=s, dtype=dtype) for s, (h, t) in enumerate(((H, n), (KV, m), (KV, m)))]


STATISTICS = sb.fit_statistics(rand(1, H, 99, D, seed=5), rand(1, KV, 99, D, seed=6), 3)
LEARNED = (sb.Quadratic(3, "learned"), [(H, 3, D), (H, D), (H,), (KV, 3, D), (KV, D)])


def projections() -> list[Tensor]:
    return [rand(*shape, seed=10 + i).requires_grad_() for i, shape in enumerate(LEARNED[1])]


SUPPORTS = {
    "full": sb.Full(),
    "window 24": sb.Window(24),
    "window 21 of 5": sb.Window(21, 5),
    "window 24 of 32": sb.Window(24, 32),
    "pooled 8": sb.Routed(20, 8),
    "pooled 16": sb.Routed(24, 16),
    "per query": sb.Routed(24, 1, 8, 8),
    "per query, wide window": sb.Routed(32, 1, 8, 24),
    "per query without window": sb.Routed(24, 1, 8),
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
        results = []
        for exact in (False, True):
            query, key, value = (t.requires_grad_() for t in qkv(n, m, dtype))
            if exact:
                out = F.scaled_dot_product_attention(
                    query, key, value, is_causal=is_causal, scale=scale, enable_gqa=True
                )
            else:
                fitted = sb.fit_statistics(rand(1, H, 99, D), rand(1, KV, 99, D, seed=1), 3, scale=scale)
                out = sb.attention(
                    query,
                    key,
                    value,
                    SUPPORTS[name],
                    sb.Quadratic(3),
                    is_causal=is_causal,
                    scale=scale,
                    statistics=fitted,
                )
            results.append([out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results))


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("name", ["full", "window 24"])
def test_the_future_stays_masked_whatever_the_scale(name: str, scale: float) -> None:
    """torch's own kernel multiplies masked scores by the scale."""
    tensors = [t.requires_grad_() for t in qkv(9)]
    results = []
    for function in (sb.attention, sb.reference.attention):
        out = function(*tensors, SUPPORTS[name], None, is_causal=True, scale=scale)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-4, atol=1e-5)


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
    wide = sb.fit_statistics(rand(1, H, 99, D), rand(1, H, 99, D), 3)
    with pytest.raises(ValueError, match="per key/value head"):
        sb.attention(*qkv(5), sb.Window(24), sb.Quadratic(3), statistics=wide)


def test_projections_that_were_not_needed_get_gradients_of_zero() -> None:
    """So that training in several processes, which waits for every parameter, goes on."""
    parameters = projections()
    query, key, value = (t.requires_grad_() for t in qkv(9))
    out = sb.attention(query, key, value, sb.Window(24), LEARNED[0], statistics=sb.Projections(*parameters))
    gradients = torch.autograd.grad(out.sum(), [query, *parameters])
    assert gradients[0].any() and all(
        g.shape == p.shape and not g.any() for g, p in zip(gradients[1:], parameters, strict=True)
    )


@pytest.mark.parametrize("low_rank", ["stored", "learned"])
def test_padding_of_short_sequences_may_hold_anything(low_rank: str) -> None:
    mask = torch.arange(9).expand(2, 9) >= torch.tensor([[6], [0]])
    results = []
    for content in (0.0, math.nan):
        tensors = [t.masked_fill(mask[:, None, :, None], content).requires_grad_() for t in qkv(9)]
        kernel, statistics = sb.Quadratic(3), STATISTICS
        if low_rank == "learned":
            kernel, statistics = LEARNED[0], sb.Projections(*projections())
        out = sb.attention(*tensors, sb.Window(24), kernel, mask, statistics=statistics)
        results.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
        assert not out[mask[:, None].expand(2, H, 9)].any()
    assert all(torch.equal(a, b) for a, b in zip(*results))


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
    [(sb.Window(48), False), (sb.Routed(48), True), (sb.Routed(48, 1, 8, 8), True), (sb.Full(), True)],
    ids=str,
)
def test_one_graph_serves_lengths_on_both_sides(support: object, is_causal: bool) -> None:
    graphs = []

    def backend(graph: object, inputs: object) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def function(query: Tensor, key: Tensor, value: Tensor, *parameters: Tensor) -> Tensor:
        return sb.attention(
            query, key, value, support, LEARNED[0], is_causal=is_causal, statistics=sb.Projections(*parameters)
        )

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for n in (60, 33, 18, 70):  # more than one block of queries: torch treats sizes of 1 apart
        results = []
        for f in (function, compiled):
            tensors = [t.requires_grad_() for t in qkv(n)]
            out = f(*tensors, *projections())
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        for mine, theirs in zip(*results):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_a_graph_for_one_short_length_gives_zero_gradients_to_projections() -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, *parameters: Tensor) -> Tensor:
        return sb.attention(query, key, value, sb.Window(24), LEARNED[0], statistics=sb.Projections(*parameters))

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)
    parameters = projections()
    out = compiled(*qkv(9), *parameters)
    torch.testing.assert_close(out, function(*qkv(9), *parameters), rtol=1e-4, atol=1e-5)
    for gradient in torch.autograd.grad(out.sum(), parameters):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = sb.ScatterbrainAttention(H, D, KV, sb.Window(24), LEARNED[0])

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.core(query, key, value)


def test_export_of_any_length_has_no_condition_on_it() -> None:
    module = Attention().eval()
    tokens = torch.export.Dim("tokens", min=17, max=4096)
    program = torch.export.export(module, tuple(qkv(40)), dynamic_shapes=({2: tokens},) * 3)
    for n in (17, 24, 25, 60):
        torch.testing.assert_close(program.module()(*qkv(n)), module(*qkv(n)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 2, 2)])
@pytest.mark.parametrize("low_rank", ["stored", "learned"])
def test_vmap_of_short_sequences_is_a_loop(low_rank: str, in_dims: tuple) -> None:
    kernel, statistics = sb.Quadratic(3), STATISTICS
    if low_rank == "learned":
        kernel, statistics = LEARNED[0], sb.Projections(*projections())

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sb.attention(query, key, value, sb.Window(24), kernel, statistics=statistics)

    tensors = [t if d is None else torch.stack([t, 0.5 * t], d) for t, d in zip(qkv(9), in_dims)]
    got = torch.vmap(function, in_dims)(*tensors)
    for i in range(2):
        one = [t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims)]
        torch.testing.assert_close(got[i], function(*one), rtol=1e-4, atol=1e-5)
