"""torch.func: grad, vmap of grad, jacrev, functional_call and per-sample gradients are those of a loop without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from testkit import KV, B, D, H, N, assert_all_close, fitted, leaves, padding, projections, qkv, rand
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import scatterbrain as sb

LEARNED = sb.Quadratic(3, "learned")
CASES = {
    "window, stored, causal": (sb.Window(8), sb.Quadratic(3), dict(is_causal=True)),
    "pooled lists, learned": (sb.Routed(16, block_q=8), LEARNED, {}),
    "lists of single queries, stored, causal": (sb.Routed(16, 1, 8, 8), sb.Quadratic(3), dict(is_causal=True)),
    "window, input": (sb.Window(8), sb.Quadratic(3, "input"), {}),
    "pooled lists, heads' own keys": (sb.Routed((16, 24), block_q=8), LEARNED, {}),
    "pooled lists, centroid": (sb.Routed(16, block_q=8), sb.Centroid(5), {}),
    "window, centroid, padded": (sb.Window(8), sb.Centroid(5), dict(key_padding_mask=padding(N, (0, 9)))),
    "hashing, favor": (sb.LSH(8), sb.Favor(8), {}),
    "nothing listed, favor, causal": (sb.Empty(), sb.Favor(8), dict(is_causal=True)),
    "window alone, padded": (sb.Window(8), None, dict(key_padding_mask=padding(N, (0, 9)))),
    "every key": (sb.Full(), None, dict(is_causal=True)),
}
UPSTREAM = rand(B, H, N, D, seed=9)
NO_FORWARD_MODE = "no forward-mode derivatives.*use reverse mode"


def attention(case: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Attention of query, key, value and, if they are learned, the projections."""
    support, low_rank, settings = CASES[case]
    learned = list(vars(projections()).values()) if low_rank is LEARNED else []
    statistics = fitted() if low_rank == sb.Quadratic(3) else None

    def function(*tensors: Tensor) -> Tensor:
        given = sb.Projections(*tensors[3:]) if learned else statistics
        return sb.attention(*tensors[:3], support, low_rank, statistics=given, **settings)

    return function, [*qkv(), *learned]


def loss_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: (function(*tensors) * UPSTREAM).sum()


def gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    own = leaves(tensors)
    return torch.autograd.grad(function(*own), own)


@pytest.mark.parametrize("case", CASES)
def test_grad_and_vmap_of_grad_are_those_of_autograd(case: str) -> None:
    function, tensors = attention(case)
    loss, places = loss_of(function), tuple(range(len(tensors)))
    want = gradients(loss, tensors)
    assert_all_close(grad(loss, places)(*tensors), want)
    twice = [torch.stack([t, 0.5 * t]) for t in tensors]
    mapped = vmap(grad(loss, places))(*twice)
    assert_all_close([g[0] for g in mapped], want)
    assert_all_close([g[1] for g in mapped], gradients(loss, [0.5 * t for t in tensors]))
    # Mapped over queries alone: the rest is shared.
    of_query = vmap(grad(loss), in_dims=(1, *(None,) * (len(tensors) - 1)))(twice[0].movedim(0, 1), *tensors[1:])
    assert_all_close(of_query[:1], want[:1])


@pytest.mark.parametrize("case", ["pooled lists, learned", "window, input", "nothing listed, favor, causal"])
def test_compiled_vmap_of_grad_is_that_without_a_compiler(case: str) -> None:
    function, tensors = attention(case)
    mapped = vmap(grad(loss_of(function), tuple(range(len(tensors)))))
    twice = [torch.stack([t, 0.5 * t]) for t in tensors]
    torch._dynamo.reset()
    assert_all_close(torch.compile(mapped, backend="aot_eager")(*twice), mapped(*twice))


@pytest.mark.parametrize("case", CASES)
def test_graphs_and_shapes_are_made_without_a_look_at_values(case: str) -> None:
    function, tensors = attention(case)
    graph, want = make_fx(function)(*tensors), function(*tensors)
    torch.testing.assert_close(graph(*tensors), want)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert function(*map(mode.from_tensor, tensors)).shape == want.shape


