"""Corners of the operator that are something else by name: exact attention, sparse attention, linear attention."""

from __future__ import annotations

from functools import partial

import pytest
import testkit
import torch
import torch.nn.functional as F
from testkit import blocks, leaves, out_and_gradients, padding

import scatterbrain as sb

qkv = partial(testkit.qkv, kv_heads=2, head_dim=32)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("low_rank", [None, sb.Quadratic(9), sb.Favor(16)])
def test_full_support_is_scaled_dot_product_attention(low_rank: object, is_causal: bool) -> None:
    q, k, v = qkv(100, heads=4)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    assert relative(sb.attention(q, k, v, sb.Full(), low_rank, is_causal=is_causal), want) < 1e-6


@pytest.mark.parametrize("is_causal", [False, True])
def test_full_support_with_padding_is_scaled_dot_product_attention_with_a_mask(is_causal: bool) -> None:
    q, k, v = qkv(70)
    mask = padding(70, (20, 0), (0, 9))
    mask[1, 40] = True
    seen = sb.reference.visible(q, k, mask, is_causal)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).masked_fill(~seen.any(-1, keepdim=True), 0)
    out, lse = sb.attention(q, k, v, sb.Full(), None, key_padding_mask=mask, is_causal=is_causal, return_lse=True)
    assert relative(out, want) < 1e-6
    scores = ((q @ k.transpose(-1, -2)) / 32**0.5).masked_fill(~seen, -torch.inf)
    assert torch.allclose(lse, torch.logsumexp(scores, -1), atol=1e-5)


SUPPORTS = [
    sb.Window(16),
    sb.Window(33, block_q=5),
    sb.Window(64, block_q=1),
    sb.Window(40, sinks=7),
    sb.Routed(48, window=24, sinks=7),
    sb.Routed(32),
    sb.Routed(32, block_q=8),
    sb.Routed(32, block_q=1, block_k=8, window=16),
    sb.Routed(32, block_q=1, block_k=8, window=16, pools=2),
    sb.Routed(32, block_q=1, block_k=8, window=16, pools=0),
]


@pytest.mark.parametrize(
    "support, is_causal",
    [(s, False) for s in SUPPORTS] + [(s, True) for s in SUPPORTS] + [(sb.LSH(32), False)],
    ids=str,
)
def test_without_a_low_rank_part_it_is_attention_under_the_mask(support: object, is_causal: bool) -> None:
    tokens = qkv(150)
    seen = sb.reference.mask(support, *tokens[:2], low_rank=None, is_causal=is_causal)
    exact = partial(F.scaled_dot_product_attention, attn_mask=seen)
    ours = partial(sb.attention, support=support, low_rank=None, is_causal=is_causal)
    d_out = testkit.rand(*tokens[0].shape, seed=4)
    got, want = (out_and_gradients(function, tokens, d_out=d_out) for function in (ours, exact))
    assert relative(got[0], want[0]) < 1e-6
    assert all(relative(mine, theirs) < 3e-6 for mine, theirs in zip(got[1:], want[1:]))


@pytest.mark.parametrize("is_causal", [False, True])
def test_empty_support_with_favor_is_linear_attention(is_causal: bool) -> None:
    q, k, v = qkv(130)
    low_rank = sb.Favor(24, seed=5)
    projection = sb.ScatterbrainAttention(2, 32, support=sb.Empty(), low_rank=low_rank).projection.double()
    scaled = [t.double() * 32**-0.25 for t in (q, k)]
    phi, psi = (torch.exp(t @ projection.T - t.square().sum(-1, keepdim=True) / 2) for t in scaled)
    v64 = v.double()
    if is_causal:
        numerator = torch.einsum("bhnm,bhnmd->bhnd", phi, (psi[..., :, None] * v64[..., None, :]).cumsum(2))
        denominator = torch.einsum("bhnm,bhnm->bhn", phi, psi.cumsum(2))
    else:
        numerator = phi @ (psi.transpose(-1, -2) @ v64)
        denominator = (phi * psi.sum(2, keepdim=True)).sum(-1)
    got = sb.attention(q, k, v, sb.Empty(), low_rank, is_causal=is_causal)
    assert relative(got, numerator / denominator[..., None]) < 3e-6


def test_a_support_that_covers_every_key_leaves_no_complement() -> None:
    """The low-rank part must not add rounding noise to exact attention."""
    q, k, v = qkv(48)
    statistics = sb.fit_statistics(q, k)
    with_low_rank = sb.attention(q, k, v, sb.Window(64), sb.Quadratic(9), statistics=statistics)
    assert torch.equal(with_low_rank, sb.attention(q, k, v, sb.Window(64), None))


