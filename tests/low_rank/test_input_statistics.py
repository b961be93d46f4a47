"""Quadratic(statistics="input"): means of all tokens of the call, covariances of samples, directions by subspace
iteration; by one operator on the CPU, composed of torch's operations on other devices."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from testkit import padding, qkv
from torch import Tensor

import scatterbrain as sb
from scatterbrain.low_rank.input_statistics import SAMPLES, composed_projection, fitted_projection, sampled_moments
from scatterbrain.low_rank.moments import moments
from scatterbrain.low_rank.quadratic_coefficients import Statistics, statistics_from_moments
from scatterbrain.operators.untraced import Projection
from scatterbrain.padding import padding_info

D = 16
SCALE = D**-0.5  # a power of two
WAYS = {"operator": fitted_projection, "composed": composed_projection}
Way = Callable[..., Projection]


def tokens(queries: int, keys: int, batch: int = 1, heads: int = 2, kv_heads: int = 2) -> list[Tensor]:
    """Queries and keys that vary less and less from direction to direction, and about means."""
    q, k, _ = qkv(queries, keys, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=D)
    spectrum = 2 * 0.75 ** torch.arange(D)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3))).Q
    return [(q * spectrum) @ turn + 0.3, (k * spectrum) @ turn - 0.2]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


def projection(way: Way, q: Tensor, k: Tensor, rank: int, *masks: Tensor | None) -> Projection:
    """``masks``: of keys and, unless it is the same, of queries."""
    key_mask, query_mask = (*masks, None, None)[:2]
    return way(q, k, padding_info(q, k, key_mask, query_mask, 0), rank, SCALE)


def input_statistics(way: Way, q: Tensor, k: Tensor, rank: int, *masks: Tensor | None) -> Statistics:
    """Pq, a, Pk and b, read from the maps that they have become."""
    p = projection(way, q, k, rank, *masks)
    return Statistics(
        p.query_weight[:, :, :-1] / SCALE,
        p.key_weight[:, :, -1],
        p.key_weight[:, :, :-1],
        p.query_weight[:, :, -1] / SCALE,
        SCALE,
    )


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["none", "holes", "left", "all"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "rank", "width"),
    [
        (700, 700, 2, 5, 16),
        (1100, 300, 6, 5, 16),
        (40, 70, 4, 9, 9),
        (2, 600, 2, 20, 40),
        (1, 1, 2, 1, 1),
        (5, 0, 2, 3, 8),
    ],
)
def test_the_operator_makes_what_torch_does(
    queries: int, keys: int, heads: int, rank: int, width: int, mask: str, dtype: torch.dtype
):
    """Rows of both projections may have the other sign."""
    q, k, _ = qkv(queries, keys, batch=3, heads=heads, kv_heads=2, head_dim=width)
    q, k, masks = (0.3 + q).to(dtype), (k - 0.2).to(dtype).transpose(1, 2).contiguous().transpose(1, 2), ()
    if mask != "none":
        drawn = [torch.rand(3, n, generator=torch.Generator().manual_seed(n)) < 0.4 for n in (keys, queries)]
        masks = [m if mask == "holes" else m.cummin(1).values if mask == "left" else m | True for m in drawn]
    got, want = (projection(way, q, k, rank, *masks) for way in WAYS.values())
    for one, other, shape in zip(got, want, ((rank + 1, width), (rank + 1,)) * 2):
        assert one.shape == other.shape == (3, 2, *shape) and one.dtype == other.dtype
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 2e-5}
    sign = torch.sign((got.query_weight.double() * want.query_weight.double()).sum(-1))
    sign[..., -1] = 1
    for one, other in zip(got, want):
        torch.testing.assert_close(
            one, other * (sign if one.dim() == 3 else sign[..., None]).to(one.dtype), **tolerance
        )


def test_at_full_rank_nothing_is_dropped(way: Way):
    q, k = tokens(300, 400)
    eye = torch.eye(D, dtype=torch.float64).expand(1, 2, D, D)
    torch.testing.assert_close(interaction(input_statistics(way, q, k, D)), eye, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [200, 1500])
def test_it_drops_little_more_than_a_full_decomposition(length: int, way: Way):
    """Mean square over pairs of the part of (q - a).(k - b) that is dropped, keys weighted."""
    q, k = tokens(length, length, heads=1, kv_heads=1)
    exact, ours = statistics_from_moments(moments(q, k, SCALE), 5, SCALE), input_statistics(way, q, k, 5)
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


@pytest.mark.parametrize("length", [1, 63, 200, 256, 700])
@pytest.mark.parametrize("batch, heads", [(1, 1), (2, 2)])
def test_padding_around_the_tokens_changes_no_bit(length: int, batch: int, heads: int):
    q, k = tokens(length, length, batch, heads, heads)
    want = sampled_moments(q, k, SCALE, None, None)
    for left, right in ((0, 0), (0, 1), (3, 0), (0, 64), (130, 77), (0, 600)):
        mask = torch.ones(batch, left + length + right, dtype=torch.bool)
        mask[:, left : left + length] = False
        wide = [F.pad(t, (0, 0, left, right), value=math.nan) for t in (q, k)]
        for got, alone in zip(sampled_moments(*wide, SCALE, mask, mask), want):
            assert torch.equal(got, alone), (left, right)


def test_the_means_of_the_operator_are_of_all_tokens_and_its_directions_of_samples():
    q, k = tokens(4 * SAMPLES, 4 * SAMPLES)
    before = input_statistics(fitted_projection, q, k, 5)
    q[:, :, 1] += 100.0
    moved = input_statistics(fitted_projection, q, k, 5)
    assert (moved.query_mean - before.query_mean).abs().max() > 0.01
    k[:, :, 1] += 10.0
    weighted = input_statistics(fitted_projection, q, k, 5)
    assert torch.equal(weighted.query_mean, moved.query_mean) and (weighted.key_mean != moved.key_mean).any()
    # The mean query decides what each sample of the keys counts, so these do not change once it does not.
    assert torch.equal(weighted.query_projection, moved.query_projection)
    assert torch.equal(weighted.key_projection, moved.key_projection)
    k[:, :, 0] += 1.0
    assert not torch.equal(input_statistics(fitted_projection, q, k, 5).key_projection, moved.key_projection)


@pytest.mark.parametrize("content", [1e9, math.nan])
def test_what_padded_tokens_hold_changes_no_bit(content: float, way: Way):
    q, k = tokens(600, 600, batch=2)
    for mask in (padding(600, (70, 0)), torch.rand(2, 600, generator=torch.Generator().manual_seed(1)) < 0.4):
        first = projection(way, q, k, 5, mask)
        second = projection(way, *(t.masked_fill(mask[:, None, :, None], content) for t in (q, k)), 5, mask)
        assert all(torch.equal(one, other) for one, other in zip(first, second))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_operator_gives_padded_rows_the_bits_of_what_is_left_of_them(side: str):
    q, k = tokens(900, 900)
    wide = [torch.nn.functional.pad(t, (0, 0, *((77, 0) if side == "left" else (0, 77)))) for t in (q, k)]
    mask = padding(977, (77,)) if side == "right" else padding(977, (77,)).flip(1)
    for got, want in zip(projection(fitted_projection, *wide, 5, mask), projection(fitted_projection, q, k, 5)):
        assert torch.equal(got, want)


def test_a_row_has_the_same_statistics_alone_and_among_others(way: Way):
    q, k = tokens(300, 500, batch=3)
    together = input_statistics(way, q, k, 5)
    for row in range(3):
        alone = input_statistics(way, q[row : row + 1], k[row : row + 1], 5)
        for got, want in zip(together.tensors(), alone.tensors()):
            torch.testing.assert_close(got[row], want[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("batch", [2, 1])
def test_the_number_of_threads_changes_no_bit(batch: int):
    """Whether there are more heads than threads or fewer."""
    q, k = tokens(3000, 3000, batch=batch, heads=4)
    v, threads = torch.randn(batch, 2, 3000, D), torch.get_num_threads()
    try:
        outputs = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            outputs.append(sb.attention(q, k, v, sb.Window(16), sb.Quadratic(5, "input")))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("support", [sb.Window(16), sb.Routed(32)], ids=str)
def test_a_prepared_call_fits_its_own_tokens(support: sb.Support, dtype: torch.dtype):
    """As one that returns its log-sum-exp too, which is not prepared."""
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        inputs = [torch.randn(2, 4, 150, 32, dtype=dtype, requires_grad=True) for _ in range(3)]
        plain, _ = sb.attention(*inputs, support, sb.Quadratic(5, "input"), return_lse=True)
        out = sb.attention(*inputs, support, sb.Quadratic(5, "input"))
        with torch.no_grad():
            assert torch.equal(sb.attention(*inputs, support, sb.Quadratic(5, "input")), plain)
        assert torch.equal(out, plain)
        for got, want in zip(*(torch.autograd.grad(o.square().sum(), inputs) for o in (out, plain))):
            assert torch.equal(got, want)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("place", [0, 1])  # the second token of a thousand is no sample
def test_tokens_that_are_not_finite_are_refused_in_every_call(which: int, bad: float, place: int, way: Way):
    inputs = [*tokens(1000, 1000), torch.randn(1, 2, 1000, D)]
    sb.attention(*inputs, sb.Window(16), sb.Quadratic(5, "input"))
    inputs[which][0, 1, place, 3] = bad
    message = r"Quadratic\(statistics='input'\): query or key holds NaN or infinity"
    with pytest.raises(ValueError, match=message):
        sb.attention(*inputs, sb.Window(16), sb.Quadratic(5, "input"))
    with pytest.raises(ValueError, match=message):
        projection(way, *inputs[:2], 5)


def test_covariances_that_overflow_are_refused(way: Way):
    q, k = (t.double() for t in tokens(300, 300))
    with pytest.raises(ValueError, match="or is too large to square"):
        way(1e200 * q, k, padding_info(q, k, None, None, 0), 5, 1.0)


def test_tracers_and_maps_know_the_operator():
    q, k = tokens(300, 200, batch=2, heads=4)
    operator, settings = torch.ops.scatterbrain.input_projection, (*(None,) * 5, 5, SCALE)
    torch.library.opcheck(operator.default, (q, k, *settings))
    mapped = torch.func.vmap(lambda q, k: operator(q, k, *settings))(torch.stack([q, 2 * q]), torch.stack([k, k + 1]))
    for got, first, second in zip(mapped, operator(q, k, *settings), operator(2 * q, k + 1, *settings)):
        assert torch.equal(got[0], first) and torch.equal(got[1], second)


def test_the_operator_says_what_it_expects():
    q, k = tokens(30, 30)
    operator, nothing = torch.ops.scatterbrain.input_projection, (None,) * 5
    with pytest.raises(RuntimeError, match="expected a rank from 1 to head_dim = 16, got 17"):
        operator(q, k, *nothing, 17, SCALE)
    with pytest.raises(RuntimeError, match="input_projection: shapes of query and key do not fit together"):
        operator(q, k[:, :, :, :8], *nothing, 5, SCALE)
    with pytest.raises(RuntimeError, match="query_offset is for causal calls"):
        operator(q, k, None, None, None, None, torch.zeros(1, dtype=torch.int32), 5, SCALE)


def test_statistics_are_constants_of_the_backward_pass():
    q, k = (t.requires_grad_() for t in tokens(300, 300))
    v = torch.randn(1, 2, 300, D, requires_grad=True)
    grads = []
    fitted = input_statistics(fitted_projection, q.detach(), k.detach(), 5)
    for low_rank, statistics in ((sb.Quadratic(5, "input"), None), (sb.Quadratic(5), fitted)):
        out = sb.attention(q, k, v, sb.Window(16), low_rank, statistics=statistics)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("same", ["queries", "keys", "both"])
def test_equal_tokens_have_no_direction(same: str, way: Way):
    """Then every row is exact: exp(s) is exp(rho + kappa)."""
    q, k = tokens(300, 300)
    if same != "keys":
        q = q[:, :, :1].expand_as(q)
    if same != "queries":
        k = k[:, :, :1].expand_as(k)
    s = input_statistics(way, q, k, 5)
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
