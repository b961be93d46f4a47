"""Quadratic(statistics="input"): means of all tokens of the call, covariances of samples, directions by subspace
iteration."""

from __future__ import annotations

import math

import pytest
import torch
from testkit import padding, qkv
from torch import Tensor

import scatterbrain as sb
from scatterbrain.low_rank.input_statistics import SAMPLES, sampled_moments, statistics_from_samples
from scatterbrain.low_rank.moments import moments
from scatterbrain.low_rank.quadratic_coefficients import Statistics, statistics_from_moments

D = 16
SCALE = D**-0.5


def tokens(queries: int, keys: int, batch: int = 1, heads: int = 2, kv_heads: int = 2) -> list[Tensor]:
    """Queries and keys that vary less and less from direction to direction, and about means."""
    q, k, _ = qkv(queries, keys, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=D)
    spectrum = 2 * 0.75 ** torch.arange(D)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3))).Q
    return [(q * spectrum) @ turn + 0.3, (k * spectrum) @ turn - 0.2]


def input_statistics(q: Tensor, k: Tensor, rank: int, mask: Tensor | None = None) -> Statistics:
    return statistics_from_samples(sampled_moments(q, k, SCALE, mask, mask), rank, SCALE)


def interaction(s: Statistics) -> Tensor:
    """x.y as a matrix between q - a and k - b."""
    return s.query_projection.transpose(-1, -2).double() @ s.key_projection.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "mask"),
    [
        (700, 700, 4, "holes"),
        (700, 700, 2, "left"),
        (300, 700, 4, "none"),
        (SAMPLES + 1, SAMPLES, 2, "none"),
        (7, 9, 2, "holes"),
        (1, 30, 2, "none"),
    ],
)
def test_it_is_what_the_definition_says(queries: int, keys: int, heads: int, mask: str, dtype: torch.dtype):
    q, k = (t.to(dtype) for t in tokens(queries, keys, batch=2, heads=heads))
    v = qkv(queries, keys, batch=2, heads=heads, kv_heads=2, head_dim=D)[2].to(dtype)
    arguments = {}
    if mask != "none":
        drawn = torch.rand(2, keys, generator=torch.Generator().manual_seed(1)) < 0.4
        drawn = drawn if mask == "holes" else torch.arange(keys) < torch.tensor([[0], [keys - 290]])
        arguments = {"key_padding_mask": drawn}
        arguments |= {"query_padding_mask": drawn[:, :queries]} if queries != keys else {}
    want = sb.reference.attention(q, k, v, sb.Window(16), sb.Quadratic(5, "input"), **arguments)
    got = sb.attention(q, k, v, sb.Window(16), sb.Quadratic(5, "input"), **arguments)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-9, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def test_at_full_rank_nothing_is_dropped():
    q, k = tokens(300, 400)
    eye = torch.eye(D, dtype=torch.float64).expand(1, 2, D, D)
    torch.testing.assert_close(interaction(input_statistics(q, k, D)), eye, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [200, 1500])
def test_it_drops_little_more_than_a_full_decomposition(length: int):
    """Mean square over pairs of the part of (q - a).(k - b) that is dropped, keys weighted."""
    q, k = tokens(length, length, heads=1, kv_heads=1)
    exact, ours = statistics_from_moments(moments(q, k, SCALE), 5, SCALE), input_statistics(q, k, 5)
    x, y = q[0, 0].double() * SCALE - exact.query_mean[0].double(), k[0, 0].double() - exact.key_mean[0].double()
    weight = torch.softmax(k[0, 0].double() @ exact.query_mean[0].double(), 0)

    def dropped(matrix: Tensor) -> float:
        return float(((x @ (torch.eye(D).double() - matrix.reshape(D, D)) @ y.T).square() @ weight).mean())

    least, everything = dropped(interaction(exact)), dropped(torch.zeros(D, D).double())
    assert least < 0.1 * everything
    assert dropped(interaction(ours)) < 1.15 * least


