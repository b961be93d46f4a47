"""Shapes and dtypes of the operators' results, for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from scatterbrain.operators import library  # noqa: F401  (loads the operators)
from scatterbrain.operators.arguments import (
    AttentionArguments,
    ClusterArguments,
    InputProjectionArguments,
    QuadraticArguments,
    RouteArguments,
    after_projection,
    backward_arguments,
    for_routing,
)
from scatterbrain.operators.tracing import NOT_IN_TORCHSCRIPT

_OPS = torch.ops.scatterbrain


def _check_devices(operator: str, **arguments: object) -> None:
    """Raises RuntimeError unless all tensors are on the device of the first: torch calls the function for the meta
    device, whose results hold nothing, as soon as one of them is there."""
    (first, tokens), *_ = arguments.items()
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.device != tokens.device:
            raise RuntimeError(
                f"{operator}: tensors must be on one device, got {first} on {tokens.device} and {name} on "
                f"{value.device}; move one of them"
            )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _like_tokens(tokens: Tensor, width: int) -> Tensor:
    """Empty rows of ``width`` for ``tokens`` (B, H, N, d), in memory as they are: with the heads of a token next to
    each other, or head after head."""
    batch, heads, n, _ = tokens.shape
    if tokens.stride(1) >= tokens.stride(2):
        return tokens.new_empty((batch, heads, n, width))
    return tokens.new_empty((batch, n, heads, width)).transpose(1, 2)


@torch.library.register_fake("scatterbrain::project")
def _(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_devices("project", tokens=tokens, weight=weight, bias=bias)
    return tokens.new_empty((*tokens.shape[:3], weight.shape[2]), dtype=accumulation_dtype(tokens.dtype))


@torch.library.register_fake("scatterbrain::project_packed")
def _(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check_devices("project_packed", tokens=tokens, weight=weight, bias=bias)
    width = _OPS.packed_width(int(weight.shape[2]) - 1)
    return tokens.new_empty((*tokens.shape[:3], width), dtype=accumulation_dtype(tokens.dtype))


@torch.library.register_fake("scatterbrain::project_backward")
def _(grad: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices("project_backward", tokens=tokens, grad=grad, weight=weight)
    dtype = accumulation_dtype(tokens.dtype)
    return (
        _like_tokens(tokens, tokens.shape[3]),
        weight.new_empty(weight.shape, dtype=dtype),
        weight.new_empty(weight.shape[:3], dtype=dtype),
    )


@torch.library.register_fake("scatterbrain::attention")
def _(*arguments: object) -> tuple[Tensor, Tensor]:
    a = AttentionArguments(*arguments)
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(NOT_IN_TORCHSCRIPT)
    _check_devices("attention", **a._asdict())
    batch, heads, tokens, _d = a.query.shape
    lse = a.query.new_empty((batch, heads, tokens), dtype=accumulation_dtype(a.query.dtype))
    return _like_tokens(a.query, a.value.shape[3]), lse


@torch.library.register_fake("scatterbrain::attention_with_state")
def _(*arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = AttentionArguments(*arguments)
    out, lse = _OPS.attention(*arguments)
    return out, lse, *_saved(a, lse)


def _saved(a: AttentionArguments, lse: Tensor) -> tuple[Tensor, Tensor]:
    """State and scores, whose sizes and dtype the device tells."""
    rank = 0 if a.query_map is None else a.packed_rank or a.query_map.shape[3] - 1
    if a.representatives is not None:
        rank = a.representatives.shape[2]
    listed = 0 if a.span is None else a.span_keys + a.span_sinks
    listed += 0 if a.index is None else a.index.shape[3] * a.block_k
    shape = *a.query.shape, *a.key.shape[1:3], a.value.shape[3], a.low_rank, rank, listed, a.block_q
    device = "cpu" if a.query.is_meta else a.query.device
    state, scores, name = _OPS.saved_sizes(device, a.query.dtype, *map(int, shape), a.is_causal)
    dtype = getattr(torch, name)
    return lse.new_empty(state, dtype=dtype), lse.new_empty(scores, dtype=dtype)


def _projected(a: QuadraticArguments) -> AttentionArguments:
    project = _OPS.project_packed if a.packed_rank else _OPS.project
    maps = project(a.query, a.query_weight, a.query_bias), project(a.key, a.key_weight, a.key_bias)
    lists = _OPS.route(*for_routing(a, *maps)) if a.keys else (None, None)
    return after_projection(a, *maps, *lists)


@torch.library.register_fake("scatterbrain::quadratic_attention")
def _(*arguments: object) -> tuple[Tensor, Tensor]:
    return _OPS.attention(*_projected(QuadraticArguments(*arguments)))


@torch.library.register_fake("scatterbrain::quadratic_attention_with_state")
def _(*arguments: object) -> tuple[Tensor, ...]:
    given = QuadraticArguments(*arguments)
    a = _projected(given)
    lists = (a.index, a.count) if given.keys else [a.query.new_empty(0, dtype=torch.int32) for _ in range(2)]
    return *_OPS.attention_with_state(*a), a.query_map, a.key_map, *lists


@torch.library.register_fake("scatterbrain::attention_backward")
def _(*arguments: object) -> tuple[Tensor, ...]:
    forward, a, kept = backward_arguments(arguments)
    _check_devices("attention_backward", **a._asdict(), **forward._asdict(), **kept._asdict())
    maps = []
    for tokens, m, weight in ((a.query, a.query_map, kept.query_weight), (a.key, a.key_map, kept.key_weight)):
        width = 1 if m is None else a.packed_rank + 1 if a.packed_rank else m.shape[3]
        rows = 0 if m is None or weight is not None else tokens.shape[2]
        maps.append(tokens.new_empty((*tokens.shape[:2], rows, width), dtype=forward.lse.dtype))
    return *(_like_tokens(t, t.shape[3]) for t in (a.query, a.key, a.value)), *maps


def list_capacity(a: RouteArguments | QuadraticArguments, k_tokens: int | torch.SymInt) -> int | torch.SymInt:
    """Entries of a routed list: no more than the budget, nor than the blocks of all keys."""
    return torch.sym_min(_OPS.list_capacity(a.keys, a.block_k), (k_tokens + a.block_k - 1) // a.block_k)


@torch.library.register_fake("scatterbrain::route")
def _(*arguments: object) -> tuple[Tensor, Tensor]:
    a = RouteArguments(*arguments)
    _check_devices("route", **a._asdict())
    shape = (a.query.shape[0], a.query.shape[1], (a.query.shape[2] + a.block_q - 1) // a.block_q)
    return a.query.new_empty((*shape, list_capacity(a, a.key.shape[2])), dtype=torch.int32), a.query.new_empty(
        shape, dtype=torch.int32
    )


@torch.library.register_fake("scatterbrain::cluster")
def _(*arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = ClusterArguments(*arguments)
    _check_devices("cluster", **a._asdict())
    batch, heads, keys, d = a.key.shape
    dtype = accumulation_dtype(a.key.dtype)
    return (
        a.key.new_empty((batch, heads, keys), dtype=torch.int32),
        a.key.new_empty((batch, heads, a.clusters, d), dtype=dtype),
        a.key.new_empty((batch, heads, keys), dtype=dtype),
        a.key.new_empty((batch, heads, d), dtype=dtype),
    )


@torch.library.register_fake("scatterbrain::input_projection")
def _(*arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = InputProjectionArguments(*arguments)
    _check_devices("input_projection", **a._asdict())
    batch, heads, _, d = a.key.shape
    shape, dtype = (batch, heads, a.rank + 1), accumulation_dtype(a.key.dtype)
    return tuple(a.key.new_empty(size, dtype=dtype) for size in ((*shape, d), shape) * 2)