def test_jacrev_is_a_loop_over_the_outputs() -> None:
    function, tensors = attention("pooled lists, learned")
    outputs = lambda *t: function(*t)[0, 1, :3, 0]
    want = [gradients(lambda *t, i=i: outputs(*t)[i], tensors) for i in range(3)]
    for got, rows in zip(jacrev(outputs, tuple(range(len(tensors))))(*tensors), zip(*want), strict=True):
        torch.testing.assert_close(got, torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_vjp_of_out_and_lse() -> None:
    function = lambda *t: sb.attention(*t, sb.Window(8), sb.Quadratic(3), statistics=fitted(), return_lse=True)
    upstream = rand(B, H, N, D, seed=5), rand(B, H, N, seed=6)
    own = leaves(qkv())
    assert_all_close(vjp(function, *qkv())[1](upstream), torch.autograd.grad(function(*own), own, upstream))


# -------------------- modules


def per_sample(module: nn.Module, call: Callable[..., Tensor], *batch: Tensor) -> tuple[dict, list[dict]]:
    """Gradients of ``call(module, *sample)`` for the parameters: mapped over the batch, and in a loop over it."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict, *sample: Tensor) -> Tensor:
        run = lambda *arguments, **named: functional_call(module, parameters, arguments, named)
        return call(run, *(s[None] for s in sample)).square().sum()

    mapped = vmap(grad(loss), in_dims=(None, *(0 for _ in batch)))(parameters, *batch)
    loop = []
    for sample in zip(*batch):
        module.zero_grad()
        call(module, *(s[None] for s in sample)).square().sum().backward()
        loop.append({name: p.grad for name, p in module.named_parameters()})
    return mapped, loop


def assert_per_sample(module: nn.Module, call: Callable[..., Tensor], *batch: Tensor) -> None:
    mapped, loop = per_sample(module, call, *batch)
    for i, want in enumerate(loop):
        assert_all_close([mapped[name][i] for name in want], list(want.values()))


def test_per_sample_gradients_of_learned_projections() -> None:
    core = sb.ScatterbrainAttention(H, D, KV, sb.Window(8), LEARNED)
    assert_per_sample(core, lambda run, *tokens: run(*tokens, is_causal=True), *qkv())


@pytest.mark.parametrize("low_rank", [sb.Quadratic(3), LEARNED], ids=str)
def test_per_sample_gradients_of_multihead_attention_with_padding(low_rank: sb.Quadratic) -> None:
    module, x = sb.MultiheadAttention(16, 2, batch_first=True, support=sb.Window(8), low_rank=low_rank), rand(2, N, 16)
    if low_rank.statistics == "stored":
        with sb.calibrate(module):
            module(x, x, x, need_weights=False)
    call = lambda run, x, mask: run(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    assert_per_sample(module, call, x, padding(N, (0, 9)))
    if low_rank is LEARNED:
        with pytest.raises(ValueError, match="expected bool where torch.func.vmap maps over it.*pass a bool mask"):
            per_sample(module, call, x, padding(N, (0, 9)).float())


@pytest.mark.parametrize("statistics", ["stored", "ema"])
def test_functional_call_takes_statistics_as_arguments_and_writes_none(statistics: str) -> None:
    core, tokens = sb.ScatterbrainAttention(H, D, KV, sb.Window(8), sb.Quadratic(3, statistics)), qkv()
    with sb.calibrate(core):
        core(*tokens)
    other = sb.ScatterbrainAttention(H, D, KV, sb.Window(8), sb.Quadratic(3, statistics))
    with sb.calibrate(other):
        other(*qkv(seed=40))
    core.train()
    buffers = dict(other.named_buffers())
    loss = lambda buffers, *tokens: functional_call(core, buffers, tokens).square().sum()
    for _ in range(9):  # moving averages gather at every tenth step
        sb.update_statistics(core)
    got = vmap(grad(loss, argnums=1), in_dims=(None, 0, 0, 0))(buffers, *(t[:, None] for t in tokens))
    own = leaves(tokens)
    torch.testing.assert_close(got[:, 0], torch.autograd.grad(other.eval()(*own).square().sum(), own[0])[0])
    assert core.gathered is None


# -------------------- what is refused


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_forward_mode_and_second_derivatives_say_what_to_do() -> None:
    function, (query, *rest) = attention("window, stored, causal")
    loss = lambda query: loss_of(function)(query, *rest)
    with pytest.raises(RuntimeError, match=NO_FORWARD_MODE):
        jvp(loss, (query,), (query,))
    with pytest.raises(RuntimeError, match=NO_FORWARD_MODE):
        hessian(loss)(query)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented.*sb.reference.attention"):
        grad(lambda query: grad(loss)(query).sum())(query)
