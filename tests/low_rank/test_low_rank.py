"""Low-rank kernels: calibration, random features and the estimator of the paper."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from testkit import padding, qkv

import scatterbrain as sb
from scatterbrain.low_rank.favor import draw_projection
from scatterbrain.low_rank.input_statistics import balanced_statistics, sampled_moments, statistics_from_samples
from scatterbrain.low_rank.moments import moments
from scatterbrain.low_rank.quadratic_coefficients import on_one_thread, statistics_from_moments
from scatterbrain.reference import Inputs, log_kernel

draw = partial(qkv, batch=1, kv_heads=2)
FAVORS = sb.Favor(32, centred=True), sb.Favor(32)


def kernel(
    q: torch.Tensor, k: torch.Tensor, low_rank: object, statistics: object = None, scale: float | None = None
) -> torch.Tensor:
    exponent, factor = log_kernel(low_rank, Inputs.of(q.double(), k.double(), scale=scale, statistics=statistics))
    return torch.exp(exponent) * factor


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


def test_orthogonal_rows_are_orthogonal_with_gaussian_norms() -> None:
    w = draw_projection(sb.Favor(16), 8, torch.Generator().manual_seed(0))
    gram = w[:8] @ w[:8].T
    assert torch.allclose(gram, torch.diag(torch.diag(gram)), atol=1e-4)
    norms = torch.cat(
        [draw_projection(sb.Favor(64), 8, torch.Generator().manual_seed(i)).norm(dim=1) for i in range(20)]
    )
    assert abs(float(norms.square().mean()) - 8) < 0.5


def test_centred_features_see_no_means_of_keys() -> None:
    """One vector added to all keys adds what all keys of a row have alike."""
    q, k, v = draw(60, heads=2)
    shift = 2 * torch.randn(8, generator=torch.Generator().manual_seed(1))
    for low_rank, is_same in zip(FAVORS, (True, False)):
        got, want = (sb.attention(q, keys, v, sb.Window(8), low_rank) for keys in (k + shift, k))
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4) == is_same


def test_balancing_shares_out_what_queries_and_keys_are_stretched_by() -> None:
    """An invertible map of the queries with its inverse on the keys changes no product. Plain features get worse with
    it; balanced ones are those of the same tokens, but for a rotation."""
    q, k, v = draw(60, heads=2)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    stretch = 2.0 ** torch.linspace(-3, 3, 8)

    def error(favor: sb.Favor, q: torch.Tensor, k: torch.Tensor) -> float:
        outs = (sb.attention(q, k, v, sb.Empty(), replace(favor, seed=i)) for i in range(20))
        return sum(float((out - want).norm() / want.norm()) for out in outs) / 20

    balanced, plain = ([error(favor, *t) for t in ((q, k), (q * stretch, k / stretch))] for favor in FAVORS)
    assert balanced[1] < 1.15 * balanced[0] and balanced[0] < 1.05 * plain[0]
    assert plain[1] > 1.5 * plain[0]


def test_a_module_redraws_centred_features_and_keeps_a_kernel_for_causal_calls() -> None:
    module = sb.ScatterbrainAttention(2, 8, low_rank=sb.Favor(16, redraw=2, centred=True), support=sb.Window(8))
    q, k, v = draw(40, heads=2)
    first, before = module(q, k, v), module.projection.clone()
    sb.update_statistics(module)
    assert torch.equal(module(q, k, v), first)
    sb.update_statistics(module)
    assert not torch.equal(module.projection, before) and not torch.equal(module(q, k, v), first)
    with pytest.raises(ValueError, match="would see the future"):
        module(q, k, v, is_causal=True)


def test_favor_does_not_underflow_far_from_the_origin() -> None:
    """Stabilisers are the rows' own maxima: tokens of norm 30 still give finite, normalised rows, at the start of a
    causal sequence too."""
    q, k, v = draw(80)
    out = sb.attention(10 * q, 10 * k, v, sb.Empty(), sb.Favor(32), is_causal=True)
    assert torch.isfinite(out).all() and torch.allclose(out[:, :, 0], v[:, :, 0], atol=1e-5)


def test_favor_of_an_earlier_pickle_without_a_field_is_the_same_kernel() -> None:
    earlier = sb.Favor(8, seed=3)
    object.__delattr__(earlier, "centred")
    loaded = pickle.loads(pickle.dumps(earlier))
    assert loaded == sb.Favor(8, seed=3) and "centred" not in repr(loaded)
    tokens = qkv()
    assert torch.equal(*(sb.attention(*tokens, sb.Window(8), favor) for favor in (loaded, sb.Favor(8, seed=3))))


# -------------------- threads


def in_a_new_thread(function: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_statistics_take_no_threads_from_others() -> None:
    """Torch gives a thread its number of threads when that first uses it, for good."""
    before = torch.get_num_threads()

    def fit_beside_a_block() -> tuple[int, int, int]:
        number = torch.get_num_threads()
        with on_one_thread():
            inside = torch.get_num_threads()
        return number, inside, torch.get_num_threads()

    torch.set_num_threads(3)
    try:
        with on_one_thread():
            assert torch.get_num_threads() == 1
            assert in_a_new_thread(torch.get_num_threads) == 3
            assert in_a_new_thread(fit_beside_a_block) == (3, 1, 3)
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3 == in_a_new_thread(torch.get_num_threads)
    finally:
        torch.set_num_threads(before)


class NoThreads:
    """As where the system has no more threads to give."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def start(self) -> None:
        raise RuntimeError("can't start new thread")


def test_a_thread_that_cannot_start_leaves_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    tokens = draw(40, 30)
    torch.set_num_threads(3)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(threading, "Thread", NoThreads)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                sb.fit_statistics(*tokens[:2], rank=3)
        assert torch.get_num_threads() == 3 == in_a_new_thread(torch.get_num_threads)
        sb.fit_statistics(*tokens[:2], rank=3)  # nothing is held since
    finally:
        torch.set_num_threads(before)


def test_statistics_of_other_devices_leave_the_threads_of_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    tokens = [t.to("meta") for t in draw(40, 30)[:2]]  # which stands for any device but the CPU
    torch.set_num_threads(3)
    try:
        monkeypatch.setattr(threading, "Thread", NoThreads)
        statistics_from_moments(moments(*tokens, 1.0), 3, 1.0)
        sampled = sampled_moments(*tokens, 1.0, None, None)
        statistics_from_samples(sampled, 3, 1.0)
        balanced_statistics(sampled, 1.0)
    finally:
        torch.set_num_threads(before)
