"""Low-rank kernels: calibration, random features and the estimator of the paper."""

from __future__ import annotations

import math
import pickle
from functools import partial

import pytest
import torch
from testkit import padding, qkv

import scatterbrain as sb
from scatterbrain.low_rank.favor import draw_projection
from scatterbrain.low_rank.moments import moments
from scatterbrain.reference import Inputs, log_kernel

draw = partial(qkv, batch=1, kv_heads=2)


def kernel(
    q: torch.Tensor, k: torch.Tensor, low_rank: object, statistics: object = None, scale: float | None = None
) -> torch.Tensor:
    exponent, factor = log_kernel(low_rank, Inputs.of(q.double(), k.double(), scale=scale, statistics=statistics))
    return torch.exp(exponent) * factor


def assert_mean(draws: torch.Tensor, want: torch.Tensor) -> None:
    """The mean over draws (first dimension) is ``want`` within 4.5 standard errors in every entry, and the standard
    error is small enough to show a bias of 3 %."""
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert float((standard_error / want).max()) < 0.03
    assert float(((draws.mean(0) - want) / standard_error).abs().max()) < 4.5


def test_quadratic_follows_its_definition() -> None:
    q, k, _ = draw(40, 30)
    s = sb.fit_statistics(q, k, rank=3)
    a, b, pq, pk = (t[:, None].double() for t in (s.query_mean, s.key_mean, s.query_projection, s.key_projection))
    scaled, key = q[0].double() * 8**-0.5, k[0].double()
    x, y = (scaled - a) @ pq.squeeze(1).transpose(-1, -2), (key - b) @ pk.squeeze(1).transpose(-1, -2)
    want = (
        torch.exp(scaled @ b.transpose(-1, -2) + a @ (key - b).transpose(-1, -2))
        * (1 + x @ y.transpose(-1, -2) / 2) ** 2
    )
    assert torch.allclose(kernel(q, k, sb.Quadratic(3), s)[0], want, rtol=1e-10)


def test_full_rank_projections_reproduce_the_centred_inner_product() -> None:
    """With r = d nothing is dropped: x.y = (q - a).(k - b), so that L is the second-order square of exp(s) exactly."""
    q, k, _ = draw(200, 150)
    s = sb.fit_statistics(q, k, rank=8)
    inner = s.query_projection.transpose(-1, -2).double() @ s.key_projection.double()
    assert torch.allclose(inner, torch.eye(8, dtype=torch.float64).expand(2, 8, 8), atol=1e-5)


def test_means_are_the_weighted_ones() -> None:
    q, k, _ = draw(50, 40)
    s = sb.fit_statistics(q, k, rank=2, scale=0.7)
    a = (0.7 * q[0]).mean(1)
    weights = torch.softmax((k[0] @ a[..., None]).squeeze(-1), -1)
    assert torch.allclose(s.query_mean, a, atol=1e-6) and torch.allclose(
        s.key_mean, (weights[..., None] * k[0]).sum(1), atol=1e-6
    )


def test_grouped_heads_share_the_statistics_of_their_key_head() -> None:
    q, k, _ = draw(50, heads=4)
    pooled = torch.stack([q[:, :2].transpose(1, 2).reshape(1, 100, 8), q[:, 2:].transpose(1, 2).reshape(1, 100, 8)], 1)
    assert torch.allclose(sb.fit_statistics(q, k, 3).query_mean, sb.fit_statistics(pooled, k, 3).query_mean, atol=1e-6)


def test_padded_tokens_do_not_enter_statistics() -> None:
    q, k, _ = draw(30)
    mask = padding(30, (10,))
    q[:, :, 20:], k[:, :, 20:] = float("nan"), 1e4
    masked, cut = sb.fit_statistics(q, k, 3, key_padding_mask=mask), sb.fit_statistics(q[:, :, :20], k[:, :, :20], 3)
    assert torch.allclose(masked.query_mean, cut.query_mean) and torch.allclose(masked.key_mean, cut.key_mean)


@pytest.mark.parametrize("n", [1, 25])
def test_constant_tokens_have_no_projection(n: int) -> None:
    q, k = torch.full((1, 1, n, 8), 0.3), torch.full((1, 1, n, 8), -1.7)
    s = sb.fit_statistics(q, k, 3)
    assert s.query_projection.eq(0).all() and s.key_projection.eq(0).all()
    assert torch.allclose(
        kernel(q, k, sb.Quadratic(3), s), torch.exp(q.double() @ k.double().transpose(-1, -2) * 8**-0.5), rtol=1e-5
    )


