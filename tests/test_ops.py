"""The operators in torch: opcheck, gradcheck, vmap, FLOPs, compile, export, checkpointing, meta, autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import scatterbrain as sb

B, H, KV, N, D = 2, 2, 1, 37, 8


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(n: int = N, dtype: torch.dtype = torch.float32, batch: int = B) -> list[Tensor]:
    return [rand(batch, h, n, D, seed=seed, dtype=dtype) for seed, h in enumerate((H, KV, KV))]


def projections(dtype: torch.dtype = torch.float32, rank: int = 3) -> sb.Projections:
    shapes = ((H, rank, D), (H, D), (H,), (KV, rank, D), (KV, D))
    return sb.Projections(*(rand(*shape, seed=10 + i, dtype=dtype) / 3 for i, shape in enumerate(shapes)))


def some_lists(tokens: int = N, is_causal: bool = False) -> sb.Blocks:
    index = torch.tensor([[0, 2, -1], [0, 1, 2], [1, 3, 4]], dtype=torch.int32).expand(B, H, 3, 3).contiguous()
    count = torch.tensor([2, 3, 3], dtype=torch.int32).expand(B, H, 3).contiguous()
    return sb.Blocks(index.clamp(max=1) if is_causal and tokens < 20 else index, count, 16, 4 if is_causal else 8)


MASK = torch.arange(N).expand(B, N) >= torch.tensor([[N], [N - 9]])

# ---------------------------------------------------------------------------------------- opcheck

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# What opcheck looks at where there is no gradient: the other two parts are about autograd.
WITHOUT_GRADIENT = ("test_schema", "test_faketensor")


def attention_arguments(kernel: str, lists: str, dtype: torch.dtype, is_causal: bool) -> tuple:
    """Arguments of the operator. The causal samples have masks with their ranges, and an offset."""
    maps = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [t.requires_grad_() for t in qkv(dtype=dtype)]
    coordinates = [None, None]
    if kernel != "none":
        coordinates = [rand(B, h, N, 4, seed=seed, dtype=maps).abs().requires_grad_() for seed, h in ((4, H), (5, KV))]
    index = count = span = order = offset = None
    block_q, block_k, span_keys = 16, 1, 0
    if lists in ("index", "order"):
        blocks = some_lists(is_causal=True)
        index, count, block_k = blocks.index, blocks.count, blocks.block_k
    if lists == "order":
        order = (
            torch.randperm(N, generator=torch.Generator().manual_seed(1)).expand(B, H, N).to(torch.int32).contiguous()
        )
    if lists == "span":
        span, span_keys = torch.tensor([[[0, 12], [4, 16], [20, 32]]], dtype=torch.int32), 12
    masks = ranges = (None, None)
    if is_causal:
        masks = (MASK, MASK.clone())
        ranges = (torch.tensor([[0, N], [0, N - 9]], dtype=torch.int32),) * 2
        ranges, offset = (ranges[0], ranges[1].clone()), torch.tensor([0, 3], dtype=torch.int32)
    code = {"none": 0, "quadratic": 1, "features": 2}[kernel]
    return (
        *tensors,
        *coordinates,
        index,
        count,
        span,
        order,
        *masks,
        *ranges,
        offset,
        code,
        block_q,
        block_k,
        span_keys,
        is_causal,
        0.3,
    )


SAMPLES = [
    (kernel, lists, dtype, is_causal)
    for kernel in ("quadratic", "features", "none")
    for lists in ("span", "index", "order", "empty")
    for is_causal in (False, True)
    for dtype in (DTYPES if lists == "index" and kernel == "quadratic" else [torch.float32])
    if not (lists == "order" and is_causal) and not (lists == "empty" and kernel == "none")
]


@pytest.mark.parametrize("kernel, lists, dtype, is_causal", SAMPLES)
def test_opcheck_of_attention_and_its_backward(kernel: str, lists: str, dtype: torch.dtype, is_causal: bool) -> None:
    arguments = attention_arguments(kernel, lists, dtype, is_causal)
    torch.library.opcheck(torch.ops.scatterbrain.attention.default, arguments)
    plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    out, lse = torch.ops.scatterbrain.attention(*plain)
    d_lse = None if lists == "span" else torch.randn_like(lse)
    gradients = (torch.randn_like(out), d_lse, out, lse, *plain)
    torch.library.opcheck(torch.ops.scatterbrain.attention_backward.default, gradients, test_utils=WITHOUT_GRADIENT)


def detached(arguments: tuple) -> tuple:
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)


def kept_things_change_no_bit(arguments: tuple) -> tuple[Tensor, Tensor]:
    """State and scores that the forward pass kept."""
    torch.library.opcheck(torch.ops.scatterbrain.attention_with_state.default, arguments, test_utils=WITHOUT_GRADIENT)
    out, lse, state, scores = torch.ops.scatterbrain.attention_with_state(*arguments)
    for a, b in zip((out, lse), torch.ops.scatterbrain.attention(*arguments)):
        assert torch.equal(a, b)
    gradients = (torch.randn_like(out), None, out, lse, *arguments)
    again = torch.ops.scatterbrain.attention_backward(*gradients)
    for kept in ({"state": state}, {"scores": scores}, {"state": state, "scores": scores}):
        for a, b in zip(torch.ops.scatterbrain.attention_backward(*gradients, **kept), again):
            assert torch.equal(a, b)
    if scores.numel():  # they are what the backward pass reads
        noise = torch.linspace(0, 1, scores.numel()).reshape(scores.shape)
        others = torch.ops.scatterbrain.attention_backward(*gradients, scores=scores + noise)
        assert not torch.equal(others[0], again[0])
    return state, scores


@pytest.mark.parametrize("kernel, lists, dtype, is_causal", SAMPLES)
def test_what_is_kept_changes_no_bit_of_the_backward_pass(
    kernel: str, lists: str, dtype: torch.dtype, is_causal: bool
) -> None:
    state, scores = kept_things_change_no_bit(detached(attention_arguments(kernel, lists, dtype, is_causal)))
    assert (state.numel() > 0) == (kernel != "none" and not is_causal)
    assert scores.numel() == 0  # heads of 8 are computed in double


# Tiles of 8, 16 and 32 queries, partly filled ones, queries with lists of their own, few keys (lists as masks), and
# lists too long to be worth keeping.
KEPT = [(8, 1, 40), (12, 1, 40), (16, 1, 64), (32, 1, 64), (40, 4, 64), (1, 8, 64), (1, 1, 100), (16, 8, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("low_rank", [0, 1, 2])
@pytest.mark.parametrize("n", [75, 150])
@pytest.mark.parametrize(("block_q", "block_k", "keys"), KEPT)
def test_kept_scores_change_no_bit_of_the_backward_pass(
    block_q: int, block_k: int, keys: int, n: int, low_rank: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(block_q + n)
    q, k, v = (torch.randn(B, h, n, 32, generator=generator).to(dtype) for h in (H, KV, KV))
    maps = [None, None]
    if low_rank:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        maps = [torch.rand(B, h, n, 4, generator=generator).to(wide) / 3 for h in (H, KV)]
    blocks, key_blocks = -(-n // block_q), -(-n // block_k)
    used = min(keys // block_k, key_blocks - 1)
    rows = [torch.randperm(key_blocks, generator=generator)[:used].sort().values for _ in range(B * H * blocks)]
    index = torch.stack(rows).to(torch.int32).reshape(B, H, blocks, used)
    count = torch.randint(1, used + 1, (B, H, blocks), generator=generator).to(torch.int32)
    mask = torch.zeros(B, n, dtype=torch.bool)
    mask[0, ::7] = True
    # The second row is short: its keys may all be evaluated together where those of the first are not.
    count[1] = count[1].clamp(max=(n * 2 // 3) // block_k).clamp(min=1)
    index[1] = torch.arange(used).clamp(max=(n * 2 // 3) // block_k - 1)
    ends = torch.tensor([[0, n], [0, n * 2 // 3]], dtype=torch.int32)
    arguments = (q, k, v, *maps, index, count, None, None, mask, mask, ends, ends, None)
    _, scores = kept_things_change_no_bit((*arguments, low_rank, block_q, block_k, 0, False, 0.2))
    is_short = keys <= 80 or (block_q == 1 and low_rank != 0 and n <= 128) or min(keys, n) <= 80
    has_full_tiles = block_q not in (12, 40)
    assert (scores.numel() > 0) == (dtype != torch.float64 and is_short and has_full_tiles)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_q, block_k, window", [(16, 1, 0), (1, 8, 16), (0, 0, 0)])
def test_one_call_projects_routes_and_attends(
    block_q: int, block_k: int, window: int, dtype: torch.dtype, trained: bool
) -> None:
    """As the operators one by one do, with lists of its own or given a window."""
    library, n, rank = torch.ops.scatterbrain, 150, 5
    q, k, v = (rand(B, h, n, WIDE, seed=seed, dtype=dtype) for seed, h in enumerate((H, KV, KV)))
    weights = [rand(1, h, rank + 1, *shape, seed=7 + h) / 9 for h in (H, KV) for shape in ((WIDE,), ())]
    span = None
    if block_q == 0:
        span = torch.tensor([[[max(0, i - 20), i + 20] for i in range(8, n + 8, 16)]], dtype=torch.int32).clamp(max=n)
    lists, keys = (None, None, span, None), 0 if block_q == 0 else 32
    blocks = (block_q or 16, block_k or 1, 0 if span is None else 40, False, 0.2)
    none = (None,) * 5
    operator = library.quadratic_attention_with_state if trained else library.quadratic_attention
    arguments = (q, k, v, *weights, *lists, *none, keys, window, *blocks, rank, weights, [w.clone() for w in weights])
    torch.library.opcheck(operator.default, arguments, test_utils=WITHOUT_GRADIENT)
    separate = library.attention_with_state if trained else library.attention
    with FlopCounterMode(display=False) as flops:
        maps = [library.project_packed(t, *weights[i : i + 2]) for t, i in ((q, 0), (k, 2))]
        if keys:
            lists = (*library.route(q, k, *maps, *none, 1, keys, *blocks[:2], window, *blocks[3:], rank), None, None)
        expected = separate(q, k, v, *maps, *lists, *none, 1, *blocks, rank)
    with FlopCounterMode(display=False) as flops_of_one:
        operator(*arguments)
    assert flops_of_one.get_total_flops() == flops.get_total_flops() > 0
    if trained:
        expected = (*expected, *maps, *(t if keys else torch.empty(0, dtype=torch.int32) for t in lists[:2]))
    stale = operator(*arguments[:-1], [w + 1 for w in weights])
    assert [t.numel() for t in stale] == [0] * len(expected)
    results = operator(*arguments)
    assert len(results) == len(expected)
    for name, a, b in zip(operator.default._schema.returns, results, expected):
        if name.name == "state":  # a slot ends in one number of sixteen
            a, b = a[..., :-15], b[..., :-15]
        # Scores have room that no list reaches.
        assert a.shape == b.shape if name.name == "scores" else torch.equal(a, b), name.name


def test_equal_bytes_sees_every_difference() -> None:
    equal = torch.ops.scatterbrain.equal_bytes
    tensors = [rand(2, 3, seed=1), rand(4, seed=2, dtype=torch.float64), torch.full((2,), float("nan")), torch.zeros(0)]
    assert equal(tensors, [t.clone() for t in tensors])
    assert equal(tensors, [tensors[0].t().contiguous().t(), *tensors[1:]])
    for i in range(3):
        other = [t.clone() for t in tensors]
        other[i].view(-1)[-1] = 7
        assert not equal(tensors, other)
    assert not equal(tensors, [tensors[0].t().contiguous(), *tensors[1:]])
    assert not equal(tensors, [tensors[0].double(), *tensors[1:]])
    assert not equal(tensors, tensors[:3]) and not equal(tensors[:3], tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 20, 32])  # computed in double, padded, and in place
@pytest.mark.parametrize("block_q", [1, 16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shared", [False, True])  # one weight for the batch, and for all heads
def test_gradients_go_through_the_projections_inside_the_backward_pass(
    shared: bool, is_causal: bool, block_q: int, width: int, dtype: torch.dtype
) -> None:
    maps_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (rand(B, h, N, width, seed=seed, dtype=dtype) for seed, h in enumerate((H, KV, KV)))
    heads = ((1, KV), (1, KV)) if shared else ((B, H), (B, KV))
    weights = [rand(b, h, 4, width, seed=3 + i, dtype=maps_dtype) / width for i, (b, h) in enumerate(heads)]
    maps = [torch.ops.scatterbrain.project(t, w, None) for t, w in zip((q, k), weights)]
    starts = torch.arange(0, N, block_q).clamp(max=N - 12)
    span = torch.stack([starts, starts + 12], -1)[None].to(torch.int32)
    ends = torch.tensor([[0, N], [0, N - 9]], dtype=torch.int32)
    arguments = (q, k, v, *maps, None, None, span, None, MASK, MASK, ends, ends, None)
    arguments = (*arguments, 1, block_q, 1, 12, is_causal, 0.3)
    out, lse = torch.ops.scatterbrain.attention(*arguments)
    gradients = (rand(*out.shape, seed=9, dtype=dtype), None, out, lse, *arguments)
    fused = dict(query_weight=weights[0], key_weight=weights[1])
    torch.library.opcheck(
        torch.ops.scatterbrain.attention_backward.default, gradients, fused, test_utils=WITHOUT_GRADIENT
    )
    *tokens, dv, d_query_map, d_key_map = torch.ops.scatterbrain.attention_backward(*gradients)
    *through, dv_again, _, _ = torch.ops.scatterbrain.attention_backward(*gradients, **fused)
    assert torch.equal(dv, dv_again)
    for plain, d_map, weight, result in zip(tokens, (d_query_map, d_key_map), weights, through):
        expected = plain.double() + d_map.double() @ weight.double()
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}[dtype]
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max())


def test_what_other_arguments_kept_is_refused() -> None:
    arguments = tuple(
        a.detach() if isinstance(a, Tensor) else a
        for a in attention_arguments("quadratic", "span", torch.float64, False)
    )
    out, lse, state, _ = torch.ops.scatterbrain.attention_with_state(*arguments)
    with pytest.raises(RuntimeError, match="state must be what attention_with_state returned"):
        torch.ops.scatterbrain.attention_backward(out, None, out, lse, *arguments, state=state[..., 1:].contiguous())
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    span = torch.tensor([[[0, 20], [10, 30], [20, 40]]], dtype=torch.int32)
    arguments = (q, k, v, None, None, None, None, span, *(None,) * 6, 0, 16, 1, 20, False, 0.2)
    out, lse, _, scores = torch.ops.scatterbrain.attention_with_state(*arguments)
    for wrong in (scores[..., 1:].contiguous(), scores.transpose(1, 2)):
        with pytest.raises(RuntimeError, match="scores must be what attention_with_state returned"):
            torch.ops.scatterbrain.attention_backward(out, None, out, lse, *arguments, scores=wrong)


WIDE = 32  # narrower heads are computed in double and do not use packed rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 9, 14, 15])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_rows_are_the_map_in_another_layout(rank: int, is_causal: bool, dtype: torch.dtype) -> None:
    q, k, v = (rand(B, h, N, WIDE, seed=seed, dtype=dtype) for seed, h in enumerate((H, KV, KV)))
    weights = [
        (rand(1, h, rank + 1, WIDE, seed=3 + h) / WIDE, rand(1, h, rank + 1, seed=5 + h) / rank) for h in (H, KV)
    ]
    maps = [torch.ops.scatterbrain.project(t, *w) for t, w in zip((q, k), weights)]
    packed = [torch.ops.scatterbrain.project_packed(t, *w) for t, w in zip((q, k), weights)]
    for rows, map_ in zip(packed, maps):
        assert torch.equal(rows[..., :rank], map_[..., :rank]) and (rows[..., rank] == 1).all()
        torch.testing.assert_close(rows[..., rank + 1], map_[..., rank] / torch.log(torch.tensor(2.0)))
        assert not rows[..., rank + 2 :].any()
    torch.library.opcheck(torch.ops.scatterbrain.project_packed.default, (q, *weights[0]), test_utils=WITHOUT_GRADIENT)
    masks = (None,) * 5
    route = (*masks, 1, 16, 16, 1, 0, is_causal, 0.2)
    lists = torch.ops.scatterbrain.route(q.float(), k.float(), *maps, *route)
    for a, b in zip(lists, torch.ops.scatterbrain.route(q.float(), k.float(), *packed, *route, packed_rank=rank)):
        assert torch.equal(a, b)
    rest = (*lists, None, None, *masks, 1, 16, 1, 0, is_causal, 0.2)
    results = [
        torch.ops.scatterbrain.attention(q, k, v, *m, *rest, packed_rank=r) for m, r in ((maps, 0), (packed, rank))
    ]
    d_out = torch.randn_like(results[0][0])
    results = [
        (*result, *torch.ops.scatterbrain.attention_backward(d_out, None, *result, q, k, v, *m, *rest, packed_rank=r))
        for result, m, r in zip(results, (maps, packed), (0, rank))
    ]
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_packed_rows_of_another_rank_are_refused() -> None:
    q = rand(B, H, N, WIDE)
    rows = torch.ops.scatterbrain.project_packed(q, rand(1, 1, 4, WIDE), rand(1, 1, 4))
    rest = (None,) * 9
    with pytest.raises(RuntimeError, match="packed_rank 20 must be 32 wide"):
        torch.ops.scatterbrain.attention(q, q, q, rows, rows, *rest, 1, 16, 1, 0, False, 0.2, packed_rank=20)
    with pytest.raises(RuntimeError, match="packed_rank is for the quadratic kernel"):
        torch.ops.scatterbrain.attention(q, q, q, rows, rows, *rest, 2, 16, 1, 0, False, 0.2, packed_rank=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, heads, bias", [(1, 1, True), (1, H, False), (B, H, True)])
def test_opcheck_of_the_projection(dtype: torch.dtype, batch: int, heads: int, bias: bool) -> None:
    maps = torch.float64 if dtype == torch.float64 else torch.float32
    tokens, weight = (
        rand(B, H, N, D, dtype=dtype).requires_grad_(),
        rand(batch, heads, 4, D, seed=1, dtype=maps).requires_grad_(),
    )
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
    maps = (rand(B, H, N, 4, seed=4), rand(B, KV, N, 4, seed=5))
    ranges = torch.tensor([[0, N], [0, N - 9]], dtype=torch.int32)
    offset = torch.tensor([0, 3], dtype=torch.int32) if is_causal else None
    arguments = (
        *qkv()[:2],
        *maps,
        MASK,
        MASK.clone(),
        ranges,
        ranges.clone(),
        offset,
        1,
        40,
        block_q,
        block_k,
        window,
        is_causal,
        0.3,
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
    tensors = [rand(1, h, n, 3, seed=seed, dtype=torch.float64).requires_grad_() for seed, h in enumerate((2, 1, 1))]
    learned = isinstance(low_rank, sb.Quadratic) and low_rank.statistics == "learned"
    shapes = ((2, 3, 3), (2, 3), (2,), (1, 3, 3), (1, 3)) if learned else ()
    weights = [(rand(*shape, seed=9 + i, dtype=torch.float64) / 3).requires_grad_() for i, shape in enumerate(shapes)]
    if arguments.get("key_padding_mask"):
        arguments = arguments | dict(
            key_padding_mask=torch.rand(1, n, generator=torch.Generator().manual_seed(3)) < 0.3
        )
    if support == "blocks":
        support = sb.Blocks(
            torch.tensor([[0, 1], [1, -1], [0, 2]], dtype=torch.int32).expand(1, 2, 3, 2),
            torch.tensor([2, 1, 2], dtype=torch.int32).expand(1, 2, 3),
            4,
            3,
        )
    stored = sb.fit_statistics(*(rand(1, h, 50, 3, seed=30 + h) for h in (2, 1)), 3, scale=arguments.get("scale"))

    def function(query: Tensor, key: Tensor, value: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        statistics = sb.Projections(*weights) if learned else stored if isinstance(low_rank, sb.Quadratic) else None
        out, lse = sb.attention(
            query, key, value, support, low_rank, statistics=statistics, return_lse=True, **arguments
        )
        return out, torch.where(lse.isfinite(), lse, 0)

    assert torch.autograd.gradcheck(function, (*tensors, *weights), eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=n > 12)


# ---------------------------------------------------------------------------------------- vmap

VMAPS = {
    "window, learned": dict(support=sb.Window(8, 4), low_rank=sb.Quadratic(3, "learned"), is_causal=True),
    "window, padded": dict(support=sb.Window(8, 4), low_rank=sb.Quadratic(3, "learned"), key_padding_mask=MASK),
    "routed": dict(support=sb.Routed(16, 8), low_rank=sb.Quadratic(3, "learned"), is_causal=True),
    "routed per query": dict(support=sb.Routed(24, 1, 8, 8), low_rank=sb.Quadratic(3, "learned")),
    "empty, favor": dict(support=sb.Empty(), low_rank=sb.Favor(8)),
    "lsh": dict(support=sb.LSH(8), low_rank=None),
    "full": dict(support=sb.Full(), low_rank=None, key_padding_mask=MASK),
    "blocks": dict(support=some_lists(), low_rank=None),
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
    weights = [torch.stack([w * (1 + 0.2 * j) for j in range(2)]) for w in vars(projections()).values()]

    def function(query: Tensor, key: Tensor, value: Tensor, *weights: Tensor) -> Tensor:
        return sb.attention(
            query, key, value, sb.Window(8, 4), sb.Quadratic(3, "learned"), statistics=sb.Projections(*weights)
        )

    inner = torch.vmap(function, (0,) * 8)
    got = torch.vmap(inner, (0, 0, 0, *(None,) * 5))(*tensors, *weights)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(
                got[i, j], function(*(t[i, j] for t in tensors), *(w[j] for w in weights)), rtol=1e-5, atol=1e-6
            )


def test_gradients_through_vmap_are_those_of_the_loop() -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, *weights: Tensor) -> Tensor:
        return sb.attention(
            query, key, value, sb.Window(8, 4), sb.Quadratic(3, "learned"), MASK, statistics=sb.Projections(*weights)
        )

    batched = [torch.stack([t, 0.7 * t]).requires_grad_() for t in qkv()]
    weights = [w.requires_grad_() for w in vars(projections()).values()]
    upstream = rand(2, B, H, N, D, seed=20)
    mapped = torch.vmap(function, (0, 0, 0, *(None,) * 5))(*batched, *weights)
    looped = torch.stack([function(*(t[i] for t in batched), *weights) for i in range(2)])
    got, want = (torch.autograd.grad(out, batched + weights, upstream) for out in (mapped, looped))
    for mine, theirs in zip(got, want):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


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
    query, key, value = (t.requires_grad_() for t in qkv())
    out = sb.attention(query, key, value, **arguments)
    gradients = torch.autograd.grad(out.square().sum(), (query, key, value), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="second derivatives"):
            gradient.square().sum().backward(retain_graph=True)


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
    tensors = [t.requires_grad_() for t in qkv(n)]
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
    "routed": (sb.Routed(24), sb.Quadratic(3, "learned"), True),
    "favor": (sb.Window(16), sb.Favor(8), True),
    "full": (sb.Full(), None, True),
    "lsh": (sb.LSH(8), None, True),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile_without_graph_breaks_for_any_length(name: str) -> None:
    support, low_rank, padded = COMPILED[name]
    weights = [w.requires_grad_() for w in vars(projections()).values()]
    graphs = []

    def backend(graph: object, inputs: object) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *weights: Tensor) -> Tensor:
        statistics = sb.Projections(*weights) if isinstance(low_rank, sb.Quadratic) else None
        return sb.attention(query, key, value, support, low_rank, mask, name != "lsh", statistics=statistics)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for n in (70, 130, 33):
        mask = torch.arange(n).expand(B, n) >= torch.tensor([[n], [n - 9]]) if padded else None
        results = []
        for f in (function, compiled):
            tensors = [t.requires_grad_() for t in qkv(n)]
            out = f(*tensors, mask, *weights)
            results.append(
                [
                    out,
                    *torch.autograd.grad(
                        out.square().sum(), tensors + weights, allow_unused=True, materialize_grads=True
                    ),
                ]
            )
        for mine, theirs in zip(*results):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1, "one graph serves every length"


def test_the_module_with_learned_projections_compiles() -> None:
    torch.manual_seed(0)
    core = sb.ScatterbrainAttention(H, D, KV, sb.Routed(24, 1, 8, 8), sb.Quadratic(3, "learned"))
    torch._dynamo.reset()
    compiled = torch.compile(core, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for module in (core, compiled):
        tensors = [t.requires_grad_() for t in qkv(70)]
        out = module(*tensors, is_causal=True)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*tensors, *core.parameters()])])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_inductor_compiles_routing_and_attention() -> None:
    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return 2 * sb.attention(query, key, value, sb.Routed(24, 1, 8, 8), None, is_causal=True)

    torch._dynamo.reset()
    with torch._inductor.config.patch(
        force_disable_caches=True
    ):  # which would keep code for operators of an earlier build
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
    tokens = torch.export.Dim(
        "tokens", min=17, max=4096
    )  # more than one block of queries: torch treats sizes of 1 apart
    program = torch.export.export(module, tuple(qkv(70)), dynamic_shapes=({2: tokens},) * 3)
    for n in (70, 33, 130):
        torch.testing.assert_close(program.module()(*qkv(n)), module(*qkv(n)))


# ---------------------------------------------------------------------------------------- checkpointing, meta, autocast


@pytest.mark.parametrize(
    "support, low_rank",
    [(sb.Routed(24), sb.Quadratic(3, "learned")), (sb.LSH(8), sb.Favor(8)), (sb.Window(8), sb.Quadratic(3, "input"))],
    ids=str,
)
def test_activation_checkpointing_gives_the_same_bits(support: object, low_rank: object) -> None:
    torch.manual_seed(0)
    core = sb.ScatterbrainAttention(H, D, KV, support, low_rank)
    results = []
    for again in (False, True):
        tensors = [t.requires_grad_() for t in qkv()]
        out = checkpoint(core, *tensors, use_reentrant=False) if again else core(*tensors)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*tensors, *core.parameters()])])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results))


META = [sb.Full(), sb.Empty(), sb.Window(16), sb.Routed(24), sb.Routed(24, 1, 8, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("support", META, ids=str)
def test_the_meta_device_gives_shapes_and_dtypes(support: object, dtype: torch.dtype) -> None:
    core = sb.ScatterbrainAttention(H, D, KV, support, sb.Quadratic(3, "learned"))
    real = [t.requires_grad_() for t in qkv(dtype=dtype)]
    meta = [t.detach().to("meta").requires_grad_() for t in real]
    want, want_lse = core(*real, key_padding_mask=MASK, is_causal=True, return_lse=True)
    got, got_lse = core.to("meta")(*meta, key_padding_mask=MASK.to("meta"), is_causal=True, return_lse=True)
    got.sum().backward()
    assert (
        got.device.type == "meta"
        and (got.shape, got.dtype) == (want.shape, want.dtype)
        and (got_lse.shape, got_lse.dtype) == (want_lse.shape, want_lse.dtype)
    )
    assert [t.grad.shape for t in meta] == [t.shape for t in real] and [t.grad.dtype for t in meta] == [
        t.dtype for t in real
    ]


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
    torch.manual_seed(0)
    core = sb.ScatterbrainAttention(H, D, KV, sb.Routed(24), sb.Quadratic(3, "learned"))
    tensors = [t.requires_grad_() for t in qkv()]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = core(*tensors, return_lse=True)
        half = [t.detach().bfloat16() for t in tensors]
        query_map, _ = sb.functional.coordinates(
            *half[:2],
            core.low_rank,
            core.coefficients(),
            D**-0.5,
            sb.functional.rows_of(*half[:2], None, None, 0),
            False,
        )
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
    tensors = [t.requires_grad_() for t in qkv(dtype=torch.float64)]
    with torch.autocast("cpu", torch.bfloat16):
        out = sb.attention(*tensors, support, None)
    assert out.dtype == torch.float64 and torch.equal(out, sb.attention(*tensors, support, None))


def test_autocast_in_float16_gives_float16() -> None:
    with torch.autocast("cpu", torch.float16):
        assert sb.attention(*qkv(), sb.Window(8), sb.Favor(8)).dtype == torch.float16


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("tokens", [0, 40])
@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_attend_with_has_gradients_of_zero(batch: int, tokens: int, threads: int) -> None:
    """An empty batch, no token at all, and rows that are padding, on more threads than heads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, k, v = (torch.randn(batch, 1, tokens, 32, requires_grad=True) for _ in range(3))
        mask = torch.ones(batch, tokens, dtype=torch.bool)
        sb.attention(q, k, v, sb.Window(16), None, key_padding_mask=mask).sum().backward()
        assert all(t.grad.count_nonzero() == 0 for t in (q, k, v))
        rows = [torch.randn(batch, 1, 5, 32), torch.randn(batch, 1, 32)] * 2
        statistics = sb.Statistics(*rows, scale=32**-0.5)
        sb.attention(
            q, k, v, sb.Window(16), sb.Quadratic(5), key_padding_mask=mask, statistics=statistics
        ).sum().backward()
        assert all(t.grad.count_nonzero() == 0 for t in (q, k, v))
        sb.attention(q, k, v, sb.Window(16), sb.Quadratic(5, "input"), key_padding_mask=mask).sum().backward()
        assert all(t.grad.count_nonzero() == 0 for t in (q, k, v))
    finally:
        torch.set_num_threads(before)