def test_the_means_are_of_all_tokens_and_the_covariances_of_samples():
    q, k = tokens(4 * SAMPLES, 4 * SAMPLES)
    before = sampled_moments(q, k, SCALE, None, None)
    q[:, :, 1] += 100.0  # the second of some thousand is no sample
    k[:, :, 1] += 1.0
    after = sampled_moments(q, k, SCALE, None, None)
    assert (after.query_mean - before.query_mean).abs().max() > 0.01 and (after.key_mean != before.key_mean).any()
    assert torch.equal(after.covariances[0], before.covariances[0])
    q[:, :, 0] += 1.0
    assert not torch.equal(sampled_moments(q, k, SCALE, None, None).covariances[0], before.covariances[0])


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("valid", [100, 700])
def test_samples_are_counted_over_valid_tokens(side: str, valid: int):
    """Padded rows have the moments of what is left of them."""
    q, k = tokens(valid, valid)
    mask = torch.ones(1, 2 * valid, dtype=torch.bool)
    place = {"left": slice(valid, None), "right": slice(0, valid), "holes": slice(1, None, 2)}[side]
    mask[:, place] = False
    wide = [torch.full((1, 2, 2 * valid, D), math.nan).index_copy(2, (~mask[0]).nonzero()[:, 0], t) for t in (q, k)]
    for got, want in zip(sampled_moments(*wide, SCALE, mask, mask), sampled_moments(q, k, SCALE, None, None)):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_what_padded_tokens_hold_changes_no_bit():
    q, k = tokens(600, 600, batch=2)
    mask = padding(600, (70, 0))
    first = sampled_moments(q, k, SCALE, mask, mask)
    second = sampled_moments(*(t.masked_fill(mask[:, None, :, None], 1e9) for t in (q, k)), SCALE, mask, mask)
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_a_row_has_the_same_statistics_alone_and_among_others():
    q, k = tokens(300, 500, batch=3)
    together = input_statistics(q, k, 5)
    for row in range(3):
        alone = input_statistics(q[row : row + 1], k[row : row + 1], 5)
        for got, want in zip(together.tensors(), alone.tensors()):
            torch.testing.assert_close(got[row], want[0], atol=1e-6, rtol=1e-6)


def test_the_number_of_threads_changes_no_bit():
    q, k = tokens(3000, 3000, batch=2, heads=4)
    v, threads = torch.randn(2, 2, 3000, D), torch.get_num_threads()
    try:
        outputs = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            outputs.append(sb.attention(q, k, v, sb.Window(16), sb.Quadratic(5, "input")))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_statistics_are_constants_of_the_backward_pass():
    q, k = (t.requires_grad_() for t in tokens(300, 300))
    v = torch.randn(1, 2, 300, D, requires_grad=True)
    grads = []
    fitted = input_statistics(q, k, 5)
    for low_rank, statistics in ((sb.Quadratic(5, "input"), None), (sb.Quadratic(5), fitted)):
        out = sb.attention(q, k, v, sb.Window(16), low_rank, statistics=statistics)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("same", ["queries", "keys", "both"])
def test_equal_tokens_have_no_direction(same: str):
    """Then every row is exact: exp(s) is exp(rho + kappa)."""
    q, k = tokens(300, 300)
    if same != "keys":
        q = q[:, :, :1].expand_as(q)
    if same != "queries":
        k = k[:, :, :1].expand_as(k)
    s = input_statistics(q, k, 5)
    assert s.query_projection.eq(0).all() and s.key_projection.eq(0).all()
    v = torch.randn(1, 2, 300, D)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(sb.attention(q, k, v, sb.Empty(), sb.Quadratic(5, "input")), exact, atol=1e-5, rtol=1e-5)


def test_one_graph_serves_sequences_shorter_and_longer_than_the_samples():
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sb.attention(q, k, v, sb.Window(16), sb.Quadratic(5, "input"))

    class Module(torch.nn.Module):
        forward = staticmethod(attend)

    q, k = tokens(300, 300)
    shape = {2: torch.export.Dim("tokens", min=32, max=2000)}
    program = torch.export.export(Module(), (q, k, q.clone()), dynamic_shapes=(shape, shape, shape)).module()
    for length in (60, 300, 1000):
        q, k = tokens(length, length)
        torch.testing.assert_close(program(q, k, q), attend(q, k, q), atol=1e-6, rtol=1e-6)