def test_rows_that_see_nothing_are_zero_and_so_are_their_gradients() -> None:
    tokens = leaves(qkv(20))
    out, lse = sb.attention(*tokens, sb.Window(16), None, key_padding_mask=padding(20, (20, 0)), return_lse=True)
    gradients = torch.autograd.grad(out.sum(), tokens)
    assert out[0].eq(0).all() and lse[0].eq(-torch.inf).all() and out[1].ne(0).any()
    assert all(g[0].eq(0).all() and torch.isfinite(g).all() and g[1].ne(0).any() for g in gradients)


def test_empty_support_with_a_kernel_that_is_zero_gives_zeros() -> None:
    """(1 + x.y / 2)^2 with x.y = -2 for every pair: no weight at all."""
    q = torch.ones(1, 1, 5, 4)
    k = -torch.ones(1, 1, 7, 4)
    v = torch.randn(1, 1, 7, 4)
    p = sb.Projections(
        torch.tensor([[[0.5] * 4]]), torch.zeros(1, 4), torch.zeros(1), torch.tensor([[[0.25] * 4]]), torch.zeros(1, 4)
    )
    out, lse = sb.attention(q, k, v, sb.Empty(), sb.Quadratic(1, "learned"), scale=1.0, statistics=p, return_lse=True)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()


def test_lse_is_the_log_of_the_total_weight_and_differentiable() -> None:
    q, k, v = leaves(qkv(90, dtype=torch.float64))
    statistics = sb.fit_statistics(q, k)
    grads = []
    for function in (sb.attention, sb.reference.attention):
        _, lse = function(
            q, k, v, sb.Window(32), sb.Quadratic(9), is_causal=True, statistics=statistics, return_lse=True
        )
        grads.append((lse, *torch.autograd.grad(lse.square().sum(), (q, k))))
    for mine, theirs in zip(*grads):
        assert relative(mine, theirs) < 1e-12


def test_lists_from_route_give_the_same_result_as_routing_inside() -> None:
    q, k, v = qkv(300, heads=4)
    statistics = sb.fit_statistics(q, k)
    for support in (sb.Routed(64), sb.Routed(64, block_q=1, block_k=8, window=16), sb.LSH(32)):
        lists = sb.route(q, k, support, statistics=statistics)
        assert torch.equal(
            sb.attention(q, k, v, lists, statistics=statistics), sb.attention(q, k, v, support, statistics=statistics)
        )


@pytest.mark.parametrize("low_rank", [None, sb.Quadratic(9), sb.Favor(8)], ids=str)
@pytest.mark.parametrize("support", [sb.Full(), sb.Window(16), sb.Window(16, block_q=1), sb.Routed(16)], ids=str)
def test_nan_in_a_valid_token_is_not_swallowed(support: object, low_rank: object) -> None:
    """A row that holds a NaN is NaN; only a row without weight is zero."""
    q, k, v = qkv(200)
    statistics = sb.fit_statistics(q, k) if isinstance(low_rank, sb.Quadratic) and support != sb.Full() else None
    q[0, 0, 50] = float("nan")
    for function in (sb.attention, sb.reference.attention):
        out, lse = function(q, k, v, support, low_rank, statistics=statistics, return_lse=True)
        assert out[0, 0, 50].isnan().all() and lse[0, 0, 50].isnan() and not out[0, 1].isnan().any()


def test_a_query_that_no_slot_names_is_zero() -> None:
    q, k, v = leaves(qkv(32))
    order = torch.arange(32, dtype=torch.int32).expand(2, 2, 32).clone()
    order[..., 3] = -1
    lists = blocks([[0]] * 4, 8, 8, order=order)
    out = sb.attention(q, k, v, lists, sb.Favor(8))
    (gradient,) = torch.autograd.grad(out.square().sum(), q)
    named = torch.arange(32) != 3
    assert out[:, :, 3].eq(0).all() and gradient[:, :, 3].eq(0).all() and out[:, :, named].ne(0).all()


def test_statistics_are_constants_of_the_backward_pass() -> None:
    q, k, v = qkv(64)
    fitted = sb.fit_statistics(q, k)
    leaf = fitted.query_projection.requires_grad_()
    out = sb.attention(q, k, v, sb.Window(16), sb.Quadratic(9), statistics=fitted)
    assert leaf.requires_grad and not out.requires_grad


def test_lists_used_where_they_do_not_fit_are_refused() -> None:
    q, k, v = qkv(64)
    lists = sb.route(q, k, sb.Routed(32))
    with pytest.raises(ValueError, match="past the 20 keys"):
        sb.attention(q, k[:, :, :20], v[:, :, :20], lists, None)
    with pytest.raises(ValueError, match="causality"):
        sb.attention(q, k, v, lists, None, is_causal=True)
