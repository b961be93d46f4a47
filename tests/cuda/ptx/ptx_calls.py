"""Calls of the registered operators that together start every CUDA kernel. A new kernel needs a call here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from oracle import CASES, draw
from supports.test_route import BY_SKETCH, PER_QUERY, PER_QUERY_IN_TWO, POOLED, Inputs
from testkit import rand

import scatterbrain as sb

OPERATORS = torch.ops.scatterbrain
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CALLS: dict[str, Callable[[torch.dtype], object]] = {}
N, D = 70, 24


def call(name: str) -> Callable[[Callable[[torch.dtype], object]], Callable[[torch.dtype], object]]:
    def register(function: Callable[[torch.dtype], object]) -> Callable[[torch.dtype], object]:
        CALLS[name] = function
        return function

    return register


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(
    dtype: torch.dtype,
    support: object,
    low_rank: object,
    head_dim: int = D,
    value_dim: int = 19,
    queries: int = N,
    keys: int = N,
    wants_gradients: bool = False,
    **more: object,
) -> None:
    query = rand(1, 2, queries, head_dim, seed=1, dtype=dtype)
    key, value = rand(1, 1, keys, head_dim, seed=2, dtype=dtype), rand(1, 1, keys, value_dim, seed=3, dtype=dtype)
    if isinstance(low_rank, sb.Quadratic):
        more["statistics"] = sb.fit_statistics(query.float(), key.float(), low_rank.rank)
    for tokens in (query, key, value):
        tokens.requires_grad_(wants_gradients)
    out, lse = sb.attention(query, key, value, support, low_rank, return_lse=True, **more)
    if wants_gradients:
        (out.float().square().sum() + lse.clamp(min=-1e3).sum()).backward()


def mask_of(*ignored: slice) -> torch.Tensor:
    mask = torch.zeros(1, N, dtype=torch.bool)
    for part in ignored:
        mask[:, part] = True
    return mask


@call("projections")
def _projections(dtype: torch.dtype) -> None:
    x, weight = rand(2, 4, 300, 11, dtype=dtype), rand(1, 2, 5, 11, seed=1, dtype=accumulation(dtype))
    bias, grad = rand(1, 2, 5, seed=2, dtype=accumulation(dtype)), rand(2, 4, 300, 5, seed=3, dtype=accumulation(dtype))
    OPERATORS.project(x, weight, bias)
    OPERATORS.project_packed(x, weight, bias)
    OPERATORS.project_backward(grad, x, weight)
    x, weight = rand(2, 4, 150, 24, dtype=dtype), rand(1, 2, 5, 24, seed=1, dtype=accumulation(dtype))
    OPERATORS.project(x, weight, bias)
    OPERATORS.project_backward(grad[:, :, :150], x, weight)


@call("windows")
def _windows(dtype: torch.dtype) -> None:
    attend(dtype, sb.Window(20, 8), None, is_causal=True)
    attend(dtype, sb.Window(29, 16, sinks=5), sb.Quadratic(3), is_causal=True)
    attend(dtype, sb.Window(24), sb.Quadratic(3), keys=530)


@call("lists")
def _lists(dtype: torch.dtype) -> None:
    attend(dtype, sb.Routed(24, 16), sb.Favor(8), key_padding_mask=mask_of(slice(60, None)))
    attend(dtype, sb.Routed(32, block_q=1, block_k=8, window=16), sb.Favor(8, hyperbolic=False), is_causal=True)
    attend(dtype, sb.LSH(8, rounds=2), sb.Quadratic(3), key_padding_mask=mask_of(slice(5), slice(11, None, 7)))
    attend(dtype, sb.Empty(), sb.Quadratic(3), is_causal=True)
    attend(dtype, sb.Full(), None, queries=9, query_offset=3, is_causal=True)


@call("routes")
def _routes(dtype: torch.dtype) -> None:
    """The operator itself: supports route float64 tokens as float32."""
    for low_rank, form in (
        (0, POOLED[1]),
        (1, POOLED[1]),
        (1, PER_QUERY[2]),
        (1, PER_QUERY_IN_TWO[1]),
        (0, BY_SKETCH[0]),
    ):
        queries, keys = (9, 170) if form in BY_SKETCH else (45, 45)
        given = Inputs(queries, keys, low_rank=low_rank, heads=4, kv_heads=2)
        given.query, given.key = given.query.to(dtype), given.key.to(dtype)
        given.route(**form)


@call("routes on tensor cores")
def _routes_on_tensor_cores(dtype: torch.dtype) -> None:
    """More leaves than are kept, and more candidates than lists of 64 keys have; and a width that scalars take."""
    if dtype.itemsize != 2:
        return
    wide = {"keys": 200, "block_q": 32, "window": 40, "sinks": 3, "pools": 2}
    for form, shape in ((POOLED[1], (20, 600)), (wide, (40, 80))):
        given = Inputs(*shape, low_rank=2, d=40, batch=1)
        given.query, given.key = given.query.to(dtype), given.key.to(dtype)
        given.route(**form)
    of_queries = ((PER_QUERY[2], 9, 45, 20), (PER_QUERY[0], 9, 1300, 40), (PER_QUERY_IN_TWO[0], 9, 700, 40))
    for form, n, m, d in ((POOLED[1], 45, 45, 20), *of_queries):
        given = Inputs(n, m, low_rank=0, d=d, batch=1)
        given.query, given.key = given.query.to(dtype), given.key.to(dtype)
        given.route(**form)


@call("drawn")
def _drawn(dtype: torch.dtype) -> None:
    """Some of the parity table's cases: lists, orders, masks, offsets, lengths and widths that nobody chose."""
    for seed in range(DTYPES.index(dtype), CASES, CASES // 8 + 1):
        case = draw(seed, dtype)
        sb.attention(case.query, case.key, case.value, case.support, **case.arguments)


@call("narrow heads")
def _narrow_heads(dtype: torch.dtype) -> None:
    """Sums are in double there."""
    attend(dtype, sb.Window(16), sb.Quadratic(3), head_dim=8, keys=140, is_causal=True, query_offset=60)
    attend(dtype, sb.Window(16), sb.Centroid(4), head_dim=8, key_padding_mask=mask_of(slice(2, None, 3)))
    attend(dtype, sb.Routed(32, block_q=1, block_k=8, window=16), sb.Favor(8), head_dim=8, is_causal=True)
    attend(dtype, sb.LSH(8, rounds=2), sb.Favor(8, hyperbolic=False), head_dim=8)


@call("wide heads")
def _wide_heads(dtype: torch.dtype) -> None:
    for low_rank in (sb.Quadratic(9), sb.Favor(70), sb.Centroid(40)):
        attend(dtype, sb.Window(16), low_rank, head_dim=256, value_dim=250, queries=9, keys=80)


@call("gradients")
def _gradients(dtype: torch.dtype) -> None:
    def differentiate(support: object, low_rank: object, queries: int = 20, **more: object) -> None:
        attend(dtype, support, low_rank, queries=queries, wants_gradients=True, **more)

    differentiate(sb.Window(20, 8), None, keys=20, is_causal=True)
    differentiate(sb.Window(24), sb.Quadratic(3), keys=530)
    differentiate(sb.Window(29, 16, sinks=5), sb.Quadratic(3), keys=140, is_causal=True, query_offset=110)
    differentiate(sb.Routed(24, 16), sb.Favor(8), queries=N, key_padding_mask=mask_of(slice(60, None)))
    per_query = sb.Routed(32, block_q=1, block_k=8, window=16)
    differentiate(per_query, sb.Favor(8, hyperbolic=False), is_causal=True, query_offset=50)
    differentiate(sb.LSH(8, rounds=2), sb.Quadratic(3))
    differentiate(sb.Window(16), sb.Centroid(5))
    differentiate(sb.Window(16), sb.Centroid(4), head_dim=8)
    differentiate(sb.Window(16), sb.Quadratic(3), head_dim=8, is_causal=True)
    differentiate(sb.Window(16), sb.Quadratic(9), head_dim=200, value_dim=250, queries=5, keys=70)


@call("clusters")
def _clusters(dtype: torch.dtype) -> None:
    attend(dtype, sb.Window(16), sb.Centroid(5))
    attend(dtype, sb.Routed(32, 16, pools=2), sb.Centroid(5))
    sb.cluster(rand(1, 2, 600, 40, dtype=dtype), rand(1, 1, 600, 40, seed=1, dtype=dtype), 33)


@call("tiles")
def _tiles(dtype: torch.dtype) -> None:
    """On tensor cores: both widths and what is narrower, every kind, lists of several stages and of none, holes."""
    if dtype.itemsize != 2:
        return
    for low_rank in (None, sb.Quadratic(5), sb.Centroid(18)):
        attend(dtype, sb.Window(40), low_rank, 48, 64, queries=40, keys=150)
        attend(dtype, ragged_lists(), low_rank, 128, 104, key_padding_mask=mask_of(slice(3, 40, 4)))
    attend(dtype, sb.Routed(48, 16), sb.Quadratic(9), 64, 128, key_padding_mask=mask_of(slice(60, None)))
    attend(dtype, sb.LSH(16, rounds=2), sb.Quadratic(3), 24, 8)
    attend(dtype, sb.Routed(32, 16), sb.Centroid(5), 16, 16)
    attend(dtype, sb.Empty(), sb.Quadratic(3), 72, 64)
    attend(dtype, sb.Full(), None, 128, 128, queries=17)


@call("windows of neighbouring tiles")
def _windows_of_tiles(dtype: torch.dtype) -> None:
    """On tensor cores, sharing keys: both widths, every kind, causal edges, sinks, holes, values that are no number."""
    if dtype.itemsize != 2:
        return
    for low_rank in (None, sb.Quadratic(5), sb.Centroid(18)):
        attend(dtype, sb.Window(50, 64, sinks=3), low_rank, 48, 64, keys=150)
        attend(dtype, sb.Window(64, 32), low_rank, 128, 104, queries=40, key_padding_mask=mask_of(slice(3, 40, 4)))
    for low_rank in (None, sb.Quadratic(5)):
        more = dict(queries=70, keys=200, is_causal=True, query_offset=120)
        attend(dtype, sb.Window(96), low_rank, 64, 48, **more)
        attend(dtype, sb.Window(66, 32, sinks=2), low_rank, 72, 64, **more)
    value = torch.cat([torch.zeros(1, 1, 60, 64), torch.full((1, 1, 10, 64), torch.nan)], 2).to(dtype)
    query, key = (rand(1, 1, N, 64, seed=i, dtype=dtype) for i in range(2))
    for is_causal in (False, True):
        sb.attention(query, key, value, sb.Window(64, 32), None, is_causal=is_causal)


@call("gradients of tiles")
def _gradients_of_tiles(dtype: torch.dtype) -> None:
    """On tensor cores: both widths, every kind, lists of several stages, holes."""
    if dtype.itemsize != 2:
        return
    for low_rank in (None, sb.Quadratic(5), sb.Centroid(18)):
        for widths in ((48, 64), (128, 104)):
            attend(dtype, sb.Window(40), low_rank, *widths, queries=20, keys=130, wants_gradients=True)
    attend(dtype, ragged_lists(), None, 24, 16, key_padding_mask=mask_of(slice(3, 40, 4)), wants_gradients=True)


@call("gradients of ragged tiles")
def _gradients_of_ragged_tiles(dtype: torch.dtype) -> None:
    """On tensor cores: causal edges, with a state and without, lists of few queries and of one, keys that are no
    numbers."""
    if dtype.itemsize != 2:
        return
    more = dict(queries=20, wants_gradients=True)
    for low_rank in (None, sb.Quadratic(5)):
        for widths in ((48, 64), (128, 104)):
            attend(dtype, sb.Window(24), low_rank, *widths, keys=140, is_causal=True, query_offset=115, **more)
    for widths in ((24, 16), (72, 16)):
        attend(dtype, sb.Window(24, 8), sb.Centroid(5), *widths, **more)
    attend(dtype, sb.Window(9, 1), None, 24, 16, **more)
    attend(dtype, sb.Window(9, 8), None, 128, 104, **more)
    query, key, value = (rand(1, 1, N, 64, seed=i, dtype=dtype) for i in range(3))
    key[:, :, 60:] = torch.nan
    sb.attention(query.requires_grad_(), key, value, sb.Window(24), None, is_causal=True)[:, :, :60].sum().backward()


@call("gradients of tiles of float32")
def _gradients_of_float_tiles(dtype: torch.dtype) -> None:
    """On tensor cores: every kind, shared and ragged lists, a state of all keys and causal ones, holes, keys that are
    no numbers."""
    if dtype != torch.float32:
        return
    more = dict(queries=20, wants_gradients=True)
    for low_rank in (None, sb.Quadratic(5), sb.Centroid(5)):
        attend(dtype, sb.Window(40), low_rank, 48, 64, keys=130, **more)
        if not isinstance(low_rank, sb.Centroid):
            attend(dtype, sb.Window(24), low_rank, 64, 40, keys=140, is_causal=True, query_offset=115, **more)
        attend(dtype, sb.Window(24, 8), low_rank, 24, 16, key_padding_mask=mask_of(slice(3, 40, 4)), **more)
    query, key, value = (rand(1, 1, N, 64, seed=i, dtype=dtype) for i in range(3))
    key[:, :, 60:] = torch.nan
    sb.attention(query.requires_grad_(), key, value, sb.Window(24), None, is_causal=True)[:, :, :60].sum().backward()


@call("shares of keys")
def _shares(dtype: torch.dtype) -> None:
    """On tensor cores: both widths, every kind, lists of several stages."""
    if dtype == torch.float64:
        return
    index = torch.arange(0, 100, 5, dtype=torch.int32).expand(1, 2, 1, 20).contiguous()
    support = sb.Blocks(index, torch.tensor([[[20], [17]]], dtype=torch.int32), block_q=16, block_k=1)
    for low_rank in (None, sb.Quadratic(5), sb.Centroid(5)):
        for widths in ((24, 32), (128, 104)):
            if dtype.itemsize == 2 or max(widths) <= 64:
                attend(dtype, support, low_rank, *widths, queries=16, keys=100, wants_gradients=True)


@call("shares of keys from ragged lists")
def _ragged_shares(dtype: torch.dtype) -> None:
    """Of two lists in a tile, which differ, and with a causal edge."""
    if dtype == torch.float64:
        return
    index = torch.stack([torch.arange(first, first + 10, 2, dtype=torch.int32) for first in (0, 1)])
    support = sb.Blocks(index.expand(1, 1, 2, 5).contiguous(), torch.tensor([[[5, 4]]], dtype=torch.int32), 8, 8)
    for low_rank in (None, sb.Quadratic(5), sb.Centroid(5)):
        more = {} if isinstance(low_rank, sb.Centroid) else dict(is_causal=True, query_offset=84)
        for widths in ((24, 32), (128, 104)):
            if dtype.itemsize == 2 or max(widths) <= 64:
                attend(dtype, support, low_rank, *widths, queries=16, keys=100, wants_gradients=True, **more)


@call("sums on tensor cores")
def _sums(dtype: torch.dtype) -> None:
    """States and their gradients, with and without a causal edge, in one piece of columns and in several."""
    if dtype.itemsize != 2:
        return
    more = dict(queries=20, wants_gradients=True)
    attend(dtype, sb.Window(16), sb.Quadratic(5), D, 24, keys=140, is_causal=True, query_offset=110, **more)
    attend(dtype, sb.Window(16), sb.Favor(70), D, 136, keys=100, **more)


@call("ragged tiles")
def _ragged_tiles(dtype: torch.dtype) -> None:
    """On tensor cores: causal edges, lists one after the other and merged, values that are no numbers."""
    if dtype.itemsize != 2:
        return
    for low_rank in (None, sb.Quadratic(5)):
        attend(dtype, sb.Window(24), low_rank, 64, 48, queries=40, keys=250, is_causal=True, query_offset=200)
        attend(dtype, sb.Window(20, 8, sinks=3), low_rank, 128, 104, is_causal=True)
        attend(dtype, sb.Routed(32, block_q=1, block_k=8, window=16), low_rank, 72, 64, keys=90)
        attend(dtype, sb.Routed(24, 8), low_rank, 24, 32, is_causal=True)
    attend(dtype, sb.Routed(24, 8), sb.Centroid(18), 64, 64, key_padding_mask=mask_of(slice(3, 40, 4)))
    attend(dtype, sb.Window(24, 8), sb.Centroid(5), 128, 128, queries=20)
    value = torch.cat([torch.zeros(1, 1, 60, 64), torch.full((1, 1, 10, 64), torch.nan)], 2).to(dtype)
    sb.attention(
        *(rand(1, 1, N, 64, seed=i, dtype=dtype) for i in range(2)), value, sb.Window(24), None, is_causal=True
    )


@call("tiles of float32")
def _tiles_of_float32(dtype: torch.dtype) -> None:
    """On tensor cores: every kernel once, a list of several stages and of none, holes, values that are no numbers."""
    if dtype != torch.float32:
        return
    for low_rank in (None, sb.Quadratic(5), sb.Centroid(18)):
        attend(dtype, sb.Window(40), low_rank, 48, 64, queries=20, keys=130)
        attend(dtype, ragged_lists(), low_rank, 128, 104, key_padding_mask=mask_of(slice(3, 40, 4)))
        attend(dtype, sb.Window(24, 8, sinks=3), low_rank, 64, 48, queries=20)
        attend(dtype, sb.Routed(24, 8), low_rank, 72, 128, queries=20)
    attend(dtype, sb.Window(20, 8), None, 128, 104, queries=40, is_causal=True)
    attend(dtype, sb.Window(24), sb.Quadratic(5), 64, 48, queries=20, keys=250, is_causal=True, query_offset=230)
    value = torch.cat([torch.zeros(1, 1, 60, 64), torch.full((1, 1, 10, 64), torch.inf)], 2)
    for is_causal in (False, True):
        sb.attention(*(rand(1, 1, N, 64, seed=i) for i in range(2)), value, sb.Window(24), None, is_causal=is_causal)


def ragged_lists() -> sb.Blocks:
    """Lists of 0 to 70 of the keys for every 16 queries of every head."""
    draw_one, shape = torch.Generator().manual_seed(0), (1, 2, -(-N // 16))
    count = torch.randint(0, N + 1, shape, generator=draw_one)
    count[0, 0, :3] = torch.tensor([0, N, 17])
    index = torch.stack([torch.randperm(N, generator=draw_one) for _ in range(count.numel())]).view(*shape, N)
    index = index.masked_fill(torch.arange(N) >= count[..., None], N).sort(-1).values
    return sb.Blocks(index.int(), count.int(), block_q=16, block_k=1)


@call("cancelling queries")
def _cancelling(dtype: torch.dtype) -> None:
    """L overrates the listed keys by far, so that their queries are computed again."""
    query, key, value = (rand(1, 2, N, 16, seed=seed, dtype=dtype) for seed in range(3))
    query_map, key_map = (30 * torch.ones(1, 2, N, 3, dtype=accumulation(dtype)) for _ in range(2))
    query_map[..., -1] = key_map[..., -1] = 0
    key_map[:, :, 20:] = 0
    index = torch.arange(20, dtype=torch.int32).expand(1, 2, 1, 20).contiguous()
    count = torch.full((1, 2, 1), 20, dtype=torch.int32)
    for is_causal in (False, True):
        OPERATORS.attention(
            query,
            key,
            value,
            query_map,
            key_map,
            *[None] * 4,
            index,
            count,
            *[None] * 7,
            1,
            N + 30,
            1,
            0,
            0,
            is_causal,
            0.2,
        )
