"""Untraced calls are one node of the graph and keep maps and lists between calls; neither changes a bit."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import testkit
import torch
from testkit import assert_same_bits, leaves, low_ranks, out_and_gradients, padding, rand, weights
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import scatterbrain as sb

H, KV, N, D, R = 4, 2, 70, 8, 3


qkv = partial(testkit.qkv, N, heads=H, kv_heads=KV)
fitted = partial(testkit.fitted, R, heads=H, kv_heads=KV)
projections = partial(testkit.projections, R, heads=H, kv_heads=KV)
KERNELS = low_ranks(R)


def run(kernel: str, tokens: list[Tensor], dtype: torch.dtype = torch.float32, **arguments: object) -> list[Tensor]:
    """out, lse and all gradients, with learned projections in ``dtype``."""
    statistics = fitted() if kernel == "stored" else projections(dtype=dtype) if kernel == "learned" else None
    return testkit.attend(tokens, sb.Routed(24), KERNELS[kernel], statistics, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "ema"])
def test_one_node_gives_the_bits_of_the_registered_autograd(kernel: str, dtype: torch.dtype) -> None:
    """A dispatch mode sees the operators one by one, with the autograd that is registered with them."""
    mask, learned = padding(N, (0, 9)), torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    for arguments in ({"key_padding_mask": mask}, {} if kernel == "input" else {"is_causal": True}):
        got = run(kernel, qkv(dtype=dtype), learned, **arguments)
        with FlopCounterMode(display=False):
            want = run(kernel, qkv(dtype=dtype), learned, **arguments)
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_wide_heads_too_and_half_types_are_rounded_once_less(dtype: torch.dtype) -> None:
    tensors, statistics = qkv(head_dim=32, dtype=dtype), fitted(head_dim=32)

    def gradients(tensors: list[Tensor]) -> list[Tensor]:
        d_out = rand(*tensors[0].shape, seed=20, dtype=tensors[0].dtype)
        function = partial(sb.attention, support=sb.Routed(24), low_rank=sb.Quadratic(R), statistics=statistics)
        return out_and_gradients(function, tensors, d_out=d_out)[1:]

    got = gradients(tensors)
    with FlopCounterMode(display=False):
        want = gradients(tensors)
    if dtype in (torch.float32, torch.float64):
        assert_same_bits(got, want, testkit.RESULTS[2:])
        return
    assert torch.equal(got[2], want[2])  # values have no coordinates
    exact = gradients([t.float() for t in tensors])
    for mine, theirs, truth in zip(got[:2], want, exact):
        assert (mine - truth).norm() < (theirs - truth).norm()


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "ema"])
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(kernel: str, wanted: int) -> None:
    everything = run(kernel, qkv())[2:5]
    tensors = [t.requires_grad_(i == wanted) for i, t in enumerate(qkv())]
    statistics = {"stored": fitted(), "learned": projections()}.get(kernel)
    out, lse = sb.attention(*tensors, sb.Routed(24), KERNELS[kernel], statistics=statistics, return_lse=True)
    upstream = [rand(*out.shape, seed=20), rand(*lse.shape, seed=21)]
    (got,) = torch.autograd.grad([out, lse], tensors[wanted : wanted + 1], upstream)
    assert torch.equal(got, everything[wanted])


@pytest.mark.parametrize("kernel", ["stored", "learned"])
def test_a_batch_of_upstream_gradients_is_a_loop(kernel: str) -> None:
    tensors, learned = leaves(qkv()), leaves(weights(projections()))
    statistics = fitted() if kernel == "stored" else sb.Projections(*learned)
    out = sb.attention(*tensors, sb.Window(16), KERNELS[kernel], statistics=statistics)
    wanted = tensors + (learned if kernel == "learned" else [])
    upstream = rand(3, *out.shape, seed=20)
    batched = torch.autograd.grad(out, wanted, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for mine, theirs in zip(batched, torch.autograd.grad(out, wanted, upstream[i], retain_graph=True)):
            torch.testing.assert_close(mine[i], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("support", [sb.Window(16), sb.Routed(24)], ids=["window", "routed"])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("head_dim", [16, 32])
@pytest.mark.parametrize("kernel", ["stored", "input", "centroid"])
def test_a_batch_of_upstream_gradients_is_a_loop_for_kept_calls_too(
    kernel: str, head_dim: int, is_padded: bool, support: object
) -> None:
    tensors = leaves(qkv(head_dim=head_dim))
    core = sb.ScatterbrainAttention(H, head_dim, KV, support, KERNELS.get(kernel, sb.Centroid(12)))
    if kernel == "stored":
        with sb.calibrate(core):
            core(*tensors)
    mask = padding(N, (0, 9)) if is_padded else None
    for _ in range(2):  # a call is kept from its first time on
        out = core(*tensors, key_padding_mask=mask)
        upstream = rand(3, *out.shape, seed=20)
        batched = torch.autograd.grad(out, tensors, upstream, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            for mine, theirs in zip(batched, torch.autograd.grad(out, tensors, upstream[i], retain_graph=True)):
                torch.testing.assert_close(mine[i], theirs, rtol=1e-5, atol=1e-6)


def test_a_vectorized_jacobian_is_the_plain_one() -> None:
    q, k, v = qkv(head_dim=16)
    core = sb.ScatterbrainAttention(H, 16, KV, sb.Window(16), sb.Centroid(12))
    some = lambda values: core(q, k, values)[0, :2, :2, :3]
    jacobians = [torch.autograd.functional.jacobian(some, v, vectorize=vectorize) for vectorize in (True, False)]
    torch.testing.assert_close(*jacobians, rtol=1e-5, atol=1e-6)


def test_tokens_changed_before_the_backward_pass_are_noticed() -> None:
    tensors = leaves(qkv())
    query = tensors[0] * 1
    out = sb.attention(query, *tensors[1:], sb.Window(16), KERNELS["stored"], statistics=fitted())
    with torch.no_grad():
        query.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---------------------------------------------------------------------------------------- kept between calls


def attend(statistics: sb.Statistics, dtype: torch.dtype = torch.float32, support: object = sb.Window(16)) -> Tensor:
    return sb.attention(*qkv(dtype=dtype), support, sb.Quadratic(R), statistics=statistics)


@pytest.mark.parametrize("field", ["query_projection", "query_mean", "key_projection", "key_mean"])
def test_statistics_changed_in_place_are_used_as_they_are_now(field: str) -> None:
    """Also behind the version counter, as moving averages of models do with .data."""
    statistics = fitted()
    before = attend(statistics)
    for change in (lambda t: t.data.mul_(0.5), lambda t: t.mul_(0.5)):
        change(getattr(statistics, field))
        after = attend(statistics)
        assert not torch.equal(after, before) and torch.equal(after, attend(copy.deepcopy(statistics)))
        before = after


def test_statistics_serve_two_types_in_turn() -> None:
    statistics = fitted()
    want = attend(copy.deepcopy(statistics)), attend(copy.deepcopy(statistics), torch.float64)
    for _ in range(2):
        assert torch.equal(attend(statistics), want[0])
        assert torch.equal(attend(statistics, torch.float64), want[1])


def test_loading_other_statistics_changes_the_output() -> None:
    cores = [sb.ScatterbrainAttention(H, D, KV, sb.Window(16), sb.Quadratic(R)) for _ in range(2)]
    tensors = qkv()
    for i, core in enumerate(cores):
        with sb.calibrate(core):
            core(*(t + i for t in tensors))
    outs = [core(*tensors) for core in cores]
    assert not torch.equal(*outs)
    cores[0].load_state_dict(cores[1].state_dict())
    assert torch.equal(cores[0](*tensors), outs[1])


@pytest.mark.parametrize("support", [sb.Window(16), sb.Window(16, 3), sb.Routed(24)], ids=str)
@pytest.mark.parametrize("kernel", ["stored", "favor"])
def test_values_kept_from_inference_mode_can_train(kernel: str, support: object) -> None:
    statistics = fitted() if kernel == "stored" else None
    low_rank = KERNELS[kernel] if kernel == "stored" else sb.Favor(8, seed=77)
    with torch.inference_mode():
        want = sb.attention(*qkv(), support, low_rank, statistics=statistics)
    out, *gradients = out_and_gradients(
        partial(sb.attention, support=support, low_rank=low_rank, statistics=statistics), qkv()
    )
    assert torch.equal(out, want) and all(g.isfinite().all() for g in gradients)


def test_windows_of_one_shape_are_told_apart() -> None:
    """Kept by length, keys, block and causality."""
    for support in (sb.Window(16), sb.Window(17), sb.Window(16, 8), sb.Window(16)):
        for is_causal in (False, True):
            for n in (N, 45):
                some = [t[:, :, :n] for t in qkv()]
                got = sb.attention(*some, support, None, is_causal=is_causal)
                want = sb.reference.attention(*some, support, None, is_causal=is_causal)
                torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_rank", [None, sb.Quadratic(R)], ids=["none", "stored"])
def test_results_lie_in_memory_as_their_tokens_do(low_rank: sb.Quadratic | None) -> None:
    """Heads of a token that lie next to each other, as linear layers write them, stay so, and the next layer needs no
    copy. The bits are those of the other layout."""
    statistics = fitted() if low_rank else None
    by_token = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv()]
    function = partial(sb.attention, support=sb.Window(16), low_rank=low_rank, statistics=statistics)
    results = [out_and_gradients(function, t, d_out=rand(*t[0].shape, seed=20)) for t in (by_token, qkv())]
    assert all(t.transpose(1, 2).is_contiguous() for t in results[0])
    assert all(t.is_contiguous() for t in results[1])
    assert_same_bits(*results)