def test_moments_merge_by_tokens() -> None:
    q, k, _ = draw(60, batch=3)
    parts = [moments(q[i : i + 1], k[i : i + 1], 0.3) for i in range(3)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert torch.allclose(merged.query_mean, moments(q, k, 0.3).query_mean, atol=1e-12) and merged.tokens.eq(180).all()


@pytest.mark.parametrize(
    "low_rank", [sb.Favor(32), sb.Favor(32, orthogonal=False), sb.Favor(32, hyperbolic=True)], ids=str
)
def test_favor_weights_are_unbiased(low_rank: sb.Favor) -> None:
    q, k, _ = (0.35 * t for t in draw(6, 5, heads=1, kv_heads=1))
    draws = torch.stack(
        [
            kernel(q, k, low_rank, sb.RandomFeatures(draw_projection(low_rank, 8, torch.Generator().manual_seed(i))))
            for i in range(1500)
        ]
    )
    want = torch.exp(q.double() @ k.double().transpose(-1, -2) * 8**-0.5)
    assert_mean(draws, want)


def test_orthogonal_rows_are_orthogonal_with_gaussian_norms() -> None:
    w = draw_projection(sb.Favor(16), 8, torch.Generator().manual_seed(0))
    gram = w[:8] @ w[:8].T
    assert torch.allclose(gram, torch.diag(torch.diag(gram)), atol=1e-4)
    norms = torch.cat(
        [draw_projection(sb.Favor(64), 8, torch.Generator().manual_seed(i)).norm(dim=1) for i in range(20)]
    )
    assert abs(float(norms.square().mean()) - 8) < 0.5


def test_the_papers_estimator_is_unbiased_off_the_support_and_exact_on_it() -> None:
    """sb.presets.paper(): mean over draws of the projection of its unnormalised weights equals exp(s) within the
    standard error, and without error on S. The weights are read off the operator: out times exp(lse) with one-hot
    values."""
    n, d = 24, 8
    q, k, _ = (0.35 * t for t in draw(n, heads=1, kv_heads=1))
    support, low_rank = sb.presets.paper(keys=8, features=32)
    lists = sb.route(q, k, support)
    mask = sb.reference.mask(lists, q, k)[0, 0]
    one_hot = torch.eye(n)[None, None]
    draws = []
    for i in range(600):
        statistics = sb.RandomFeatures(draw_projection(low_rank, d, torch.Generator().manual_seed(i)))
        out, lse = sb.attention(q, k, one_hot, lists, low_rank, statistics=statistics, return_lse=True)
        draws.append((out * torch.exp(lse)[..., None])[0, 0].double())
    draws = torch.stack(draws)
    want = torch.exp(q.double() @ k.double().transpose(-1, -2) * d**-0.5)[0, 0]
    assert mask.any() and (~mask).any()
    assert torch.allclose(draws[:, mask], want[mask].expand(len(draws), -1), rtol=2e-5)
    assert_mean(draws[:, ~mask], want[~mask])


def test_favor_does_not_underflow_far_from_the_origin() -> None:
    """Stabilisers are the rows' own maxima: tokens of norm 30 still give finite, normalised rows, at the start of a
    causal sequence too."""
    q, k, v = draw(80)
    out = sb.attention(10 * q, 10 * k, v, sb.Empty(), sb.Favor(32), is_causal=True)
    assert torch.isfinite(out).all() and torch.allclose(out[:, :, 0], v[:, :, 0], atol=1e-5)


def test_favor_of_an_earlier_pickle_with_a_field_more_is_the_same_kernel() -> None:
    earlier = sb.Favor(8, seed=3)
    object.__setattr__(earlier, "centred", False)
    loaded = pickle.loads(pickle.dumps(earlier))
    assert loaded == sb.Favor(8, seed=3) and "centred" not in repr(loaded)
    tokens = qkv()
    assert torch.equal(*(sb.attention(*tokens, sb.Window(8), favor) for favor in (loaded, sb.Favor(8, seed=3))))
