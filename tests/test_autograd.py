"""Plain eager calls take one node of the graph and keep what they computed before; neither changes a bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import scatterbrain as sb

H, KV, N, D, R = 4, 2, 70, 8, 3


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [rand(2, h, N, D, seed=s, dtype=dtype).requires_grad_() for s, h in enumerate((H, KV, KV))]


def fitted(seed: int = 5) -> sb.Statistics:
    return sb.fit_statistics(rand(1, H, 99, D, seed=seed), rand(1, KV, 99, D, seed=seed + 1), R)


def projections(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((H, R, D), (H, D), (H,), (KV, R, D), (KV, D))
    return [(rand(*s, seed=10 + i) / 3).to(dtype).requires_grad_() for i, s in enumerate(shapes)]


KERNELS = {
    "none": None,
    "stored": sb.Quadratic(R),
    "input": sb.Quadratic(R, "input"),
    "learned": sb.Quadratic(R, "learned"),
    "favor": sb.Favor(8),
}


def run(kernel: str, tensors: list[Tensor], learned: list[Tensor], **arguments: object) -> list[Tensor]:
    """out, lse and all gradients of both."""
    statistics = {"stored": fitted(), "learned": sb.Projections(*learned)}.get(kernel)
    out, lse = sb.attention(
        *tensors, sb.Routed(24), KERNELS[kernel], statistics=statistics, return_lse=True, **arguments
    )
    leaves = tensors + (learned if kernel == "learned" else [])
    upstream = [rand(*out.shape, seed=20, dtype=out.dtype), rand(*lse.shape, seed=21, dtype=lse.dtype)]
    return [out, lse, *torch.autograd.grad([out, lse], leaves, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_node_gives_the_bits_of_the_registered_autograd(kernel: str, dtype: torch.dtype) -> None:
    """A dispatch mode sees the operators one by one, with the autograd that is registered with them."""
    mask = torch.arange(N).expand(2, N) >= torch.tensor([[N], [N - 9]])
    learned = projections(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    for arguments in ({"key_padding_mask": mask}, {} if kernel == "input" else {"is_causal": True}):
        got = run(kernel, qkv(dtype), learned, **arguments)
        with FlopCounterMode(display=False):
            want = run(kernel, qkv(dtype), learned, **arguments)
        assert all(torch.equal(mine, theirs) and mine.dtype == theirs.dtype for mine, theirs in zip(got, want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_wide_heads_too_and_half_types_are_rounded_once_less(dtype: torch.dtype) -> None:
    tensors = [rand(2, h, N, 32, seed=s, dtype=dtype).requires_grad_() for s, h in enumerate((H, KV, KV))]
    statistics = sb.fit_statistics(rand(1, H, 99, 32, seed=5), rand(1, KV, 99, 32, seed=6), R)

    def gradients(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        out = sb.attention(*tensors, sb.Routed(24), sb.Quadratic(R), statistics=statistics)
        return torch.autograd.grad(out, tensors, rand(*out.shape, seed=20, dtype=out.dtype))

    got = gradients(tensors)
    with FlopCounterMode(display=False):
        want = gradients(tensors)
    if dtype in (torch.float32, torch.float64):
        assert all(map(torch.equal, got, want))
        return
    assert torch.equal(got[2], want[2])  # values have no coordinates
    exact = gradients([t.detach().float().requires_grad_() for t in tensors])
    for mine, theirs, truth in zip(got[:2], want, exact):
        assert (mine - truth).norm() < (theirs - truth).norm()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(kernel: str, wanted: int) -> None:
    everything = run(kernel, qkv(), projections())[2:5]
    tensors = [t.requires_grad_(i == wanted) for i, t in enumerate(t.detach() for t in qkv())]
    statistics = {"stored": fitted(), "learned": sb.Projections(*(p.detach() for p in projections()))}.get(kernel)
    out, lse = sb.attention(*tensors, sb.Routed(24), KERNELS[kernel], statistics=statistics, return_lse=True)
    upstream = [rand(*out.shape, seed=20), rand(*lse.shape, seed=21)]
    (got,) = torch.autograd.grad([out, lse], tensors[wanted : wanted + 1], upstream)
    assert torch.equal(got, everything[wanted])


@pytest.mark.parametrize("kernel", ["stored", "learned"])
def test_a_batch_of_upstream_gradients_is_a_loop(kernel: str) -> None:
    tensors, learned = qkv(), projections()
    statistics = fitted() if kernel == "stored" else sb.Projections(*learned)
    out = sb.attention(*tensors, sb.Window(16), KERNELS[kernel], statistics=statistics)
    leaves = tensors + (learned if kernel == "learned" else [])
    upstream = rand(3, *out.shape, seed=20)
    batched = torch.autograd.grad(out, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for mine, theirs in zip(batched, torch.autograd.grad(out, leaves, upstream[i], retain_graph=True)):
            torch.testing.assert_close(mine[i], theirs, rtol=1e-5, atol=1e-6)


def test_tokens_changed_before_the_backward_pass_are_noticed() -> None:
    tensors = qkv()
    query = tensors[0] * 1
    out = sb.attention(query, *tensors[1:], sb.Window(16), KERNELS["stored"], statistics=fitted())
    with torch.no_grad():
        query.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---------------------------------------------------------------------------------------- what is kept


def attend(statistics: sb.Statistics, dtype: torch.dtype = torch.float32, support: object = sb.Window(16)) -> Tensor:
    tensors = [t.detach().to(dtype) for t in qkv()]
    return sb.attention(*tensors, support, sb.Quadratic(R), statistics=statistics)


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
    torch.manual_seed(0)
    cores = [sb.ScatterbrainAttention(H, D, KV, sb.Window(16), sb.Quadratic(R)) for _ in range(2)]
    tensors = [t.detach() for t in qkv()]
    for i, core in enumerate(cores):
        with sb.calibrate(core):
            core(*(t + i for t in tensors))
    outs = [core(*tensors) for core in cores]
    assert not torch.equal(*outs)
    cores[0].load_state_dict(cores[1].state_dict())
    assert torch.equal(cores[0](*tensors), outs[1])


@pytest.mark.parametrize("support", [sb.Window(16), sb.Window(16, 3), sb.Routed(24)], ids=str)
@pytest.mark.parametrize("kernel", ["stored", "favor"])
def test_what_inference_mode_left_behind_can_train(kernel: str, support: object) -> None:
    statistics = fitted() if kernel == "stored" else None
    low_rank = KERNELS[kernel] if kernel == "stored" else sb.Favor(8, seed=77)
    with torch.inference_mode():
        want = sb.attention(*qkv(), support, low_rank, statistics=statistics)
    tensors = qkv()
    out = sb.attention(*tensors, support, low_rank, statistics=statistics)
    assert torch.equal(out, want)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), tensors))


def test_windows_of_one_shape_are_told_apart() -> None:
    """Kept by length, keys, block and causality."""
    tensors = [t.detach() for t in qkv()]
    for support in (sb.Window(16), sb.Window(17), sb.Window(16, 8), sb.Window(16)):
        for is_causal in (False, True):
            for n in (N, 45):
                some = [t[:, :, :n] for t in tensors]
                got = sb.attention(*some, support, None, is_causal=is_causal)
                want = sb.reference.attention(*some, support, None, is_causal=is_causal)
                torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_rank", [None, sb.Quadratic(R)], ids=["none", "stored"])
def test_results_lie_in_memory_as_their_tokens_do(low_rank: sb.Quadratic | None) -> None:
    """Heads of a token next to each other, as linear layers make them, stay so: what follows needs no copy. The bits
    are those of the other layout."""
    statistics = fitted() if low_rank else None
    tokens = [t.detach() for t in qkv()]
    by_token = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in tokens]
    by_head = [t.clone().requires_grad_() for t in tokens]
    results = []
    for leaves in (by_token, by_head):
        out = sb.attention(*leaves, sb.Window(16), low_rank, statistics=statistics)
        results.append([out, *torch.autograd.grad(out, leaves, rand(*out.shape, seed=20))])
    assert all(t.transpose(1, 2).is_contiguous() for t in results[0])
    assert all(t.is_contiguous() for t in results[1])
    assert all(map(torch.equal, *results))
