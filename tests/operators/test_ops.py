"""The operators in torch: opcheck, gradcheck, vmap, FLOPs, compile, export, checkpointing, meta, autocast."""

from __future__ import annotations

import pytest
import torch
from operator_cases import (
    DTYPES,
    MASK,
    SAMPLES,
    WITHOUT_GRADIENT,
    attention_arguments,
    detached,
    operator_arguments,
    some_lists,
)
from testkit import (
    KV,
    B,
    D,
    H,
    N,
    assert_all_close,
    assert_same_bits,
    blocks,
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
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import scatterbrain as sb
from scatterbrain.call import Call
from scatterbrain.operators.arguments import QUADRATIC, ForwardResults, RouteArguments
from scatterbrain.padding import EVERYTHING

# ---------------------------------------------------------------------------------------- opcheck


@pytest.mark.parametrize("kernel, lists, dtype, is_causal", SAMPLES)
def test_opcheck_of_attention_and_its_backward(kernel: str, lists: str, dtype: torch.dtype, is_causal: bool) -> None:
    arguments = attention_arguments(kernel, lists, dtype, is_causal)
    torch.library.opcheck(torch.ops.scatterbrain.attention.default, arguments)
    plain = detached(arguments)
    out, lse = torch.ops.scatterbrain.attention(*plain)
    d_lse = None if lists == "span" else torch.randn_like(lse)
    backward = (*ForwardResults(torch.randn_like(out), d_lse, out, lse), *plain)
    torch.library.opcheck(torch.ops.scatterbrain.attention_backward.default, backward, test_utils=WITHOUT_GRADIENT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, heads, bias", [(1, 1, True), (1, H, False), (B, H, True)])
def test_opcheck_of_the_projection(dtype: torch.dtype, batch: int, heads: int, bias: bool) -> None:
    maps = torch.float64 if dtype == torch.float64 else torch.float32
    tokens, weight = leaves((rand(B, H, N, D, dtype=dtype), rand(batch, heads, 4, D, seed=1, dtype=maps)))
    offset = rand(batch, heads, 4, seed=2, dtype=maps).requires_grad_() if bias else None
    torch.library.opcheck(torch.ops.scatterbrain.project.default, (tokens, weight, offset))
    grad = rand(B, H, N, 4, seed=3, dtype=maps)
    arguments = (grad, tokens.detach(), weight.detach())
    torch.library.opcheck(torch.ops.scatterbrain.project_backward.default, arguments, test_utils=WITHOUT_GRADIENT)


@pytest.mark.parametrize(
    "operator, arguments", [("random_projection", (6, D, True, True, 1)), ("hash_directions", (2, D, 1))]
)
def test_opcheck_of_seeded_constants(operator: str, arguments: tuple) -> None:
    torch.library.opcheck(getattr(torch.ops.scatterbrain, operator).default, arguments)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("block_q, block_k, window", [(8, 1, 0), (16, 1, 0), (32, 1, 0), (1, 8, 0), (1, 8, 16)])
def test_opcheck_of_routing(block_q: int, block_k: int, window: int, is_causal: bool) -> None:
    query, key, _ = qkv()
    ranges = torch.tensor([[0, N], [0, N - 9]], dtype=torch.int32)
    arguments = operator_arguments(
        RouteArguments,
        query=query,
        key=key,
        query_map=rand(B, H, N, 4, seed=4),
        key_map=rand(B, KV, N, 4, seed=5),
        query_mask=MASK,
        key_mask=MASK.clone(),
        query_range=ranges,
        key_range=ranges.clone(),
        query_offset=torch.tensor([0, 3], dtype=torch.int32) if is_causal else None,
        low_rank=QUADRATIC,
        keys=40,
        block_q=block_q,
        block_k=block_k,
        window=window,
        is_causal=is_causal,
        scale=0.3,
    )
    torch.library.opcheck(torch.ops.scatterbrain.route.default, arguments, test_utils=WITHOUT_GRADIENT)


# ---------------------------------------------------------------------------------------- gradcheck

GRADCHECKS = {
    "window, learned": (sb.Window(6, 4), sb.Quadratic(3, "learned"), {}),
    "window, learned, causal": (sb.Window(6, 4), sb.Quadratic(3, "learned"), dict(is_causal=True)),
    "single queries, learned, causal, padded": (
        sb.Window(5, 1),
        sb.Quadratic(3, "learned"),
        dict(is_causal=True, key_padding_mask=True),
    ),
    "empty, learned, causal": (sb.Empty(), sb.Quadratic(3, "learned"), dict(is_causal=True, query_offset=2)),
    "empty, learned, padded": (sb.Empty(), sb.Quadratic(3, "learned"), dict(key_padding_mask=True)),
    "blocks, learned, padded": ("blocks", sb.Quadratic(3, "learned"), dict(key_padding_mask=True)),
    "window, stored": (sb.Window(6, 4), sb.Quadratic(3), dict(scale=0.7)),
    "window, favor": (sb.Window(6, 4), sb.Favor(6), {}),
    "empty, favor, causal, padded": (sb.Empty(), sb.Favor(6), dict(is_causal=True, key_padding_mask=True)),
    "window, hyperbolic": (sb.Window(6, 4), sb.Favor(6, hyperbolic=True), dict(is_causal=True)),
    "window alone": (sb.Window(6, 4), None, dict(is_causal=True)),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck_in_float64(name: str) -> None:
    """Of out and lse, by query, key, value and learned projections. 80 keys: states of several chunks take part."""
    support, low_rank, arguments = GRADCHECKS[name]
    n = 80 if "causal" in name else 12
    tensors = leaves(qkv(n, batch=1, head_dim=3, dtype=torch.float64))
    learned = leaves(weights(projections(head_dim=3, dtype=torch.float64))) if "learned" in name else []
    if arguments.get("key_padding_mask"):
        arguments = arguments | dict(
            key_padding_mask=torch.rand(1, n, generator=torch.Generator().manual_seed(3)) < 0.3
        )
    if support == "blocks":
        support = blocks([[0, 1], [1], [0, 2]], 4, 3, batch=1)
    stored = fitted(head_dim=3, scale=arguments.get("scale")) if "stored" in name else None

    def function(query: Tensor, key: Tensor, value: Tensor, *learned: Tensor) -> tuple[Tensor, Tensor]:
        statistics = sb.Projections(*learned) if learned else stored
        out, lse = sb.attention(
            query, key, value, support, low_rank, statistics=statistics, return_lse=True, **arguments
        )
        return out, torch.where(lse.isfinite(), lse, 0)

    assert torch.autograd.gradcheck(function, (*tensors, *learned), eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=n > 12)


# ---------------------------------------------------------------------------------------- vmap

VMAPS = {
    "window, learned": dict(support=sb.Window(8, 4), low_rank=sb.Quadratic(3, "learned"), is_causal=True),
    "window, padded": dict(support=sb.Window(8, 4), low_rank=sb.Quadratic(3, "learned"), key_padding_mask=MASK),
    "window, sinks": dict(support=sb.Window(10, 4, sinks=2), low_rank=sb.Quadratic(3, "learned"), is_causal=True),
    "routed": dict(support=sb.Routed(16, 8), low_rank=sb.Quadratic(3, "learned"), is_causal=True),
    "routed, sinks": dict(support=sb.Routed(24, 8, window=16, sinks=2), low_rank=None, is_causal=True),
    "routed per query": dict(support=sb.Routed(24, 1, 8, 8), low_rank=sb.Quadratic(3, "learned")),
    "empty, favor": dict(support=sb.Empty(), low_rank=sb.Favor(8)),
    "window, centroid": dict(support=sb.Window(8), low_rank=sb.Centroid(5), key_padding_mask=MASK),
    "lsh": dict(support=sb.LSH(8), low_rank=None),
    "full": dict(support=sb.Full(), low_rank=None, key_padding_mask=MASK),
    "blocks": dict(support=some_lists(8), low_rank=None),
}
IN_DIMS = {"all": (0, 0, 0), "query": (0, None, None), "key and value": (None, 0, 0), "other places": (2, 4, 0)}


@pytest.mark.parametrize("dims", IN_DIMS)
@pytest.mark.parametrize("name", VMAPS)
def test_vmap_is_a_loop(name: str, dims: str) -> None:
    arguments, in_dims = dict(VMAPS[name]), IN_DIMS[dims]
    if isinstance(arguments["low_rank"], sb.Quadratic):
        arguments["statistics"] = projections()
    tensors = [
        t if dim is None else torch.stack([t + 0.1 * rand(*t.shape, seed=50 + i) for i in range(3)], dim)
        for t, dim in zip(qkv(), in_dims)
    ]

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sb.attention(query, key, value, **arguments)

    got = torch.vmap(function, in_dims)(*tensors)
    for i in range(3):
        one = [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims)]
        torch.testing.assert_close(got[i], function(*one), rtol=1e-5, atol=1e-6)


def test_nested_vmap_and_mapped_projections_are_loops() -> None:
    tensors = [
        torch.stack([torch.stack([t * (1 + 0.1 * i + 0.03 * j) for j in range(2)]) for i in range(3)]) for t in qkv()
    ]
    stacked = [torch.stack([w * (1 + 0.2 * j) for j in range(2)]) for w in weights(projections())]

    def function(query: Tensor, key: Tensor, value: Tensor, *learned: Tensor) -> Tensor:
        return sb.attention(
            query, key, value, sb.Window(8, 4), sb.Quadratic(3, "learned"), statistics=sb.Projections(*learned)
        )

    inner = torch.vmap(function, (0,) * 8)
    got = torch.vmap(inner, (0, 0, 0, *(None,) * 5))(*tensors, *stacked)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(
                got[i, j], function(*(t[i, j] for t in tensors), *(w[j] for w in stacked)), rtol=1e-5, atol=1e-6
            )


def test_gradients_through_vmap_are_those_of_the_loop() -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, *learned: Tensor) -> Tensor:
        return sb.attention(
            query, key, value, sb.Window(8, 4), sb.Quadratic(3, "learned"), MASK, statistics=sb.Projections(*learned)
        )

    batched = leaves([torch.stack([t, 0.7 * t]) for t in qkv()])
    learned = leaves(weights(projections()))
    upstream = rand(2, B, H, N, D, seed=20)
    mapped = torch.vmap(function, (0, 0, 0, *(None,) * 5))(*batched, *learned)
    looped = torch.stack([function(*(t[i] for t in batched), *learned) for i in range(2)])
    assert_all_close(*(torch.autograd.grad(out, batched + learned, upstream) for out in (mapped, looped)))


SECOND = {
    "none": {"support": sb.Window(8), "low_rank": None},
    "quadratic": {"support": sb.Window(8), "low_rank": sb.Quadratic(3, "learned")},
    "favor": {"support": sb.Window(8), "low_rank": sb.Favor(8)},
    "empty": {"support": sb.Empty(), "low_rank": sb.Favor(8)},
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_raise(name: str) -> None:
    """They are not implemented, and must not come out as zero."""
    arguments = dict(SECOND[name], statistics=projections() if name == "quadratic" else None)
    tensors = leaves(qkv())
    out = sb.attention(*tensors, **arguments)
    gradients = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="second derivatives"):
            gradient.square().sum().backward(retain_graph=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # in what torch.func.jvp imports
@pytest.mark.parametrize("name", SECOND)
def test_forward_mode_derivatives_raise(name: str) -> None:
    arguments = dict(SECOND[name], statistics=projections() if name == "quadratic" else None)
    query, key, value = qkv()
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda q: sb.attention(q, key, value, **arguments), (query,), (torch.ones_like(query),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        dual = torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
        sb.attention(query, key, dual, **arguments)


# ---------------------------------------------------------------------------------------- FLOPs


def flops(n: int, support: object, low_rank: object) -> tuple[int, int]:
    """(forward, forward and backward) of one call."""
    tensors = leaves(qkv(n))
    with FlopCounterMode(display=False) as counter:
        out = sb.attention(
            *tensors,
            support,
            low_rank,
            statistics=projections() if isinstance(low_rank, sb.Quadratic) else None,
            is_causal=True,
        )
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("support", [sb.Window(16), sb.Routed(24, 1, 8, 8), sb.Routed(24)], ids=str)
@pytest.mark.parametrize("low_rank", [None, sb.Quadratic(3, "learned"), sb.Favor(8)], ids=str)
def test_flops_are_counted_and_linear_in_the_tokens(support: object, low_rank: object) -> None:
    small, large = flops(64, support, low_rank), flops(256, support, low_rank)
    assert small[0] > 0 and small[1] > 2 * small[0]
    assert large == (4 * small[0], 4 * small[1])


def test_flops_of_a_window_are_those_of_its_pairs() -> None:
    """Scores and their use: 2 (d + dv) per pair; the backward pass 2 (3 d + 2 dv)."""
    pairs = B * H * 64 * 16
    assert flops(64, sb.Window(16), None) == (pairs * 2 * (D + D), pairs * 2 * (D + D + 3 * D + 2 * D))


# ---------------------------------------------------------------------------------------- compile and export

COMPILED = {
    "window, quadratic, padded": (sb.Window(16), sb.Quadratic(3, "learned"), True),
    "routed per query": (sb.Routed(24, 1, 8, 8), sb.Quadratic(3, "learned"), False),
    "routed, heads' own keys": (sb.Routed((24, 32)), sb.Quadratic(3, "learned"), True),
    "routed": (sb.Routed(24), sb.Quadratic(3, "learned"), True),
    "favor": (sb.Window(16), sb.Favor(8), True),
    "full": (sb.Full(), None, True),
    "lsh": (sb.LSH(8), None, True),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile_without_graph_breaks_for_any_length(name: str) -> None:
    support, low_rank, padded = COMPILED[name]
    learned = leaves(weights(projections()))

    def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *learned: Tensor) -> Tensor:
        statistics = sb.Projections(*learned) if isinstance(low_rank, sb.Quadratic) else None
        return sb.attention(query, key, value, support, low_rank, mask, name != "lsh", statistics=statistics)

    graphs, backend = counting_backend()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for n in (70, 130, 33):
        mask = padding(n, (0, 9)) if padded else None
        assert_all_close(
            *(
                out_and_gradients(lambda *t: f(*t, mask, *learned), qkv(n), learned, allow_unused=True)
                for f in (function, compiled)
            )
        )
    assert len(graphs) == 1, "one graph serves every length"


def test_the_module_with_learned_projections_compiles() -> None:
    core = sb.ScatterbrainAttention(H, D, KV, sb.Routed(24, 1, 8, 8), sb.Quadratic(3, "learned"))
    torch._dynamo.reset()
    compiled = torch.compile(core, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_all_close(
        *(
            out_and_gradients(lambda *t: module(*t, is_causal=True), qkv(70), list(core.parameters()))
            for module in (core, compiled)
        )
    )


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_inductor_compiles_routing_and_attention() -> None:
    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return 2 * sb.attention(query, key, value, sb.Routed(24, 1, 8, 8), None, is_causal=True)

    torch._dynamo.reset()
    # Caches would keep code for the operators of an earlier build.
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(function, fullgraph=True, dynamic=True)
        for n in (70, 33):
            torch.testing.assert_close(compiled(*qkv(n)), function(*qkv(n)))


class Attention(nn.Module):
    def __init__(self, support: object, is_causal: bool) -> None:
        super().__init__()
        self.core, self.is_causal = sb.ScatterbrainAttention(H, D, KV, support, sb.Quadratic(3, "learned")), is_causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.core(query, key, value, is_causal=self.is_causal)


@pytest.mark.parametrize("support", [sb.Window(16), sb.Routed(24, 1, 8, 8)], ids=str)
def test_export_with_a_dynamic_number_of_tokens(support: object) -> None:
    module = Attention(support, is_causal=True).eval()
    # More than one block of queries: torch specialises on sizes of 1.
    tokens = torch.export.Dim("tokens", min=17, max=4096)
    program = torch.export.export(module, tuple(qkv(70)), dynamic_shapes=({2: tokens},) * 3)
    for n in (70, 33, 130):
        torch.testing.assert_close(program.module()(*qkv(n)), module(*qkv(n)))


# ---------------------------------------------------------------------------------------- checkpointing, meta, autocast


@pytest.mark.parametrize(
    "support, low_rank",
    [(sb.Routed(24), sb.Quadratic(3, "learned")), (sb.LSH(8), sb.Favor(8)), (sb.Window(8), sb.Quadratic(3, "input"))]
    + [(sb.Window(8), sb.Centroid(5))],
    ids=str,
)
def test_activation_checkpointing_gives_the_same_bits(support: object, low_rank: object) -> None:
    core = sb.ScatterbrainAttention(H, D, KV, support, low_rank)
    parameters = list(core.parameters())
    assert_same_bits(
        out_and_gradients(lambda *t: checkpoint(core, *t, use_reentrant=False), qkv(), parameters),
        out_and_gradients(core, qkv(), parameters),
    )


META = [sb.Full(), sb.Empty(), sb.Window(16), sb.Routed(24), sb.Routed(24, 1, 8, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("support", META, ids=str)
def test_the_meta_device_gives_shapes_and_dtypes(support: object, dtype: torch.dtype) -> None:
    core = sb.ScatterbrainAttention(H, D, KV, support, sb.Quadratic(3, "learned"))
    real = leaves(qkv(dtype=dtype))
    meta = leaves([t.to("meta") for t in real])
    want, want_lse = core(*real, key_padding_mask=MASK, is_causal=True, return_lse=True)
    got, got_lse = core.to("meta")(*meta, key_padding_mask=MASK.to("meta"), is_causal=True, return_lse=True)
    got.sum().backward()
    assert got.device.type == "meta" and (got.shape, got.dtype) == (want.shape, want.dtype)
    assert (got_lse.shape, got_lse.dtype) == (want_lse.shape, want_lse.dtype)
    assert [(t.grad.shape, t.grad.dtype) for t in meta] == [(t.shape, t.dtype) for t in real]


@pytest.mark.parametrize(
    "low_rank", [None, sb.Quadratic(3), sb.Quadratic(3, "ema"), sb.Quadratic(3, "learned"), sb.Favor(8)], ids=str
)
def test_modules_created_on_the_meta_device_come_alive(low_rank: object) -> None:
    with torch.device("meta"):
        core = sb.ScatterbrainAttention(H, D, KV, sb.Window(8), low_rank)
    assert all(t.device.type == "meta" for t in core.state_dict().values() if t.dim() > 1 or t.numel() > 5)
    core.to_empty(device="cpu")
    core.reset_parameters()
    torch.manual_seed(1)
    fresh = sb.ScatterbrainAttention(H, D, KV, sb.Window(8), low_rank)
    mine, theirs = core.state_dict(), fresh.state_dict()
    assert [(n, t.shape, t.dtype) for n, t in mine.items()] == [(n, t.shape, t.dtype) for n, t in theirs.items()]
    assert [n for n, _ in core.named_parameters()] == [n for n, _ in fresh.named_parameters()]
    if low_rank == sb.Quadratic(3):
        with sb.calibrate(core):
            core(*qkv())
    out = core(*qkv())
    assert out.isfinite().all()
    for name, tensor in mine.items():
        if "projection" in name and low_rank != sb.Quadratic(3):
            assert tensor.abs().sum() > 0, name


def test_autocast_casts_tokens_and_keeps_coordinates_and_projections() -> None:
    core = sb.ScatterbrainAttention(H, D, KV, sb.Routed(24), sb.Quadratic(3, "learned"))
    tensors = leaves(qkv())
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = core(*tensors, return_lse=True)
        half = [t.detach().bfloat16() for t in tensors]
        call = Call(*half, core.support, core.low_rank, core.coefficients(), D**-0.5, EVERYTHING, is_causal=False)
        query_map, _ = core.low_rank.coordinates(call)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and query_map.dtype == torch.float32
    assert torch.equal(out, core(*half)), "autocast is a cast of query, key and value"
    out.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors) and all(
        p.grad.dtype == torch.float32 for p in core.parameters()
    )
    exact = core(*qkv())
    assert (out.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("support", [sb.Full(), sb.Window(8)], ids=str)
def test_float64_stays_float64_under_autocast(support: object) -> None:
    tensors = qkv(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = sb.attention(*tensors, support, None)
    assert out.dtype == torch.float64 and torch.equal(out, sb.attention(*tensors, support, None))


def test_autocast_in_float16_gives_float16() -> None:
    with torch.autocast("cpu", torch.float16):
        assert sb.attention(*qkv(), sb.Window(8), sb.Favor(8)).dtype == torch.float16


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("tokens_dim", "weight_dim"), [(0, 0), (1, 1), (2, None), (None, 1), (0, 2)])
def test_vmap_of_projections_over_any_dimension_is_a_loop(
    tokens_dim: int | None, weight_dim: int | None, rows: int
) -> None:
    library = torch.ops.scatterbrain

    def mapped(t: Tensor, dim: int | None) -> Tensor:
        return t if dim is None else torch.stack([t + i for i in range(3)], dim)

    tokens, weight = mapped(rand(B, H, 5, D), tokens_dim), mapped(rand(rows, H, 4, D, seed=1), weight_dim)
    gradient = rand(B, H, 5, 4, seed=2)

    def both(t: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return library.project(t, w, None), *library.project_backward(gradient, t, w)

    got = torch.vmap(both, in_dims=(tokens_dim, weight_dim))(tokens, weight)
    each = [
        both(*(t if dim is None else t.select(dim, i) for t, dim in ((tokens, tokens_dim), (weight, weight_dim))))
        for i in range(3)
    ]
    assert all(torch.equal(a, torch.stack(b)) for a, b in zip(got, zip(*each)))
